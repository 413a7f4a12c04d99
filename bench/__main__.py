"""One layer of routed experts beside what this machine can do and beside other implementations.

    python -m bench                                   the default cells: about a quarter of an hour
    python -m bench --quick                           a look at S1
    python -m bench --cells S1:1,S1:64 --methods BF16 --peers torch:bf16
    python -m bench --mode sft --tokens 256
    python -m bench --python kt=VENV/bin/python --python llamacpp=VENV/bin/python

floor = max(operations / peak, bytes of the touched experts / DRAM read bandwidth), both measured in the same run.
The error is relative L2 against float64 on the original bf16 weights. Writes bench.json and roofline.png to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ktmoe
from bench import cells, limits, peers, report
from bench.cells import Cell
from bench.floors import better_of
from bench.problem import SHAPES, Shape
from bench.runner import Outcome, Pace, running, say, time_cell, time_overhead, time_wrapper
from ktmoe import _ext
from ktmoe.methods import methods_of

BUSY = 0.15
"""Drift of a limit from which on the table says that the machine was busy."""
QUICK = {"tokens": "1,16,256", "shape": "S1", "seconds": 0.5, "rounds": 2, "peers": "torch:bf16"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="inference", choices=("inference", "sft"))
    parser.add_argument("--shape", help=f"of {', '.join(SHAPES)}, separated by commas (default: S1,S2; sft: S1)")
    parser.add_argument("--tokens", help="separated by commas")
    parser.add_argument("--cells", help="SHAPE:TOKENS,... instead of --shape and --tokens")
    parser.add_argument("--methods", help="default: every method; METHOD?option=value passes an option")
    parser.add_argument(
        "--peers", help='"auto" (default: what is found), "none", or names: torch:bf16,kt,llamacpp:Q4_K'
    )
    parser.add_argument("--python", action="append", default=[], metavar="FAMILY=PATH", help="interpreter of a peer")
    parser.add_argument("--quick", action="store_true", help="S1 with few sizes and only torch: under 3 minutes")
    parser.add_argument("--experts", type=int, help="of every shape; default: what fits the memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="per implementation and cell, all rounds together")
    parser.add_argument("--max-call", type=float, default=5.0, help="leave out cells with longer calls (seconds)")
    parser.add_argument("--read-bytes", type=int, help="buffer of the bandwidth test; default: 4 x the caches")
    parser.add_argument(
        "--no-overhead", action="store_true", help="leave out TINY and the wrapper beside the extension"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args(argv)
    normal = {"tokens": ",".join(map(str, cells.TOKENS[args.mode])), "shape": ",".join(cells.DEFAULT_SHAPES[args.mode]),
              "seconds": 1.0, "rounds": 3, "peers": "auto"}  # fmt: skip
    for name, value in (normal | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        texts = (
            args.cells.split(",")
            if args.cells
            else [f"{s}:{t}" for s in args.shape.split(",") for t in args.tokens.split(",")]
        )
        args.cells = [Cell.parse(text) for text in texts]
        args.found = peers.launches(dict(p.split("=", 1) for p in args.python))
        args.peers = peers.choose(args.peers, args.mode, args.found)
    except ValueError as e:
        parser.error(str(e))
    methods = args.methods.split(",") if args.methods else [m.name for m in methods_of(args.mode)]
    args.ours = [f"ktmoe:{m}" for m in methods]
    return args


def measure_limits(args: argparse.Namespace) -> list[limits.Limit]:
    """Empty, with a message, where the program cannot be built: the table then has no floors."""
    try:
        return limits.measure(args.threads, args.read_bytes)
    except limits.NoCompilerError as e:
        say(f"The limits of this machine are not measured, so there are no floors: {e}")
        return []


def run_shapes(args: argparse.Namespace, pace: Pace) -> list[Outcome]:
    outcomes, sft = [], args.mode == "sft"
    for name in dict.fromkeys(cell.shape for cell in args.cells):
        sizes = sorted({cell.tokens for cell in args.cells if cell.shape == name})
        impls = args.ours + args.peers
        shape = cells.fitted(SHAPES[name], impls, limits.available_memory(), args.experts)
        with running(shape, impls, args.found, pace, max(sizes), sft=sft) as (workers, outcome):
            for tokens in sizes:
                time_cell(workers, outcome, tokens, pace, sft=sft)
            if name == "S1" and not sft and not args.no_overhead:
                time_wrapper(workers, outcome, pace)
        outcomes.append(outcome)
    return outcomes


def run_overhead(args: argparse.Namespace, pace: Pace) -> Outcome | None:
    """TINY: what a call costs when there is nothing to compute; one peer of each family."""
    if args.mode == "sft" or args.no_overhead:
        return None
    families = {p.partition(":")[0]: p for p in reversed(args.peers)}
    with running(SHAPES["TINY"], args.ours + list(families.values()), args.found, pace, 1, sft=False) as (workers, out):
        time_overhead(workers, out, pace)
        time_wrapper(workers, out, pace)
    return out


def results(args: argparse.Namespace, started: float) -> dict[str, Any]:
    pace = Pace(args.threads, args.rounds, args.seconds, args.max_call)
    say("measuring the limits of this machine")
    before = measure_limits(args)
    outcomes = run_shapes(args, pace)
    tiny = run_overhead(args, pace)
    after = measure_limits(args) if before else []
    best = better_of(before, after)
    every = [*outcomes, *([tiny] if tiny else [])]
    return {
        "version": 1,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": time.time() - started,
        "mode": args.mode,
        "machine": {
            "cpu": _ext.cpu_report()["model"],
            "isa": _ext.active_isa(),
            "threads": args.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ktmoe": ktmoe.__version__,
        },
        "pace": asdict(pace),
        "limits": {
            "before": [asdict(x) for x in before],
            "after": [asdict(x) for x in after],
            "drift": limits.drift(before, after),
        },
        "shapes": [asdict(o.shape) for o in outcomes],
        "implementations": [{"shape": o.shape.name, "impl": n, **v} for o in every for n, v in o.loaded.items()],
        "cells": [row for o in outcomes for row in report.rows_of(o, best)],
        "overhead": tiny.overhead if tiny else [],
        "wrapper": [
            {"shape": o.shape.name, "impl": n, **v, "percent": 100 * (v["wrapper"] / v["direct"] - 1)}
            for o in every
            for n, v in o.wrapper.items()
        ],
        "left_out": [x for o in every for x in o.left_out],
    }


def print_tables(data: dict[str, Any]) -> None:
    machine = data["machine"]
    print(f"{machine['cpu']}, {machine['threads']} threads, ISA level {machine['isa']}, {data['seconds']:.0f} s\n")
    before, after = ([limits.Limit(**x) for x in data["limits"][key]] for key in ("before", "after"))
    if before:
        print(report.limit_table(before, after, data["limits"]["drift"]))
        moved = max(map(abs, data["limits"]["drift"].values()))
        if moved > BUSY:
            print(f"The limits moved by up to {100 * moved:.0f} %: the machine was busy, so trust ratios at most.")
    for shape in data["shapes"]:
        rows = [row for row in data["cells"] if row["shape"] == shape["name"]]
        print(f"\n{Shape(**shape)}")
        print(report.cell_table(rows) if rows else "nothing was measured")
    if data["overhead"]:
        print(f"\n{SHAPES['TINY']}, 1 token\n{report.overhead_table(data['overhead'])}")
    if data["wrapper"]:
        print(
            f"\nwrapper.forward beside the extension's layer.forward, 1 token\n{report.wrapper_table(data['wrapper'])}"
        )
    for gone in data["left_out"]:
        print(f"left out: {gone['shape']} {gone['impl']} {gone['tokens'] or ''} {gone['why']}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    data = results(args, time.time())
    print_tables(data)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
    kept = [args.out / "bench.json"]
    with_floor = [row for row in data["cells"] if row["floor"]]
    if with_floor:
        from bench import plot

        best = better_of(*([limits.Limit(**x) for x in data["limits"][key]] for key in ("before", "after")))
        title = f"{data['machine']['cpu']}, {args.threads} threads, {args.mode}"
        plot.draw(with_floor, best, title, args.out / "roofline.png")
        kept.append(args.out / "roofline.png")
    print(f"\nwritten: {', '.join(map(str, kept))}")
    return 0 if data["cells"] else 1


if __name__ == "__main__":
    sys.exit(main())
