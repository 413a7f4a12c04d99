"""What is measured beside the cells: the overhead of a call, what the public interface costs, memory in training."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path

from bench.impls import family_of
from bench.peers import Launch
from bench.runner import PAUSE_S, Outcome, Pace, Worker, WorkerError, say

WRAPPER_TOKENS = {"inference": 1, "sft": 16}
"""Few: the less there is to compute, the more a call's own cost weighs."""


def time_overhead(workers: dict[str, Worker], outcome: Outcome, pace: Pace) -> None:
    """One token: us a call back to back, and after 80 ms without work."""
    for name, worker in workers.items():
        try:
            got = worker.ask("overhead", tokens=1, seconds=pace.seconds / 2, idle_s=PAUSE_S, idle_calls=12)
        except WorkerError as e:
            outcome.leave_out(name, str(e), 1)
            continue
        hot, idle = (sorted(1e6 * s[0] for s in got[key]) for key in ("hot", "after_idle"))
        spread = {"p10": hot[len(hot) // 10], "p90": hot[len(hot) * 9 // 10]}
        outcome.overhead.append(
            outcome.row(name, us=statistics.median(hot), **spread, after_idle_us=statistics.median(idle))
        )


def time_wrapper(workers: dict[str, Worker], outcome: Outcome, pace: Pace) -> None:
    """What the public forward, and backward, cost beside the direct calls of the extension, which make no tensors.

    The public backward makes new ones for the LoRA gradients, unless it has been given buffers: it is timed both ways.
    """
    for name, worker in workers.items():
        if family_of(name) != "ktmoe":
            continue
        try:
            _wrapper_cost(worker, outcome, pace, buffers=False)
            if outcome.sft:
                _wrapper_cost(worker, outcome, pace, buffers=True)
        except WorkerError as e:
            outcome.leave_out(name, str(e), WRAPPER_TOKENS[outcome.mode])


def _wrapper_cost(worker: Worker, outcome: Outcome, pace: Pace, *, buffers: bool) -> None:
    tokens = WRAPPER_TOKENS[outcome.mode]
    got = worker.ask("wrapper_cost", tokens=tokens, seconds=pace.seconds, buffers=buffers)
    for pass_, wrapper, direct in zip(outcome.passes, got["wrapper"], got["direct"], strict=True):
        if pass_ == "forward" and buffers:
            continue
        cost = {"pass": f"{pass_} into buffers" if buffers else pass_, "wrapper": wrapper, "direct": direct}
        outcome.wrapper.append(outcome.row(worker.name, tokens=tokens, percent=100 * (wrapper / direct - 1)) | cost)


def measure_memory(outcome: Outcome, folder: Path, found: dict[str, Launch], pace: Pace) -> None:
    """A training step of each, each alone in a fresh process, at the largest size that is not too slow."""
    say("  memory")
    for name in outcome.loaded:
        sizes = {tokens for timed, tokens, _ in outcome.samples if timed == name}
        tokens = max((t for t in sizes if outcome.slowest_pass(name, t) <= pace.max_call_s), default=0)
        if not tokens:
            continue
        worker = Worker(name, found[family_of(name)], pace.patience_s)
        options = {"layers": 1, "threads": pace.threads, "max_tokens": tokens, "sft": True}
        try:
            got = worker.ask(
                "memory", name=name, folder=str(folder), shape=asdict(outcome.shape), tokens=tokens, **options
            )
            outcome.memory.append(outcome.row(name, tokens=tokens, **got))
        except WorkerError as e:
            outcome.leave_out(name, f"memory: {e}", tokens)
        finally:
            worker.close()
