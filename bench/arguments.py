"""The command line, and what it plans: which cells of which implementations, mode by mode."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench import cells, impls, peers
from bench.cells import Cell
from bench.peers import Launch
from bench.problem import SHAPES
from ktmoe.methods import METHODS, MODES, methods_of

QUICK = {"shape": "S1", "seconds": 0.5, "rounds": 2, "peers": "torch:bf16"}
ENGINE = {"shape": "S1", "tokens": "1", "methods": "BF16", "seconds": 1.0, "rounds": 4, "peers": "auto"}
NORMAL = {"shape": ",".join(cells.DEFAULT_SHAPES), "seconds": 1.0, "rounds": 3, "peers": "auto"}


@dataclass(frozen=True)
class Plan:
    mode: str
    cells: list[Cell]
    ours: list[str]
    peers: list[str]


@dataclass(frozen=True)
class Arguments:
    options: argparse.Namespace
    plans: list[Plan]
    launches: dict[str, Launch]
    """How a process of each family is started."""
    started: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        """Whether the time is up in which cells may begin."""
        within: float | None = self.options.within
        return within is not None and time.monotonic() > self.started + within


def parse(description: str, argv: list[str] | None = None) -> Arguments:
    """Exits with a message, as argparse does, for options that make no sense."""
    parser = _parser(description)
    options = parser.parse_args(argv)
    engine = options.part == "engine"
    for name, value in (ENGINE if engine else NORMAL | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        found = peers.launches(dict(p.split("=", 1) for p in options.python))
        plans = [_plan(mode, options, found) for mode in _modes(options)]
        return Arguments(options, [_engine_plan(plan, options) for plan in plans] if engine else plans, found)
    except ValueError as e:
        parser.error(str(e))


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", nargs="?", choices=("layers", "engine"), default="layers", help="what is measured (default: layers)")
    add("--mode", choices=MODES, help="default: inference, then sft (LoRA fine-tuning); or those of --methods")
    add("--shape", help=f"of {', '.join(SHAPES)}, separated by commas (default: S1,S2)")
    add("--tokens", help="separated by commas")
    add("--cells", help="SHAPE:TOKENS,... instead of --shape and --tokens")
    add("--methods", help="default: every method; METHOD?option=value passes an option")
    add("--peers", help='"auto" (default: what is found), "none", or names: torch:bf16,kt,llamacpp:Q4_K')
    add("--python", action="append", default=[], metavar="FAMILY=PATH", help="interpreter of a peer")
    add("--quick", action="store_true", help="S1 with few sizes and only torch: a few minutes")
    add("--experts", type=int, help="of every shape; default: what fits the memory")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--rounds", type=int)
    add("--seconds", type=float, help="per implementation and cell, all rounds together")
    add("--max-call", type=float, default=5.0, help="leave out cells with a longer forward or backward (seconds)")
    add("--within", type=float, help="seconds; cells that would begin later are left out (a machine lent for minutes)")
    add("--read-bytes", type=int, help="buffer of the bandwidth test; default: 4 x the caches")
    add("--cells-only", action="store_true", help="leave out TINY, the wrapper beside the extension, memory")
    add("--out", type=Path, default=Path("bench-out"))
    return parser


def _plan(mode: str, options: argparse.Namespace, found: dict[str, Launch]) -> Plan:
    tokens = options.tokens or ",".join(map(str, (cells.QUICK_TOKENS if options.quick else cells.TOKENS)[mode]))
    texts = (
        options.cells.split(",")
        if options.cells
        else [f"{s}:{t}" for s in options.shape.split(",") for t in tokens.split(",")]
    )
    if options.methods is None:
        methods = [m.name for m in methods_of(mode)]
    else:
        methods = [m for m in options.methods.split(",") if options.mode or _mode_of(m) == mode]
    ours = [f"ktmoe:{m}" for m in methods]
    return Plan(mode, [Cell.parse(text) for text in texts], ours, peers.choose(options.peers, mode, found))


def _engine_plan(plan: Plan, options: argparse.Namespace) -> Plan:
    """ValueError for what has no queue."""
    if plan.mode != "inference":
        raise ValueError(f"engine: got mode {plan.mode}, expected inference")
    queueing = [p for p in plan.peers if impls.family_of(p) == "kt"]
    if options.peers == "auto":
        queueing = queueing[:1]  # kt:BF16
    elif queueing != plan.peers:
        raise ValueError(f"--peers: got {options.peers!r}, expected variants of kt: no other peer has a queue")
    return replace(plan, peers=queueing)


def _modes(options: argparse.Namespace) -> list[str]:
    if options.mode:
        return [options.mode]
    named = {_mode_of(m) for m in options.methods.split(",")} if options.methods else MODES
    return [mode for mode in MODES if mode in named]


def _mode_of(method: str) -> str:
    """Of a method that is not known: inference, where loading it says so."""
    row = METHODS.get(method.partition("?")[0])
    return row.mode if row else MODES[0]
