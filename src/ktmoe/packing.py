"""The pipeline that makes a packed file: read the next expert, pack this one, write the ones before it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from .errors import WeightFileError
from .io.packed_file import PackedInfo, read_info
from .io.packed_writer import PackedWriter
from .io.read_ahead import read_ahead

Progress = Callable[[int], None]
"""Called after each expert with the bytes of its source."""
ReadExpert = Callable[[int], tuple[Tensor, ...]]
"""Reads one expert, by its number in the file: gate, up [inter, hidden] and down [hidden, inter], bf16."""

_BUFFERS = 3  # one is filled while the others are written


class Packer(Protocol):
    """Packs one expert at a time: a wrapper of a layer with a single expert."""

    layer: Any

    def load_expert(self, expert: int, *args: Any, **kwargs: Any) -> None: ...


def pack_layer(
    packer: Packer,
    read: ReadExpert,
    info: PackedInfo,
    path: str,
    progress: Progress | None = None,
    *,
    reuse: bool = True,
) -> None:
    """Packs the experts 0..n-1 of one layer to the file `path`; memory: two experts of the source, three packed ones.

    reuse: keep a file that is there and has the same `info`. Atomic: whatever happens, `path` is absent, old or
    complete. OSError if it cannot be written; what `read` raises.
    """
    if reuse and holds(path, info):
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with PackedWriter(path, info) as writer:
        if reuse and holds(path, info):  # by the process that we have waited for
            return
        writer.reserve()
        buffers = [np.empty(info.expert_bytes, np.uint8) for _ in range(_BUFFERS)]
        with ThreadPoolExecutor(_BUFFERS - 1, "ktmoe-write") as threads:
            writes: deque[Future[None]] = deque()

            def use(expert: int, tensors: tuple[Tensor, ...]) -> None:
                packer.load_expert(0, *tensors)
                if len(writes) == _BUFFERS:
                    writes.popleft().result()
                buffer = buffers[expert % _BUFFERS]
                packer.layer.read_expert(0, buffer)
                writes.append(threads.submit(writer.put, expert, buffer))
                if progress is not None:
                    progress(sum(tensor.nbytes for tensor in tensors))

            read_ahead(read, range(info.n_experts), use)
            while writes:
                writes.popleft().result()
        writer.commit()


def holds(path: str, info: PackedInfo) -> bool:
    """True if there is a sound file with exactly this content at `path`. Reads the header, not the weights."""
    if not os.path.exists(path):
        return False
    try:
        return read_info(path) == info
    except WeightFileError:
        return False
