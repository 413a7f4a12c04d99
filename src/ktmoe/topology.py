"""The machine as far as this process may use it: CPUs, cores, NUMA nodes.

`KTMOE_FAKE_NUMA=n` in the environment pretends n nodes that all have all CPUs, for trying what several nodes do on a
machine with one: layers are cut into n parts, but no memory and no thread is bound.
"""

from __future__ import annotations

import functools
import os

_NODES = "/sys/devices/system/node"


def cpu_list(path: str) -> list[int]:
    """Parses the kernel's "0-3,8" lists; empty if the file is missing (not Linux, or a container hides it)."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return []
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def usable_cpus() -> frozenset[int]:
    """Logical CPUs that this process may run on."""
    return frozenset(os.sched_getaffinity(0))


@functools.cache
def physical_cores(cpus: frozenset[int]) -> int:
    """Number of cores behind `cpus`: two hyper-threads of one core count once."""
    cores = {
        tuple(cpu_list(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or (cpu,) for cpu in cpus
    }
    return max(1, len(cores))


def fake_nodes() -> int:
    """Number of pretended nodes; 0: none. ValueError if the environment says something else than a number."""
    text = os.environ.get("KTMOE_FAKE_NUMA", "")
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError(f"KTMOE_FAKE_NUMA: got {text!r}, expected a number of nodes")
    return int(text or 0)


def node_cpus(cpus: frozenset[int]) -> dict[int, frozenset[int]]:
    """Those of `cpus` that each NUMA node has, by node, ascending; nodes without any are left out.

    {0: cpus} where the kernel does not say.
    """
    return dict.fromkeys(range(fake_nodes()), cpus) or dict(_real_nodes(cpus))


@functools.cache
def _real_nodes(cpus: frozenset[int]) -> dict[int, frozenset[int]]:
    own = {n: cpus.intersection(cpu_list(f"{_NODES}/node{n}/cpulist")) for n in cpu_list(f"{_NODES}/online")}
    return {n: some for n, some in sorted(own.items()) if some} or {0: cpus}
