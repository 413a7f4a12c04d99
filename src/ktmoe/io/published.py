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

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gguf_types import BLOCK_WEIGHTS, GGUF_TYPE_OF, dequantize_rows, gguf, quantize_rows
from .q4_k import quantize_q4_k

FP8_BLOCK = 128
INT4_GROUPS = {f"int4_g{group}{zero}": group for zero in ("", "z") for group in (32, 64, 128)}
_FP8_MAX = 448.0
_BETWEEN_E2M1 = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_E2M1 = torch.tensor([sign * m for sign in (1.0, -1.0) for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])


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
def _padded(weights: Tensor, block: int) -> Tensor:
    """fp32, with zeros up to whole blocks along k."""
    return pad(weights.float(), (0, -weights.shape[1] % block))


def _int4(weights: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric: scale = largest / 7 in bf16, codes -7..7. A group with a weight that is not finite decodes to NaN."""
    n = weights.shape[0]
    groups = _padded(weights, group).view(n, -1, group)
    scales = (groups.abs().amax(2) / 7).bfloat16()
    scales = torch.where(torch.isfinite(groups).all(2), scales, torch.nan)
    codes = (groups / scales.float()[..., None]).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-8, 7)
    return pack_nibbles((codes + 8).to(torch.uint8).view(n, -1)), scales


def _int4_zero(weights: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric: 16 levels from the smallest weight (or 0) to the largest (or 0), one of them 0. NaN as in `_int4`."""
    n = weights.shape[0]
    groups = _padded(weights, group).view(n, -1, group)
    low, high = groups.amin(2).clamp_(max=0.0), groups.amax(2).clamp_(min=0.0)
    scales = ((high - low) / 15).bfloat16()
    divisor = torch.where(scales == 0, 1.0, scales.float())
    zeros = (-low / divisor).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(0, 15)
    codes = (groups / divisor[..., None]).nan_to_num_(0.0, 0.0, 0.0).round_()
    codes = (codes + zeros[..., None]).clamp_(0, 15).to(torch.uint8)
    scales = torch.where(torch.isfinite(groups).all(2), scales, torch.nan)
    return pack_nibbles(codes.view(n, -1)), scales, zeros.to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [n, k/2] from codes 0..15 [n, k]: the even k of a pair in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def _fp8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 128 x 128: scale = largest / 448, nearest e4m3fn. A weight that is not finite becomes NaN."""
    n, k = weights.shape
    rows, columns = blocks_along(n, FP8_BLOCK), blocks_along(k, FP8_BLOCK)
    tiles = pad(weights.float(), (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    tiles = tiles.view(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = torch.where(torch.isfinite(tiles), tiles.abs(), 0.0).amax((1, 3)) / _FP8_MAX
    # 0 / 0 is NaN too, but a weight of a block of zeros is a zero.
    values = torch.where(tiles == 0, 0.0, tiles / scales[:, None, :, None])
    values = torch.where(torch.isfinite(tiles), values.clamp(-_FP8_MAX, _FP8_MAX), torch.nan)
    codes = values.view(rows * FP8_BLOCK, -1)[:n, :k].to(torch.float8_e4m3fn).contiguous()
    return codes.view(torch.uint8), expand_rows(scales, n)


def expand_rows(scales: Tensor, n: int) -> Tensor:
    """fp32 [n, blocks of k] from the scales of 128 x 128 blocks."""
    return scales.float().repeat_interleave(FP8_BLOCK, 0)[:n].contiguous()


def _gguf(weights: Tensor, format: str) -> tuple[Tensor]:
    padded = _padded(weights, BLOCK_WEIGHTS[format])
    if format == "q4_k":
        return (quantize_q4_k(padded),)
    return (quantize_rows(padded, gguf().GGMLQuantizationType[GGUF_TYPE_OF[format]]),)


def _mxfp4(weights: Tensor) -> Tensor:
    """The rule of OCP and gguf: the power of two of the largest weight / 4, nearest e2m1. NaN as in `_int4`."""
    blocks = _padded(weights, 32).view(weights.shape[0], -1, 32)
    largest = blocks.abs().amax(2, keepdim=True)
    exponents = torch.frexp(largest).exponent + (127 - 1 - 2)
    exponents = torch.where(largest > 0, exponents.clamp(min=0), 0)
    levels = torch.ldexp(blocks.abs(), 127 - exponents)
    codes = torch.bucketize(levels, _BETWEEN_E2M1).to(torch.uint8)
    codes += 8 * ((codes > 0) & (blocks < 0)).to(torch.uint8)
    exponents = torch.where(torch.isfinite(largest), exponents, 255).to(torch.uint8)
    return mxfp4_rows(exponents[..., 0], codes)


def mxfp4_rows(exponents: Tensor, codes: Tensor) -> Tensor:
    """uint8 [n, 17 * blocks], as GGUF has them, from uint8 [n, blocks] and codes 0..15 [n, blocks, 32]."""
    return torch.cat((exponents[..., None], codes[..., :16] | codes[..., 16:] << 4), 2).flatten(1)


_QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "bf16": lambda weights: (weights.to(torch.bfloat16),),
    **{f"int4_g{g}": functools.partial(_int4, group=g) for g in (32, 64, 128)},
    **{f"int4_g{g}z": functools.partial(_int4_zero, group=g) for g in (32, 64, 128)},
    "fp8": _fp8,
    "q8_0": lambda weights: _gguf(weights, "q8_0"),
    "q4_0": lambda weights: _gguf(weights, "q4_0"),
    "q4_k": lambda weights: _gguf(weights, "q4_k"),
    "mxfp4": lambda weights: (_mxfp4(weights),),
}


def quantize(weights: Tensor, format: str) -> PublishedMatrix:
    """Floats [n, k] in `format`. NotImplementedError for a format that is only ever read from files."""
    if format not in _QUANTIZERS:
        raise NotImplementedError(f"Weights cannot be quantised to {format}, only to {', '.join(_QUANTIZERS)}")
    with torch.no_grad():
        return PublishedMatrix(format, _QUANTIZERS[format](weights), (weights.shape[0], weights.shape[1]))


# --- and back -----------------------------------------------------------------------------------------------------
def dequantize(matrix: PublishedMatrix) -> Tensor:
    """fp32 [n, k]: the weights that the format stands for."""
    n, k = matrix.shape
    if matrix.format == "bf16":
        return matrix.parts[0].float()
    if matrix.format == "int8":
        values, scales = matrix.parts
        return values.float() * scales[:, None]
    if matrix.format in INT4_GROUPS:
        packed, scales, *zeros = matrix.parts
        codes = unpack_nibbles(packed).float().view(n, scales.shape[1], -1)
        codes -= zeros[0].float()[..., None] if zeros else 8
        return (codes * scales.float()[..., None]).view(n, -1)[:, :k].contiguous()
    if matrix.format == "fp8":
        bits, scales = matrix.parts
        return bits.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(FP8_BLOCK, 1)[:, :k]
    if matrix.format == "mxfp4":
        return _from_mxfp4(matrix.parts[0])[:, :k].contiguous()
    kind = gguf().GGMLQuantizationType[GGUF_TYPE_OF[matrix.format]]
    return dequantize_rows(matrix.parts[0], kind)[:, :k].contiguous()


def _from_mxfp4(rows: Tensor) -> Tensor:
    """fp32 [n, kp]. Safetensors files have this format too, so it is read without the package gguf."""
    blocks = rows.view(rows.shape[0], -1, 17)
    exponents, codes = blocks[..., :1], blocks[..., 1:]
    powers = torch.where(exponents == 255, torch.nan, torch.exp2(exponents.float() - 127))
    return (_E2M1[torch.cat((codes & 15, codes >> 4), 2).long()] * powers).flatten(1)


def convert(matrix: PublishedMatrix, format: str) -> PublishedMatrix:
    """The matrix itself if it has this format already, else through floats."""
    return matrix if matrix.format == format else quantize(dequantize(matrix), format)
