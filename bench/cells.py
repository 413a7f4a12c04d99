"""What is measured: which cells by default, which shapes fit, what each cell's numbers mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import impls
from bench.limits import last_level_cache
from bench.problem import SHAPES, Shape

TOKENS = {"inference": (1, 4, 16, 64, 256, 1024, 4096), "sft": (256, 1024, 4096)}
QUICK_TOKENS = {"inference": (1, 16, 256), "sft": (256,)}
DEFAULT_SHAPES = ("S1", "S2")
MOST_EXPERTS = 32
"""Of a shape that is reduced: more would only take longer to load."""
LARGE = 8 << 30
"""Bytes of bf16 weights from which a shape is reduced."""
MEMORY_SHARE = 0.7
SAME_ACCURACY = 2.0
"""A peer is compared with if its error is at most this many times ours."""


@dataclass(frozen=True)
class Cell:
    shape: str
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """SHAPE:TOKENS; ValueError otherwise."""
        shape, _, tokens = text.partition(":")
        if shape not in SHAPES or not tokens.isdigit() or int(tokens) < 1:
            raise ValueError(f"--cells: got {text!r}, expected SHAPE:TOKENS with a shape of {', '.join(SHAPES)}")
        return cls(shape, int(tokens))


def fitted(shape: Shape, names: Sequence[str], memory: int, experts: int | None) -> Shape:
    """The shape with as many experts as fit when all implementations are loaded at once, a power of two."""
    if experts:
        return shape.reduced(max(experts, shape.top_k))
    if 2 * shape.n_weights < LARGE:
        return shape
    each = shape.expert_weights * (2.0 + sum(impls.bytes_per_weight(name) for name in names))
    count = MOST_EXPERTS
    while count > shape.top_k and count * each > MEMORY_SHARE * memory:
        count //= 2
    return shape.reduced(max(count, shape.top_k))


def layers_for(shape: Shape, name: str) -> int:
    """Copies of the layer to walk through, so that together they do not stay in the caches."""
    layer = shape.n_weights * impls.bytes_per_weight(name)
    return max(1, min(8, round(2 * last_level_cache() / layer)))


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile in ms."""
    ms = sorted(1e3 * s for s in seconds)
    last = len(ms) - 1
    return {"ms": statistics.median(ms), "p10": ms[round(0.1 * last)], "p90": ms[round(0.9 * last)], "n": len(ms)}


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to every row its fastest peer: of all (`peer`), and of those about as accurate (`fair_peer`)."""
    for row in rows:
        rivals = [
            r
            for r in rows
            if r is not row
            and not r["impl"].startswith("ktmoe:")
            and all(r[key] == row[key] for key in ("shape", "tokens", "pass"))
        ]
        fair = [r for r in rivals if r["error"] <= SAME_ACCURACY * row["error"]]
        for key, among in (("peer", rivals), ("fair_peer", fair)):
            fastest = min(among, key=lambda r: r["ms"], default=None)
            row[key] = fastest["impl"] if fastest else None
            row[f"{key}_ms"] = fastest["ms"] if fastest else None
            row[f"{key}_ratio"] = row["ms"] / fastest["ms"] if fastest else None
