"""Activations, biases and experts without a gate through the public classes."""

import pytest
import torch
import torch_oracle as ref
from oracle.experts import ACTIVATIONS, Activation, layer_forward
from oracle.registry import each_activation

from ktmoe.autograd import LoraTensors, moe_forward
from ktmoe.base import BaseMoEWrapper
from ktmoe.sft import GRAD_NAMES

SHAPE = ref.Shape()
GATE, UP, DOWN = ref.weights(SHAPE)
METHODS = [*ref.INFERENCE, *ref.SFT]
RELU2 = ACTIVATIONS["relu2"]
BIASES = {
    name: torch.randn(SHAPE.experts, n, generator=torch.Generator().manual_seed(n))
    for name, n in (("gate_bias", SHAPE.inter), ("up_bias", SHAPE.inter), ("down_bias", SHAPE.hidden))
}


def options(activation: Activation) -> dict[str, object]:
    name, limit, alpha = activation.arguments
    return {"activation": name, "swiglu_limit": limit, "swiglu_alpha": alpha}


def own_biases(activation: Activation) -> dict[str, torch.Tensor]:
    return {name: b for name, b in BIASES.items() if activation.gated or name != "gate_bias"}


def loaded(method: str, activation: Activation, biased: bool = True) -> BaseMoEWrapper:
    wrapper = ref.make(SHAPE, method, **options(activation))
    given = own_biases(activation) if biased else {}
    wrapper.load_weights_from_tensors(GATE if activation.gated else None, UP, DOWN, **given)
    return wrapper


def lora(activation: Activation) -> LoraTensors:
    full = ref.lora(SHAPE)
    return full if activation.gated else full._replace(gate_a=None, gate_b=None)


def exact(
    wrapper: BaseMoEWrapper, activation: Activation, inputs: list[torch.Tensor], adapter: LoraTensors | None
) -> torch.Tensor:
    weights = []
    for e in range(SHAPE.experts):
        h, i = SHAPE.hidden, SHAPE.inter
        stacks = [torch.zeros(i, h) if activation.gated else None, torch.zeros(i, h), torch.zeros(h, i)]
        wrapper.layer.dequantize_expert(e, *stacks)
        weights.append(tuple(None if t is None else t.double() for t in stacks))
    given = [own_biases(activation).get(name) for name in BIASES]
    biases = [tuple(None if b is None else b[e].double() for b in given) for e in range(SHAPE.experts)]
    names = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
    matrices = None
    if adapter is not None:
        matrices = {n: ref.bf16(t) for n, t in zip(names, adapter[:6], strict=True) if t is not None}
    hidden, ids, routing = inputs
    return layer_forward(
        weights, hidden.double(), ids, routing.double(), matrices, adapter.scaling if adapter else 1.0,
        ref.rounding(wrapper), activation=activation, biases=biases,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@each_activation
def test_forward(method: str, activation: Activation) -> None:
    wrapper = loaded(method, activation)
    inputs = list(ref.batch(SHAPE, 9))
    got = wrapper.forward(*inputs, *([False] if wrapper.mode == "sft" else []))
    assert ref.row_error(got, exact(wrapper, activation, inputs, None)) < ref.forward_tolerance(wrapper)


@pytest.mark.parametrize("method", ref.SFT)
@each_activation
def test_training(method: str, activation: Activation) -> None:
    """The stateful calls and the functional one give the same gradients, which are those of float64."""
    wrapper, adapter = loaded(method, activation), lora(activation)
    hidden, ids, routing = ref.batch(SHAPE, 24)
    grad_out = torch.randn(24, SHAPE.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = [None if t is None else t.detach() for t in adapter[:6]]
    wrapper.lora_scaling = adapter.scaling
    wrapper.init_lora_weights(*given)
    wrapper.forward_sft(hidden, ids, routing)
    grad_input, grads = wrapper.backward(grad_out)
    assert tuple(grads) == (GRAD_NAMES if activation.gated else GRAD_NAMES[2:])

    leaves = [hidden.clone().requires_grad_(), routing.clone().requires_grad_()]
    moe_forward(wrapper, leaves[0], ids, leaves[1], adapter).backward(grad_out)
    assert torch.equal(leaves[0].grad, grad_input)
    assert torch.equal(leaves[1].grad, grads.grad_topk_weights)
    for tensor, grad in zip(adapter.tensors, grads.values(), strict=True):
        assert torch.equal(tensor.grad, grad)

    doubles = [hidden.double().requires_grad_(), routing.double().requires_grad_()]
    out = exact(wrapper, activation, [doubles[0], ids, doubles[1]], adapter)
    want = torch.autograd.grad(out, [*doubles, *adapter.tensors], grad_out.double())
    tolerance = ref.gradient_tolerance(wrapper)
    for name, w, g in zip(
        ("hidden", "routing", *grads), want, (grad_input, grads.grad_topk_weights, *grads.values()), strict=True
    ):
        # A router gradient is one dot product a slot, which may cancel.
        assert ref.relative(g, w) < tolerance * (3 if name == "routing" else 1), name


@pytest.mark.parametrize("biased", [False, True])
def test_bias_dtypes_and_maps(biased: bool) -> None:
    mapping = torch.tensor([3, 0, 0, 4, 1])
    given = {name: b.bfloat16() for name, b in BIASES.items()} if biased else {}
    mapped = ref.make(SHAPE, "BF16")
    mapped.load_weights_from_tensors(GATE, UP, DOWN, mapping, **given)
    direct = ref.make(SHAPE, "BF16")
    for slot, e in enumerate(mapping.tolist()):
        direct.load_expert(slot, GATE[e], UP[e], DOWN[e], **{n: b[e].float() for n, b in given.items()})
    inputs = ref.batch(SHAPE, 9)
    assert torch.equal(mapped.forward(*inputs), direct.forward(*inputs))


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("gate_bias", BIASES["gate_bias"][:4], ValueError, r"gate_bias: got shape \(4, 40\), expected \(5, 40\)"),
        ("down_bias", BIASES["up_bias"], ValueError, r"down_bias: got shape \(5, 40\), expected \(5, 72\)"),
        ("up_bias", BIASES["up_bias"].double(), TypeError, "up_bias: got dtype torch.float64, expected torch.bfloat16"),
        ("up_bias", [1.0], TypeError, "up_bias: got list, expected a torch.Tensor"),
    ],
)
def test_bad_biases_change_nothing(name: str, value: object, error: type, text: str) -> None:
    wrapper, inputs = loaded("BF16", ACTIVATIONS["silu"]), ref.batch(SHAPE, 5)
    before = wrapper.forward(*inputs)
    with pytest.raises(error, match=f"^{text}"):
        wrapper.load_weights_from_tensors(GATE, UP, DOWN, **(BIASES | {name: value}))
    assert torch.equal(wrapper.forward(*inputs), before)


