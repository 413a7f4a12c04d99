"""A folder of safetensors files: which tensor lies in which file, and reading them."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import WeightFileError
from .index_json import read_index
from .limits import MAX_OPEN_SHARDS, MAX_SHARDS, MAX_TENSORS
from .safetensors_file import FLOAT_DTYPES, SafetensorsFile, TensorEntry

_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def shard_map(folder: str) -> Mapping[str, str]:
    """Tensor name -> file name of every tensor in the folder. Remembered until a file of the folder changes.

    Taken from the index file if there is one, otherwise from the headers of all safetensors files.
    WeightFileError if the folder is missing, holds no safetensors, or contradicts itself.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise WeightFileError(f"{folder}: cannot be read as a folder: {error.strerror}") from error
    indices = [n for n in names if n.endswith(_INDEX)]
    files = [n for n in names if n.endswith(_SUFFIX)]
    if len(indices) > 1:
        # Variants ("model.fp16.safetensors.index.json") lie beside the main one in some repositories.
        indices = [n for n in indices if n == "model" + _INDEX]
        if not indices:
            raise WeightFileError(f"{folder}: several index files and no model{_INDEX}")
    if not indices and not files:
        pickles = [n for n in names if n.endswith(_PICKLES)]
        if pickles:
            raise WeightFileError(
                f"{folder}: holds {pickles[0]} but no safetensors. Such files may run code when they are opened, so "
                "they are not read; convert them, for example by save_pretrained of transformers"
            )
        raise WeightFileError(f"{folder}: holds no {_SUFFIX} file")
    if len(files) > MAX_SHARDS:
        raise WeightFileError(f"{folder}: got {len(files)} files, expected at most {MAX_SHARDS}")
    stamps = []
    for name in indices or files:
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError as error:
            raise WeightFileError(f"{os.path.join(folder, name)}: {error.strerror}") from error
        stamps.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return _scan(os.path.abspath(folder), tuple(stamps), bool(indices))


@functools.lru_cache(maxsize=2)
def _scan(folder: str, stamps: tuple[tuple[str, int, int, int], ...], indexed: bool) -> Mapping[str, str]:
    if indexed:
        return MappingProxyType(read_index(os.path.join(folder, stamps[0][0])))
    result: dict[str, str] = {}
    for name, *_ in stamps:
        with SafetensorsFile(os.path.join(folder, name)) as file:
            for tensor in file.entries:
                if tensor in result:
                    raise WeightFileError(f"{folder}: tensor {tensor!r} is in {result[tensor]} and again in {name}")
                result[tensor] = name
        if len(result) > MAX_TENSORS:
            raise WeightFileError(f"{folder}: got more than {MAX_TENSORS} tensors")
    return MappingProxyType(result)


class SafetensorsDir:
    """Reads tensors by name. Files are opened when first needed, a few at a time; close() or `with` ends that."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.shards = shard_map(folder)
        """Tensor name -> file name."""
        self._open: OrderedDict[str, SafetensorsFile] = OrderedDict()

    def close(self) -> None:
        """Closes all files; harmless if repeated."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> SafetensorsDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def file_of(self, name: str) -> SafetensorsFile:
        """The open file that holds this tensor. WeightFileError if there is none."""
        shard = self.shards.get(name)
        if shard is None:
            raise WeightFileError(f"{self.folder}: tensor {name!r} is missing")
        file = self._open.get(shard)
        if file is None:
            try:
                file = SafetensorsFile(os.path.join(self.folder, shard))
            except WeightFileError as error:
                raise WeightFileError(f"{error} (needed for tensor {name!r})") from error
            while len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = file
        self._open.move_to_end(shard)
        return file

    def entry(self, name: str) -> TensorEntry:
        """See `SafetensorsFile.entry`."""
        return self.file_of(name).entry(name)

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        index: int | None = None,
        dtypes: Mapping[str, torch.dtype] = FLOAT_DTYPES,
    ) -> Tensor:
        """See `SafetensorsFile.read`."""
        return self.file_of(name).read(name, shape, index, dtypes)
