"""One matrix in a published weight format, as files hold it and the engine packs it, and the way to and from floats.

    format              parts of a matrix [n, k]
    bf16                bf16 [n, k]
    int4_g{32,64,128}   uint8 [n, kp/2], low nibble: even k; bf16 scales [n, kp/g]; w = (nibble - 8) * scale
    int4_g{32,64,128}z  the same, and uint8 zeros 0..15 [n, kp/g]; w = (nibble - zero) * scale
    fp8                 uint8 [n, k], the bits of e4m3fn; fp32 scales [n, ceil(k/128)]; w = value * scale
    q4_0 q8_0 q4_k      uint8 [n, bytes of a row], exactly as GGUF stores a row of kp
    q5_k q6_k iq4_nl mxfp4

    int8                int8 [n, k]; fp32 scales [n]; w = value * scale; comes out of the engine alone

kp is k rounded up to whole groups or blocks; the weights behind k are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _ext
from ..capsule import rows_in_one_piece, to_dlpack
from .gguf_types import BLOCK_BYTES, BLOCK_WEIGHTS

FP8_BLOCK = 128
INT4_GROUPS = {f"int4_g{group}{zero}": group for zero in ("", "z") for group in (32, 64, 128)}


@dataclass(frozen=True, slots=True, eq=False)
class PublishedMatrix:
    """A matrix [n, k] in a format of the table above."""

    format: str
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.itemsize for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class PublishedExpert:
    """One expert on its way from a file, or from tensors, to the engine."""

    matrices: tuple[PublishedMatrix | None, ...]
    """gate (None without one), up [inter, hidden], down [hidden, inter]."""
    biases: Mapping[str, Tensor]
    """Any of gate_bias, up_bias [inter], down_bias [hidden], fp32."""

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return sum(m.nbytes for m in self.matrices if m is not None)


def plain_expert(gate: Tensor | None, up: Tensor, down: Tensor, **biases: Tensor) -> PublishedExpert:
    """An expert in floats: matrices as bf16, biases as fp32."""
    matrices = tuple(None if w is None else plain(w.detach()) for w in (gate, up, down))
    return PublishedExpert(matrices, {name: bias.detach().float() for name, bias in biases.items()})


def plain(weights: Tensor) -> PublishedMatrix:
    """Floats [n, k] as bf16, rounded to the nearest."""
    return PublishedMatrix("bf16", (weights.to(torch.bfloat16),), (weights.shape[0], weights.shape[1]))


def blocks_along(k: int, block: int) -> int:
    """Blocks that cover k weights."""
    return -(-k // block)


# --- quantising ---------------------------------------------------------------------------------------------------
QUANTISED = (*INT4_GROUPS, "fp8", "q8_0", "q4_0", "q4_k", "mxfp4")
"""Formats that are made from floats, by the rules in csrc/kernels/quantize_blocks-inl.h; the others are only read."""


def quantize(weights: Tensor, format: str, pool: _ext.ThreadPool | None = None) -> PublishedMatrix:
    """Floats [n, k] in `format`. A block with a weight that is not finite decodes to numbers that are not.

    pool: whose threads share the work, as `CPUInfer.pool`; None: the caller's thread alone does it.
    NotImplementedError for a format that is only ever read from files.
    """
    if format == "bf16":
        return plain(weights.detach())
    if format not in QUANTISED:
        raise NotImplementedError(f"Weights cannot be quantised to {format}, only to bf16, {', '.join(QUANTISED)}")
    source = weights if weights.dtype in (torch.bfloat16, torch.float32) else weights.float()
    matrix = empty_matrix(format, weights.shape[0], weights.shape[1])
    _ext.quantize(format, to_dlpack(rows_in_one_piece(source)), [to_dlpack(part) for part in matrix.parts], pool)
    return matrix


def empty_matrix(format: str, n: int, k: int) -> PublishedMatrix:
    """A matrix [n, k] whose parts hold anything; also of int4, with the parts of int8."""

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
        parts = (new(blocks_along(k, BLOCK_WEIGHTS[format]) * BLOCK_BYTES[format], torch.uint8),)
    return PublishedMatrix(format, parts, (n, k))


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, k], 0..15, from bytes [n, k/2]: the even k of a pair in the low nibble."""
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def expand_rows(scales: Tensor, n: int) -> Tensor:
    """fp32 [n, blocks of k] from the scales of 128 x 128 blocks."""
    return scales.float().repeat_interleave(FP8_BLOCK, 0)[:n].contiguous()


def mxfp4_rows(exponents: Tensor, codes: Tensor) -> Tensor:
    """uint8 [n, 17 * blocks], as GGUF has them, from uint8 [n, blocks] and codes 0..15 [n, blocks, 32]."""
    return torch.cat((exponents[..., None], codes[..., :16] | codes[..., 16:] << 4), 2).flatten(1)


# --- and back -----------------------------------------------------------------------------------------------------
def dequantize(
    matrix: PublishedMatrix, dtype: torch.dtype = torch.float32, pool: _ext.ThreadPool | None = None
) -> Tensor:
    """fp32 or bf16 [n, k]: the weights that the format stands for. pool: as in `quantize`."""
    if matrix.format == "bf16":
        return matrix.parts[0].to(dtype)
    if matrix.format == "int8":
        values, scales = matrix.parts
        return (values.float() * scales[:, None]).to(dtype)
    weights = torch.empty(matrix.shape, dtype=dtype, device="cpu")
    parts = [to_dlpack(part.contiguous()) for part in matrix.parts]
    _ext.dequantize(matrix.format, parts, to_dlpack(weights), pool)
    return weights


def convert(matrix: PublishedMatrix, format: str, pool: _ext.ThreadPool | None = None) -> PublishedMatrix:
    """The matrix itself if it has this format already, else through floats. pool: as in `quantize`."""
    if matrix.format == format:
        return matrix
    if format == "bf16":
        return plain(dequantize(matrix, torch.bfloat16, pool))
    floats = matrix.parts[0] if matrix.format == "bf16" else dequantize(matrix, pool=pool)
    return quantize(floats, format, pool)
