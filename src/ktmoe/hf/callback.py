"""What ktmoe adds to a Trainer's log: tokens per second."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

KEY = "ktmoe/tok_per_s"


class ThroughputCallback(TrainerCallback):
    """Adds ``ktmoe/tok_per_s`` to every training log.

    Needs ``TrainingArguments(include_num_input_tokens_seen=...)``; without it there is nothing to count and no key.
    The time of an evaluation counts for nothing.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.tok_per_s = 0.0
        self._seen_before = 0
        self._step_began: float | None = None
        self._window = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen_before = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step_began is not None:
            self.seconds += time.perf_counter() - self._step_began
        self.tokens = int(state.num_input_tokens_seen) - self._seen_before

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        tokens, seconds = self.tokens - self._window[0], self.seconds - self._window[1]
        self._window = (self.tokens, self.seconds)
        if tokens > 0 and seconds > 0:
            self.tok_per_s = tokens / seconds
            logs[KEY] = round(self.tok_per_s, 1)

    @property
    def average(self) -> float:
        """Tokens per second over the whole training so far."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0
