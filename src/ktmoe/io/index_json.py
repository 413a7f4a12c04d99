"""Strict JSON, and the index file of a sharded checkpoint (`*.safetensors.index.json`)."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from ..errors import WeightFileError
from .limits import MAX_INDEX_BYTES, MAX_NAME_CHARS, MAX_SHARDS, MAX_TENSORS


def open_regular(path: str) -> int:
    """A file descriptor for reading. WeightFileError if there is no such file, or if it is a device, pipe or folder."""
    try:
        # A pipe would block the open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise WeightFileError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WeightFileError(f"{path}: not a regular file")
    return descriptor


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:200]!r} occurs twice")
    return result


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object. WeightFileError naming `source` for anything else, and for a key that occurs twice."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightFileError(f"{source}: got a JSON {type(value).__name__}, expected an object")
    return value


def check_shard_name(name: object, source: str) -> str:
    """`name` if it is the plain name of a safetensors file; an index must not point outside its own folder."""
    if (
        not isinstance(name, str)
        or not name.endswith(".safetensors")
        or "\0" in name
        or "\\" in name
        or name != os.path.basename(name)
    ):
        text = repr(name)[:200]
        if isinstance(name, str) and name.endswith((".bin", ".pt", ".pth")):
            raise WeightFileError(f"{source}: shard {text} may run code when it is opened; convert it to safetensors")
        raise WeightFileError(f"{source}: got shard name {text}, expected the plain name of a .safetensors file")
    return name


def check_tensor_name(name: str, source: str) -> str:
    """`name` if its length is sane."""
    if len(name) > MAX_NAME_CHARS:
        raise WeightFileError(f"{source}: a tensor name has {len(name)} characters, expected at most {MAX_NAME_CHARS}")
    return name


def read_index(path: str) -> dict[str, str]:
    """Tensor name -> file name, from an index.json. WeightFileError if it is damaged or hostile."""
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_INDEX_BYTES:
            raise WeightFileError(f"{path}: got {size} bytes, expected at most {MAX_INDEX_BYTES}")
        data = file.read(MAX_INDEX_BYTES + 1)
    weight_map = parse_object(data, path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightFileError(f'{path}: got no object "weight_map"')
    if len(weight_map) > MAX_TENSORS:
        raise WeightFileError(f"{path}: got {len(weight_map)} tensors, expected at most {MAX_TENSORS}")
    checked: dict[object, str] = {}  # there are few files and many tensors
    result: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in checked:
            checked[shard if isinstance(shard, str) else None] = check_shard_name(shard, path)
        result[check_tensor_name(tensor, path)] = checked[shard]
    if len(checked) > MAX_SHARDS:
        raise WeightFileError(f"{path}: got {len(checked)} files, expected at most {MAX_SHARDS}")
    return result
