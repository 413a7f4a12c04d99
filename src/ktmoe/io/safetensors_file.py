"""One safetensors file.

The official reader judges the header. Bytes are then read with pread at the offsets of the accepted header, one tensor
or one expert at a time: a file that shrinks meanwhile is an exception here, where a mapped one would kill the process,
and no page of the file counts as our memory. Only our own packed files are mapped.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightFileError
from .index_json import check_tensor_name, open_regular, parse_object
from .limits import MAX_HEADER_BYTES, MAX_TENSORS

FLOAT_DTYPES: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes that plain weights are read from, by their name in the file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int


class SafetensorsFile:
    """An open file. WeightFileError, naming file and tensor, for whatever is wrong with it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = open_regular(path)
        try:
            self.size = os.fstat(self._fd).st_size
            """Bytes of the file."""
            self.metadata: dict[str, object] = {}
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; harmless if repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fail(self, text: str) -> WeightFileError:
        return WeightFileError(f"{self.path}: {text}")

    def pread(self, offset: int, into: memoryview, what: str) -> None:
        """Fills `into`, all of it; `what` is for the message."""
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if count == 0:
                raise self._fail(f"{what}: got {done} bytes, expected {len(into)}: the file is truncated")
            done += count

    def _read_header(self) -> dict[str, TensorEntry]:
        size = self.size
        prefix = bytearray(8)
        self.pread(0, memoryview(prefix), "header size")
        length: int = struct.unpack("<Q", prefix)[0]
        if length > MAX_HEADER_BYTES:
            raise self._fail(f"got a header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise self._fail(f"header: got {size} bytes of file, expected at least {8 + length}: the file is truncated")
        try:
            # The official verdict: JSON, dtypes, shapes, offsets without gap or overlap, and the size of the file.
            # Opened through the descriptor: the very file that is read below, whatever its name points to by now.
            safe_open(f"/proc/self/fd/{self._fd}", framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise self._fail(f"refused by safetensors ({size} bytes of file): {error}") from error
        header = bytearray(length)
        self.pread(8, memoryview(header), "header")
        fields = parse_object(bytes(header), self.path)
        metadata = fields.pop("__metadata__", None)
        self.metadata = metadata if isinstance(metadata, dict) else {}
        if len(fields) > MAX_TENSORS:
            raise self._fail(f"got {len(fields)} tensors, expected at most {MAX_TENSORS}")
        return {check_tensor_name(n, self.path): self._entry(n, f, 8 + length, size) for n, f in fields.items()}

    def _entry(self, name: str, field: Any, base: int, size: int) -> TensorEntry:
        # The file may have changed since it was judged, so what is used of it is checked once more.
        try:
            begin, end = (int(x) for x in field["data_offsets"])
            entry = TensorEntry(str(field["dtype"]), tuple(int(x) for x in field["shape"]), base + begin, end - begin)
        except (TypeError, KeyError, ValueError) as error:
            raise self._fail(f"tensor {name!r}: damaged header entry") from error
        if not 0 <= begin <= end or base + end > size or min(entry.shape, default=0) < 0:
            raise self._fail(f"tensor {name!r}: got bytes {begin}..{end}, expected them in 0..{size - base}")
        return entry

    def entry(self, name: str) -> TensorEntry:
        """WeightFileError if the file has no such tensor."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._fail(f"tensor {name!r} is missing")
        return entry

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        index: int | None = None,
        dtypes: Mapping[str, torch.dtype] = FLOAT_DTYPES,
    ) -> Tensor:
        """The tensor, or with `index` its part [index], in the dtype of the file, in memory of its own.

        `shape` is what the whole tensor must have; WeightFileError for another one and for a dtype that is not in
        `dtypes` (BF16, F16, F32), before memory is allocated.
        """
        entry = self.entry(name)
        if entry.shape != shape:
            raise self._fail(f"tensor {name!r}: got shape {list(entry.shape)}, expected {list(shape)}")
        dtype = dtypes.get(entry.dtype)
        if dtype is None:
            raise self._fail(f"tensor {name!r}: got dtype {entry.dtype}, expected {', '.join(dtypes)}")
        count = 1
        for dim in shape:
            count *= dim
        if entry.nbytes != count * dtype.itemsize:
            raise self._fail(f"tensor {name!r}: got {entry.nbytes} bytes, expected {count * dtype.itemsize}")
        offset = entry.offset
        if index is not None:
            count //= shape[0]
            shape = shape[1:]
            offset += index * count * dtype.itemsize
        result = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        if count:
            self.pread(offset, result.numpy().data, f"tensor {name!r}")
        return result.view(dtype).view(shape)

    def map_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, mapped shared and read-only: flat, nothing is read or copied.

        WeightFileError if the tensor does not begin at a page.
        """
        entry = self.entry(name)
        if entry.offset % mmap.ALLOCATIONGRANULARITY:
            raise self._fail(f"tensor {name!r}: got offset {entry.offset}, expected whole pages")
        try:
            mapped = mmap.mmap(self._fd, entry.nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=entry.offset)
        except (OSError, ValueError) as error:
            raise self._fail(f"tensor {name!r}: cannot be mapped: {error}") from error
        return np.frombuffer(mapped, np.uint8)
