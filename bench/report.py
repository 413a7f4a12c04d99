"""Results as rows (JSON) and as tables (text)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.cells import compare, summary
from bench.floors import floor_of
from bench.limits import Limit
from bench.problem import touched_experts
from bench.runner import Outcome


def rows_of(outcome: Outcome, limits: Sequence[Limit]) -> list[dict[str, Any]]:
    """One row for each implementation, size and pass. Without limits, or for a peer, `floor` is None.

    Forward and backward have a floor each: both meet every base weight once for each row, and read it once. What LoRA
    and its gradients add is not in the floor. `error` is that of y, or of the gradient of x; `lora_error` is that of
    all LoRA gradients together.
    """
    shape, rows = outcome.shape, []
    touched = {tokens: touched_experts(shape, tokens) for tokens in {t for _, t, _ in outcome.samples}}
    for (name, tokens, pass_), seconds in outcome.samples.items():
        loaded = outcome.loaded[name]
        row = outcome.row(name, experts=shape.experts, tokens=tokens) | {"pass": pass_} | summary(seconds)
        row |= {
            "gops": shape.flops(tokens) / row["ms"] / 1e6,
            "error": loaded["grad_error" if pass_ == "backward" else "error"],
            "lora_error": loaded["lora_error"] if pass_ == "backward" else None,
            "floor": None,
            "fraction": None,
            "samples_ms": [round(1e3 * s, 4) for s in seconds],
        }
        if limits and loaded["packed_bytes"]:
            read = loaded["packed_bytes"] / shape.experts * touched[tokens]
            method = name.partition(":")[2].partition("?")[0]
            here = _now(limits, outcome.reads.get(tokens))
            floor = floor_of(here, method, shape.flops(tokens), read, backward=pass_ == "backward")
            row |= {"floor": floor.to_json(), "fraction": floor.ms / row["ms"]}
        rows.append(row)
    compare(rows)
    return rows


def _now(limits: Sequence[Limit], reads: Sequence[float] | None) -> list[Limit]:
    """The limits, with the bandwidth that was there while a cell was measured."""
    if not reads:
        return list(limits)
    here = Limit("read, beside the cell", "read", "GB/s", statistics.median(reads), min(reads), max(reads))
    return [*(x for x in limits if x.kind != "read"), here]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if value < 10**digits else f"{value:.0f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed; the first to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    left = {"implementation", "fastest peer as accurate", "bound", "test", "pass", "shape", "call", "OpenMP waits"}

    def text(line: Sequence[str]) -> str:
        cells = (c.ljust(w) if h in left else c.rjust(w) for h, c, w in zip(header, line, widths, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join(text(line) for line in [header, *lines])


def cell_table(rows: Sequence[dict[str, Any]]) -> str:
    sft = any(row["lora_error"] is not None for row in rows)
    header = (
        *("tokens", "implementation", "ms", "p10", "p90", "Gop/s", "floor ms", "of floor", "bound", "error"),
        *(("LoRA error",) if sft else ()),
        *("time / peer", "fastest peer as accurate"),
    )
    lines = []
    for row in sorted(rows, key=lambda r: (r["tokens"], r["pass"] == "backward", r["floor"] is None, r["ms"])):
        floor = row["floor"]
        name = row["impl"] + (" backward" if row["pass"] == "backward" else "")
        times = [_number(row[key]) for key in ("ms", "p10", "p90", "gops")]
        bounds = [_number(floor["ms"]), f"{row['fraction']:.2f}", floor["bound"]] if floor else ["-", "-", "-"]
        peer = [f"{row['fair_peer_ratio']:.2f}x", row["fair_peer"]] if row["fair_peer"] else ["-", "-"]
        errors = [f"{row['error']:.1e}", *([_error(row["lora_error"])] if sft else [])]
        lines.append([str(row["tokens"]), name, *times, *bounds, *errors, *peer])
    return aligned(header, lines)


def limit_table(before: Sequence[Limit], after: Sequence[Limit], drift: dict[str, float]) -> str:
    later = {limit.name: limit for limit in after}
    lines = [
        [limit.name, limit.kind, _number(limit.median, 4), _number(later[limit.name].median, 4), limit.unit,
         f"{100 * drift[limit.name]:+.0f} %"]
        for limit in before
    ]  # fmt: skip
    return aligned(("test", "kind", "before", "after", "unit", "drift"), lines)


def overhead_table(rows: Sequence[dict[str, Any]]) -> str:
    keys = ("us", "p10", "p90", "after_idle_us")
    lines = [[row["impl"], *(f"{row[key]:.1f}" for key in keys)] for row in rows]
    return aligned(("implementation", "us a call", "p10", "p90", "after 80 ms idle"), lines)


def wrapper_table(costs: Sequence[dict[str, Any]]) -> str:
    lines = []
    for cost in costs:
        us = [1e6 * s for s in (cost["wrapper"], cost["direct"], cost["wrapper"] - cost["direct"])]
        name = cost["impl"] + (f" {cost['pass']}" if cost["pass"] != "forward" else "")
        lines.append([str(cost["tokens"]), name, *(f"{u:.1f}" for u in us), f"{cost['percent']:+.1f} %"])
    return aligned(("tokens", "implementation", "wrapper us", "extension us", "cost us", "cost"), lines)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Of a peer nobody knows how much of what it holds are packed weights."""
    header = ("tokens", "implementation", "packed", "held", "held / packed", "LoRA", "peak", "peak over packed")
    lines = []
    for row in rows:
        packed, held, lora, peak = (row[key] / 2**20 for key in ("packed", "held", "lora", "peak"))
        known = [f"{packed:.0f}", f"{held / packed:.3f}", f"{peak - packed:.0f}"] if packed else ["-"] * 3
        numbers = [known[0], f"{held:.0f}", known[1], f"{lora:.0f}", f"{peak:.0f}", known[2]]
        lines.append([str(row["tokens"]), row["impl"], *numbers])
    return aligned(header, lines)
