"""Reading every byte of a packed file again and comparing checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from ..errors import WeightFileError
from .packed_file import DIGEST_BYTES, PackedInfo, check_header, header_bytes
from .safetensors_file import SafetensorsFile

_THREADS = 8  # each holds one expert; SHA-256 releases the GIL


def verify_packed(path: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> PackedInfo:
    """Reads the whole file. WeightFileError naming the file and the first expert whose checksum does not fit.

    progress: called with a number of bytes after each expert.
    """
    with SafetensorsFile(os.fspath(path)) as file:
        info, biases = check_header(file)
        _, places = header_bytes(info, biases)
        rows = {name: place for name, place in places.items() if name != "checksums"}

        def check(expert: int) -> int:
            digest = hashlib.sha256()
            for name, (begin, size) in rows.items():
                row = bytearray(size)
                file.pread(begin + expert * size, memoryview(row), f"tensor {name!r}, expert {expert}")
                digest.update(row)
            stored = bytearray(DIGEST_BYTES)
            file.pread(places["checksums"][0] + expert * DIGEST_BYTES, memoryview(stored), "checksums")
            if digest.digest() != stored:
                raise WeightFileError(f"{file.path}: expert {expert} is damaged (its checksum does not fit)")
            return sum(size for _, size in rows.values())

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "ktmoe-verify") as threads:
            try:
                for done in as_completed([threads.submit(check, e) for e in range(info.n_experts)]):
                    nbytes = done.result()
                    if progress is not None:
                        progress(nbytes)
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise
    return info
