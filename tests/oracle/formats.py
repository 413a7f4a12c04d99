"""One oracle for each weight format: how values become stored elements and back. NumPy only."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .bf16 import narrow, widen


@dataclass(frozen=True)
class FormatOracle:
    name: str
    k_step: int  # weights of one column in one 1 KB tile
    per_word: int  # consecutive k in one 32-bit word
    element: type
    scaled: bool
    activations: str  # what the forward kernel multiplies with: "bf16" | "int8"
    quantize: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # [n, k] fp32 -> elements [n, k], scales [n]
    dequantize: Callable[[np.ndarray, np.ndarray], np.ndarray]  # back to fp32


def int8_scale(most: np.ndarray) -> np.ndarray:
    """max / 127, or 0 where that would be subnormal."""
    most = most.astype(np.float32)
    return np.where(most < np.float32(127) * np.float32(2.0**-126), np.float32(0), most / np.float32(127))


def int8_levels(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """round-half-even(x / scale) in fp32, within -127 .. 127; all zero for a zero or non-finite scale."""
    usable = (scale > 0) & np.isfinite(scale)
    divisor = np.where(usable, scale, np.float32(1))[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        level = np.clip(np.rint(x.astype(np.float32) / divisor), -127, 127)
    return np.where(usable[:, None], level, 0).astype(np.int8)


def int8_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = int8_scale(np.abs(x).max(axis=1))
    return int8_levels(x, scale), scale


def int8_quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations: as weights, but times the fp32 reciprocal of the scale, since the kernels' time for a division of
    each number would show; and a row with NaN or Inf has the scale NaN."""
    finite = np.isfinite(x).all(axis=1)
    scale = np.where(finite, int8_scale(np.abs(np.where(finite[:, None], x, 0)).max(axis=1)), np.float32(np.nan))
    usable = scale > 0
    inverse = np.float32(1) / np.where(usable, scale, np.float32(1))
    levels = np.rint(np.where(usable[:, None], x, 0).astype(np.float32) * inverse[:, None])
    return levels.astype(np.int8), scale


ORACLES = {
    "bf16": FormatOracle(
        "bf16",
        32,
        2,
        np.uint16,
        False,
        "bf16",
        lambda w: (narrow(w), np.ones(len(w), np.float32)),
        lambda q, _: widen(q),
    ),
    "int8": FormatOracle(
        "int8",
        64,
        4,
        np.int8,
        True,
        "int8",
        int8_quantize,
        lambda q, scale: q.astype(np.float32) * scale[:, None],
    ),
}
