"""LoRA matrices and their gradients wherever they lie: the same bits as from plain tensors, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from oracle.experts import LORA_NAMES
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import each_isa
from torch import Tensor

# Fewer experts than are read together, exactly as many, and some more.
SHAPES = [Shape(5, 2, 70, 40), Shape(16, 2, 40, 33), Shape(37, 3, 33, 24)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
BESIDE = -7.0
"""What lies between the rows of a target."""


def side_by_side(matrices: Tensor) -> Tensor:
    """Any [experts, rows, rank], laid out as PEFT's B: experts last."""
    return matrices.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def strided(shape: torch.Size, kind: str) -> tuple[Tensor, Tensor]:
    """(memory, a view of `shape` in it whose rows are in one piece)."""
    e, n, k = shape
    if kind == "apart":
        memory = torch.full((e, n + 1, k + 3), BESIDE)
        return memory, memory[:, :n, :k]
    memory = torch.full((n, e * k + 5), BESIDE)  # the rows of all experts one behind the other
    return memory, memory[:, : e * k].view(n, e, k).transpose(0, 1)


@each_isa
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_packing_reads_any_layout(isa: str, shape: Shape, dtype: torch.dtype, rank: int) -> None:
    layer, lora, x = Layer(shape, "bf16", isa), make_lora(shape, rank, dtype=dtype), make_inputs(shape, 9)
    expected = layer.forward(x, layer.adapter(lora))
    backwards = {name: t.flip(1).flip(1).transpose(1, 2).contiguous().transpose(1, 2) for name, t in lora.items()}
    only_b = {name: side_by_side(t) if name.endswith("_b") else t for name, t in lora.items()}
    for changed in ({name: side_by_side(t) for name, t in lora.items()}, only_b, backwards):
        assert_same(layer.forward(x, layer.adapter(changed)), expected, "output")


@each_isa
@each_shape
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["apart", "beside"])
def test_gradients_go_where_they_are_wanted(isa: str, shape: Shape, parts: int, kind: str) -> None:
    """Some experts have no tokens, and others have some in a later chunk alone."""
    layer = Layer(shape, "int8", isa, parts=parts, chunk_tokens=8)
    lora, x = make_lora(shape, 6), make_inputs(shape, 20, "mixed")
    x.ids[:8] = x.ids[:8] % 2
    x.ids[x.ids == shape.experts - 2] = -1
    adapter, dy = layer.adapter(lora), grad_out(20, shape.hidden)
    cache = layer.train(x, adapter)[1]
    expected = layer.backward(cache, dy, adapter, lora)
    memory, targets = zip(*(strided(lora[name].shape, kind) for name in LORA_NAMES), strict=True)
    layer.engine.backward(cache, dy, adapter, None, None, list(targets))
    for name, target, around in zip(LORA_NAMES, targets, memory, strict=True):
        assert_same(target, expected[name], name)
        target.fill_(BESIDE)
        assert (around == BESIDE).all(), name


@each_isa
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("chunk", [0, 8])
def test_one_target_for_the_a_of_gate_and_up(isa: str, parts: int, chunk: int) -> None:
    shape = Shape(6, 2, 70, 100)
    layer = Layer(shape, "bf16", isa, parts=parts, chunk_tokens=chunk)
    lora, x = make_lora(shape, 6), make_inputs(shape, 20)
    x.ids[x.ids == 3] = -1
    adapter, dy = layer.adapter(lora), grad_out(20, shape.hidden)
    cache = layer.train(x, adapter)[1]
    apart = layer.backward(cache, dy, adapter, lora)
    targets = [torch.full(lora[name].shape, torch.nan) for name in LORA_NAMES]
    targets[LORA_NAMES.index("up_a")] = summed = targets[LORA_NAMES.index("gate_a")]
    layer.engine.backward(cache, dy, adapter, None, None, targets)
    both = apart["gate_a"] + apart["up_a"]
    if parts == 1 and not chunk:
        assert_same(summed, both, "A")
    # Otherwise the terms are added in another order.
    torch.testing.assert_close(summed, both, rtol=2.0**-20, atol=float(both.abs().max()) * 2.0**-20)
    for name, target in zip(LORA_NAMES, targets, strict=True):
        if name not in ("gate_a", "up_a"):
            assert_same(target, apart[name], name)


def test_targets_whose_rows_are_not_in_one_piece_are_refused() -> None:
    shape = Shape(4, 2, 64, 48)
    layer, lora, x = Layer(shape, "bf16", ""), make_lora(shape, 4), make_inputs(shape, 3)
    adapter = layer.adapter(lora)
    cache = layer.train(x, adapter)[1]
    targets = [torch.empty(lora[name].shape) for name in LORA_NAMES]
    targets[5] = side_by_side(targets[5])
    with pytest.raises(ValueError, match=r"\[backward\] lora_grads strides: got 4 in the last dimension, expected 1"):
        layer.engine.backward(cache, grad_out(3, 64), adapter, None, None, targets)
