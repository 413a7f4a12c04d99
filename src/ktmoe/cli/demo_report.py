"""What the demo shows of a fine-tuning: a table, sample answers, and the loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ktmoe.cli import console
from ktmoe.cli.demo_data import Pair
from ktmoe.cli.generate import encode_prompt


@dataclass
class Outcome:
    """Held-out loss and sample answers before and after, and the training between them."""

    loss_before: float = float("nan")
    loss_after: float = float("nan")
    answers_before: list[str] = field(default_factory=list)
    answers_after: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    tok_per_s: float = 0.0


def answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 32) -> str:
    """The model's greedy answer, on one line."""
    inputs = encode_prompt(tokenizer, question)
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())


def show_losses(outcome: Outcome, held_out: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "before", "after"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row(
        f"  held-out loss ({held_out} questions)", f"{outcome.loss_before:.3f}", f"[green]{outcome.loss_after:.3f}[/]"
    )
    console.out.print(table)


def show_answers(pairs: Sequence[Pair], outcome: Outcome) -> None:
    rows = zip(pairs, outcome.answers_before, outcome.answers_after, strict=True)
    for pair, before, after in rows:
        console.out.print(f"\n  [bold]{escape(pair.question)}[/]")
        console.out.print(f"    before     [dim]{escape(before) or '(nothing)'}[/]")
        console.out.print(f"    after      [green]{escape(after) or '(nothing)'}[/]")
        console.out.print(f"    reference  {escape(pair.answer)}")


def plot_losses(outcome: Outcome, file: Path) -> None:
    """Writes the loss curve as a PNG; no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    steps = [step for step, _ in outcome.losses]
    values = [loss for _, loss in outcome.losses]
    axes.plot(steps, values, color="#9db7d5", linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(values), color="#1f4e79", linewidth=2, label="training, smoothed")
    axes.axhline(
        outcome.loss_before, color="#c0504d", linestyle="--", label=f"held out before {outcome.loss_before:.3f}"
    )
    axes.axhline(outcome.loss_after, color="#4f8f3c", linestyle="--", label=f"held out after {outcome.loss_after:.3f}")
    axes.set(xlabel="optimizer step", ylabel="loss per answer token", title="LoRA on experts and attention")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """An exponential mean without the bias towards its start."""
    result, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(mean / norm)
    return result
