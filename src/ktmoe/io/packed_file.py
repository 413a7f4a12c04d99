"""Packed experts of one layer in a safetensors file that is mapped, not read.

    ktmoe-layer-00007.safetensors
      header      JSON, padded with spaces: the data begin at a multiple of 4096; the metadata are those of `PackedInfo`
      experts     U8 [n, expert_bytes], rows a multiple of 4096: what MoeLayer.read_expert gives and attach runs on
      gate_bias   F32 [n, inter], up_bias F32 [n, inter], down_bias F32 [n, hidden]: only for experts with biases
      checksums   U8 [n + 1, 32]: SHA-256 of row e of all tensors above, in this order; the last one is of the header

The bytes depend on the weights, the formats and the layout version alone: not on the ISA, the threads or the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import WeightFileError
from .safetensors_file import SafetensorsFile

Bytes = npt.NDArray[np.uint8]

ALIGNMENT = 4096
DIGEST_BYTES = 32
BIASES = {"gate_bias": "inter", "up_bias": "inter", "down_bias": "hidden"}
"""Optional tensors, and the dimension that their rows have."""
_MARK, _VERSION = "ktmoe_packed", "1"
_TEXT = re.compile(r"[ -~]{0,200}")
_NUMBER = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True)
class PackedInfo:
    """What a file holds."""

    method: str
    gate_up_format: str
    down_format: str
    layout_version: int
    layer: int
    n_experts: int
    hidden: int
    inter: int
    expert_bytes: int
    source: str
    """Fingerprint of what was packed."""

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it: strings."""
        return {_MARK: _VERSION} | {name: str(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], path: str) -> PackedInfo:
        """WeightFileError, naming the field, for metadata that are not ours."""
        if metadata.get(_MARK) != _VERSION:
            got = repr(metadata.get(_MARK))[:50]
            raise WeightFileError(f"{path}: metadata {_MARK!r}: got {got}, expected {_VERSION!r}: no packed experts")
        values: dict[str, str | int] = {}
        for item in dataclasses.fields(cls):
            text, number = metadata.get(item.name), item.type == "int"
            if not isinstance(text, str) or not (_NUMBER if number else _TEXT).fullmatch(text):
                expected = "a number" if number else "a short text"
                raise WeightFileError(f"{path}: metadata {item.name!r}: got {text!r:.100}, expected {expected}")
            values[item.name] = int(text) if number else text
        return cls(**values)  # type: ignore[arg-type]

    @property
    def formats(self) -> tuple[str, str]:
        """Of gate/up and of down."""
        return self.gate_up_format, self.down_format

    def difference(self, expected: PackedInfo) -> str:
        """The first field in which this is not what was expected, for a message; empty if there is none."""
        for item in dataclasses.fields(self):
            got, want = getattr(self, item.name), getattr(expected, item.name)
            if got != want:
                return f"{item.name}: got {got}, expected {want}"
        return ""


@dataclass(frozen=True)
class PackedLayer:
    """An open file, mapped read-only: the pages belong to the page cache and all processes share them."""

    path: str
    info: PackedInfo
    experts: Bytes
    """[n, expert_bytes], read-only."""
    biases: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def layer_file(layer: int) -> str:
    """The name of the file of one layer."""
    return f"ktmoe-layer-{layer:05}.safetensors"


def header_bytes(info: PackedInfo, biases: Sequence[str] = ()) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The padded header with its length field, and tensor name -> (offset in the file, bytes of a row)."""
    n = info.n_experts
    shapes: dict[str, tuple[str, int, int, int]] = {"experts": ("U8", n, info.expert_bytes, 1)}
    shapes |= {name: ("F32", n, getattr(info, BIASES[name]), 4) for name in BIASES if name in biases}
    shapes["checksums"] = ("U8", n + 1, DIGEST_BYTES, 1)
    header: dict[str, object] = {"__metadata__": info.to_metadata()}
    places, begin = {}, 0
    for name, (dtype, rows, columns, size) in shapes.items():
        places[name] = (begin, columns * size)
        end = begin + rows * columns * size
        header[name] = {"dtype": dtype, "shape": [rows, columns], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: (base + at, size) for n, (at, size) in places.items()}


def header_digest(header: bytes) -> bytes:
    """The last row of `checksums`."""
    return hashlib.sha256(header).digest()


def open_packed(path: str | os.PathLike[str]) -> PackedLayer:
    """Maps a file after every check that does not read the weights; `verify_packed` reads them.

    WeightFileError, naming the file and what differs. A file that is cut while it is mapped kills the process (SIGBUS):
    replace packed files by renaming, as `ktmoe quantize` does, never in place.
    """
    with SafetensorsFile(os.fspath(path)) as file:
        info, biases = check_header(file)
        experts = file.map_bytes("experts").reshape(info.n_experts, info.expert_bytes)
        loaded = {name: file.read(name, (info.n_experts, getattr(info, BIASES[name]))).numpy() for name in biases}
    return PackedLayer(file.path, info, experts, loaded)


def read_info(path: str | os.PathLike[str]) -> PackedInfo:
    """What the file holds, after the same checks as `open_packed`."""
    with SafetensorsFile(os.fspath(path)) as file:
        return check_header(file)[0]


def check_header(file: SafetensorsFile) -> tuple[PackedInfo, list[str]]:
    """The header must be, byte for byte, the one that its own metadata ask for; so nothing in it is left unchecked."""
    info = PackedInfo.from_metadata(file.metadata, file.path)
    if info.expert_bytes % ALIGNMENT or not info.expert_bytes or not info.n_experts:
        raise WeightFileError(
            f"{file.path}: got {info.n_experts} experts of {info.expert_bytes} bytes, expected a positive multiple "
            f"of {ALIGNMENT} bytes each"
        )
    biases = [name for name in BIASES if name in file.entries]
    want, places = header_bytes(info, biases)
    if file.size != sum(places["checksums"]) + info.n_experts * DIGEST_BYTES:
        raise WeightFileError(f"{file.path}: got {file.size} bytes, which do not fit the metadata of the file")
    got = bytearray(len(want))
    file.pread(0, memoryview(got), "header")
    digest = bytearray(DIGEST_BYTES)
    file.pread(file.size - DIGEST_BYTES, memoryview(digest), "checksum of the header")
    if got != want or digest != header_digest(want):
        raise WeightFileError(f"{file.path}: the header is damaged or was edited (its checksum does not fit)")
    return info, biases
