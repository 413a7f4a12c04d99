"""The engine that layers share: worker threads, the queue of submitted forwards, and their life cycle.

Equal configurations share one engine, so a model of many layers has one set of threads. Engines live until the process
ends. A forked child starts with idle engines: the pool forgets its threads by itself, the queue is replaced here.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from . import _ext
from .config import MoEConfig
from .cpu_share import default_threads, nodes_of_rank
from .deferred import LayerChain
from .errors import engine_closed, shut_down
from .staging import StagingPool
from .topology import fake_nodes, node_cpus, physical_cores, usable_cpus

log = logging.getLogger("ktmoe")
# Without a handler Python writes warnings to stderr; what is shown is the application's decision.
log.addHandler(logging.NullHandler())

_EXIT_TIMEOUT_S = 2.0
QUEUE_CAPACITY = 256
"""Submitted forwards that may wait in the queue of an engine: more than any model has layers."""


def isa_without_amx() -> str:
    """The best level of the host that is not AMX; `KTMOE_ISA` can lower it further. RuntimeError if that is invalid."""
    active = _ext.active_isa()
    if "amx" not in active:
        return active
    return next(level for level in _ext.isa_levels() if "amx" not in level)


# --- configuration ------------------------------------------------------------------------------------------------
_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning(text)


@dataclass(frozen=True)
class WorkerPoolConfig:
    """The threads of one engine, in sub-pools: usually one sub-pool for each NUMA node.

    Layers are cut into one part for each sub-pool, see docs/numa.md.

    `subpool_numa_map[i]` is the node of sub-pool i, `subpool_thread_count[i]` its number of threads.
    """

    subpool_count: int
    subpool_numa_map: Sequence[int]
    subpool_thread_count: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "subpool_count", operator.index(self.subpool_count))
        for name, low in (("subpool_numa_map", 0), ("subpool_thread_count", 1)):
            values = tuple(operator.index(v) for v in getattr(self, name))
            if self.subpool_count < 1 or len(values) != self.subpool_count:
                raise ValueError(
                    f"{name}: got {len(values)} value(s), expected one per sub-pool ({self.subpool_count})"
                )
            if min(values) < low:
                raise ValueError(f"{name}: got {list(values)}, expected values of at least {low}")
            object.__setattr__(self, name, values)

    @classmethod
    def plan(cls, threads: int | None, subpools: int | None, nodes: Sequence[int] | None = None) -> WorkerPoolConfig:
        """Fits what was asked for to this machine.

        threads: in total, None = one per physical core of the nodes that are used, as far as control groups and other
        local ranks (torchrun) leave them (`cpu_share`). subpools: None = one per NUMA node, of those of this rank.
        nodes: one per sub-pool. More threads than usable CPUs, of the machine or of a node, only fight each other, so
        they are cut to that number (results do not depend on it). Nodes that do not exist are replaced by ones that do.
        Each of these is one warning in the log. A single sub-pool is that of one node, unless more threads were asked
        for than the node has CPUs and no node was named: it then has all nodes.
        """
        cpus = usable_cpus()
        present = node_cpus(cpus)
        everywhere = _cores_of(present, present)
        if subpools is None and nodes is None:
            present = {n: present[n] for n in nodes_of_rank(list(present))}
        count = subpools if subpools is not None else len(nodes or present)
        chosen = _choose_nodes(count, nodes, list(present))
        total = threads if threads is not None else min(_cores_of(present, chosen), default_threads(everywhere))
        if total > len(cpus):
            _warn_once(f"cpuinfer_threads={total} is more than the {len(cpus)} usable CPUs: using {len(cpus)}")
            total = len(cpus)
        share, rest = divmod(total, count)
        shares = [max(1, share + (i < rest)) for i in range(count)]
        if count > 1 or nodes is not None:
            room = [max(1, len(present[n]) // chosen.count(n)) for n in chosen]
            if threads is not None and any(s > r for s, r in zip(shares, room, strict=True)):
                _warn_once(
                    f"cpuinfer_threads={threads}: NUMA nodes {chosen} have {[len(present[n]) for n in chosen]} usable "
                    "CPUs, which is fewer than their shares: using as many threads as they have"
                )
            shares = [min(s, r) for s, r in zip(shares, room, strict=True)]
        return cls(count, chosen, shares)


def _cores_of(present: Mapping[int, frozenset[int]], nodes: Iterable[int]) -> int:
    return physical_cores(frozenset[int]().union(*(present[n] for n in nodes)))


def _choose_nodes(count: int, nodes: Sequence[int] | None, present: list[int]) -> list[int]:
    """The node of each sub-pool."""
    if nodes is None:
        if count > len(present):
            _warn_once(f"threadpool_count={count} is more than the {len(present)} NUMA node(s): sub-pools share them")
        return [present[i % len(present)] for i in range(count)]
    if not set(nodes) <= set(present):
        _warn_once(f"numa_nodes={list(nodes)}: not all usable here, using nodes out of {present}")
    return [n if n in present else present[i % len(present)] for i, n in enumerate(nodes)]


def placement(config: WorkerPoolConfig) -> tuple[list[int], list[list[int]]]:
    """Where the engine puts each sub-pool: the node of its memory (-1: anywhere), its workers' CPUs (none: anywhere).

    There is nothing to choose on one node, and none for a sub-pool that is larger than its node. A system that refuses
    to bind memory (containers often do) is one warning in the log.
    """
    anywhere: tuple[list[int], list[list[int]]] = [-1] * config.subpool_count, [[] for _ in config.subpool_numa_map]
    present = node_cpus(usable_cpus())
    if len(present) < 2 or fake_nodes():
        return anywhere
    nodes, cpus = anywhere
    for i, (node, threads) in enumerate(zip(config.subpool_numa_map, config.subpool_thread_count, strict=True)):
        if threads <= len(present.get(node, ())):
            nodes[i], cpus[i] = node, sorted(present[node])
    for node in {n for n in nodes if n >= 0}:
        if refused := _ext.node_memory_refused(node):
            _warn_once(
                f"weights are not bound to the memory of NUMA nodes: {refused}. They lie where they are first written, "
                "which is the same node as long as it has room"
            )
            return [-1] * config.subpool_count, cpus
    return nodes, cpus


# --- fork ---------------------------------------------------------------------------------------------------------
class ForkAware(Protocol):
    """Something with a lock, a thread or a ticket that means nothing in a forked child."""

    def _after_fork(self) -> None: ...


_fork_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def reset_after_fork(owner: ForkAware) -> None:
    """Calls `owner._after_fork()` in every child forked from now on, as long as `owner` lives."""
    _fork_aware.add(owner)


# --- engine -------------------------------------------------------------------------------------------------------
class CPUInfer:
    """One engine: a thread pool, and a queue of submitted forwards that exists from the first submit on.

    Most code wants `get_engine`, which shares engines. All methods may be called from any thread.
    queue_capacity: so many submitted forwards may wait for their turn, each with a copy of its inputs; a further submit
    waits for room, or raises where its caller does not want to wait.
    """

    def __init__(self, config: WorkerPoolConfig, queue_capacity: int = QUEUE_CAPACITY) -> None:
        self.config = config
        self.queue_capacity = queue_capacity
        self.closed = False
        self.pool = _ext.ThreadPool(list(config.subpool_thread_count), *placement(config))
        self._queue: _ext.TaskQueue | None = None
        self._chains: dict[object, LayerChain] = {}
        self.staging = StagingPool()
        self.stream_errors = _ext.StreamErrors()
        self._lock = threading.Lock()
        reset_after_fork(self)

    @property
    def queue(self) -> _ext.TaskQueue:
        """The FIFO of submitted forwards. RuntimeError after `close`, and when the interpreter has begun to exit."""
        queue = self._queue
        if queue is not None and not (self.closed or _closed):
            return queue
        with self._lock:
            if _closed:
                raise shut_down()
            if self.closed:
                raise engine_closed()
            if self._queue is None:
                self._queue = _ext.TaskQueue(self.queue_capacity)
            return self._queue

    def chain(self, model: object) -> LayerChain:
        """The layers of one model, whatever names it."""
        with self._lock:
            if model not in self._chains:
                self._chains[model] = LayerChain()
            return self._chains[model]

    def sync(self) -> None:
        """Waits until everything submitted so far has run. Errors stay with the results that they belong to."""
        if self._queue is not None:
            self._queue.drain()

    def raise_stream_error(self) -> None:
        """Raises the first error of a forward on a CUDA stream that no `sync_forward` has raised yet, once.

        Only who replays graphs needs it: no `sync_forward` runs then. The results of such a forward are NaN.
        """
        self.stream_errors.check()

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the queue: every later submit of a layer of this engine is a RuntimeError.

        What has been submitted gets `timeout_s` seconds. Forwards that have not begun by then are cancelled: their sync
        raises RuntimeError. One that is running goes on to its end, and its sync returns the result. Layers made from
        here on get a new engine; a plain `forward` of CPU tensors needs no queue and still works. May be called again.
        """
        if not 0 <= timeout_s < 1e9:
            raise ValueError(f"timeout_s: got {timeout_s}, expected 0 or more seconds")
        with self._lock:
            self.closed = True
        with _lock:
            if _engines.get(self.config) is self:
                del _engines[self.config]
        if self._queue is not None:
            self._queue.close(timeout_s)

    def _after_fork(self) -> None:
        # The queue's thread stayed in the parent, and another thread of the parent may have held the lock.
        if self._queue is not None:
            _parents_queues.append(self._queue)
        self._queue = None
        self._lock = threading.Lock()
        self.staging._after_fork()
        for chain in self._chains.values():
            chain._after_fork()


