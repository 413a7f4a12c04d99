"""The header of one GGUF file: where each tensor lies.

`gguf.GGUFReader` trusts the counts and lengths of a file, keeps every word of a vocabulary as an array of its own, and
maps the file, so that one that shrinks kills the process. This walks the same few structures with pread, in bounds:

    "GGUF", u32 version, u64 tensors, u64 keys
    keys:     string name, u32 type, value               a string is u64 length, bytes
    tensors:  string name, u32 dimensions, u64 sizes (fastest first), u32 type, u64 offset
    data at the next multiple of general.alignment
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import WeightFileError
from .gguf_types import block_of, type_of
from .index_json import open_regular
from .limits import (
    MAX_GGUF_ALIGNMENT,
    MAX_GGUF_HEADER_BYTES,
    MAX_GGUF_KEYS,
    MAX_GGUF_STRING_BYTES,
    MAX_GGUF_STRINGS,
    MAX_NAME_CHARS,
    MAX_TENSORS,
)

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """Where a tensor lies."""

    type: str
    """GGUF's name, such as "Q4_K"; "type 99" for one that the gguf package does not know."""
    shape: tuple[int, ...]
    """Slowest dimension first."""
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int
    """-1 for an unknown type."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says about itself."""

    tensors: Mapping[str, GgufEntry]
    keys: Mapping[str, int]
    """The keys with integer values that are used: alignment, split numbers, numbers of layers (without the name of the
    architecture, which they begin with)."""
    architecture: str
    """general.architecture, "" if it is missing."""
    stamp: tuple[int, ...]
    """`stamp_of` the file."""


_USED_KEYS = ("general.alignment", "split.no", "split.count")
_LAYER_KEYS = ("block_count", "nextn_predict_layers")
_UNSIGNED = (0, 2, 4, 10)


