"""What `bench.engine` measures, inside the process of an implementation. Times are in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.attention import Attention
from bench.impls import Deferring, Queueing

NextCall = Callable[[], tuple[int, tuple[Tensor, ...]]]
"""Layer and batch (hidden, ids, weights) of the next call."""
PAUSE_S = 0.08
"""Whoever waits actively after its work, OpenMP threads too, has gone to sleep by then."""
LEAST = 5
"""Samples, however short the time is."""


def _forward(impl: Queueing, layer: int, batch: tuple[Tensor, ...]) -> Tensor:
    return impl.forward(layer, *batch)


def _submit(impl: Queueing, layer: int, batch: tuple[Tensor, ...]) -> Tensor:
    impl.submit(layer, *batch)
    return impl.sync(layer)


WAYS = {"forward": _forward, "submit": _submit}


def _timed(way: str, impl: Queueing, next_call: NextCall) -> float:
    layer, batch = next_call()
    start = time.perf_counter()
    WAYS[way](impl, layer, batch)
    return time.perf_counter() - start


def latency(impl: Queueing, next_call: NextCall, seconds: float) -> dict[str, list[float]]:
    """forward, and submit followed by sync, taking turns."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    end = time.perf_counter() + seconds
    while len(times["forward"]) < 2 * LEAST or time.perf_counter() < end:
        for way, samples in times.items():
            samples.append(_timed(way, impl, next_call))
    return {way: samples[LEAST:] for way, samples in times.items()}


def wake_up(
    impl: Queueing, next_call: NextCall, seconds: float, idle_s: float, following: int
) -> dict[str, dict[str, list[float]]]:
    """For each way the first call after `idle_s` without work, and the `following` ones right behind it."""
    found = {}
    for way in WAYS:
        first: list[float] = []
        others: list[float] = []
        end = time.perf_counter() + seconds / len(WAYS)
        while len(first) < LEAST or time.perf_counter() < end:
            time.sleep(idle_s)
            first.append(_timed(way, impl, next_call))
            others += [_timed(way, impl, next_call) for _ in range(following)]
        found[way] = {"first": first, "following": others}
    return found


def idle(impl: Queueing, next_call: NextCall, seconds: float) -> dict[str, float]:
    """CPU time of all threads of this process while nothing is to be done, right after some calls of both ways."""
    for way in (*["forward"] * 20, *["submit"] * 20):
        _timed(way, impl, next_call)
    start, cpu = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - start}


def beside_attention(impl: Queueing, next_call: NextCall, seconds: float) -> dict[str, Any]:
    """Passes of one token through all layers: attention and experts taking turns ("together"), and each alone.

    A round has the three kinds one after the other, each after a pause and a pass that does not count: {kind: [the
    median of each round]}.
    """
    _, (hidden, _, _) = next_call()
    attend = [Attention(hidden.shape[1], seed) for seed in range(impl.layers)]

    def one_pass(attention: bool, experts: bool) -> float:
        _, (x, ids, mix) = next_call()
        start = time.perf_counter()
        for layer in range(impl.layers):
            if attention:
                x = x + attend[layer](x)
            if experts:
                x = x + impl.forward(layer, x, ids, mix)
        return time.perf_counter() - start

    kinds = {"together": (True, True), "attention": (True, False), "experts": (False, True)}
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    end = time.perf_counter() + seconds
    while len(rounds["together"]) < 2 or time.perf_counter() < end:
        for kind, which in kinds.items():
            time.sleep(PAUSE_S)
            rounds[kind].append(statistics.median([one_pass(*which) for _ in range(LEAST)][1:]))
    return {"torch_threads": torch.get_num_threads(), "rounds": rounds}


def beside_accelerator(
    impl: Deferring, next_call: NextCall, seconds: float, accelerator_s: float, deferred: int
) -> dict[str, list[float]]:
    """Passes through all layers in which the caller waits `accelerator_s` before each, as for attention on a GPU.

    Passes without deferred experts ("none") and with so many ("some") take turns.
    """
    times: dict[str, list[float]] = {"none": [], "some": []}
    end = time.perf_counter() + seconds
    while len(times["none"]) < LEAST or time.perf_counter() < end:
        for kind, count in (("none", 0), ("some", deferred)):
            impl.defer(count)
            _, batch = next_call()
            start = time.perf_counter()
            for layer in range(impl.layers):
                time.sleep(accelerator_s)
                _submit(impl, layer, batch)
            times[kind].append(time.perf_counter() - start)
    return {kind: passes[1:] for kind, passes in times.items()}
