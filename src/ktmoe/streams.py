"""A CUDA stream as a forward sees it: copies, and where the engine's host functions go. Only this knows torch.cuda."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place among the work of a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it."""


class Stream(Protocol):
    """What a forward asks of a stream. Everything is enqueued in order; nothing waits, except `finish`."""

    key: Hashable
    """Equal for what is ordered by one stream."""
    handle: int
    """Of the driver (CUstream)."""
    capturing: bool
    """Whether work goes into a graph instead of running."""

    def use(self) -> AbstractContextManager[object]:
        """While it is open, the device and the stream are current for torch and the driver."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that copies of the stream can use."""

    def to_host(self, host: Tensor, tensor: Tensor) -> None:
        """Enqueues a copy from the device."""

    def to_device(self, host: Tensor) -> Tensor:
        """Enqueues a copy to a new tensor on the device."""

    def mark(self) -> Mark: ...

    def finish(self) -> None:
        """Waits until the device has done all that was enqueued."""


class TorchStream:
    """A stream of torch.cuda. handle: a CUstream as an integer; None: the current stream of the device."""

    def __init__(self, device: torch.device, handle: int | None) -> None:
        self._caller = torch.cuda.current_stream(device)
        self._stream: torch.cuda.Stream = self._caller
        if handle is not None and handle != self._caller.cuda_stream:
            self._stream = torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]
        self._device = device
        self.handle: int = self._stream.cuda_stream
        self.key: Hashable = (device.index, self.handle)
        with self.use():
            self.capturing: bool = torch.cuda.is_current_stream_capturing()

    def use(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def to_host(self, host: Tensor, tensor: Tensor) -> None:
        host.copy_(tensor, non_blocking=True)
        self._share(tensor, self._stream)

    def to_device(self, host: Tensor) -> Tensor:
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        tensor.copy_(host, non_blocking=True)
        self._share(tensor, self._caller)
        return tensor

    def _share(self, tensor: Tensor, user: torch.cuda.Stream) -> None:
        """The memory of a tensor must not be given to others before `user`, too, is done with it."""
        if self._stream is not self._caller:
            tensor.record_stream(user)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)


of_parent: list[object] = []
"""Where a forked child keeps what belongs to the parent's device or threads: to free it, it would have to ask them."""


def stream_of(tensor: object, handle: int | None) -> Stream | None:
    """The stream on which a forward of `tensor` runs; None for everything that is not a CUDA tensor."""
    if isinstance(tensor, Tensor) and tensor.is_cuda:
        return TorchStream(tensor.device, handle)
    return None
