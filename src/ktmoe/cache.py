"""Where ktmoe keeps what it can make again: `~/.cache/ktmoe`, or the folder that KTMOE_CACHE names, or nowhere ("off").

packed/NAME-METHOD/ktmoe-layer-00007.safetensors    packed experts, one entry per model (folder or revision) and method,
packed/NAME-METHOD-FORMAT/...                       and per format where the method leaves a choice
demo/...                                            models of `ktmoe demo`
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_OFF = ("off", "0", "no", "false")
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{7,64})(?:/|$)")


@dataclass(frozen=True)
class Entry:
    """One model in one method."""

    path: Path
    nbytes: int


def root() -> Path | None:
    """The cache folder, which need not exist; None if KTMOE_CACHE turns the cache off."""
    value = os.environ.get("KTMOE_CACHE", "").strip()
    if value.lower() in _OFF:
        return None
    try:
        return Path(value).expanduser() if value else Path.home() / ".cache" / "ktmoe"
    except RuntimeError:  # no home folder
        return None


def packed_root() -> Path | None:
    """The part that holds packed experts."""
    folder = root()
    return None if folder is None else folder / "packed"


def entry_folder(files: Sequence[Path], variant: str) -> Path | None:
    """The folder of one model's packed layers, made or not; None without a cache.

    files: the weight files of the model; variant: the method, or more. A snapshot of the Hugging Face cache counts by
    repo and revision, anything else by its path. What lies in the folder is trusted only as far as the fingerprint in
    each file agrees.
    """
    parent = packed_root()
    if parent is None or not files:
        return None
    folder = files[0].parent.absolute()
    if match := _SNAPSHOT.search(folder.as_posix()):
        name = f"{match['repo']}@{match['commit'][:12]}"
    else:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', folder.name) or 'model'}-{digest[:12]}"
    return parent / f"{name}-{variant}"


def entries() -> list[Entry]:
    """Everything packed in the cache, by name."""
    parent = packed_root()
    if parent is None or not parent.is_dir():
        return []
    return [Entry(path, _bytes_of(path)) for path in sorted(parent.iterdir()) if path.is_dir()]


def clear() -> int:
    """Deletes all packed experts; returns the bytes freed. Processes that have them mapped keep running.

    OSError if something cannot be deleted.
    """
    freed = 0
    for entry in entries():
        shutil.rmtree(entry.path)
        freed += entry.nbytes
    return freed


def _bytes_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.lstat().st_size
        except OSError:  # just deleted by somebody else
            continue
    return total
