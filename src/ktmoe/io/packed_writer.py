"""Writing one packed file: expert by expert, and visible under its name only when it is complete and on the disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .packed_file import DIGEST_BYTES, Bytes, PackedInfo, header_bytes, header_digest

if TYPE_CHECKING:
    from typing_extensions import Self

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)  # some network file systems
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_log = logging.getLogger("ktmoe")
PART = ".part"
"""Ending of a file that is being written."""


class PackedWriter:
    """A context manager; without `commit` it leaves nothing behind.

    The bytes go to NAME.part, which is locked: a second process that wants the same file waits. What a killed process
    leaves there is used again by the next one. OSError (disk full, no permission, ...) from any method.
    """

    def __init__(self, path: str, info: PackedInfo, biases: Sequence[str] = ()) -> None:
        self.path = path
        self.info = info
        self._header, self._places = header_bytes(info, biases)
        self._digests = np.zeros((info.n_experts + 1, DIGEST_BYTES), np.uint8)
        self._missing = set(range(info.n_experts))
        self._lock = threading.Lock()
        self._fd, self._part = _open_part(path)

    def reserve(self) -> None:
        """Takes the disk space, so that a full disk is noticed before the work."""
        size = self._places["checksums"][0] + self._digests.nbytes
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            os.ftruncate(self._fd, size)

    def put(self, expert: int, packed: Bytes, biases: Mapping[str, npt.NDArray[np.float32]] | None = None) -> None:
        """Writes uint8 [expert_bytes] and the rows of the biases. From any thread, each expert once."""
        rows = {"experts": packed, **(biases or {})}
        digest = hashlib.sha256()
        for name, (begin, size) in self._places.items():
            if name != "checksums":
                row = np.ascontiguousarray(rows[name]).data.cast("B")
                digest.update(row)
                _write(self._fd, row, begin + expert * size)
        self._digests[expert] = np.frombuffer(digest.digest(), np.uint8)
        with self._lock:
            self._missing.remove(expert)

    def commit(self) -> None:
        """Puts the complete file in its place, replacing an older one."""
        if self._missing:
            raise RuntimeError(f"{self.path}: {len(self._missing)} experts were not written")
        self._digests[-1] = np.frombuffer(header_digest(self._header), np.uint8)
        _write(self._fd, self._digests.data.cast("B"), self._places["checksums"][0])
        _write(self._fd, memoryview(self._header), 0)
        os.fsync(self._fd)
        os.rename(self._part, self.path)
        self._close()
        sync_folder(os.path.dirname(self.path))

    def _close(self) -> None:
        os.close(self._fd)  # ends the lock
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.unlink(self._part)
            self._close()


def write_file(path: str, data: bytes) -> None:
    """A small file, atomically: the old one or the new one, never a mixture."""
    descriptor, part = _open_part(path)
    try:
        _write(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
        os.rename(part, path)
    except BaseException:
        os.unlink(part)
        raise
    finally:
        os.close(descriptor)
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str) -> None:
    """Makes a rename outlive a loss of power."""
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _open_part(path: str) -> tuple[int, str]:
    """An empty file to write in place of `path` until it is complete: PATH.part, locked by us alone."""
    part = path + PART
    while True:
        descriptor = os.open(part, _FLAGS, 0o666)
        try:
            if not _lock(descriptor, part):  # then a name that nobody else has; it stays behind if we are killed
                os.close(descriptor)
                part = f"{path}.{os.urandom(8).hex()}{PART}"
                descriptor = os.open(part, _FLAGS, 0o666)
            # The one that we waited for has renamed or removed it: then we hold a lock on something else.
            if _same_file(descriptor, part):
                os.ftruncate(descriptor, 0)
                return descriptor, part
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, part: str) -> bool:
    """Waits for the lock. False on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("%s: waiting for another process that packs the same layer", part)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return False
    return True


def _same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
