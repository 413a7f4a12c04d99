"""The pipeline that makes a packed file: read the next expert, pack this one, write the ones before it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import WeightFileError
from .io.packed_file import PackedInfo, read_info
from .io.packed_writer import PackedWriter
from .io.read_ahead import read_ahead

if TYPE_CHECKING:
    from .io.published import PublishedExpert

Progress = Callable[[int], None]
"""Called after each expert with the bytes of its source."""
ReadExpert = Callable[[int], "PublishedExpert"]
"""Reads one expert, by its number in the file."""

_BUFFERS = 3  # one is filled while the others are written


class Packer(Protocol):
    """Packs one expert at a time: a wrapper of a layer with a single expert."""

    layer: Any

    def put_expert(self, expert: int, weights: PublishedExpert) -> None: ...


def pack_layer(
    packer: Packer,
    read: ReadExpert,
    info: PackedInfo,
    path: str,
    progress: Progress | None = None,
    *,
    biases: Sequence[str] = (),
    reuse: bool = True,
) -> None:
    """Packs the experts 0..n-1 of one layer to the file `path`; memory: two experts of the source, three packed ones.

    biases: the names of those that every expert has.
    reuse: keep a file that is there and has the same `info`. Atomic: whatever happens, `path` is absent, old or
    complete. OSError if it cannot be written; what `read` raises.
    """
    if reuse and holds(path, info):
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with PackedWriter(path, info, biases) as writer:
        if reuse and holds(path, info):  # by the process that we have waited for
            return
        writer.reserve()
        buffers = [np.empty(info.expert_bytes, np.uint8) for _ in range(_BUFFERS)]
        with ThreadPoolExecutor(_BUFFERS - 1, "ktmoe-write") as threads:
            writes: deque[Future[None]] = deque()

            def use(expert: int, weights: PublishedExpert) -> None:
                packer.put_expert(0, weights)
                if len(writes) == _BUFFERS:
                    writes.popleft().result()
                buffer = buffers[expert % _BUFFERS]
                packer.layer.read_expert(0, buffer)
                own = {name: weights.biases[name].numpy() for name in biases}
                writes.append(threads.submit(writer.put, expert, buffer, own))
                if progress is not None:
                    progress(weights.nbytes)

            read_ahead(read, range(info.n_experts), use)
            while writes:
                writes.popleft().result()
        writer.commit()


def holds(path: str, info: PackedInfo) -> bool:
    """True if there is a sound file with exactly this content at `path`. Reads the header, not the weights."""
    return held(path) == info


def held(path: str) -> PackedInfo | None:
    """What the file at `path` says of itself; None if there is none, or a damaged one, which is to be packed again."""
    try:
        return read_info(path)
    except WeightFileError:
        return None
