"""New tensors in CPU memory; large ones in huge pages, and in memory that was used before where there is some.

The first touch of a page costs the kernel about as much as the engine needs to compute what goes there: 66 MiB of LoRA
gradients took 54 ms to be written in new pages of 4 KiB, and 8 ms in pages of 2 MiB or in used ones.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_FROM_BYTES = 4 << 20
MOST_KEPT = 512 << 20
"""Bytes of memory that no tensor uses any more and that are kept for the next ones."""
_kept: dict[int, list[mmap.mmap]] = {}  # by size


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` in CPU memory, whatever torch's default device is (models are built under "meta")."""
    size = math.prod(shape) * dtype.itemsize
    memory = _memory(size) if size >= _FROM_BYTES else None
    if memory is None:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    # The tensor's storage owns the array, the array keeps the memory busy: when both are gone, it is free again.
    array = (ctypes.c_char * size).from_buffer(memory)
    weakref.finalize(array, _keep, memory).atexit = False
    return torch.frombuffer(array, dtype=dtype).view(tuple(shape))


def empty_f32(shape: Sequence[int]) -> Tensor:
    """A new fp32 tensor in CPU memory."""
    return empty(shape, torch.float32)


def _memory(size: int) -> mmap.mmap | None:
    """None where the system refuses: torch knows how to say that there is no memory."""
    try:
        return _kept[size].pop()
    except (KeyError, IndexError):
        pass
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # advice only
    except (OSError, ValueError):
        return None
    return memory


def _keep(memory: mmap.mmap) -> None:
    """May run in any thread, between any two steps of another one, so every step here is one for the interpreter."""
    if kept_bytes() + len(memory) <= MOST_KEPT:
        _kept.setdefault(len(memory), []).append(memory)


def kept_bytes() -> int:
    """Bytes that are kept now."""
    return sum(size * len(same) for size, same in list(_kept.items()))


def forget() -> None:
    """Gives what is kept back to the system."""
    _kept.clear()
