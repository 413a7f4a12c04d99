"""PEFT's own parameters as LoRA matrices: the bits of what autograd makes of views of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle.experts import ACTIVATIONS
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs
from torch import Tensor

from ktmoe import LoraTensors, moe_forward
from ktmoe.hf.peft_lora import PeftLora, lora_tensors, matrices_of
from ktmoe.lora import LoraMirror

SHAPES = [Shape(5, 2, 70, 40), Shape(16, 2, 40, 33), Shape(37, 3, 33, 24)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def peft_leaves(shape: Shape, rank: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    e, h, i = shape.experts, shape.hidden, shape.inter
    sizes = ((e * rank, h), (width, rank * e), (e * rank, i), (h, rank * e))
    return [torch.randn(size, generator=g).div(10).to(dtype).requires_grad_() for size in sizes]


def plain_views(leaves: list[Tensor], shape: Shape, gated: bool, interleaved: bool, rank: int) -> LoraTensors:
    """What autograd can take apart by itself."""
    first, down = (matrices_of(*leaves[i : i + 2], shape.experts) for i in (0, 2))
    return lora_tensors(first, down, gated=gated, interleaved=interleaved, scaling=2.0, rank=rank, name="")


class Wrapper:
    """As much of a wrapper as `moe_forward` needs."""

    def __init__(self, layer: Layer) -> None:
        s = layer.shape
        self.layer, self.layer_idx = layer.engine, 0
        self.num_experts, self.hidden_size, self.moe_intermediate_size = s.experts, s.hidden, s.inter
        self.num_experts_per_tok, self.gated = s.top_k, layer.activation.gated
        self.mirror = LoraMirror(layer.pool, s.experts, s.hidden, s.inter, self.gated)

    def _inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "interleaved"), [("silu", False), ("oai", True), ("relu2", False)])
def test_peft_parameters(shape: Shape, dtype: torch.dtype, activation: str, interleaved: bool) -> None:
    """Output and gradients have the bits of those through autograd's own views, where A is given twice."""
    layer = Layer(shape, "bf16", "", activation=ACTIVATIONS[activation])
    wrapper: Any = Wrapper(layer)
    gated, rank = layer.activation.gated, 4
    leaves = peft_leaves(shape, rank, shape.inter * (2 if gated else 1), dtype)
    x, dy = make_inputs(shape, 20, "mixed"), grad_out(20, shape.hidden)
    results = []
    for lora in (
        PeftLora(*leaves, shape.experts, gated, interleaved, 2.0, rank, "a"),
        plain_views(leaves, shape, gated, interleaved, rank),
    ):
        out = moe_forward(wrapper, x.hidden, x.ids, x.weights, lora)
        out.backward(dy)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected, "output or gradient")
        assert got.is_contiguous()


def test_only_the_leaves_that_are_trained_get_gradients() -> None:
    shape = Shape(5, 2, 70, 40)
    wrapper: Any = Wrapper(Layer(shape, "bf16", ""))
    leaves = peft_leaves(shape, 4, 80, torch.float32)
    leaves[1].requires_grad_(False)
    x = make_inputs(shape, 6)
    lora = PeftLora(*leaves, shape.experts, True, False, 2.0, 4, "a")
    moe_forward(wrapper, x.hidden, x.ids, x.weights, lora).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, True, True]
