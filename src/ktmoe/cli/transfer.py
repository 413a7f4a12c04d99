"""A progress bar for bytes: on a terminal with speed and time left, elsewhere a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ktmoe.cli import console

if TYPE_CHECKING:
    from typing_extensions import Self

_LINES = 10


class Transfer:
    """Counts steps and bytes: ``with Transfer("packing", n) as bar: bar.step(nbytes)``."""

    def __init__(self, what: str, total: int) -> None:
        self.nbytes = 0
        self._what, self._total, self.done = what, total, 0
        self._began = time.monotonic()
        self._live = console.out.is_terminal
        self._bar = Progress(
            TextColumn("  " + what),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console.out,
            disable=not self._live,
        )
        self._task = self._bar.add_task(what, total=total, speed="", note="")

    @property
    def speed(self) -> str:
        """GB/s since the start."""
        seconds = time.monotonic() - self._began
        return f"{self.nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"

    def note(self, text: str) -> None:
        """What is being worked on."""
        self._bar.update(self._task, note=text)

    def step(self, nbytes: int, steps: int = 1) -> None:
        """`steps` more of the total are done, with so many bytes."""
        before, self.done = self.done, self.done + steps
        self.nbytes += nbytes
        self._bar.update(self._task, completed=self.done, speed=self.speed)
        if not self._live and self.done * _LINES // self._total != before * _LINES // self._total:
            console.out.print(f"  {self._what} {self.done / self._total:4.0%}  {self.speed}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
