"""Where a kernel's operands lie: in ordinary memory, or flush against pages that fault.

ASan does not see masked vector loads and tile loads; the page tables do.
"""

import ctypes
import mmap
from typing import Protocol

import numpy as np

POISON = 0xFF  # fp32 and bf16 NaN, int8 -1: nothing that an unwritten output could be mistaken for
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Place(Protocol):
    def empty(self, shape: tuple[int, ...], dtype: type, align: int = 64) -> np.ndarray:
        """A poisoned array."""
        ...


class Heap:
    """Ordinary memory, 64-byte aligned."""

    def empty(self, shape: tuple[int, ...], dtype: type, align: int = 64) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.full(size + 64, POISON, np.uint8)
        skip = -raw.ctypes.data % 64
        return raw[skip : skip + size].view(dtype).reshape(shape)


class Guarded:
    """Every array in pages of its own between two PROT_NONE pages.

    right: the array ends where the page ends, as far as `align` allows (else up to align - 1 poisoned bytes follow it);
    left: it begins where the page begins. Memory is kept until close().
    """

    def __init__(self, side: str) -> None:
        self._right = side == "right"
        self._maps: list[tuple[mmap.mmap, np.ndarray, int, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: type, align: int = 64) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        inner = max(_PAGE, -(-size // _PAGE) * _PAGE)
        region = mmap.mmap(-1, inner + 2 * _PAGE)
        raw = np.frombuffer(region, np.uint8)
        raw[_PAGE : _PAGE + inner] = POISON
        base = raw.ctypes.data
        for guard in (base, base + _PAGE + inner):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = _PAGE + ((inner - size) // align * align if self._right else 0)
        self._maps.append((region, raw, start, size))
        return raw[start : start + size].view(dtype).reshape(shape)

    def assert_slack_untouched(self) -> None:
        """Nothing was written into the readable pages beside the arrays."""
        for _, raw, start, size in self._maps:
            inside = raw[_PAGE:-_PAGE]
            before, after = inside[: start - _PAGE], inside[start - _PAGE + size :]
            assert (before == POISON).all(), "a kernel wrote before an operand"
            assert (after == POISON).all(), "a kernel wrote behind an operand"

    def clear(self) -> None:
        self.assert_slack_untouched()
        self._maps.clear()


def put(place: Place, values: np.ndarray, align: int = 64) -> np.ndarray:
    out = place.empty(values.shape, values.dtype.type, align)
    out[...] = values
    return out


def put_rows(place: Place, values: np.ndarray, ld: int) -> np.ndarray:
    """Rows at stride `ld`, with nothing behind the last element of the last row, as in a slice of a larger tensor."""
    m, k = values.shape
    item = values.dtype.itemsize
    flat = place.empty(((m - 1) * ld + k,), values.dtype.type, align=item)
    rows = np.lib.stride_tricks.as_strided(flat, (m, k), (ld * item, item), writeable=True)
    rows[...] = values
    return rows
