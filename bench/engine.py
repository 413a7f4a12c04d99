"""The engine under load: what the queue costs, waking up, torch between the layers, idleness, deferred experts.

    python -m bench engine                                        two minutes: BF16 at TINY, T and S1
    python -m bench engine --python kt=VENV/bin/python            beside kt-kernel
    python -m bench engine --methods BF16,AMXINT4 --peers none

Each is measured in a process of its own while no other runs, and what is compared takes turns within the process.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.arguments import Arguments
from bench.impls import family_of
from bench.peers import Launch
from bench.problem import SHAPES
from bench.runner import Outcome, Pace, Worker, WorkerError, problem_files, say

EXPERTS = 32
"""Of each layer: the rest would only need memory. One token reads as much."""
LAYERS = 4
SMALL = {"TINY": 1, "T": 4}
"""Shapes, with a number of tokens, whose calls are so short that what surrounds them shows: TINY is computed by the
caller alone, T by all threads."""
IDLE_S = 0.01
FOLLOWING = 5
KINDS = ("together", "attention", "experts")
POLICIES = ("default", "passive")
"""OMP_WAIT_POLICY: whether torch's OpenMP threads wait actively for their next loop."""


@dataclass(frozen=True)
class Contestant:
    name: str
    launch: Launch
    note: str = ""
    """In which of several ways it runs."""


def contestants(names: Sequence[str], found: dict[str, Launch]) -> list[Contestant]:
    """kt-kernel is measured twice: with the help that `bench.impls.kt` gives it, and as it is."""
    plain = []
    for name in names:
        launch = found[family_of(name)]
        if launch.env:
            plain.append(Contestant(name, launch, "helped to sleep"))
            launch = Launch(launch.python)
        plain.append(Contestant(name, launch))
    return plain


def measure(args: Arguments, pace: Pace) -> Iterator[Outcome]:
    """One outcome a shape: the small ones, of which only calls are timed, then those asked for."""
    (plan,) = args.plans
    everyone = contestants(plan.ours + plan.peers, args.launches)
    asked = {cell.shape: cell.tokens for cell in plan.cells}
    small = {name: n for name, n in SMALL.items() if name not in asked}
    for name, n in (small | asked).items():
        shape = SHAPES[name]
        outcome = Outcome("engine", shape.reduced(max(args.options.experts or EXPERTS, shape.top_k)))
        with problem_files(outcome.shape, sft=False) as folder:
            for contestant in everyone:
                with leaving_out(outcome, contestant), loaded(outcome, folder, contestant, pace) as worker:
                    latency(worker, outcome, contestant, n, pace)
                    wake_up(worker, outcome, contestant, n, pace)
                    if name in asked:
                        idle(worker, outcome, contestant, n, pace)
            for ours in plan.ours if name in asked else ():
                beside_attention(outcome, folder, ours, pace)
                beside_accelerator(outcome, folder, ours, n, pace)
        yield outcome


@contextmanager
def loaded(outcome: Outcome, folder: Path, contestant: Contestant, pace: Pace) -> Iterator[Worker]:
    """Its process, with all layers. WorkerError."""
    worker = Worker(contestant.name, contestant.launch, pace.patience_s)
    options = {"layers": LAYERS, "threads": pace.threads, "max_tokens": 16, "sft": False}
    try:
        worker.ask("init", name=contestant.name, folder=str(folder), shape=asdict(outcome.shape), **options)
        say(f"  {contestant.name} {contestant.note}")
        yield worker
    finally:
        worker.close()


@contextmanager
def leaving_out(outcome: Outcome, contestant: Contestant) -> Iterator[None]:
    """Goes on with the next where this one fails."""
    try:
        yield
    except WorkerError as e:
        outcome.leave_out(contestant.name, f"{contestant.note}: {e}" if contestant.note else str(e))


def _us(seconds: Sequence[float]) -> float:
    return 1e6 * statistics.median(seconds)


