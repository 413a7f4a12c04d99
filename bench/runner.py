"""Runs the cells of one shape: every implementation in its own process, their rounds interleaved."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cells import layers_for
from bench.impls import family_of
from bench.peers import Launch
from bench.problem import Shape, save_problem

ROOT = Path(__file__).resolve().parent.parent
PAUSE_S = 0.08
"""Between turns: pools that spin after a call go to sleep."""


@dataclass(frozen=True)
class Pace:
    threads: int = 2
    rounds: int = 3
    seconds: float = 1.0
    """For one implementation and cell, all rounds together; at least one call a round."""
    max_call_s: float = 5.0
    """A cell whose forward, or backward, would take longer, to judge by the one before, is left out. Where it does take
    longer, one round is enough."""
    patience_s: float = 180.0
    """A process that answers nothing for so long is given up."""

    @property
    def hopeless_s(self) -> float:
        """A first call, which is slower than the next ones, that takes even longer is not repeated to be measured."""
        return 4 * self.max_call_s


class WorkerError(RuntimeError):
    """The implementation failed, died or hung; the message says which."""


class Worker:
    def __init__(self, name: str, launch: Launch, patience_s: float) -> None:
        self.name, self.patience_s = name, patience_s
        self.process = subprocess.Popen(
            [launch.python, "-m", "bench.worker"], cwd=ROOT, env={**os.environ, **launch.env},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.fastest_s = 0.0
        self.tokens = 0

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer. WorkerError."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"process ended with status {self.process.wait()}") from None
        if not select.select([self.process.stdout], [], [], self.patience_s)[0]:
            self.process.kill()
            raise WorkerError(f"no answer to '{command}' for {self.patience_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"process ended with status {self.process.wait()} in '{command}'")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def expects(self, tokens: int) -> float:
        """Seconds that a pass of this size takes at most, judged by the last size: time grows no faster than tokens."""
        return self.fastest_s * tokens / self.tokens if self.tokens else 0.0

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.communicate(b'{"command":"quit"}\n', timeout=10)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self.process.kill()
        self.process.wait()


@dataclass
class Outcome:
    """Of one shape: what was loaded, the samples in seconds by (implementation, tokens, pass), what was left out."""

    mode: str
    """"inference" or "sft"; "engine": `bench.engine`."""
    shape: Shape
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[tuple[str, int, str], list[float]] = field(default_factory=dict)
    reads: dict[int, list[float]] = field(default_factory=dict)
    """GB/s of DRAM by tokens, measured in each round beside the implementations; empty where it cannot be."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    overhead: list[dict[str, Any]] = field(default_factory=list)
    wrapper: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    engine: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sft(self) -> bool:
        return self.mode == "sft"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.sft else ("forward",)

    def slowest_pass(self, name: str, tokens: int) -> float:
        """The fastest sample, in seconds, of the slowest pass; 0 before there are any."""
        return max(min(self.samples.get((name, tokens, pass_), [0.0])) for pass_ in self.passes)

    def row(self, name: str, **more: Any) -> dict[str, Any]:
        """A line of the results about one implementation."""
        return {"mode": self.mode, "shape": self.shape.name, "impl": name, **more}

    def leave_out(self, name: str, why: str, tokens: int | None = None) -> None:
        self.left_out.append(self.row(name, tokens=tokens, why=why))
        say(f"  {name}{f' at {tokens} tokens' if tokens else ''}: left out, {why}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def problem_files(shape: Shape, *, sft: bool) -> Iterator[Path]:
    """A folder with the weights and the reference, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="ktmoe-bench-") as folder:
        say(f"{shape}: making weights and the float64 reference")
        save_problem(Path(folder), shape, sft=sft)
        yield Path(folder)


@contextmanager
def running(
    outcome: Outcome, folder: Path, names: Sequence[str], found: dict[str, Launch], pace: Pace, max_tokens: int
) -> Iterator[dict[str, Worker]]:
    """Workers with the outcome's shape loaded and their errors measured; those that fail are left out."""
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            worker = Worker(name, found[family_of(name)], pace.patience_s)
            layers = 1 if outcome.sft else layers_for(outcome.shape, name)
            options = {"threads": pace.threads, "max_tokens": max(max_tokens, 16), "sft": outcome.sft}
            workers[name] = worker
            try:
                loaded = worker.ask(
                    "init", name=name, folder=str(folder), shape=asdict(outcome.shape), layers=layers, **options
                )
                outcome.loaded[name] = {**loaded, "layers": layers, **worker.ask("check")}
            except WorkerError as e:
                workers.pop(name).close()
                outcome.leave_out(name, str(e))
                continue
            say(f"  {name}: loaded in {loaded['load_s']:.1f} s, error {outcome.loaded[name]['error']:.2e}")
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def time_cell(
    workers: dict[str, Worker], outcome: Outcome, tokens: int, pace: Pace, read_rate: Callable[[], float] | None
) -> None:
    """All rounds of one cell. Every other round goes backwards through the implementations.

    `read_rate` measures the DRAM bandwidth: on a shared machine it may change within minutes, so every round asks.
    """
    say(f"  {tokens} tokens")
    live = []
    for worker in workers.values():
        if worker.expects(tokens) > pace.max_call_s:
            outcome.leave_out(worker.name, f"a call may take {worker.expects(tokens):.0f} s", tokens)
        else:
            live.append(worker)
    for round_ in range(pace.rounds):
        if read_rate:
            outcome.reads.setdefault(tokens, []).append(read_rate())
        for worker in live[:: -1 if round_ % 2 else 1]:
            time.sleep(PAUSE_S)
            warm = 1 if round_ == 0 or tokens <= 256 else 0
            if outcome.slowest_pass(worker.name, tokens) > pace.max_call_s:
                continue
            more = {"seconds": pace.seconds / pace.rounds, "warm": warm, "hopeless_s": pace.hopeless_s}
            try:
                got = worker.ask("time", tokens=tokens, **more)
            except WorkerError as e:
                outcome.leave_out(worker.name, str(e), tokens)
                worker.close()
                del workers[worker.name]
                live = [w for w in live if w is not worker]
                for pass_ in outcome.passes:
                    outcome.samples.pop((worker.name, tokens, pass_), None)
                continue
            for pass_, column in zip(outcome.passes, zip(*got["samples"], strict=True), strict=True):
                outcome.samples.setdefault((worker.name, tokens, pass_), []).extend(column)
    for worker in live:
        worker.tokens = tokens
        worker.fastest_s = outcome.slowest_pass(worker.name, tokens)
