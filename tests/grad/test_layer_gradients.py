"""Gradients of the layer against float64 autograd (see oracle/gradients.py for the bounds)."""

import pytest
import torch
from oracle.bounds import relative
from oracle.experts import ACTIVATIONS, LORA_NAMES, Activation, layer_forward
from oracle.gradients import bound_of, check, compare
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import BLOCK_ROWS, each_activation, each_format, each_isa, each_layer_format

SHAPES = [Shape(4, 2, 64, 48), Shape(8, 3, 100, 70), Shape(3, 2, 160, 33), Shape(2, 1, 96, 272), Shape(2, 2, 290, 40)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_isa
@each_layer_format
@each_shape
def test_base(isa: str, fmt: str, shape: Shape) -> None:
    layer = Layer(shape, fmt, isa)
    for tokens in (1, 2, 3, 20, 50):
        x = make_inputs(shape, tokens, "mixed" if tokens > 3 else "uniform")
        check(layer, x, None, 1.0, f"{shape} tokens={tokens}")


@each_isa
@each_layer_format
@each_shape
@pytest.mark.parametrize("rank", [1, 4, 16, 33])
def test_lora(isa: str, fmt: str, shape: Shape, rank: int) -> None:
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, rank)
    for tokens in (2, 40):
        check(layer, make_inputs(shape, tokens), lora, 2.5, f"{shape} rank={rank} tokens={tokens}")


@each_isa
@each_format
@each_activation
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_activations_and_biases(isa: str, fmt: str, activation: Activation, biases: bool) -> None:
    """The router gradient includes the bias of down; LoRA gradients see biases in what they are multiplied with."""
    for shape in (Shape(4, 2, 100, 70), Shape(2, 1, 64, 272)):
        layer = Layer(shape, fmt, isa, activation=activation, with_biases=biases)
        lora = make_lora(shape, 6, gated=activation.gated)
        x = make_inputs(shape, 40, "mixed")
        check(layer, x, lora, 2.5, f"{shape} lora")
        check(layer, x, None, 1.0, f"{shape} base")


@each_isa
def test_ungated_gradients_of_idle_experts_and_chunks(isa: str) -> None:
    shape = Shape(6, 2, 64, 48)
    layer = Layer(shape, "bf16", isa, chunk_tokens=7, activation=ACTIVATIONS["relu2"])
    lora, x = make_lora(shape, 3, gated=False), make_inputs(shape, 20)
    x.ids[:7], x.ids[7:] = x.ids[:7] % 2, x.ids[7:] % 4
    check(layer, x, lora, 1.0, "chunks")
    adapter = layer.adapter(lora)
    grads = layer.backward(layer.train(x, adapter)[1], grad_out(20, 64), adapter, lora)
    assert all((grads[name][4:] == 0).all() and (grads[name][:4] != 0).any() for name in lora)


@each_isa
@each_layer_format
def test_more_rows_than_a_block(isa: str, fmt: str) -> None:
    """Gradients of one expert sum over its blocks."""
    shape = Shape(2, 1, 64, 48)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    tokens = BLOCK_ROWS[isa] + 21
    check(layer, make_inputs(shape, tokens, "all to one"), lora, 1.0, f"tokens={tokens}")


@each_isa
@each_layer_format
def test_so_many_rows_that_they_are_kept_in_bf16(isa: str, fmt: str) -> None:
    shape = Shape(8, 8, 70, 40)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    check(layer, make_inputs(shape, 150), lora, 1.0, "1200 rows")


@each_isa
@each_layer_format
@pytest.mark.parametrize("chunk", [7, 16])
def test_chunks(isa: str, fmt: str, chunk: int) -> None:
    """Experts that only a later chunk reaches, too."""
    shape = Shape(8, 2, 64, 48)
    layer, lora = Layer(shape, fmt, isa, chunk_tokens=chunk), make_lora(shape, 4)
    x = make_inputs(shape, 40)
    x.ids[:chunk] = x.ids[:chunk] % 2
    check(layer, x, lora, 1.0, f"chunk={chunk}")


