"""The limits of this machine, measured beside the cells: multiply-add peaks by data type, and DRAM read bandwidth.

`limits.cc` is compiled on first use into a cache folder. Rates are in G: 1e9 operations, or bytes, a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.cc")
CACHE_LEVELS = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class NoCompilerError(RuntimeError):
    """The limits cannot be measured; the message says what to do."""


@dataclass(frozen=True)
class Limit:
    name: str
    kind: str
    """"fp32", "bf16", "int8" or "read"."""
    unit: str
    median: float
    min: float
    max: float


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ktmoe" / "bench"


def compile_native(source: Path, suffix: str = "", flags: tuple[str, ...] = ()) -> Path:
    """Builds one C++ file into the cache, named by its contents. NoCompilerError without a working compiler."""
    compiler = os.environ.get("CXX") or "g++"
    command = [*compiler.split(), "-O2", "-std=c++20", "-pthread", *flags]
    key = hashlib.sha256(source.read_bytes() + repr(command).encode()).hexdigest()[:16]
    built = cache_folder() / f"{source.stem}-{key}{suffix}"
    if built.exists():
        return built
    if shutil.which(command[0]) is None:
        raise NoCompilerError(f"no C++ compiler: '{command[0]}' is not on the PATH; install g++ or set CXX")
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder) / built.name
        run = subprocess.run([*command, str(source), "-o", str(fresh)], capture_output=True, text=True)
        if run.returncode:
            raise NoCompilerError(f"{compiler} cannot compile {source.name}: {run.stderr.strip()[-500:]}")
        fresh.replace(built)
    return built


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = [0]
    for file in CACHE_LEVELS.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * UNITS[text.lstrip("0123456789")])
    return max(sizes) or 32 << 20


def buffer_bytes() -> int:
    """Four times the caches and at least 1 GiB, but never more than a quarter of the free memory."""
    return min(max(4 * last_level_cache(), 1 << 30), available_memory() // 4)


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def measure(threads: int, read_bytes: int | None = None, *, read_only: bool = False) -> list[Limit]:
    """Runs every test that this CPU has, or those of reading, on `threads` threads.

    NoCompilerError if the program cannot be built.
    """
    program = compile_native(SOURCE)
    arguments = [str(threads), str(read_bytes or buffer_bytes()), *(["read"] if read_only else [])]
    run = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{program} failed with status {run.returncode}: {run.stderr.strip()}")
    return [Limit(**json.loads(line)) for line in run.stdout.splitlines()]


def drift(before: list[Limit], after: list[Limit]) -> dict[str, float]:
    """How much each test changed over the run: after / before - 1."""
    later = {limit.name: limit.median for limit in after}
    return {limit.name: later[limit.name] / limit.median - 1 for limit in before if limit.name in later}
