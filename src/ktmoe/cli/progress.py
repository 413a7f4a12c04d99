"""The progress bar of a training, as a Trainer callback: step, loss, tokens per second, time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ktmoe.cli import console
from ktmoe.hf import ThroughputCallback

if TYPE_CHECKING:
    from typing_extensions import Self

_LINES = 10  # how often a log file hears from us


class TrainingProgress(TrainerCallback):
    """A bar on a terminal, a line now and then elsewhere. A context manager: leaving it gives the terminal back."""

    def __init__(self, meter: ThroughputCallback) -> None:
        self._meter = meter
        self._live = console.out.is_terminal
        self._bar = Progress(
            TextColumn("  training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console.out,
            disable=not self._live,
        )
        self._task = self._bar.add_task("training", total=None, loss="-", speed="-")
        self._loss = "-"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self._loss = f"{float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = f"{self._meter.average:,.0f}"
        self._bar.update(self._task, completed=state.global_step, loss=self._loss, speed=speed)
        every = max(1, state.max_steps // _LINES)
        if not self._live and (state.global_step % every == 0 or state.global_step == state.max_steps):
            console.out.print(f"  step {state.global_step}/{state.max_steps}  loss {self._loss}  {speed} tok/s")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class TimeLimit(TrainerCallback):
    """Ends the training after `seconds` (0: never)."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._seconds and time.monotonic() - self._began > self._seconds:
            control.should_training_stop = True
