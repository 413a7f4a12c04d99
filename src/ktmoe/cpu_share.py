"""How much of the machine is this process's: limits of its control groups, and its place among the ranks of a launcher.

Containers limit CPU time by quotas that the affinity mask does not show: more threads than the quota pays for are
stopped together for most of each period. Ranks of one machine (torchrun) share its cores without knowing of each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .control_group import read, unified, upwards


def cgroup_cpus(root: Path = Path("/")) -> float | None:
    """CPUs that the tightest control group above this process pays for; None without a limit.

    root: where proc and sys are. Reads cgroup v2 (cpu.max) and v1 (cpu.cfs_quota_us, cpu.cfs_period_us).
    """
    limits = [_cpus(read(folder / "cpu.max").split()) for folder in unified(root)]
    for folder in _legacy(root):
        limits.append(_cpus([read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]))
    return min((limit for limit in limits if limit is not None), default=None)


def _legacy(root: Path) -> Iterator[Path]:
    """cgroup v1: the folders of this process's group of the controller cpu, however it is mounted."""
    controllers, path = "cpu", "/"
    for line in read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, own = rest.partition(":")
        if "cpu" in names.split(","):
            controllers, path = names, own
    for mount in {controllers, "cpu"}:
        yield from upwards(root / "sys/fs/cgroup" / mount, path)


def _cpus(quota_and_period: list[str]) -> float | None:
    """Microseconds of CPU for each period; "max" and -1 mean no limit."""
    try:
        quota, period = map(int, quota_and_period)
        cpus = quota / period
    except (ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None


def local_rank() -> tuple[int, int]:
    """(rank, number of ranks) on this machine, as torchrun and accelerate tell it; (0, 1) without a launcher."""
    try:
        rank, count = int(os.environ.get("LOCAL_RANK", "")), int(os.environ.get("LOCAL_WORLD_SIZE", ""))
    except ValueError:
        return 0, 1
    return (rank, count) if 0 <= rank < count else (0, 1)


def default_threads(cores: int, root: Path = Path("/")) -> int:
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
