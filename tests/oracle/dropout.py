"""The dropout masks of csrc/moe/dropout.h, from their definition, in NumPy."""

import numpy as np

SITES = {"x": 1, "h": 2}
_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ x >> np.uint64(30)) * _FIRST
        x = (x ^ x >> np.uint64(27)) * _SECOND
        return x ^ x >> np.uint64(31)


def threshold(p: float) -> int:
    """How many of the 2^16 values of an element are dropped."""
    return round(p * 65536)


def factor(p: float) -> float:
    return 65536 / (65536 - threshold(p))


def keep(p: float, seed: int, site: str, token: np.ndarray, expert: int, n: int) -> np.ndarray:
    """bool [tokens, n]: which elements of the rows of `token` at one expert stay."""
    place = token.astype(np.uint64) << np.uint64(18) | np.uint64(expert << 2 | SITES[site])
    key = mixed(mixed(np.full(1, seed, np.uint64)) ^ mixed(place))
    with np.errstate(over="ignore"):
        words = mixed(key[:, None] + np.arange(-(-n // 4), dtype=np.uint64))
    lanes = words[:, :, None] >> np.array([0, 16, 32, 48], np.uint64) & np.uint64(0xFFFF)
    return (lanes.reshape(len(token), -1) >= threshold(p))[:, :n]
