"""Packed bytes of layers cut along inter: a whole expert goes in, is dealt out, and can be read as it was."""

import pytest
import torch
from oracle.experts import ACTIVATIONS
from oracle.layers import Layer, Shape, assert_same, make_inputs

from ktmoe import _ext

FORMATS: list[str] = list(_ext.formats())
PARTS = [2, 3, 4]


def shape_of(fmt: str) -> Shape:
    step = int(_ext.testing.k_step(fmt))
    return Shape(3, 2, 100, 4 * step - step // 2)


def packed(layer: Layer) -> torch.Tensor:
    rows = torch.full((layer.shape.experts, layer.engine.expert_bytes), 0xA5, dtype=torch.uint8)
    for e in range(layer.shape.experts):
        layer.engine.read_expert(e, rows[e])
    return rows


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["silu", "relu2"])
def test_the_bytes_outside_do_not_depend_on_the_parts(fmt: str, name: str) -> None:
    """hidden and inter with padded panels (a stride of 32 KB) among them."""
    activation = ACTIVATIONS[name]
    for shape in (shape_of(fmt), Shape(2, 1, 512, 512)):
        one = Layer(shape, fmt, "", activation=activation)
        want, weights = packed(one), one.dequantized()
        for parts in PARTS:
            layer = Layer(shape, fmt, "", parts=parts, activation=activation)
            assert layer.engine.expert_bytes == one.engine.expert_bytes
            assert torch.equal(packed(layer), want), f"{shape} {parts} parts"
            for a, b in zip(layer.dequantized(), weights, strict=True):
                assert all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fmt", FORMATS)
def test_attached_bytes(fmt: str) -> None:
    """Packed with one part, used by several, which copy: the memory may go."""
    shape = shape_of(fmt)
    rows, x = packed(Layer(shape, fmt, "")), make_inputs(shape, 9)
    for parts in PARTS:
        layer = Layer(shape, fmt, "", parts=parts)
        want = layer.forward(x)
        layer.engine.unload()
        assert not layer.engine.loaded
        assert layer.engine.packed_bytes == 0
        turned = rows.flip(0).contiguous()
        layer.engine.attach(turned, [2, 1, 0])
        assert layer.engine.loaded
        turned.zero_()
        assert_same(layer.forward(x), want, f"{parts} parts")
        assert torch.equal(packed(layer), rows)


def test_attached_biases_and_experts_on_the_gpu() -> None:
    shape = Shape(4, 2, 100, 290)
    mask = [False, True, False, False]
    whole = Layer(shape, "int8", "", with_biases=True)
    rows, x = packed(whole), make_inputs(shape, 9)
    gate, up, down = (torch.stack([b[i] for b in whole.biases]) for i in range(3))
    for parts in PARTS:
        layer = Layer(shape, "int8", "", parts=parts, with_biases=True, on_gpu=mask)
        want, size = layer.forward(x), layer.engine.packed_bytes
        layer.engine.attach(rows, [0, -7, 2, 3], gate, up, down)
        assert layer.engine.packed_bytes == size
        assert_same(layer.forward(x), want, f"{parts} parts")


def test_memory_is_that_of_one_part() -> None:
    shape = Shape(4, 2, 512, 768)
    one = Layer(shape, "bf16", "").engine.packed_bytes
    for parts in PARTS:
        assert abs(Layer(shape, "bf16", "", parts=parts).engine.packed_bytes - one) <= 0.06 * one


def test_loading_again_replaces_an_expert_and_a_bad_one_is_not_loaded() -> None:
    shape = Shape(2, 1, 64, 512)
    layer, x = Layer(shape, "fp8", "", parts=3), make_inputs(Shape(2, 1, 64, 512), 7)
    before = layer.forward(x)
    layer.load_zeros(1)
    after = layer.forward(x)
    to_zero = (x.ids == 1).any(dim=1)
    assert (after[to_zero] == 0).all()
    assert_same(after[~to_zero], before[~to_zero], "the other expert")
    bad = [torch.full((512, 64), 0x7F, dtype=torch.uint8), torch.ones(512, 1)]
    down = [torch.zeros(64, 512, dtype=torch.uint8), torch.ones(64, 4)]
    with pytest.raises(ValueError, match=r"\[load_expert_raw\] (gate|up): row \d+"):
        layer.engine.load_expert_raw(1, bad, bad, down)
    assert not layer.engine.loaded
    with pytest.raises(RuntimeError, match="1 of 2 experts are missing"):
        layer.forward(x)
    layer.load_zeros(1)
    assert_same(layer.forward(x), after, "loaded again")
