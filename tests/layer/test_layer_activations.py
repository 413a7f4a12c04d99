"""Activations and biases of the whole layer: each row within 2^-7 of float64; what may be given, when it is dropped."""

import pytest
import torch
from oracle.bounds import row_error
from oracle.experts import ACTIVATIONS, SILU, Activation
from oracle.layers import Layer, Shape, assert_same, make_biases, make_inputs, make_lora, make_pool, make_weights
from oracle.registry import BLOCK_ROWS, FORMATS, ISAS, SCALED, each_activation, each_format, each_isa

from ktmoe import _ext

TOLERANCE = 2.0**-7
SHAPES = [Shape(3, 2, 100, 70), Shape(2, 1, 33, 17), Shape(8, 3, 40, 290)]
SMALL = Shape(2, 1, 64, 48)
each_bias = pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])


@each_isa
@each_format
@each_activation
@each_bias
def test_forward(isa: str, fmt: str, activation: Activation, biases: bool) -> None:
    for shape in SHAPES:
        layer = Layer(shape, fmt, isa, activation=activation, with_biases=biases)
        lora = make_lora(shape, 5, gated=activation.gated)
        adapter = layer.adapter(lora, 2.5)
        for tokens in (1, 3, 40):
            x = make_inputs(shape, tokens, "mixed" if tokens > 3 else "uniform")
            for own, matrices in ((None, None), (adapter, lora)):
                error = row_error(layer.forward(x, own).double().numpy(), layer.reference(x, matrices, 2.5))
                assert (error <= TOLERANCE).all(), f"{shape} tokens={tokens}: off by {error.max():.4f}"
            assert_same(layer.train(x, adapter)[0], layer.forward(x, adapter), "training forward")


@each_isa
@each_format
@each_activation
def test_threads_and_block_size_change_no_bit(isa: str, fmt: str, activation: Activation) -> None:
    shape = Shape(2, 1, 64, 48)
    x = make_inputs(shape, BLOCK_ROWS[isa] + 9, "all to one")
    outs = [Layer(shape, fmt, isa, threads, activation=activation, with_biases=True).forward(x) for threads in (1, 3)]
    assert_same(outs[0], outs[1], "threads")


@pytest.mark.parametrize("fmt", SCALED)
@each_activation
def test_integer_formats_give_the_same_bits_on_every_level(fmt: str, activation: Activation) -> None:
    shape = Shape(4, 2, 100, 70)
    x = make_inputs(shape, 30, "mixed")
    outs = {isa: Layer(shape, fmt, isa, activation=activation, with_biases=True).forward(x) for isa in ISAS}
    for isa, out in outs.items():
        assert_same(out, outs[ISAS[0]], isa)


@each_isa
def test_a_missing_bias_counts_as_zero(isa: str) -> None:
    x = make_inputs(SMALL, 9)
    zeros = [torch.zeros_like(b) for b in make_biases(SMALL)[0]]
    outs = []
    for chosen in (lambda b: (None, b[1], None), lambda b: (zeros[0], b[1], zeros[2])):
        layer = Layer(SMALL, "bf16", isa)
        layer.engine.unload()
        for e, (weights, biases) in enumerate(zip(make_weights(SMALL), make_biases(SMALL), strict=True)):
            layer.engine.load_expert(e, *weights, *chosen(biases))
        outs.append(layer.forward(x))
    assert_same(outs[0], outs[1], "None for zeros")
    assert not torch.equal(outs[0], Layer(SMALL, "bf16", isa).forward(x))


def test_biases_belong_to_their_expert() -> None:
    """Replaced with it, dropped by unload; all experts have them or none."""
    layer, x = Layer(SMALL, "bf16", ISAS[0], with_biases=True), make_inputs(SMALL, 9)
    before, plain = layer.forward(x), Layer(SMALL, "bf16", ISAS[0])
    assert layer.engine.packed_bytes > plain.engine.packed_bytes
    weights, biases = make_weights(SMALL), make_biases(SMALL)
    layer.engine.load_expert(1, *weights[1], *(3 * b for b in biases[1]))
    to_one = (x.ids == 1).any(dim=1)
    assert_same(layer.forward(x)[~to_one], before[~to_one], "the other expert")
    assert (layer.forward(x)[to_one] != before[to_one]).any(dim=1).all()
    with pytest.raises(
        ValueError, match="biases of expert 1: got none, expected some as for the experts loaded before"
    ):
        layer.engine.load_expert(1, *weights[1])
    with pytest.raises(ValueError, match="biases of expert 0: got some, expected none"):
        plain.engine.load_expert(0, *weights[0], *biases[0])
    layer.engine.unload()
    for e in range(2):
        layer.engine.load_expert(e, *weights[e])
    assert_same(layer.forward(x), plain.forward(x), "loaded again without biases")
    assert layer.engine.packed_bytes == plain.engine.packed_bytes


