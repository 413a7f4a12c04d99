"""Experts of a layer back into plain tensors, for whoever computes them elsewhere, on a GPU for example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ext
from .capsule import to_dlpack
from .io.gguf_types import GGUF_TYPE_OF, block_of, gguf
from .io.published import FP8_BLOCK, INT4_GROUPS, PublishedExpert, PublishedMatrix, blocks_along
from .packed_weights import formats_of


def export_expert(layer: _ext.MoeLayer, expert: int, hidden: int, inter: int, gated: bool) -> PublishedExpert:
    """One expert in the formats of its layer, bit for bit: see `io.published` for the parts. Without biases."""
    packed = torch.empty(layer.expert_bytes, dtype=torch.uint8, device="cpu")
    layer.read_expert(expert, to_dlpack(packed))
    gate_up_format, down_format = formats_of(layer)
    gate = _empty(gate_up_format, inter, hidden) if gated else None
    up, down = _empty(gate_up_format, inter, hidden), _empty(down_format, hidden, inter)
    arrays: list[Any] = [None if m is None else [to_dlpack(part) for part in m.parts] for m in (gate, up, down)]
    _ext.unpack_expert(to_dlpack(packed), hidden, inter, gate_up_format, down_format, *arrays)
    return PublishedExpert(tuple(_named(m) for m in (gate, up, down)), {})


def _named(matrix: PublishedMatrix | None) -> PublishedMatrix | None:
    """int4 comes as the exact int8 numbers that it computes with."""
    if matrix is None or matrix.format != "int4":
        return matrix
    return PublishedMatrix("int8", matrix.parts, matrix.shape)


def _empty(format: str, n: int, k: int) -> PublishedMatrix:
    def new(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(n, columns, dtype=dtype, device="cpu")

    if format == "bf16":
        parts: tuple[Tensor, ...] = (new(k, torch.bfloat16),)
    elif format in ("int8", "int4"):
        parts = new(k, torch.int8), torch.empty(n, dtype=torch.float32, device="cpu")
    elif format == "fp8":
        parts = new(k, torch.uint8), new(blocks_along(k, FP8_BLOCK), torch.float32)
    elif format in INT4_GROUPS:
        groups = blocks_along(k, INT4_GROUPS[format])
        parts = new(groups * INT4_GROUPS[format] // 2, torch.uint8), new(groups, torch.bfloat16)
        if format.endswith("z"):
            parts = *parts, new(groups, torch.uint8)
    else:
        weights, nbytes = block_of(gguf().GGMLQuantizationType[GGUF_TYPE_OF[format]])
        parts = (new(blocks_along(k, weights) * nbytes, torch.uint8),)
    return PublishedMatrix(format, parts, (n, k))