def latency(worker: Worker, outcome: Outcome, who: Contestant, tokens: int, pace: Pace) -> None:
    got = worker.ask("probe", what="latency", tokens=tokens, seconds=pace.seconds)
    forward, submit = _us(got["forward"]), _us(got["submit"])
    times = {"forward_us": forward, "submit_us": submit, "added_us": submit - forward, "n": len(got["forward"])}
    _keep(outcome, "submit", who, tokens=tokens, **times)


def wake_up(worker: Worker, outcome: Outcome, who: Contestant, tokens: int, pace: Pace) -> None:
    more = {"seconds": pace.seconds, "idle_s": IDLE_S, "following": FOLLOWING}
    for way, got in worker.ask("probe", what="wake_up", tokens=tokens, **more).items():
        first, following = _us(got["first"]), _us(got["following"])
        times = {"first_us": first, "following_us": following, "cost_us": first - following, "n": len(got["first"])}
        _keep(outcome, "wake", who, tokens=tokens, way=way, **times)


def idle(worker: Worker, outcome: Outcome, who: Contestant, tokens: int, pace: Pace) -> None:
    got = worker.ask("probe", what="idle", tokens=tokens, seconds=2 * pace.seconds)
    _keep(outcome, "idle", who, percent=100 * got["cpu_s"] / got["wall_s"], **got)


def beside_attention(outcome: Outcome, folder: Path, name: str, pace: Pace) -> None:
    """The penalty of oversubscription: a pass with both parts over the sum of passes with one each, round by round."""
    for policy in POLICIES:
        variable = {"OMP_WAIT_POLICY": policy}
        if policy == "default":
            policy, variable = os.environ.get("OMP_WAIT_POLICY", policy), {}
        who = Contestant(name, Launch(env=variable))
        with leaving_out(outcome, who), loaded(outcome, folder, who, pace) as worker:
            got = worker.ask("probe", what="beside_attention", tokens=1, seconds=8 * pace.seconds)
            rounds = got["rounds"]
            penalties = [both / (a + e) for both, a, e in zip(*(rounds[kind] for kind in KINDS), strict=True)]
            found = {f"{kind}_ms": _us(rounds[kind]) / 1e3 for kind in KINDS}
            found |= {"penalty": statistics.median(penalties), "layers": LAYERS, "n": len(penalties)}
            _keep(outcome, "attention", who, policy=policy, torch_threads=got["torch_threads"], **found)


def beside_accelerator(outcome: Outcome, folder: Path, name: str, tokens: int, pace: Pace) -> None:
    """Half of the experts deferred against none: the accelerator takes as long as half of the experts do."""
    deferred = outcome.shape.top_k // 2
    who = Contestant(f"{name}{'&' if '?' in name else '?'}max_deferred_experts_per_token={deferred}", Launch())
    with leaving_out(outcome, who), loaded(outcome, folder, who, pace) as worker:
        alone = worker.ask("probe", what="latency", tokens=tokens, seconds=pace.seconds)["forward"]
        half = statistics.median(alone) / 2
        more = {"seconds": 4 * pace.seconds, "accelerator_s": half, "deferred": deferred}
        got = worker.ask("probe", what="beside_accelerator", tokens=tokens, **more)
        saved = statistics.median(none - some for none, some in zip(got["none"], got["some"], strict=True))
        times = {f"{kind}_ms": _us(passes) / 1e3 for kind, passes in got.items()}
        # What the last layer would defer runs at once, so one of the layers gains nothing.
        found = {"accelerator_ms": 1e3 * half, "saved_ms": 1e3 * saved, "most_ms": 1e3 * half * (LAYERS - 1)}
        found |= {"saved_percent": 100 * saved / statistics.median(got["none"])}
        _keep(outcome, "deferral", who, tokens=tokens, layers=LAYERS, n=len(got["none"]), **times, **found)


def _keep(outcome: Outcome, probe: str, who: Contestant, **found: Any) -> None:
    outcome.engine.append(outcome.row(who.name, note=who.note, probe=probe, **found))