def test_biases_are_checked() -> None:
    layer = Layer(SMALL, "bf16", ISAS[0], with_biases=True)
    weights, (gate, up, down) = make_weights(SMALL)[0], make_biases(SMALL)[0]
    before = layer.forward(make_inputs(SMALL, 5))
    for bad, error, text in (
        ((gate, up, down.bfloat16()), TypeError, "down_bias dtype: got bf16, expected fp32"),
        ((gate[:-1], up, down), ValueError, r"gate_bias shape: got \[47\], expected \[48\]"),
        ((gate, up[None], down), ValueError, r"up_bias shape: got \[1, 48\]"),
    ):
        with pytest.raises(error, match=text):
            layer.engine.load_expert(0, *weights, *bad)
    assert_same(layer.forward(make_inputs(SMALL, 5)), before, "untouched")


def test_gates_are_given_exactly_where_there_are_some() -> None:
    ungated, gated = (Layer(SMALL, "bf16", ISAS[0], activation=a) for a in (ACTIVATIONS["relu2"], SILU))
    gate, up, down = make_weights(SMALL)[0]
    with pytest.raises(
        TypeError, match=r"\[load_expert\] gate: got an array, expected None: the activation has no gate"
    ):
        ungated.engine.load_expert(0, gate, up, down)
    with pytest.raises(TypeError, match=r"\[load_expert\] gate: got None, expected an array"):
        gated.engine.load_expert(0, None, up, down)
    with pytest.raises(ValueError, match=r"gate_bias: got an array, expected none: the activation has no gate"):
        ungated.engine.load_expert(0, None, up, down, *make_biases(SMALL)[0])
    with pytest.raises(TypeError, match=r"\[dequantize_expert\] gate: got an array"):
        ungated.engine.dequantize_expert(0, gate.float(), up.float(), down.float())


def test_adapters_fit_the_activation() -> None:
    ungated, gated = (Layer(SMALL, "bf16", ISAS[0], activation=a) for a in (ACTIVATIONS["relu2"], SILU))
    lora = make_lora(SMALL, 4)
    with pytest.raises(TypeError, match="gate_a: got an array, expected None: this adapter has no gate"):
        ungated.adapter(lora)
    without = {n: t for n, t in lora.items() if not n.startswith("gate")}
    with pytest.raises(TypeError, match="gate_a: got None, expected an array"):
        gated.adapter(without)
    x = make_inputs(SMALL, 3)
    with pytest.raises(ValueError, match="lora: got an adapter without gate matrices, expected one with"):
        gated.forward(x, ungated.adapter(without))
    adapter = ungated.adapter(without)
    _, cache = ungated.train(x, adapter)
    with pytest.raises(ValueError, match="lora_grads: got 6 arrays, expected 4"):
        ungated.engine.backward(cache, x.hidden, adapter, None, None, [torch.zeros(1)] * 6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("gelu", 0.0, 0.0), 'activation: got "gelu", expected "silu", "gelu_tanh" or "relu2"'),
        (("silu", -1.0, 0.0), "limit, alpha: got -1, 0, expected 0 or more"),
        (("silu", float("nan"), 0.0), "limit, alpha: got nan"),
        (("relu2", 1.0, 0.0), 'got 1, 0 with activation "relu2", expected 0: only silu has them'),
        (("gelu_tanh", 0.0, 1.0), "only silu has them"),
    ],
)
def test_unknown_activations(arguments: tuple[str, float, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _ext.MoeLayer(make_pool(), 2, 1, 64, 48, FORMATS[0], "", 0, None, *arguments)
