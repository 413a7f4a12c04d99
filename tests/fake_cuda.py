"""Streams on a stand-in for the CUDA driver (native/fake_cuda.cc). CPU tensors stand for tensors on the device."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Hashable, Iterator
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native") / "fake_cuda.cc"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(folder: Path) -> Path:
    library = folder / "libfakecuda.so"
    subprocess.run(
        [str(compiler()), "-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library)],
        check=True,
    )
    return library


_ARGUMENTS = {
    "stream_create": [],
    "stream_destroy": [ctypes.c_void_p],
    "copy": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t],
    "hold": [ctypes.c_void_p, ctypes.c_bool],
    "mark": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)],
    "synchronize": [ctypes.c_void_p],
    "begin_capture": [ctypes.c_void_p],
    "end_capture": [ctypes.c_void_p],
    "capturing": [ctypes.c_void_p],
    "replay": [ctypes.c_void_p, ctypes.c_void_p],
    "fail_launches": [ctypes.c_int],
    "violations": [],
}
_RESULTS = {"stream_create": ctypes.c_void_p, "end_capture": ctypes.c_void_p, "capturing": ctypes.c_bool}


class Driver:
    """The library. ctypes gives up the GIL in every call; keep_gil=True keeps it."""

    def __init__(self, path: Path, keep_gil: bool = False) -> None:
        self.path = path
        library = (ctypes.PyDLL if keep_gil else ctypes.CDLL)(str(path))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"fake_{name}")
            function.argtypes, function.restype = arguments, _RESULTS.get(name, ctypes.c_int)
            setattr(self, name, function)


class FakeMark:
    def __init__(self) -> None:
        self.flag = ctypes.c_int(0)

    def query(self) -> bool:
        return bool(self.flag.value)


class FakeStream:
    """`ktmoe.streams.Stream` on the stand-in."""

    def __init__(self, device: Device) -> None:
        self.device, self.handle = device, device.handle
        self.key: Hashable = ("fake", device.handle)
        self.capturing = bool(device.driver.capturing(device.handle))

    def use(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 77, dtype=dtype)  # rubbish, as new memory has it

    def to_host(self, host: Tensor, tensor: Tensor) -> None:
        self.device.copy(host, tensor, tensor)

    def to_device(self, host: Tensor) -> Tensor:
        tensor = torch.full_like(host, 55)
        self.device.copy(tensor, host, tensor)
        return tensor

    def mark(self) -> FakeMark:
        mark = FakeMark()
        self.device.keep.append(mark)
        self.device.driver.mark(self.handle, ctypes.byref(mark.flag))
        return mark

    def finish(self) -> None:
        self.device.synchronize()


class Device:
    """One stream, and what a test does with it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handle: int = driver.stream_create()
        self.keep: list[object] = []
        """Memory of the device: a real allocator does not give it to others before the stream is done with it."""

    def stream_of(self, tensor: object, handle: int | None) -> FakeStream | None:
        """In place of `ktmoe.streams.stream_of`: the handle tells that the tensor is on the device."""
        return None if handle is None else FakeStream(self)

    def copy(self, to: Tensor, tensor: Tensor, on_device: Tensor) -> None:
        """Enqueues a copy between the device and the host, whose memory is not kept: that is for ktmoe to do."""
        source = tensor.contiguous()
        assert to.is_contiguous()
        assert (to.dtype, to.shape) == (source.dtype, source.shape)
        self.keep += [on_device, source] if on_device is tensor else [on_device]
        self.driver.copy(self.handle, to.data_ptr(), source.data_ptr(), source.nbytes)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Enqueues what a kernel may do: new contents for a tensor on the device."""
        self.copy(tensor, value, value)

    def synchronize(self) -> None:
        self.driver.synchronize(self.handle)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The stream stands still meanwhile."""
        self.driver.hold(self.handle, True)
        try:
            yield
        finally:
            self.driver.hold(self.handle, False)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[int]]:
        """The list gets the graph."""
        graph: list[int] = []
        self.driver.begin_capture(self.handle)
        try:
            yield graph
        finally:
            graph.append(self.driver.end_capture(self.handle))

    def replay(self, graph: list[int]) -> None:
        self.driver.replay(graph[0], self.handle)
        self.synchronize()

    def destroy(self) -> None:
        self.driver.hold(self.handle, False)
        self.synchronize()
        self.driver.stream_destroy(self.handle)
