"""A folder of packed layers: `ktmoe-packed.json` beside one file per layer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from ..errors import WeightFileError
from .index_json import open_regular, parse_object
from .limits import MAX_INDEX_BYTES
from .packed_file import layer_file, read_info
from .packed_writer import write_file

INDEX = "ktmoe-packed.json"
_VERSION = 1


@dataclass(frozen=True)
class PackedIndex:
    """What the folder holds, or will hold when `ktmoe quantize` has finished."""

    method: str
    layout_version: int
    source: str
    """Fingerprint of what was packed."""
    source_path: str = ""
    """Where it was, for `ktmoe verify`."""
    layers: tuple[int, ...] | None = None
    """None: whatever files are there."""


def is_packed_dir(folder: str) -> bool:
    """True if the folder says that it holds packed layers."""
    return os.path.isfile(os.path.join(folder, INDEX))


def write_packed_index(folder: str, index: PackedIndex) -> None:
    """Makes the folder and writes `ktmoe-packed.json`, atomically, unless it says just that already. OSError."""
    os.makedirs(folder, exist_ok=True)
    try:
        if read_packed_index(folder) == index:
            return
    except WeightFileError:
        pass
    text = json.dumps({"ktmoe_packed": _VERSION, **asdict(index)}, indent=1)
    write_file(os.path.join(folder, INDEX), text.encode())


def read_packed_index(folder: str) -> PackedIndex:
    """WeightFileError, naming the file and the field, if the index is missing, damaged or not ours."""
    path = os.path.join(folder, INDEX)
    with open(open_regular(path), "rb") as file:
        data = file.read(MAX_INDEX_BYTES + 1)
    if len(data) > MAX_INDEX_BYTES:
        raise WeightFileError(f"{path}: got more than {MAX_INDEX_BYTES} bytes")
    fields = parse_object(data, path)

    def get(name: str, kind: type, what: str) -> object:
        value = fields.get(name)
        if type(value) is not kind:
            raise WeightFileError(f"{path}: {name!r}: got {value!r:.100}, expected {what}")
        return value

    if get("ktmoe_packed", int, "a number") != _VERSION:
        raise WeightFileError(f"{path}: 'ktmoe_packed': got {fields['ktmoe_packed']!r:.100}, expected {_VERSION}")
    layers = fields.get("layers")
    if layers is not None and not (
        isinstance(layers, list) and all(type(x) is int and 0 <= x <= 999_999 for x in layers)
    ):
        raise WeightFileError(f"{path}: 'layers': got {layers!r:.100}, expected layer numbers or null")
    texts = {name: str(get(name, str, "a text")) for name in ("method", "source", "source_path")}
    version = get("layout_version", int, "a number")
    assert isinstance(version, int)
    return PackedIndex(layout_version=version, layers=None if layers is None else tuple(layers), **texts)


def packed_layers(folder: str, index: PackedIndex) -> list[int]:
    """The layers that the folder must hold: those of the index, else those whose files are there."""
    if index.layers is not None:
        return sorted(set(index.layers))
    names = {name for name in os.listdir(folder) if name.startswith("ktmoe-layer-")}
    digits = (name.removeprefix("ktmoe-layer-").removesuffix(".safetensors") for name in names)
    return sorted(int(d) for d in digits if d.isdecimal() and d.isascii() and layer_file(int(d)) in names)


def packed_file_of(folder: str, layer: int) -> str:
    """The file of one layer in a folder made by `ktmoe quantize`. WeightFileError if it is not there (yet)."""
    index = read_packed_index(folder)
    path = os.path.join(folder, layer_file(layer))
    if os.path.exists(path):
        info = read_info(path)
        for name in ("method", "layout_version", "source"):
            if getattr(info, name) != getattr(index, name):
                raise WeightFileError(
                    f"{path}: {name}: got {getattr(info, name)}, but {INDEX} says {getattr(index, name)}"
                )
        return path
    if index.layers is not None and layer in index.layers:
        raise WeightFileError(f"{path}: missing: packing was not finished. Run `ktmoe quantize` again, it goes on")
    there = ", ".join(map(str, packed_layers(folder, index)[:20])) or "none"
    raise WeightFileError(f"{folder}: holds no packed layer {layer} (there are: {there})")
