"""What is measured beside the cells: the overhead of a call, what the public interface costs, memory in training."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path

from bench.impls import family_of
from bench.peers import Launch
from bench.runner import PAUSE_S, Outcome, Pace, Worker, WorkerError, say


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
    """What the public forward costs beside the direct extension call, at one token."""
    for name, worker in workers.items():
        if family_of(name) == "ktmoe":
            try:
                cost = worker.ask("wrapper_cost", tokens=1, seconds=pace.seconds)
            except WorkerError as e:
                outcome.leave_out(name, str(e), 1)
                continue
            percent = 100 * (cost["wrapper"] / cost["direct"] - 1)
            outcome.wrapper.append(outcome.row(name, tokens=1, **cost, percent=percent))


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
