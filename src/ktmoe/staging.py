"""Host memory between a device and the engine.

A forward on a stream takes one `Staging` when it is submitted and gives it back when it is synced: what the next
forward on this stream enqueues comes after that, so the memory can be used again at once. Batch sizes that a server
captures in CUDA graphs keep their memory, because a graph goes on using it; other memory is freed when the stream has
passed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .streams import Mark, Stream, of_parent

_BF16 = torch.bfloat16


class Staging:
    """The inputs and outputs of a forward of `rows` tokens."""

    def __init__(self, stream: Stream, inputs: tuple[Tensor, Tensor, Tensor], key: Hashable, persistent: bool) -> None:
        self.stream, self.key, self.persistent = stream, key, persistent
        self.inputs = tuple(stream.pinned(tuple(t.shape), t.dtype) for t in inputs)
        self.out = stream.pinned(tuple(inputs[0].shape), _BF16)
        self._later: Tensor | None = None
        self.rows: int = inputs[0].shape[0]
        self.n_tokens = torch.full((1,), self.rows, dtype=torch.int32, device="cpu")

    @property
    def later(self) -> Tensor:
        """Where deferred experts go: like `out`."""
        if self._later is None:
            self._later = self.stream.pinned(tuple(self.out.shape), _BF16)
        return self._later


class StagingPool:
    """The staging memory of one engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[Hashable, list[Staging]] = {}
        self._passing: list[tuple[Mark, Staging]] = []
        self._generation = 0
        _pools.add(self)

    def take(self, stream: Stream, inputs: tuple[Tensor, Tensor, Tensor]) -> Staging:
        """Memory for inputs of these shapes and dtypes.

        RuntimeError in a stream that is being captured if the batch size is not one of the captured sizes: its memory
        would be gone when the graph is replayed.
        """
        rows = inputs[0].shape[0]
        persistent = rows in _captured_sizes
        if stream.capturing and not persistent:
            raise RuntimeError(
                f"batch size {rows} is being captured, but set_capture_batch_sizes got {sorted(_captured_sizes)}: "
                "name every captured size before the capture"
            )
        with self._lock:
            if not stream.capturing:  # a stream must not be asked then
                self._passing = [(mark, staging) for mark, staging in self._passing if not mark.query()]
            key = (self._generation, *((tuple(t.shape), t.dtype) for t in inputs))
            free = self._free.get(key, [])
            staging = next((s for s in reversed(free) if s.stream.key == stream.key), None)
            if staging is None and stream.capturing and free:
                # That of another stream: a warm-up has run there, and it has to be done before the graph runs. To pin
                # new memory is more than CUDA may allow during a capture.
                staging = free[-1]
                staging.stream = stream
            if staging is not None:
                free.remove(staging)
                return staging
        return Staging(stream, inputs, key, persistent)

    def give_back(self, staging: Staging) -> None:
        """The last work with this memory has been enqueued."""
        with self._lock:
            if staging.persistent and staging.key[0] == self._generation:  # type: ignore[index]
                self._free.setdefault(staging.key, []).append(staging)
            else:
                self._passing.append((staging.stream.mark(), staging))

    def clear(self) -> None:
        """Frees what is kept for captured batch sizes; what is in use is freed when its stream has passed."""
        with self._lock:
            free, self._free = self._free, {}
            self._generation += 1
        streams = {s.stream.key: s.stream for sets in free.values() for s in sets}
        for stream in streams.values():
            stream.finish()

    def _after_fork(self) -> None:
        of_parent.append((self._free, self._passing))
        self._lock = threading.Lock()
        self._free, self._passing = {}, []


_pools: weakref.WeakSet[StagingPool] = weakref.WeakSet()
_captured_sizes: list[int] = []
_replay_sizes: dict[int, Tensor] = {}


def set_captured_sizes(sizes: Sequence[int]) -> None:
    """Batch sizes whose memory is kept."""
    _captured_sizes[:] = sizes


def captured_sizes() -> list[int]:
    return list(_captured_sizes)


def replay_size(rows: int) -> Tensor:
    """int32 [1]: how many tokens graphs captured with `rows` tokens compute. Read whenever a graph runs."""
    return _replay_sizes.setdefault(rows, torch.full((1,), rows, dtype=torch.int32, device="cpu"))


def clear_all() -> None:
    """Frees the kept memory of all engines."""
    for pool in list(_pools):
        pool.clear()
    _replay_sizes.clear()