def read_header(path: str) -> GgufHeader:
    """The header of the file. Remembered until the file changes. WeightFileError for whatever is wrong with it."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise WeightFileError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    return _read(os.path.abspath(path), stamp_of(status))


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced; the size first."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


@functools.lru_cache(maxsize=64)  # a model of many layers asks for the same split files once a layer
def _read(path: str, stamp: tuple[int, ...]) -> GgufHeader:
    descriptor = open_regular(path)
    try:
        if stamp_of(os.fstat(descriptor)) != stamp:
            raise WeightFileError(f"{path}: changed while it was opened")
        return _parse(_Walker(path, descriptor, stamp[0]), stamp)
    finally:
        os.close(descriptor)


class _Walker:
    """Reads a header from its start in windows. WeightFileError beyond the end of the file or the bound on headers."""

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self.path = path
        self.at = 0
        self.strings = 0
        """Strings of arrays so far."""
        self._descriptor = descriptor
        self._size = size
        self._window, self._begin = b"", 0

    def fail(self, text: str) -> WeightFileError:
        return WeightFileError(f"{self.path}: {text}")

    def skip(self, count: int, what: str) -> None:
        if count > self._size - self.at:
            raise self.fail(
                f"{what}: got {self._size - self.at} bytes, expected {count}: the file is truncated or damaged"
            )
        if self.at + count > MAX_GGUF_HEADER_BYTES:
            raise self.fail(f"{what}: the header is longer than {MAX_GGUF_HEADER_BYTES} bytes")
        self.at += count

    def take(self, count: int, what: str) -> bytes:
        begin = self.at
        self.skip(count, what)
        if begin < self._begin or self.at > self._begin + len(self._window):
            self._begin, self._window = begin, os.pread(self._descriptor, max(count, _WINDOW), begin)
        data = self._window[begin - self._begin : self.at - self._begin]
        if len(data) != count:
            raise self.fail(f"{what}: got {len(data)} bytes, expected {count}: the file is truncated")
        return data

    def number(self, format: str, what: str) -> int:
        value: int = struct.unpack(format, self.take(struct.calcsize(format), what))[0]
        return value

    def bounded(self, format: str, limit: int, what: str) -> int:
        value = self.number(format, what)
        if value > limit:
            raise self.fail(f"{what}: got {value}, expected at most {limit}")
        return value

    def name(self, what: str) -> str:
        data = self.take(self.bounded("<Q", MAX_NAME_CHARS, f"length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what}: not UTF-8") from error

    def skip_string(self, what: str) -> None:
        self.skip(self.bounded("<Q", MAX_GGUF_STRING_BYTES, f"length of {what}"), what)


def _parse(walker: _Walker, stamp: tuple[int, ...]) -> GgufHeader:
    if walker.take(4, "magic") != b"GGUF":
        raise walker.fail("not a GGUF file")
    version = walker.number("<I", "version")
    if version & 0xFFFF == 0:
        raise walker.fail("a big-endian GGUF file; only little-endian ones are read")
    if version not in (2, 3):
        raise walker.fail(f"got GGUF version {version}, expected 2 or 3")
    n_tensors = walker.bounded("<Q", MAX_TENSORS, "number of tensors")
    n_keys = walker.bounded("<Q", MAX_GGUF_KEYS, "number of keys")
    keys, architecture = _read_keys(walker, n_keys)
    alignment = keys.get("general.alignment", 32)
    if not 0 < alignment <= MAX_GGUF_ALIGNMENT or alignment & (alignment - 1):
        raise walker.fail(f"general.alignment: got {alignment}, expected a power of two up to {MAX_GGUF_ALIGNMENT}")
    infos = _read_infos(walker, n_tensors)
    base = -(-walker.at // alignment) * alignment
    tensors = {name: _entry(walker, name, info, base, stamp[0]) for name, info in infos.items()}
    _refuse_overlap(walker, tensors)
    return GgufHeader(MappingProxyType(tensors), MappingProxyType(keys), architecture, stamp)


def _read_keys(walker: _Walker, count: int) -> tuple[dict[str, int], str]:
    """Walks over all keys; returns the numbers that are used, and the architecture."""
    used: dict[str, int] = {}
    architecture = ""
    for number in range(count):
        key = walker.name(f"name of key {number}")
        kind = walker.number("<I", f"type of key {key!r}")
        what = f"key {key!r}"
        if key in _USED_KEYS:
            if kind not in _UNSIGNED:
                raise walker.fail(f"{what}: got value type {kind}, expected an unsigned integer")
            if key in used:
                raise walker.fail(f"{what} occurs twice")
            used[key] = walker.number(_SCALARS[kind], what)
        elif key.partition(".")[2] in _LAYER_KEYS and kind in _UNSIGNED:
            used[key.partition(".")[2]] = walker.number(_SCALARS[kind], what)
        elif key == "general.architecture" and kind == _STRING:
            architecture = walker.name(what)
        elif kind == _ARRAY:
            _skip_array(walker, what)
        else:
            _skip_value(walker, kind, what)
    return used, architecture


def _skip_value(walker: _Walker, kind: int, what: str) -> None:
    if kind == _STRING:
        walker.skip_string(what)
    elif kind in _SCALARS:
        walker.skip(struct.calcsize(_SCALARS[kind]), what)
    else:
        raise walker.fail(f"{what}: got value type {kind}, which GGUF does not have")


def _skip_array(walker: _Walker, what: str) -> None:
    kind = walker.number("<I", what)
    if kind == _STRING:
        count = walker.number("<Q", what)
        walker.strings += count
        if walker.strings > MAX_GGUF_STRINGS:
            raise walker.fail(f"{what}: got {count} strings, expected at most {MAX_GGUF_STRINGS} in the file")
        for _ in range(count):
            walker.skip_string(what)
    elif kind in _SCALARS:
        walker.skip(walker.number("<Q", what) * struct.calcsize(_SCALARS[kind]), what)
    else:
        raise walker.fail(f"{what}: got an array of value type {kind}, expected numbers or strings")


_Info = tuple[tuple[int, ...], int, int]
"""Shape, type number, offset from the start of the data."""


def _read_infos(walker: _Walker, count: int) -> dict[str, _Info]:
    infos: dict[str, _Info] = {}
    for number in range(count):
        name = walker.name(f"name of tensor {number}")
        what = f"tensor {name!r}"
        if name in infos:
            raise walker.fail(f"{what} occurs twice")
        dims = walker.bounded("<I", 4, f"{what}: dimensions")
        shape = tuple(walker.number("<Q", what) for _ in range(dims))[::-1]
        infos[name] = (shape, walker.number("<I", what), walker.number("<Q", what))
    return infos


def _entry(walker: _Walker, name: str, info: _Info, base: int, size: int) -> GgufEntry:
    shape, number, offset = info
    kind = type_of(number)
    if kind is None:
        return GgufEntry(f"type {number}", shape, base + offset, -1)
    block, block_bytes = block_of(kind)
    count = 1
    for dim in shape:
        count *= dim
    if shape and shape[-1] % block:
        raise walker.fail(f"tensor {name!r}: got rows of {shape[-1]} weights, expected a multiple of {block}")
    nbytes = count // block * block_bytes
    if base + offset + nbytes > size:
        raise walker.fail(
            f"tensor {name!r}: got bytes {offset}..{offset + nbytes} of the data, expected them in "
            f"0..{max(size - base, 0)}: the file is truncated or damaged"
        )
    return GgufEntry(kind.name, shape, base + offset, nbytes)


def _refuse_overlap(walker: _Walker, tensors: Mapping[str, GgufEntry]) -> None:
    end, last = 0, ""
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        if entry.offset < end and entry.nbytes > 0:
            raise walker.fail(f"tensor {name!r} lies on tensor {last!r}")
        if entry.offset + entry.nbytes > end:
            end, last = entry.offset + entry.nbytes, name
