"""The files that a GGUF model consists of, and bytes out of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import WeightFileError
from .gguf_header import GgufHeader, read_header
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


def read_bytes(descriptor: int, file: str, name: str, offset: int, nbytes: int) -> Tensor:
    """uint8 [nbytes] of tensor `name`, from `offset` of the file on."""
    result = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    view = result.numpy().data
    done = 0
    while done < nbytes:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise WeightFileError(
                f"{file}: tensor {name!r}: got {done} bytes, expected {nbytes}: the file is truncated"
            )
        done += count
    return result
