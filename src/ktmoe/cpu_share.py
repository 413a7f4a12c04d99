"""How much of the machine is this process's: limits of its control groups, and its place among the ranks of a launcher.

Containers limit CPU time by quotas that the affinity mask does not show: more threads than the quota pays for are
stopped together for most of each period. Ranks of one machine (torchrun) share its cores without knowing of each other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def cgroup_cpus(root: str = "/") -> float | None:
    """CPUs that the tightest control group above this process pays for; None without a limit.

    root: where proc and sys are. Reads cgroup v2 (cpu.max) and v1 (cpu.cfs_quota_us, cpu.cfs_period_us).
    """
    base = Path(root)
    limits = []
    for line in _lines(base / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            limits += [_quota_v2(folder) for folder in _upwards(base / "sys/fs/cgroup", path)]
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu"):
                limits += [_quota_v1(folder) for folder in _upwards(base / "sys/fs/cgroup" / mount, path)]
    return min((limit for limit in limits if limit is not None), default=None)


def _upwards(mount: Path, path: str) -> list[Path]:
    """The group's folder and those above it, up to the mount. A container may see only the top."""
    parts = [p for p in path.split("/") if p not in ("", "..")]
    return [mount.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    words = " ".join(_lines(folder / "cpu.max")).split()
    return _ratio(*words) if len(words) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    """Microseconds of CPU for each period; "max" and -1 mean no limit."""
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def local_rank() -> tuple[int, int]:
    """(rank, number of ranks) on this machine, as torchrun and accelerate tell it; (0, 1) without a launcher."""
    try:
        rank, count = int(os.environ.get("LOCAL_RANK", "")), int(os.environ.get("LOCAL_WORLD_SIZE", ""))
    except ValueError:
        return 0, 1
    return (rank, count) if 0 <= rank < count else (0, 1)


def default_threads(cores: int, root: str = "/") -> int:
    """Threads for a process that may use `cores` physical cores: within its quota, its share among the local ranks."""
    rank, ranks = local_rank()
    share = cores // ranks + (rank < cores % ranks)
    quota = cgroup_cpus(root)
    if quota is not None:
        share = min(share, int(quota / ranks))
    return max(1, share)


def nodes_of_rank(nodes: Sequence[int]) -> tuple[int, ...]:
    """The NUMA nodes out of `nodes` that this rank should use: neighbours, and no others' while there are enough."""
    rank, ranks = local_rank()
    first, last = rank * len(nodes) // ranks, (rank + 1) * len(nodes) // ranks
    return tuple(nodes[first : max(last, first + 1)])
