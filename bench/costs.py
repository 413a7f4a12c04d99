"""What is measured beside the cells: the overhead of a call, and what the public interface costs."""

from __future__ import annotations

import statistics

from bench.impls import family_of
from bench.runner import PAUSE_S, Outcome, Pace, Worker, WorkerError


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