_lock = threading.Lock()
_engines: dict[WorkerPoolConfig, CPUInfer] = {}
# Never destroyed: a destructor in the child would wait for a thread that does not exist there.
_parents_queues: list[_ext.TaskQueue] = []
_closed = False


def get_engine(config: WorkerPoolConfig) -> CPUInfer:
    """The engine of this configuration, made on first use. A second, different configuration logs a warning."""
    with _lock:
        engine = _engines.get(config)
        if engine is None:
            if _engines:
                log.warning(
                    "a second thread pool is made for %s (present: %s): layers with different cpuinfer_threads or "
                    "threadpool_count do not share threads",
                    config,
                    ", ".join(map(str, _engines)),
                )
            engine = _engines[config] = CPUInfer(config)
        return engine


def engine_for(config: MoEConfig) -> CPUInfer:
    """The engine that a layer of this configuration runs on."""
    return get_engine(WorkerPoolConfig.plan(config.cpuinfer_threads, config.threadpool_count, config.numa_nodes))


@atexit.register
def _shut_down() -> None:
    """Gives running forwards a moment to end: their output memory must not go away under them."""
    global _closed
    _closed = True
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    for engine in list(_engines.values()):
        engine.close(max(0.0, deadline - time.monotonic()))


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for owner in list(_fork_aware):
        owner._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
