"""How much memory this process may still take, so that a load that cannot succeed fails before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .control_group import read, unified

_GIB = 2**30


def available_bytes(root: Path = Path("/")) -> tuple[int, str] | None:
    """(bytes, what limits them), or None where the system does not say. `root` is for tests."""
    limits = [*_machine(root), *_control_groups(root)]
    return min(limits) if limits else None


def check_memory(need: int, what: str) -> None:
    """MemoryError if `need` more bytes clearly do not fit: before any work, instead of a kill half-way."""
    found = available_bytes()
    if found is not None and need > found[0]:
        raise MemoryError(f"{what}: need {need / _GIB:.2f} GiB, have {found[0] / _GIB:.2f} GiB ({found[1]})")


def _machine(root: Path) -> Iterator[tuple[int, str]]:
    fields = dict(line.split(":", 1) for line in read(root / "proc/meminfo").splitlines() if ":" in line)
    try:
        free, swap = (1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (KeyError, ValueError, IndexError):
        return
    yield free + swap, "free memory of the machine"


def _control_groups(root: Path) -> Iterator[tuple[int, str]]:
    """cgroup v2 (this group and its parents; in a container the root is this group), then v1."""
    for folder in unified(root):
        yield from _limit(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")
    v1 = root / "sys/fs/cgroup/memory"
    yield from _limit(
        v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat", "total_inactive_file"
    )


def _limit(limit: Path, used: Path, stat: Path, reclaimable: str) -> Iterator[tuple[int, str]]:
    top, now = read(limit), read(used)
    if not (top.isdigit() and now.isdigit()):  # "max", or no such group
        return
    # File pages count as used but are given back on demand.
    fields = dict(line.split(" ", 1) for line in read(stat).splitlines() if " " in line)
    cache = fields.get(reclaimable, "0")
    yield max(0, int(top) - int(now) + (int(cache) if cache.isdigit() else 0)), f"limit of the control group, {limit}"
