"""Quantising to GGUF's Q4_K: 256 weights in 144 bytes, w = d * scale * q - dmin * low.

d, dmin: fp16 of the block. scale, low: 6 bits of each sub-block of 32 weights. q: 4 bits of each weight.

The search minimises the squared error of the weights, in three steps:
1. Each sub-block alone, with real numbers: several widths are tried; for the codes that a width gives, the best
   (step, low) is a line fit in closed form.
2. scale and low are rounded to 6 bits on the d and dmin that their largest values give.
3. With those fixed, codes and neighbouring integers are tried again, and (d, dmin) is fitted over the whole block.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
SUB_BLOCKS = 8
_SUB = BLOCK // SUB_BLOCKS
BLOCK_BYTES = 144
_WIDTHS = (0.72, 0.8, 0.88, 0.96)
"""Fractions of the full range (largest - smallest) that the 16 codes are spread over at first."""
_CHUNK = 512
"""Blocks at a time: the working set stays in the caches."""


def quantize_q4_k(weights: Tensor) -> Tensor:
    """uint8 [n, k / 256 * 144] from floats [n, k], k a multiple of 256, exactly as GGUF stores rows.

    A block with a weight that is not finite, or beyond what fp16 scales can hold, decodes to NaN.
    """
    n, k = weights.shape
    blocks = weights.reshape(-1, SUB_BLOCKS, _SUB)
    result = torch.empty(blocks.shape[0], BLOCK_BYTES, dtype=torch.uint8)
    for begin in range(0, blocks.shape[0], _CHUNK):
        result[begin : begin + _CHUNK] = _quantize_blocks(blocks[begin : begin + _CHUNK].float())
    return result.view(n, k // BLOCK * BLOCK_BYTES)


def _quantize_blocks(w: Tensor) -> Tensor:
    broken = ~torch.isfinite(w).all(-1).all(-1)
    w = torch.where(broken[:, None, None], 0.0, w)
    step, low = _fit_sub_blocks(w)
    d, dmin = _unit(step), _unit(low)
    scale, floor = _levels(step, d), _levels(low, dmin)
    for _ in range(2):
        scale, floor = _try_neighbours(w, d, dmin, scale, floor)
        d, dmin = _fit_block(w, d, dmin, scale, floor)
    codes = _codes(w, d[:, None] * scale, dmin[:, None] * floor)[0]
    d = torch.where(broken | ~torch.isfinite(d + dmin), torch.nan, d)
    return _pack(d, dmin, scale.to(torch.uint8), floor.to(torch.uint8), codes.to(torch.uint8))


def _half(x: Tensor) -> Tensor:
    """Rounded to fp16."""
    return x.half().float()


def _unit(value: Tensor) -> Tensor:
    """The fp16 unit in which the largest of 8 values is 63; the smallest fp16 rather than 0 for very small ones."""
    return torch.where(value.amax(1) > 0, _half(value.amax(1) / 63).clamp(min=2.0**-24), 0.0)


def _levels(value: Tensor, unit: Tensor) -> Tensor:
    """value / unit rounded to 0..63; 0 where the unit is 0."""
    return (value / unit[:, None]).nan_to_num(0.0, 0.0, 0.0).round_().clamp_(0, 63)


def _codes(w: Tensor, step: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes 0..15 of w = step * q - low, and the squared error of each sub-block."""
    q = (w + low[..., None]).div_(step.clamp(min=1e-30)[..., None]).round_().clamp_(0, 15)
    error = torch.addcmul(-low[..., None] - w, q, step[..., None]).square_().sum(-1)
    return q, error


def _fit_sub_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Real (step, low), both [blocks, 8] and not negative, of each sub-block alone."""
    low_end = w.amin(-1).clamp(max=0.0)
    top = w.amax(-1).clamp(min=0.0)
    best_step, best_low = (top - low_end) / 15, -low_end
    best_error = _codes(w, best_step, best_low)[1]
    middle = (top + low_end) / 2
    sum_w = w.sum(-1)
    for width in _WIDTHS:
        step = (top - low_end) * (width / 15)
        q, _ = _codes(w, step, (7.5 * step - middle).clamp_(min=0.0))
        # Least squares of w = step * q - low over the 32 weights.
        sum_q, sum_qq, sum_qw = q.sum(-1), q.square().sum(-1), (q * w).sum(-1)
        determinant = _SUB * sum_qq - sum_q.square()
        step = (_SUB * sum_qw - sum_q * sum_w) / determinant
        low = (sum_q * sum_qw - sum_qq * sum_w) / determinant
        # A line above zero is not expressible: through zero instead.
        step = torch.where(low < 0, sum_qw / sum_qq, step).nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0.0)
        low = low.nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0.0)
        error = _codes(w, step, low)[1]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step, best_low = torch.where(better, step, best_step), torch.where(better, low, best_low)
    return best_step, best_low


def _try_neighbours(w: Tensor, d: Tensor, dmin: Tensor, scale: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The best of the nine pairs around each (scale, floor)."""
    best_scale, best_floor = scale, floor
    best_error = torch.full_like(scale, torch.inf)
    for up in (0, -1, 1):
        for lift in (0, -1, 1):
            s, f = (scale + up).clamp_(0, 63), (floor + lift).clamp_(0, 63)
            error = _codes(w, d[:, None] * s, dmin[:, None] * f)[1]
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_floor = torch.where(better, s, best_scale), torch.where(better, f, best_floor)
    return best_scale, best_floor


def _fit_block(w: Tensor, d: Tensor, dmin: Tensor, scale: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """(d, dmin) by least squares over the block with everything else fixed; the old ones where that is no better."""
    q, before = _codes(w, d[:, None] * scale, dmin[:, None] * floor)
    a = q * scale[..., None]  # w = d * a - dmin * floor
    aa, ab = a.square().sum((1, 2)), (a.sum(-1) * floor).sum(1)
    bb = floor.square().sum(1) * _SUB
    aw, bw = (a * w).sum((1, 2)), (w.sum(-1) * floor).sum(1)
    determinant = aa * bb - ab.square()
    new_d, new_dmin = _half((aw * bb - ab * bw) / determinant), _half((ab * aw - aa * bw) / determinant)
    after = _codes(w, new_d[:, None] * scale, new_dmin[:, None] * floor)[1]
    better = (after.sum(1) < before.sum(1)) & (new_d > 0) & (new_dmin >= 0)
    return torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)


def _pack(d: Tensor, dmin: Tensor, scale: Tensor, floor: Tensor, codes: Tensor) -> Tensor:
    """d, dmin [b]; scale, floor [b, 8]; codes [b, 8, 32] -> [b, 144]."""
    head = torch.stack((d, dmin), 1).half().view(torch.uint8)
    # Sub-blocks 0..3 keep their 6 bits in bytes 0..3 (scales) and 4..7 (lows). The upper two bits of those bytes are
    # the upper bits of sub-blocks 4..7, whose lower four bits share bytes 8..11.
    six = torch.cat(
        (
            scale[:, :4] | (scale[:, 4:] >> 4 << 6),
            floor[:, :4] | (floor[:, 4:] >> 4 << 6),
            (scale[:, 4:] & 15) | (floor[:, 4:] << 4),
        ),
        1,
    )
    # A byte holds the same place of two neighbouring sub-blocks.
    nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat((head, six, nibbles.flatten(1)), 1)
