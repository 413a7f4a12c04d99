"""One layer of routed experts beside what this machine can do and beside other implementations.

    python -m bench                                   the default cells, inference, then training: about half an hour
    python -m bench --quick                           a look at S1
    python -m bench --cells S1:1,S1:64 --methods BF16 --peers torch:bf16
    python -m bench --mode sft --tokens 256
    python -m bench engine                            the engine under load instead: see bench/engine.py
    python -m bench --python kt=VENV/bin/python --python llamacpp=VENV/bin/python

floor = max(operations / peak, bytes of the touched experts / DRAM read bandwidth), both measured in the same run, the
bandwidth in every round beside the implementations (it changes where other machines share the memory). In training,
forward and backward have a floor each. Errors are relative L2 against float64 on the original bf16 weights.
Writes bench.json and roofline.png to --out; engine.json with `engine`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import ktmoe
from bench import arguments, cells, costs, engine, engine_report, limits, report
from bench.arguments import Arguments, Plan
from bench.floors import best, better_of
from bench.problem import LORA_RANK, SHAPES, Shape
from bench.runner import Outcome, Pace, problem_files, running, say, time_cell
from ktmoe import _ext

BUSY = 0.15
"""Drift of a limit from which on the table says that the machine was busy."""


def measure_limits(args: Arguments) -> list[limits.Limit]:
    """Empty, with a message, where the program cannot be built: the table then has no floors."""
    try:
        return limits.measure(args.options.threads, args.options.read_bytes)
    except limits.NoCompilerError as e:
        say(f"The limits of this machine are not measured, so there are no floors: {e}")
        return []


def read_rate(args: Arguments) -> float:
    """GB/s of DRAM now."""
    reads = limits.measure(args.options.threads, args.options.read_bytes, read_only=True)
    return best(reads, "read").median


def run_shapes(args: Arguments, plan: Plan, pace: Pace, *, with_limits: bool) -> Iterator[Outcome]:
    """One outcome a shape; the first shape's workers also say what the public interface costs."""
    names = plan.ours + plan.peers
    reading = partial(read_rate, args) if with_limits else None
    for index, name in enumerate(dict.fromkeys(cell.shape for cell in plan.cells)):
        sizes = sorted({cell.tokens for cell in plan.cells if cell.shape == name})
        shape = cells.fitted(SHAPES[name], names, limits.available_memory(), args.options.experts)
        outcome = Outcome(plan.mode, shape)
        with problem_files(shape, sft=outcome.sft) as folder:
            with running(outcome, folder, names, args.launches, pace, max(sizes)) as workers:
                for tokens in sizes:
                    if args.late:
                        outcome.leave_out("all", "the time was up", tokens)
                    else:
                        time_cell(workers, outcome, tokens, pace, reading)
                if index == 0 and not args.options.cells_only:
                    costs.time_wrapper(workers, outcome, pace)
            if outcome.sft and not args.options.cells_only:
                costs.measure_memory(outcome, folder, args.launches, pace)
        yield outcome


def run_overhead(args: Arguments, plan: Plan, pace: Pace) -> Iterator[Outcome]:
    """TINY: what a call costs when there is nothing to compute; one peer of each family."""
    if plan.mode == "sft" or args.options.cells_only:
        return
    families = {p.partition(":")[0]: p for p in reversed(plan.peers)}
    outcome = Outcome(plan.mode, SHAPES["TINY"])
    with (
        problem_files(outcome.shape, sft=False) as folder,
        running(outcome, folder, plan.ours + list(families.values()), args.launches, pace, 1) as workers,
    ):
        costs.time_overhead(workers, outcome, pace)
        costs.time_wrapper(workers, outcome, pace)
    yield outcome


def head(args: Arguments, pace: Pace, started: float, modes: list[str]) -> dict[str, Any]:
    """What every file of results says of its run."""
    return {
        "version": 2,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": time.time() - started,
        "modes": modes,
        "machine": {
            "cpu": _ext.cpu_report()["model"],
            "isa": _ext.active_isa(),
            "threads": args.options.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ktmoe": ktmoe.__version__,
        },
        "pace": asdict(pace),
    }


def engine_results(args: Arguments, pace: Pace, started: float) -> dict[str, Any]:
    load = os.getloadavg()[0]
    outcomes = list(engine.measure(args, pace))
    return {
        **head(args, pace, started, ["engine"]),
        "load_before": load,
        "shapes": [{"mode": o.mode, **asdict(o.shape)} for o in outcomes],
        "engine": [row for o in outcomes for row in o.engine],
        "left_out": [row for o in outcomes for row in o.left_out],
    }