def test_a_gate_where_there_is_none() -> None:
    wrapper = ref.make(SHAPE, ref.SFT[0], activation="relu2")
    with pytest.raises(TypeError, match="^gate: got Tensor, expected None: 'relu2' experts have no gate"):
        wrapper.load_weights_from_tensors(GATE, UP, DOWN)
    with pytest.raises(TypeError, match="^gate_bias: got Tensor, expected None"):
        wrapper.load_expert(0, None, UP[0], DOWN[0], gate_bias=BIASES["gate_bias"][0])
    with pytest.raises(TypeError, match="^gate: got None, expected a torch.Tensor"):
        ref.make(SHAPE, "BF16").load_weights_from_tensors(None, UP, DOWN)
    tensors = [t.detach() for t in ref.lora(SHAPE).tensors]
    with pytest.raises(TypeError, match="^gate_lora_a: got Tensor, expected None: the experts have no gate"):
        wrapper.init_lora_weights(*tensors)
    with pytest.raises(TypeError, match="^gate_lora_a: got NoneType, expected a torch.Tensor"):
        ref.loaded(SHAPE, ref.SFT[0]).init_lora_weights(None, None, *tensors[2:])
    buffers = [torch.zeros_like(t) for t in tensors]
    with pytest.raises(
        ValueError, match=r"^grad buffers: got 6, expected all four \(the experts have no gate\) or none"
    ):
        wrapper.init_lora_weights(None, None, *tensors[2:], *buffers)


def test_grad_buffers_without_a_gate() -> None:
    wrapper, adapter = loaded("AMXBF16_SFT", RELU2), lora(RELU2)
    buffers = [torch.zeros_like(t) for t in adapter.tensors]
    wrapper.init_lora_weights(None, None, *(t.detach() for t in adapter.tensors), None, None, *buffers)
    hidden, ids, routing = ref.batch(SHAPE, 9)
    wrapper.forward_sft(hidden, ids, routing)
    _, grads = wrapper.backward(hidden)
    assert all(
        grads[name].data_ptr() == buffer.data_ptr() for name, buffer in zip(GRAD_NAMES[2:], buffers, strict=True)
    )
    assert all((buffer != 0).any() for buffer in buffers)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu2"])
@pytest.mark.parametrize("name", ["swiglu_limit", "swiglu_alpha"])
def test_swiglu_parameters_belong_to_silu(activation: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got 7.0 with activation='{activation}', expected 0.0"):
        ref.make(SHAPE, "BF16", activation=activation, **{name: 7.0})
