"""What this process holds in RAM, and the most that it held. Linux only, in bytes.

Pages of mapped files count while they are resident, so a file that was only read from is dropped first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

PROCESS = Path("/proc/self")
_FORGET_PEAK = "5"
_DONT_NEED = 4


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    """The most since `forget_peak`, or since the start of the process."""
    return _status("VmHWM")


def forget_peak() -> None:
    (PROCESS / "clear_refs").write_text(_FORGET_PEAK)


def drop_pages(mapped: Sequence[Tensor]) -> None:
    """Takes pages of tensors of `torch.from_file(..., shared=True)` out of this process; reads bring them back."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for tensor in mapped:
        if madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), _DONT_NEED):
            raise OSError(ctypes.get_errno(), "madvise")


def _status(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{PROCESS / 'status'} has no {field}")
