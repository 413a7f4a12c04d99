"""The rows of `bench.engine` as tables, one for each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.report import aligned

Row = dict[str, Any]


def _name(row: Row) -> str:
    return f"{row['impl']} ({row['note']})" if row["note"] else str(row["impl"])


def _submit(row: Row) -> list[str]:
    times = (row["forward_us"], row["submit_us"], row["added_us"])
    return [row["shape"], str(row["tokens"]), _name(row), *(f"{us:.1f}" for us in times)]


def _wake(row: Row) -> list[str]:
    times = (row["first_us"], row["following_us"], row["cost_us"])
    return [row["shape"], str(row["tokens"]), _name(row), row["way"], *(f"{us:.1f}" for us in times)]


def _idle(row: Row) -> list[str]:
    return [row["shape"], _name(row), f"{row['wall_s']:.1f}", f"{1e3 * row['cpu_s']:.1f}", f"{row['percent']:.1f} %"]


def _attention(row: Row) -> list[str]:
    times = (row["attention_ms"], row["experts_ms"], row["together_ms"])
    return [row["shape"], _name(row), row["policy"], *(f"{ms:.2f}" for ms in times), f"{row['penalty']:.2f}x"]


def _deferral(row: Row) -> list[str]:
    times = (row["accelerator_ms"], row["none_ms"], row["some_ms"], row["saved_ms"], row["most_ms"])
    return [row["shape"], _name(row), *(f"{ms:.2f}" for ms in times), f"{row['saved_percent']:.0f} %"]


TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Row], list[str]]]] = {
    "submit": (
        "submit and sync beside forward, taking turns: us a call",
        ("shape", "tokens", "implementation", "forward", "submit + sync", "added"),
        _submit,
    ),
    "wake": (
        "the first call after 10 ms without work beside the next ones: us a call",
        ("shape", "tokens", "implementation", "call", "first", "following", "added"),
        _wake,
    ),
    "idle": (
        "CPU time of the process while idle, of one core",
        ("shape", "implementation", "seconds", "CPU ms", "idle use"),
        _idle,
    ),
    "attention": (
        "one token through all layers, torch doing attention between them: ms a pass; penalty = together / sum of both",
        ("shape", "implementation", "OpenMP waits", "attention", "experts", "together", "penalty"),
        _attention,
    ),
    "deferral": (
        "one token through all layers, a simulated accelerator busy before each; experts deferred or not: ms a pass",
        ("shape", "implementation", "accelerator", "none deferred", "some", "saved", "at most", "of the pass"),
        _deferral,
    ),
}


def tables(rows: Sequence[Row]) -> str:
    """Of those questions that have rows."""
    parts = []
    for probe, (title, header, line) in TABLES.items():
        if lines := [line(row) for row in rows if row["probe"] == probe]:
            parts.append(f"\n{title}\n{aligned(header, lines)}")
    return "\n".join(parts)