@each_isa
@each_layer_format
def test_adjoint_identity(isa: str, fmt: str) -> None:
    """<J v, w> = <v, J' w> by a central difference of the float64 layer; the backward is the engine's own."""
    shape = Shape(4, 2, 100, 70)
    layer, x, dy = Layer(shape, fmt, isa), make_inputs(Shape(4, 2, 100, 70), 12), grad_out(12, 100)
    v = torch.randn(12, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weights, eps = layer.dequantized(), 1e-4

    def f(sign: int) -> torch.Tensor:
        return layer_forward(weights, x.hidden.double() + sign * eps * v, x.ids, x.weights.double())

    left = float(((f(1) - f(-1)) / (2 * eps) * dy.double()).sum())
    grads = layer.backward(layer.train(x)[1], dy)["input"].double()
    assert abs(left - float((v * grads).sum())) <= 2e-2 * float(v.norm() * grads.norm()) / 12**0.5


@each_isa
@each_layer_format
def test_zero_b_leaves_the_base_and_gives_no_gradient_to_a(isa: str, fmt: str) -> None:
    shape = Shape(4, 2, 100, 70)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    lora |= {n: torch.zeros_like(lora[n]) for n in ("gate_b", "up_b", "down_b")}
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 30), grad_out(30, 100)
    out, cache = layer.train(x, adapter)
    assert_same(out, layer.forward(x), "output")
    grads = layer.backward(cache, dy, adapter, lora)
    base = layer.backward(layer.train(x)[1], dy)
    for name in ("input", "weights"):
        assert_same(grads[name], base[name], name)
    for name in ("gate_a", "up_a", "down_a"):
        assert (grads[name] == 0).all(), name
    for name in ("gate_b", "up_b", "down_b"):
        assert (grads[name] != 0).any(), name


@each_isa
@each_layer_format
def test_idle_experts_have_zero_gradients(isa: str, fmt: str) -> None:
    shape = Shape(6, 2, 64, 48)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 3)
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 20), grad_out(20, 64)
    x.ids = x.ids % 2 * 3  # experts 0 and 3
    x.ids[4] = -1
    grads = layer.backward(layer.train(x, adapter)[1], dy, adapter, lora)
    for name in LORA_NAMES:
        for e in range(6):
            assert bool((grads[name][e] != 0).any()) == (e in (0, 3)), f"{name} of expert {e}"
    assert (grads["input"][4] == 0).all()
    assert (grads["weights"][4] == 0).all()


@each_isa
@each_layer_format
def test_nothing_routed_and_no_tokens(isa: str, fmt: str) -> None:
    shape = Shape(3, 2, 64, 48)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 3)
    adapter = layer.adapter(lora)
    x = make_inputs(shape, 5, "masked")
    for inputs in (x, x.part(slice(0, 0))):
        _, cache = layer.train(inputs, adapter)
        grads = layer.backward(cache, grad_out(inputs.tokens, 64), adapter, lora)
        assert all((g == 0).all() for g in grads.values())


@each_isa
@each_layer_format
def test_a_shared_a_gets_the_sum_of_both_gradients(isa: str, fmt: str) -> None:
    """PEFT uses one A for gate and up."""
    shape = Shape(4, 2, 100, 70)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 8)
    lora["up_a"] = lora["gate_a"]
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 30), grad_out(30, 100)
    got = layer.backward(layer.train(x, adapter)[1], dy, adapter, lora)

    a = lora["gate_a"].double().requires_grad_()
    exact = {n: t.double() for n, t in lora.items()} | {"gate_a": a, "up_a": a}
    out = layer_forward(layer.dequantized(), x.hidden.double(), x.ids, x.weights.double(), exact, 1.0, layer.rounding)
    (want,) = torch.autograd.grad(out, a, dy.double())
    compare({"shared a": got["gate_a"] + got["up_a"]}, {"shared a": want}, fmt, "shared A")


@each_isa
@each_layer_format
@pytest.mark.parametrize("pieces", [2, 5])
def test_micro_batches_sum_to_one_batch(isa: str, fmt: str, pieces: int) -> None:
    shape = Shape(4, 2, 64, 48)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 40), grad_out(40, 64)
    whole = layer.backward(layer.train(x, adapter)[1], dy, adapter, lora)
    rows = [slice(40 * i // pieces, 40 * (i + 1) // pieces) for i in range(pieces)]
    caches = [layer.train(x.part(r), adapter)[1] for r in rows]  # all forwards first: the caches are independent
    parts = [layer.backward(c, dy[r], adapter, lora) for c, r in zip(caches, rows, strict=True)]
    for name in LORA_NAMES:
        total = sum(p[name].double() for p in parts)
        assert relative(total.numpy(), whole[name].double().numpy()) <= bound_of(fmt), name
    for name in ("input", "weights"):
        joined = torch.cat([p[name] for p in parts])
        assert relative(joined.double().numpy(), whole[name].double().numpy()) <= 1e-2, name
