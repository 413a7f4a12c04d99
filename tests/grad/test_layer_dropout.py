"""Dropout on the LoRA path: masks that are a function of seed and place, and exact gradients through them."""

import numpy as np
import pytest
import torch
from oracle import dropout
from oracle.bounds import relative
from oracle.experts import ACTIVATIONS, LORA_NAMES, Dropout, lora_names
from oracle.gradients import bound_of
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import BLOCK_ROWS, each_isa, each_layer_format

SHAPES = [Shape(4, 2, 64, 48), Shape(3, 2, 100, 290)]
DROP = Dropout(0.3, 2**61 + 12345)


def check(layer: Layer, tokens: int, drop: Dropout = DROP, rank: int = 6) -> None:
    """Output and every gradient against float64 autograd with the same masks."""
    lora = make_lora(layer.shape, rank, gated=layer.activation.gated)
    x, dy = make_inputs(layer.shape, tokens, "mixed"), grad_out(tokens, layer.shape.hidden)
    adapter = layer.adapter(lora, 2.5)
    out, cache = layer.train(x, adapter, drop)
    assert_same(out, layer.forward(x, adapter, drop), "a forward that saves is the same forward")
    got = layer.backward(cache, dy, adapter, lora)

    leaves = {"input": x.hidden.double(), **{n: t.double() for n, t in lora.items()}}
    for leaf in leaves.values():
        leaf.requires_grad_()
    want_out = layer.exact(leaves["input"], x.ids, x.weights.double(), {n: leaves[n] for n in lora}, 2.5, drop)
    want = torch.autograd.grad(want_out, list(leaves.values()), dy.double())
    assert relative(out.double().numpy(), want_out.detach().numpy()) <= bound_of(layer.fmt)
    for name, exact in zip(leaves, want, strict=True):
        error = relative(got[name].double().numpy(), exact.numpy())
        assert error <= bound_of(layer.fmt), f"{layer.isa}/{layer.fmt} {layer.shape} gradient of {name}: {error:.4f}"


@each_isa
@each_layer_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64_with_the_same_masks(isa: str, fmt: str, shape: Shape) -> None:
    check(Layer(shape, fmt, isa), 40)


@each_isa
@pytest.mark.parametrize("activation", ["relu2", "oai"])
def test_other_activations(isa: str, activation: str) -> None:
    check(Layer(SHAPES[0], "bf16", isa, activation=ACTIVATIONS[activation], with_biases=True), 40)


@each_isa
def test_masks_count_tokens_of_the_whole_call(isa: str) -> None:
    """Chunks and blocks do not begin anew."""
    check(Layer(SHAPES[0], "bf16", isa, chunk_tokens=7), 30)
    check(Layer(Shape(2, 1, 64, 48), "bf16", isa), BLOCK_ROWS[isa] + 60)


@each_isa
def test_few_tokens(isa: str) -> None:
    layer = Layer(Shape(2, 1, 64, 48), "bf16", isa)
    lora = make_lora(layer.shape, 16)
    x, adapter = make_inputs(layer.shape, 1), layer.adapter(lora)
    want = layer.exact(
        x.hidden.double(), x.ids, x.weights.double(), {n: t.double() for n, t in lora.items()}, 1.0, DROP
    )
    assert relative(layer.forward(x, adapter, DROP).double().numpy(), want.numpy()) <= 1e-2


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    def gradients(threads: int) -> dict[str, torch.Tensor]:
        layer = Layer(Shape(4, 2, 100, 290), "bf16", "", threads=threads)
        lora = make_lora(layer.shape, 6)
        adapter = layer.adapter(lora)
        x = make_inputs(layer.shape, 60)
        return layer.backward(layer.train(x, adapter, DROP)[1], grad_out(60, 100), adapter, lora)

    want = gradients(2)
    for name, got in gradients(threads).items():
        assert_same(got, want[name], name)


def test_a_seed_repeats_and_another_differs() -> None:
    layer = Layer(SHAPES[0], "bf16", "")
    x, adapter = make_inputs(SHAPES[0], 9), layer.adapter(make_lora(SHAPES[0], 6))
    first = layer.forward(x, adapter, DROP)
    assert_same(first, layer.forward(x, adapter, DROP), "the same seed")
    assert (first != layer.forward(x, adapter, Dropout(0.3, 1))).any()
    assert_same(layer.forward(x, adapter), layer.forward(x, adapter, Dropout(0.0, 77)), "p = 0 drops nothing")
    assert_same(layer.forward(x), layer.forward(x, None, DROP), "no LoRA, nothing to drop")
    with pytest.raises(ValueError, match=r"\[forward\] dropout: got 1, expected 0 <= p < 1"):
        layer.forward(x, adapter, Dropout(1.0, 0))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_drop_a_share_p_independently(p: float) -> None:
    """Within four standard deviations of what independent coins would do."""
    tokens, n = np.arange(400), 512
    masks = {
        (site, expert, seed): dropout.keep(p, seed, site, tokens, expert, n)
        for site, expert, seed in (("x", 0, 5), ("h", 0, 5), ("x", 1, 5), ("x", 0, 6))
    }
    size, variance = 400 * n, p * (1 - p)
    for mask in masks.values():
        assert abs(mask.mean() - (1 - p)) < 4 * (variance / size) ** 0.5
    first = masks["x", 0, 5] - (1 - p)
    others = [m - (1 - p) for key, m in masks.items() if key != ("x", 0, 5)]
    shifted = [np.roll(first, 1, axis=axis) for axis in (0, 1)] + [np.roll(first, 4, axis=1)]
    for other in (*others, *shifted):
        assert abs((first * other).mean()) < 4 * variance / size**0.5


def test_all_lora_tensors_see_their_mask() -> None:
    """An element that is dropped for every token gets no gradient in A."""
    layer = Layer(Shape(1, 1, 64, 48), "bf16", "")
    lora = make_lora(layer.shape, 4)
    adapter, x = layer.adapter(lora), make_inputs(layer.shape, 3)
    drop = Dropout(0.75, 3)
    got = layer.backward(layer.train(x, adapter, drop)[1], grad_out(3, 64), adapter, lora)
    for site, names, n in (("x", ("gate_a", "up_a"), 64), ("h", ("down_a",), 48)):
        dropped = ~dropout.keep(drop.p, drop.seed, site, np.arange(3), 0, n).any(0)
        assert dropped.any()
        for name in names:
            assert (got[name][0][:, torch.from_numpy(dropped)] == 0).all()
            assert (got[name][0][:, torch.from_numpy(~dropped)] != 0).any()
    assert set(lora_names(layer.activation)) == set(LORA_NAMES)
