"""Reads single tensors out of the safetensors files that transformers has resolved for a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ktmoe.errors import WeightFileError
from ktmoe.io.limits import MAX_OPEN_SHARDS
from ktmoe.io.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from typing_extensions import Self


class CheckpointFiles:
    """The tensors of a set of safetensors files, a few of them open at a time. A context manager.

    WeightFileError, naming file and tensor, for whatever is wrong with a file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._open: OrderedDict[Path, SafetensorsFile] = OrderedDict()
        self._where: dict[str, Path] = {}
        for path in files:
            for key in self._file(path).entries:
                other = self._where.setdefault(key, path)
                if other != path:
                    raise WeightFileError(f"{path.parent}: tensor {key!r} is in {other.name} and again in {path.name}")

    def keys(self) -> Iterable[str]:
        return self._where.keys()

    def read(self, key: str, shape: tuple[int, ...], index: int | None = None) -> torch.Tensor:
        """Tensor `key`, which must have `shape`, or entry `index` of its first dimension; in memory of its own."""
        return self._file(self._where[key]).read(key, shape, index)

    def _file(self, path: Path) -> SafetensorsFile:
        file = self._open.pop(path, None) or SafetensorsFile(str(path))
        self._open[path] = file
        while len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def close(self) -> None:
        """Closes all files; harmless if repeated."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
