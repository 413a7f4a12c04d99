"""Published formats in NumPy: random weights in their own bytes, and what those bytes mean by somebody else's word.

GGUF types by the `gguf` package, FP8 by torch, int4 groups by the three lines that define them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
import torch

from . import bf16

Parts = list[np.ndarray]


@dataclass(frozen=True)
class Published:
    name: str
    block: int  # consecutive k that rows are rounded up to
    random: Callable[[np.random.Generator, int, int, float], Parts]  # n, k, standard deviation (about) -> parts
    dequantize: Callable[[Parts, int], np.ndarray]  # parts, k -> fp32 [n, k]
    scale_at: tuple[int, int, int]  # part, byte offset, bytes: a scale that a test may make infinite


def _up(k: int, block: int) -> int:
    return -(-k // block) * block


def _gguf(name: str, block: int, n_bytes: int, scales: list[int], levels: float) -> Published:
    """Random bits everywhere but in the f16 scales at the byte offsets `scales`, which give `levels` the deviation."""

    def random(rng: np.random.Generator, n: int, k: int, deviation: float) -> Parts:
        blocks = rng.integers(0, 256, (n, _up(k, block) // block, n_bytes), dtype=np.uint8)
        for at in scales:
            d = (deviation / levels * rng.uniform(0.5, 1.5, blocks.shape[:2])).astype(np.float16)
            blocks[..., at : at + 2] = d[..., None].view(np.uint8)
        return [blocks.reshape(n, -1)]

    kind = gguf.GGMLQuantizationType[name.upper()]
    return Published(
        name, block, random, lambda parts, k: gguf.quants.dequantize(parts[0], kind)[:, :k], (0, scales[0], 2)
    )


def _mxfp4() -> Published:
    def random(rng: np.random.Generator, n: int, k: int, deviation: float) -> Parts:
        blocks = rng.integers(0, 256, (n, _up(k, 32) // 32, 17), dtype=np.uint8)
        blocks[..., 0] = np.round(np.log2(deviation / 2.9)) + 127 + rng.integers(0, 2, blocks.shape[:2])
        return [blocks.reshape(n, -1)]

    kind = gguf.GGMLQuantizationType.MXFP4
    return Published("mxfp4", 32, random, lambda parts, k: gguf.quants.dequantize(parts[0], kind)[:, :k], (0, 0, 1))


def _int4_group(group: int, with_zero: bool) -> Published:
    def random(rng: np.random.Generator, n: int, k: int, deviation: float) -> Parts:
        shape = n, _up(k, group) // group
        scale = bf16.narrow(deviation / 4.6 * rng.uniform(0.5, 1.5, shape).astype(np.float32))
        zeros = [rng.integers(5, 12, shape, dtype=np.uint8)] if with_zero else []
        for zero in zeros:
            zero.flat[:2] = [0, 15][: zero.size]
        return [rng.integers(0, 256, (n, shape[1] * group // 2), dtype=np.uint8), scale, *zeros]

    def dequantize(parts: Parts, k: int) -> np.ndarray:
        q = np.stack([parts[0] & 15, parts[0] >> 4], -1).reshape(len(parts[0]), -1).astype(np.float32)
        zero = np.repeat(parts[2], group, axis=1).astype(np.float32) if with_zero else 8
        return ((q - zero) * np.repeat(bf16.widen(parts[1]), group, axis=1))[:, :k]

    return Published(f"int4_g{group}{'z' * with_zero}", group, random, dequantize, (1, 0, 2))


def _fp8() -> Published:
    def random(rng: np.random.Generator, n: int, k: int, deviation: float) -> Parts:
        values = torch.from_numpy(rng.standard_normal((n, k), np.float32)) * 100
        codes = values.clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond, some versions of torch make NaN
        codes.view(torch.uint8)[0, :4] = torch.tensor([0x00, 0x80, 0x01, 0x87][: min(k, 4)])  # zeros and subnormals
        scale = (deviation / 100 * rng.uniform(0.5, 1.5, (n, _up(k, 128) // 128))).astype(np.float32)
        return [codes.view(torch.uint8).numpy(), scale]

    def dequantize(parts: Parts, k: int) -> np.ndarray:
        values = torch.from_numpy(parts[0]).view(torch.float8_e4m3fn).float().numpy()
        return values * np.repeat(parts[1], 128, axis=1)[:, :k]

    return Published("fp8", 1, random, dequantize, (1, 0, 4))


PUBLISHED = {
    p.name: p
    for p in (
        *(_int4_group(g, with_zero) for with_zero in (False, True) for g in (32, 64, 128)),
        _fp8(),
        _gguf("q4_0", 32, 18, [0], 4.6),
        _gguf("iq4_nl", 32, 18, [0], 68.0),
        _mxfp4(),
        _gguf("q8_0", 32, 34, [0], 74.0),
        _gguf("q4_k", 256, 144, [0, 2], 250.0),
        _gguf("q5_k", 256, 176, [0, 2], 480.0),
        _gguf("q6_k", 256, 210, [208], 1370.0),
    )
}


def arrays(parts: Parts) -> list[object]:
    """As the engine takes them: 16-bit parts are bf16."""
    return [bf16.tensor(p) if p.dtype == np.uint16 else p for p in parts]