def results(args: Arguments, pace: Pace, started: float) -> dict[str, Any]:
    say("measuring the limits of this machine")
    before = measure_limits(args)
    outcomes: list[Outcome] = []
    for plan in args.plans:
        say(f"mode {plan.mode}")
        outcomes += run_shapes(args, plan, pace, with_limits=bool(before))
        outcomes += run_overhead(args, plan, pace)
    after = measure_limits(args) if before else []
    peaks = better_of(before, after)
    return {
        **head(args, pace, started, [plan.mode for plan in args.plans]),
        "limits": {
            "before": [asdict(x) for x in before],
            "after": [asdict(x) for x in after],
            "drift": limits.drift(before, after),
        },
        "shapes": [{"mode": o.mode, **asdict(o.shape)} for o in outcomes],
        "implementations": [o.row(name, **v) for o in outcomes for name, v in o.loaded.items()],
        "cells": [row for o in outcomes for row in report.rows_of(o, peaks)],
        "overhead": [row for o in outcomes for row in o.overhead],
        "wrapper": [row for o in outcomes for row in o.wrapper],
        "memory": [row for o in outcomes for row in o.memory],
        "left_out": [row for o in outcomes for row in o.left_out],
    }


def print_machine(data: dict[str, Any]) -> None:
    machine = data["machine"]
    print(f"{machine['cpu']}, {machine['threads']} threads, ISA level {machine['isa']}, {data['seconds']:.0f} s\n")


def print_left_out(data: dict[str, Any]) -> None:
    for gone in data["left_out"]:
        print(f"left out: {gone['mode']} {gone['shape']} {gone['impl']} {gone['tokens'] or ''} {gone['why']}")


def print_tables(data: dict[str, Any]) -> None:
    print_machine(data)
    before, after = ([limits.Limit(**x) for x in data["limits"][key]] for key in ("before", "after"))
    if before:
        print(report.limit_table(before, after, data["limits"]["drift"]))
        moved = max(map(abs, data["limits"]["drift"].values()))
        if moved > BUSY:
            print(f"The limits moved by up to {100 * moved:.0f} %: the machine was busy, so trust ratios at most.")
    for shape in data["shapes"]:
        print_shape(data, **shape)
    print_left_out(data)


def print_shape(data: dict[str, Any], mode: str, **shape: Any) -> None:
    cells, overhead, wrapper, memory = (
        [row for row in data[kind] if (row["mode"], row["shape"]) == (mode, shape["name"])]
        for kind in ("cells", "overhead", "wrapper", "memory")
    )
    print(f"\n{Shape(**shape)}{f', LoRA rank {LORA_RANK}' if mode == 'sft' else ''}")
    if cells:
        print(report.cell_table(cells))
    if overhead:
        print(f"\none call, 1 token\n{report.overhead_table(overhead)}")
    if wrapper:
        print(f"\nthe wrapper beside the direct call of the extension\n{report.wrapper_table(wrapper)}")
    if memory:
        print(f"\nMiB: weights as packed, held after load, LoRA, at most in a step\n{report.memory_table(memory)}")
    if not (cells or overhead):
        print("nothing was measured")


def main_engine(args: Arguments, pace: Pace) -> int:
    data = engine_results(args, pace, time.time())
    print_machine(data)
    print(f"load average before: {data['load_before']:.1f} on {os.cpu_count()} CPUs")
    print(engine_report.tables(data["engine"]))
    print_left_out(data)
    path = args.options.out / "engine.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0 if data["engine"] else 1


def main(argv: list[str] | None = None) -> int:
    args = arguments.parse(__doc__ or "", argv)
    options, out = args.options, args.options.out
    pace = Pace(options.threads, options.rounds, options.seconds, options.max_call)
    out.mkdir(parents=True, exist_ok=True)
    if options.part == "engine":
        return main_engine(args, pace)
    data = results(args, pace, time.time())
    print_tables(data)
    (out / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
    kept = [out / "bench.json"]
    with_floor = [row for row in data["cells"] if row["floor"]]
    if with_floor:
        from bench import plot

        peaks = better_of(*([limits.Limit(**x) for x in data["limits"][key]] for key in ("before", "after")))
        title = f"{data['machine']['cpu']}, {args.options.threads} threads"
        plot.draw(with_floor, peaks, title, out / "roofline.png")
        kept.append(out / "roofline.png")
    print(f"\nwritten: {', '.join(map(str, kept))}")
    return 0 if data["cells"] else 1


if __name__ == "__main__":
    sys.exit(main())
