"""The packed bytes of an expert can be read, and a layer can run on bytes that somebody else holds."""

import pytest
import torch
from oracle.layers import Layer, Shape, assert_same, make_inputs
from oracle.registry import ISAS, each_layer_format

SHAPE = Shape(3, 2, 100, 72)


def packed(layer: Layer) -> torch.Tensor:
    rows = torch.empty(SHAPE.experts, layer.engine.expert_bytes, dtype=torch.uint8)
    for e in range(SHAPE.experts):
        layer.engine.read_expert(e, rows[e])
    return rows


@each_layer_format
def test_a_layer_runs_on_attached_bytes(fmt: str) -> None:
    layer = Layer(SHAPE, fmt, ISAS[0])
    rows, inputs = packed(layer), make_inputs(SHAPE, 9)
    before = layer.forward(inputs)
    layer.engine.unload()
    layer.engine.attach(rows.flip(0).contiguous(), [2, 1, 0])  # the layer alone keeps this memory
    assert layer.engine.loaded
    assert layer.engine.packed_bytes == rows.numel()
    assert torch.equal(packed(layer), rows)
    assert_same(layer.forward(inputs), before, "attached")
    layer.engine.unload()
    assert not layer.engine.loaded


@each_layer_format
def test_packed_bytes_do_not_depend_on_the_level(fmt: str) -> None:
    images = [packed(Layer(SHAPE, fmt, isa)) for isa in ISAS]
    assert all(torch.equal(images[0], image) for image in images[1:])


def test_what_cannot_be_attached_is_refused_and_changes_nothing() -> None:
    layer = Layer(SHAPE, "int8", ISAS[0])
    rows, inputs = packed(layer), make_inputs(SHAPE, 3)
    before = layer.forward(inputs)
    shifted = torch.empty(rows.numel() + 1, dtype=torch.uint8)[1:].view_as(rows)
    for bad, row, text in (
        (rows, [0, 1], "row: got 2 entries, expected 3"),
        (rows, [0, 1, 3], r"row\[2\]: got 3, expected 0 to 2"),
        (rows[:, :-1].contiguous(), [0, 1, 2], "packed"),
        (shifted, [0, 1, 2], "64-byte aligned"),
    ):
        with pytest.raises(ValueError, match=text):
            layer.engine.attach(bad, row)
    with pytest.raises(TypeError, match="capsule"):
        layer.engine.attach(rows.__dlpack__(), [0, 1, 2])
    with pytest.raises(ValueError, match=r"\[read_expert\] expert: got 3"):
        layer.engine.read_expert(3, rows[0])
    assert_same(layer.forward(inputs), before, "after refusals")
