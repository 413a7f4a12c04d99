"""Whole tensors of a GGUF model, as floats: what lies beside the experts, which `GgufSource` reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _ext
from ..errors import WeightFileError
from .gguf_file import is_expert
from .gguf_files import OpenFiles, check_known, files_of, headers_of
from .gguf_header import GgufEntry
from .gguf_types import FLOAT_TYPES, FORMAT_OF, dequantize_rows, kind_of
from .published import PublishedMatrix, dequantize

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK_WEIGHTS = 1 << 24
"""Read at a time, so that a large matrix is in memory once and not twice."""


class GgufTensors:
    """The tensors of all files of a model but its experts; open files, to be closed by close() or `with`.

    path: one of the files, or their folder. WeightFileError, naming file and tensor, for whatever is wrong with them.
    """

    def __init__(self, path: str) -> None:
        self.files = files_of(path)
        self.architecture = ""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name -> shape, slowest dimension first."""
        self._where: dict[str, tuple[str, GgufEntry]] = {}
        stamps = {}
        for file, header in headers_of(self.files):
            stamps[file] = header.stamp
            self.architecture = self.architecture or header.architecture
            for name, entry in header.tensors.items():
                if is_expert(name):
                    continue
                if name in self._where:
                    raise WeightFileError(f"{file}: tensor {name!r} is in {self._where[name][0]} too")
                self._where[name] = file, entry
                self.shapes[name] = entry.shape
        self._open = OpenFiles(stamps)

    def read(self, name: str, dtype: torch.dtype, pool: _ext.ThreadPool | None = None) -> Tensor:
        """Tensor `name` in its own shape. What the file has in fp32 (norms, biases, routers) stays fp32.

        pool: whose threads share the work, as in `quantize`.
        """
        file, entry = self._where[name]
        check_known(file, name, entry)
        if entry.type == "F32":
            return self._open.read(file, name, entry.offset, entry.nbytes).view(torch.float32).view(entry.shape)
        k = entry.shape[-1] if entry.shape else 1
        n = math.prod(entry.shape) // k if k else 0
        weights = torch.empty(n, k, dtype=dtype, device="cpu")
        step = max(1, _CHUNK_WEIGHTS // k) if k else 1
        for first in range(0, n, step):
            rows = min(step, n - first)
            begin, end = (entry.nbytes * row // n for row in (first, first + rows))
            data = self._open.read(file, name, entry.offset + begin, end - begin)
            weights[first : first + rows] = _floats(data.view(rows, -1), entry.type, k, pool)
        return weights.view(entry.shape)

    def close(self) -> None:
        """Closes the files; harmless if repeated."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _floats(rows: Tensor, kind: str, k: int, pool: _ext.ThreadPool | None) -> Tensor:
    if kind in FLOAT_TYPES:
        return rows.view(FLOAT_TYPES[kind])
    if kind in FORMAT_OF:
        return dequantize(PublishedMatrix(FORMAT_OF[kind], (rows,), (rows.shape[0], k)), pool=pool)
    return dequantize_rows(rows, kind_of(kind))
