"""Progress of a training: a bar with loss and speed on a terminal, a line now and then elsewhere."""

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
    """Step, loss, tokens per second, time left, as a Trainer callback. A context manager around the training."""

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        step, last = state.global_step, state.max_steps
        loss, speed = f"{float(logs['loss']):.3f}", f"{self._meter.average:,.0f}"
        self._bar.update(self._task, completed=step, loss=loss, speed=speed)
        if not self._live and (step % max(1, last // _LINES) == 0 or step == last):
            console.out.print(f"  step {step}/{last}  loss {loss}  {speed} tok/s")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class PretrainingProgress:
    """Share done and loss of the demo's pretraining; called with both. A context manager around it."""

    def __init__(self) -> None:
        self._live = console.out.is_terminal
        self._bar = Progress(
            TextColumn("  pretraining"),
            BarColumn(bar_width=30),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console.out,
            disable=not self._live,
        )
        # Invisible until there is something to show: a cached model has nothing to pretrain.
        self._task = self._bar.add_task("pretraining", total=1.0, loss="-", visible=False)
        self._next_line = 0.1

    def __call__(self, done: float, loss: float) -> None:
        self._bar.update(self._task, completed=done, loss=f"{loss:.3f}", visible=True)
        if not self._live and done >= self._next_line:
            console.out.print(f"  pretraining {done:.0%}  loss {loss:.3f}")
            self._next_line = done + 1 / _LINES

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
