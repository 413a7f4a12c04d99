"""Experts of a layer back into plain tensors, for whoever computes them elsewhere, on a GPU for example."""

from __future__ import annotations

from typing import Any

import torch

from . import _ext
from .capsule import to_dlpack
from .io.published import PublishedExpert, PublishedMatrix, empty_matrix
from .packed_weights import formats_of


def export_expert(layer: _ext.MoeLayer, expert: int, hidden: int, inter: int, gated: bool) -> PublishedExpert:
    """One expert in the formats of its layer, bit for bit: see `io.published` for the parts. Without biases."""
    packed = torch.empty(layer.expert_bytes, dtype=torch.uint8, device="cpu")
    layer.read_expert(expert, to_dlpack(packed))
    gate_up_format, down_format = formats_of(layer)
    gate = empty_matrix(gate_up_format, inter, hidden) if gated else None
    up, down = empty_matrix(gate_up_format, inter, hidden), empty_matrix(down_format, hidden, inter)
    arrays: list[Any] = [None if m is None else [to_dlpack(part) for part in m.parts] for m in (gate, up, down)]
    _ext.unpack_expert(to_dlpack(packed), hidden, inter, gate_up_format, down_format, *arrays)
    return PublishedExpert(tuple(_named(m) for m in (gate, up, down)), {})


def _named(matrix: PublishedMatrix | None) -> PublishedMatrix | None:
    """int4 comes as the exact int8 numbers that it computes with."""
    if matrix is None or matrix.format != "int4":
        return matrix
    return PublishedMatrix("int8", matrix.parts, matrix.shape)
