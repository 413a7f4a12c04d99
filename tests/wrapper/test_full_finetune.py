"""Training of the experts' own weights: full_weight_grad=True."""

import pytest
import torch
import torch_oracle as ref

SHAPE = ref.Shape()
GATELESS = ref.Shape(extra={"activation": "relu2"})


def tuned(dtype=torch.float32, shape=SHAPE, **options):
    wrapper = ref.make(shape, "AMXBF16_SFT", full_weight_grad=True, **options)
    tensors = [t.to(dtype) for t in ref.weights(shape)]
    return wrapper, tensors


def grad(n_tokens):
    return torch.randn(n_tokens, SHAPE.hidden, generator=torch.Generator().manual_seed(3000)).bfloat16()


def oracle(tensors, hidden, ids, weights, grad_out):
    """Output, and gradients of hidden and the three stacks, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *tensors)]
    x, gate, up, down = leaves
    rows = []
    for t in range(len(x)):
        parts = [
            weights[t, s].double() * (down[e] @ (torch.nn.functional.silu(gate[e] @ x[t]) * (up[e] @ x[t])))
            for s, e in enumerate(ids[t].tolist())
        ]
        rows.append(sum(parts))
    out = torch.stack(rows)
    return out.detach(), torch.autograd.grad(out, leaves, grad_out.double(), materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_buffers", [True, False])
def test_against_float64_without_lora(dtype, own_buffers) -> None:
    wrapper, tensors = tuned(dtype)
    grads = [torch.full(t.shape, 7.0, dtype=dtype) for t in tensors] if own_buffers else []
    wrapper.init_base_weights(*tensors, *grads)
    inputs = ref.batch(SHAPE, 19)
    out = wrapper.forward_sft(*inputs)
    grad_input, grad_loras = wrapper.backward(grad(19))
    want_out, want = oracle([t.bfloat16() for t in tensors], *inputs, grad(19))
    assert dict(grad_loras) == {}
    assert grad_loras.grad_topk_weights.shape == inputs[2].shape
    assert ref.row_error(out, want_out) <= 2.0**-7
    for got, exact in zip((grad_input, *wrapper.base_grads), want, strict=True):
        assert ref.relative(got, exact) <= 1e-2
    if own_buffers:
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(wrapper.base_grads, grads, strict=True))


def test_a_loop_with_an_optimizer_lowers_the_loss() -> None:
    wrapper, tensors = tuned()
    params = [torch.nn.Parameter(t) for t in tensors]
    wrapper.init_base_weights(*params)
    inputs = ref.batch(SHAPE, 24)
    target = ref.loaded(SHAPE, "BF16", seed=9).forward(*inputs).float()
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    losses = []
    for _ in range(30):
        output = wrapper.forward_sft(*inputs)
        losses.append(float((output - target).pow(2).mean()))
        wrapper.backward((2 * (output - target) / output.numel()).bfloat16())
        for p, g in zip(params, wrapper.base_grads, strict=True):
            p.grad = g
        optimizer.step()
        wrapper.update_base_weights()
    assert losses[-1] < 0.1 * losses[0]
    now = ref.make(SHAPE, "BF16")
    now.load_weights_from_tensors(*(p.detach().bfloat16() for p in params))
    assert torch.equal(wrapper.forward_sft(*inputs, save_for_backward=False), now.forward(*inputs))


def test_together_with_lora() -> None:
    """The base gradients see LoRA in h and dy; the LoRA gradients are those without full_weight_grad."""
    wrapper, tensors = tuned(lora_alpha=0.75 * SHAPE.rank)
    plain = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=0.75 * SHAPE.rank)
    own = [t.detach().clone() for t in ref.lora(SHAPE).tensors]
    wrapper.init_base_weights(*tensors)
    for w in (wrapper, plain):
        w.init_lora_weights(*own)
    inputs = ref.batch(SHAPE, 9)
    assert torch.equal(wrapper.forward_sft(*inputs), plain.forward_sft(*inputs))
    got, want = wrapper.backward(grad(9))[1], plain.backward(grad(9))[1]
    for name in want:
        assert torch.equal(got[name], want[name])
    without, _ = tuned()
    without.init_base_weights(*tensors)
    without.forward_sft(*inputs)
    without.backward(grad(9))
    assert all((a != b).any() for a, b in zip(wrapper.base_grads, without.base_grads, strict=True))


def test_biases_stay() -> None:
    wrapper, tensors = tuned()
    biases = {"gate_bias": torch.randn(5, 40), "up_bias": torch.randn(5, 40), "down_bias": torch.randn(5, 72)}
    wrapper.init_base_weights(*tensors, **biases)
    inputs = ref.batch(SHAPE, 4)
    wrapper.update_base_weights()
    plain = ref.make(SHAPE, "BF16")
    plain.load_weights_from_tensors(*(t.bfloat16() for t in tensors), **biases)
    assert torch.equal(wrapper.forward_sft(*inputs, save_for_backward=False), plain.forward(*inputs))


def test_without_gates() -> None:
    wrapper, (_, up, down) = tuned(shape=GATELESS)
    wrapper.init_base_weights(None, up, down)
    wrapper.forward_sft(*ref.batch(GATELESS, 6))
    wrapper.backward(grad(6))
    gate, grad_up, grad_down = wrapper.base_grads
    assert gate is None
    assert (grad_up != 0).any()
    assert (grad_down != 0).any()
    with pytest.raises(TypeError, match="^gate: got Tensor, expected None"):
        wrapper.init_base_weights(up, up, down)


def test_experts_on_the_gpu_get_zeros() -> None:
    wrapper, tensors = tuned(num_gpu_experts=2)
    wrapper.init_base_weights(*tensors)
    wrapper.forward_sft(*ref.batch(SHAPE, 20))
    wrapper.backward(grad(20))
    for g in wrapper.base_grads:
        assert (g[:2] == 0).all()
        assert (g[2:] != 0).any()


def test_the_weights_do_not_change_under_a_waiting_forward() -> None:
    wrapper, tensors = tuned()
    wrapper.init_base_weights(*tensors)
    wrapper.forward_sft(*ref.batch(SHAPE, 3))
    for call in (wrapper.update_base_weights, lambda: wrapper.init_base_weights(*tensors)):
        with pytest.raises(RuntimeError, match=r"1 forward\(s\) wait for their backward"):
            call()
    wrapper.backward(grad(3))
    wrapper.update_base_weights()


def test_errors() -> None:
    wrapper, tensors = tuned()
    with pytest.raises(RuntimeError, match="^Base weights not initialized"):
        wrapper.update_base_weights()
    with pytest.raises(RuntimeError, match="needs full_weight_grad=True"):
        ref.loaded(SHAPE, "AMXBF16_SFT").init_base_weights(*tensors)
    for method in [m for m in ref.SFT if m != "AMXBF16_SFT"]:
        with pytest.raises(ValueError, match=f"full_weight_grad: got True with method {method}"):
            ref.make(SHAPE, method, full_weight_grad=True)
    zeros = [torch.zeros(t.shape) for t in tensors]
    for arguments, error, text in (
        ((tensors[0], tensors[1], tensors[1]), ValueError, "down: got shape"),
        ((tensors[0].half(), *tensors[1:]), TypeError, "gate: got torch.float16"),
        ((*tensors, zeros[0]), ValueError, "grad buffers: got 1, expected all 3 or none"),
        ((*tensors, zeros[0], zeros[1], zeros[0]), ValueError, "grad_down: got shape"),
        ((*tensors, *zeros[:2], zeros[0].transpose(1, 2)), TypeError, "grad_down: got a tensor on cpu, strides"),
    ):
        with pytest.raises(error, match=f"^{text}"):
            wrapper.init_base_weights(*arguments)
    assert not wrapper.loaded
    with pytest.raises(RuntimeError, match="^Weights not loaded"):
        wrapper.forward_sft(*ref.batch(SHAPE, 3))
