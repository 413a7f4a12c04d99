"""Gradients of the base weights (full fine-tuning) against float64 autograd."""

import pytest
import torch
from oracle.bounds import cosine, relative
from oracle.experts import ACTIVATIONS, layer_forward
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import BLOCK_ROWS, each_isa

SHAPES = [Shape(4, 2, 64, 48), Shape(3, 2, 100, 70), Shape(5, 2, 290, 33)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
NAMES = ("gate", "up", "down")


def run(layer: Layer, x, dy, dtype=torch.float32, lora=None):
    """Gradients by name, as the engine writes them."""
    s = layer.shape
    shapes = {
        "gate": (s.experts, s.inter, s.hidden),
        "up": (s.experts, s.inter, s.hidden),
        "down": (s.experts, s.hidden, s.inter),
    }
    names = NAMES if layer.activation.gated else NAMES[1:]
    grads = {n: torch.full(shapes[n], torch.nan, dtype=dtype) for n in names}
    adapter = layer.adapter(lora) if lora else None
    _, cache = layer.train(x, adapter)
    layer.engine.backward(cache, dy, adapter, None, None, None, list(grads.values()))
    return grads


def reference(layer: Layer, x, dy, lora=None):
    weights = layer.dequantized()
    leaves = [[None if w is None else w.requires_grad_() for w in expert] for expert in weights]
    exact_lora = {n: t.double() for n, t in lora.items()} if lora else None
    out = layer_forward(
        leaves, x.hidden.double(), x.ids, x.weights.double(), exact_lora, 1.0, layer.rounding,
        activation=layer.activation, biases=None if layer.biases is None else
        [tuple(None if b is None else b.double() for b in own) for own in layer.biases],
    )  # fmt: skip
    flat = [w for expert in leaves for w in expert if w is not None]
    grads = iter(torch.autograd.grad(out, flat, dy.double(), allow_unused=True, materialize_grads=True))
    stacks = [[None if w is None else next(grads) for w in expert] for expert in leaves]
    return {n: torch.stack([s[i] for s in stacks]) for i, n in enumerate(NAMES) if stacks[0][i] is not None}


def check(layer: Layer, tokens: int, kind="mixed", dtype=torch.float32, lora=None) -> None:
    x, dy = make_inputs(layer.shape, tokens, kind), grad_out(tokens, layer.shape.hidden)
    got, want = run(layer, x, dy, dtype, lora), reference(layer, x, dy, lora)
    assert list(got) == list(want)
    for name, exact in want.items():
        error = relative(got[name].double().numpy(), exact.numpy())
        assert error <= 1e-2, f"{layer.isa} {layer.shape} tokens={tokens}: gradient of {name} is off by {error:.4f}"
        assert cosine(got[name].double().numpy(), exact.numpy()) >= 0.9999


@each_isa
@each_shape
def test_base(isa: str, shape: Shape) -> None:
    layer = Layer(shape, "bf16", isa)
    for tokens in (1, 3, 50):
        check(layer, tokens, "mixed" if tokens > 3 else "uniform")
    check(layer, 40, lora=make_lora(shape, 4))


@each_isa
@pytest.mark.parametrize("name", ["relu2", "oai", "gelu_tanh"])
def test_other_activations(isa: str, name: str) -> None:
    check(Layer(SHAPES[1], "bf16", isa, activation=ACTIVATIONS[name], with_biases=True), 40)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_chunks_sum(isa: str, dtype: torch.dtype) -> None:
    check(Layer(Shape(2, 1, 64, 48), "bf16", isa), BLOCK_ROWS[isa] + 21, "all to one", dtype)
    check(Layer(Shape(8, 2, 64, 48), "bf16", isa, chunk_tokens=7), 40, "uniform", dtype)


@each_isa
def test_bf16_gradients_are_the_fp32_ones_rounded_once(isa: str) -> None:
    layer = Layer(Shape(2, 1, 100, 70), "bf16", isa)
    tokens = BLOCK_ROWS[isa] + 21
    x, dy = make_inputs(layer.shape, tokens), grad_out(tokens, 100)
    wide, narrow = run(layer, x, dy), run(layer, x, dy, torch.bfloat16)
    for name, grad in wide.items():
        assert_same(narrow[name], grad.bfloat16(), name)


def test_idle_experts_get_exact_zeros() -> None:
    shape = Shape(6, 2, 64, 48)
    layer, x = Layer(shape, "bf16", "", chunk_tokens=7), make_inputs(shape, 20)
    x.ids[:7], x.ids[7:] = x.ids[:7] % 2, x.ids[7:] % 4
    for grad in run(layer, x, grad_out(20, 64)).values():
        assert (grad[4:] == 0).all()
        assert (grad[:4] != 0).any()
    empty = make_inputs(shape, 0)
    assert all((g == 0).all() for g in run(layer, empty, grad_out(0, 64)).values())


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, dy = make_inputs(SHAPES[1], 60), grad_out(60, 100)
    want = run(Layer(SHAPES[1], "bf16", "", threads=2), x, dy)
    for name, got in run(Layer(SHAPES[1], "bf16", "", threads=threads), x, dy).items():
        assert_same(got, want[name], name)


def test_wrong_tensors_are_refused() -> None:
    layer = Layer(SHAPES[0], "bf16", "")
    x = make_inputs(SHAPES[0], 5)
    _, cache = layer.train(x)
    good = [torch.zeros(4, 48, 64), torch.zeros(4, 48, 64), torch.zeros(4, 64, 48)]
    for bad, error, text in (
        (good[:2], ValueError, "base_grads: got 2 arrays, expected 3"),
        ([*good[:2], torch.zeros(4, 48, 64)], ValueError, "base_grads"),
        ([good[0].half(), *good[1:]], TypeError, "base_grads"),
    ):
        with pytest.raises(error, match=text):
            layer.engine.backward(cache, grad_out(5, 64), None, None, None, None, bad)
