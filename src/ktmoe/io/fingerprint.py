"""Recognising weight files again, without reading them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

_WEIGHTS = (".safetensors", ".gguf")


def fingerprint(files: Iterable[str | os.PathLike[str]], extra: str = "") -> str:
    """A digest (hex) of the names, sizes and modification times of `files`, and of `extra`.

    Cheap (no file is opened) and on the safe side: a copy with a new time is another source. A file in a store that is
    addressed by content, as in the Hugging Face cache (a link to `blobs/DIGEST`), counts by that digest instead of its
    time. OSError if a file is missing.
    """
    stamps = sorted(_stamp(Path(file)) for file in files)
    return hashlib.sha256(json.dumps([stamps, extra]).encode()).hexdigest()[:32]


def folder_fingerprint(path: str) -> str:
    """The fingerprint of all weight files in a folder, or of those beside a single file. OSError if it is missing."""
    os.stat(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    names = [name for name in os.listdir(folder) if name.endswith(_WEIGHTS)]
    return fingerprint(os.path.join(folder, name) for name in names)


def _stamp(file: Path) -> tuple[str, int, str]:
    status = file.stat()
    target = Path(os.path.realpath(file)) if file.is_symlink() else file
    by_content = target.parent.name == "blobs"
    return file.name, status.st_size, target.name if by_content else str(status.st_mtime_ns)
