"""The files that a GGUF model consists of, and bytes out of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import WeightFileError
from .gguf_header import GgufEntry, GgufHeader, read_header, stamp_of
from .gguf_types import FORMAT_OF, can_dequantize, kind_of
from .index_json import open_regular
from .limits import MAX_SHARDS

GGUF_SUFFIX = ".gguf"
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def files_of(path: str) -> list[str]:
    """All files of the model that `path`, a file or a folder, names."""
    if os.path.isdir(path):
        # The projector of a multimodal model lies beside it.
        names = [n for n in sorted(os.listdir(path)) if n.endswith(GGUF_SUFFIX) and not n.startswith("mmproj")]
        first = {match["stem"] if (match := _SPLIT.fullmatch(n)) else n: n for n in reversed(names)}
        if len(first) != 1:
            found = f"several models ({', '.join(sorted(first)[:4])})" if first else f"no {GGUF_SUFFIX} file"
            raise WeightFileError(f"{path}: got {found}, expected one; weight_path may name a file")
        path = os.path.join(path, next(iter(first.values())))
    split = _SPLIT.fullmatch(os.path.basename(path))
    if not split:
        count = read_header(path).keys.get("split.count", 1)
        if count > 1:
            raise WeightFileError(f"{path}: is one of {count} files, but not named like *-00001-of-{count:05}.gguf")
        return [path]
    count = int(split["count"])
    if not 0 < count <= MAX_SHARDS:
        raise WeightFileError(f"{path}: got {count} files by its name, expected 1..{MAX_SHARDS}")
    folder = os.path.dirname(path)
    files = [os.path.join(folder, f"{split['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        raise WeightFileError(f"{missing[0]}: is missing ({len(missing)} of the {count} files of this model)")
    return files


def split_pattern(name: str) -> str:
    """A glob for all files of the model of which `name` is one."""
    split = _SPLIT.fullmatch(name)
    return f"{split['stem']}-*-of-{split['count']}.gguf" if split else name


def headers_of(files: Sequence[str]) -> Iterator[tuple[str, GgufHeader]]:
    """Every file of a model and its header. WeightFileError if one says that it has another place among them."""
    for number, file in enumerate(files):
        header = read_header(file)
        if header.keys.get("split.count", len(files)) != len(files) or header.keys.get("split.no", number) != number:
            raise WeightFileError(
                f"{file}: says it is number {header.keys.get('split.no')} of {header.keys.get('split.count')} files, "
                f"expected number {number} of {len(files)} (counted from 0)"
            )
        yield file, header


class OpenFiles:
    """Files of a model, held open until close(). WeightFileError for one that is no longer what its header was read of.

    stamps: file -> `GgufHeader.stamp`.
    """

    def __init__(self, stamps: Mapping[str, tuple[int, ...]]) -> None:
        self._open: dict[str, int] = {}
        try:
            for file, stamp in stamps.items():
                self._open[file] = open_regular(file)
                if stamp_of(os.fstat(self._open[file])) != stamp:
                    raise WeightFileError(f"{file}: changed while it was opened")
        except BaseException:
            self.close()
            raise

    def read(self, file: str, name: str, offset: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] of tensor `name`, from `offset` of the file on."""
        result = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        view = result.numpy().data
        done = 0
        while done < nbytes:
            count = os.preadv(self._open[file], [view[done:]], offset + done)
            if count == 0:
                raise WeightFileError(
                    f"{file}: tensor {name!r}: got {done} bytes, expected {nbytes}: the file is truncated"
                )
            done += count
        return result

    def close(self) -> None:
        """Closes the files; harmless if repeated."""
        while self._open:
            os.close(self._open.popitem()[1])


def check_known(file: str, name: str, entry: GgufEntry) -> None:
    """WeightFileError for a tensor of a type that can be neither used nor decoded."""
    if entry.nbytes < 0:
        raise WeightFileError(f"{file}: tensor {name!r}: got {entry.type}, which the package gguf does not know")
    if entry.type not in FORMAT_OF and not can_dequantize(kind_of(entry.type)):
        raise WeightFileError(f"{file}: tensor {name!r}: got {entry.type}, which the package gguf cannot decode")
