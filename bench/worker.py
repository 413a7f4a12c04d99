"""One implementation in a process of its own: commands in, answers out, one JSON object a line.

Started by `runner.Worker`, in the interpreter of the implementation's family.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

# Answers go to a copy of stdout; what the implementations print goes nowhere.
_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

import torch  # noqa: E402

from bench import impls, memory, probes  # noqa: E402
from bench.problem import CHECK_SEED, CHECK_TOKENS, Problem, Shape, batch_seeds, relative_error  # noqa: E402


class Session:
    def __init__(self) -> None:
        self.step = 0
        self.batches: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def init(self, name: str, folder: str, shape: dict[str, Any], **options: Any) -> dict[str, Any]:
        self.problem, self.sft = Problem(Path(folder), Shape(**shape)), options["sft"]
        start = time.perf_counter()
        self.impl = impls.make(name, self.problem, **options)
        if self.sft:
            self.impl.set_lora(self.problem.lora())
        seconds = time.perf_counter() - start
        return {
            "load_s": seconds / self.impl.layers,
            "packed_bytes": self.impl.packed_bytes,
            "isa": getattr(self.impl, "isa", ""),
        }

    def check(self) -> dict[str, float]:
        """Relative L2 errors against float64 on the original weights."""
        want = self.problem.expected()
        y = self.impl.forward(0, *self.problem.batch(CHECK_TOKENS, CHECK_SEED))
        errors = {"error": relative_error([y], want["y"])}
        if self.sft:
            grads = self.impl.backward(torch.ones_like(y))
            errors["grad_error"] = relative_error([grads.x], want["x"])
            errors["lora_error"] = relative_error(grads.lora, want["lora"])
        return errors

    def _next(self, tokens: int) -> tuple[int, tuple[torch.Tensor, ...]]:
        """Layer and batch of the next call: both rotate, so that weights come from memory as in a model."""
        if tokens not in self.batches:
            self.batches = {tokens: [self.problem.batch(tokens, seed) for seed in batch_seeds(tokens)]}
            # Nothing of torch runs between calls: its threads would go on spinning for milliseconds into what is timed.
            self.grad = torch.ones_like(self.batches[tokens][0][0])
        batches = self.batches[tokens]
        self.step += 1
        return self.step % self.impl.layers, batches[self.step % len(batches)]

    def _call(self, tokens: int) -> list[float]:
        layer, batch = self._next(tokens)
        return self._timed(self.impl, layer, batch)

    def _timed(self, impl: impls.Trainable, layer: int, batch: tuple[torch.Tensor, ...]) -> list[float]:
        """Seconds of a forward, and of a backward in sft mode."""
        start = time.perf_counter()
        y = impl.forward(layer, *batch)
        seconds = [time.perf_counter() - start]
        if self.sft:
            start = time.perf_counter()
            impl.backward(self.grad)
            seconds.append(time.perf_counter() - start)
        del y
        return seconds

    def time(self, tokens: int, seconds: float, warm: int, hopeless_s: float = math.inf) -> dict[str, Any]:
        """Calls for about `seconds` after `warm` calls that do not count: {"samples": [[forward, backward?], ...]}.

        A warm call that takes longer than `hopeless_s` does count, and is the only one.
        """
        for _ in range(warm):
            first = self._call(tokens)
            if max(first) > hopeless_s:
                return {"samples": [first]}
        samples: list[list[float]] = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            samples.append(self._call(tokens))
        return {"samples": samples}

    def overhead(self, tokens: int, seconds: float, idle_s: float, idle_calls: int) -> dict[str, Any]:
        """Calls back to back, then calls that each follow a pause."""
        hot = self.time(tokens, seconds, warm=20)["samples"]
        after_idle = []
        for _ in range(idle_calls):
            time.sleep(idle_s)
            after_idle.append(self._call(tokens))
        return {"hot": hot, "after_idle": after_idle}

    def wrapper_cost(self, tokens: int, seconds: float, buffers: bool) -> dict[str, list[float]]:
        """The public calls beside the direct ones of the extension, taking turns: the median of each pass in seconds.

        buffers: the LoRA gradients are written into buffers of the caller; for good.
        """
        impl: Any = self.impl
        if buffers:
            impl.give_buffers()
        contestants: dict[str, impls.Trainable] = {"wrapper": impl, "direct": impl.direct()}
        times: dict[str, list[list[float]]] = {name: [] for name in contestants}
        end = time.perf_counter() + seconds
        while len(times["direct"]) < 20 or time.perf_counter() < end:
            for name in sorted(contestants, reverse=self.step // 2 % 2 == 1):
                _, batch = self._next(tokens)
                times[name].append(self._timed(contestants[name], 0, batch))
        return {name: [statistics.median(p) for p in zip(*rows[4:], strict=True)] for name, rows in times.items()}

    def probe(self, what: str, tokens: int, **arguments: Any) -> dict[str, Any]:
        """One measurement of `bench.probes`."""
        found: dict[str, Any] = getattr(probes, what)(self.impl, partial(self._next, tokens), **arguments)
        return found

    def memory(self, name: str, folder: str, shape: dict[str, Any], tokens: int, **options: Any) -> dict[str, int]:
        """Bytes that this process, which must be fresh, gains: by loading, by LoRA, and at most in a training step."""
        problem = Problem(Path(folder), Shape(**shape))
        batch = problem.batch(tokens, CHECK_SEED)
        grad = torch.ones_like(batch[0])
        impls.class_of(name, sft=True)  # libraries are not what is measured
        before = memory.resident()
        impl = impls.make(name, problem, **options)
        memory.drop_pages(problem.weights)
        held = memory.resident() - before
        impl.set_lora(problem.lora())
        lora = memory.resident() - before - held
        memory.forget_peak()
        y = impl.forward(0, *batch)
        grads = impl.backward(grad)
        peak = memory.peak() - before
        del y, grads
        return {"packed": impl.packed_bytes, "held": held, "lora": lora, "peak": peak}


def serve() -> None:
    session = Session()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("command")
        if name == "quit":
            break
        try:
            answer = getattr(session, name)(**command)
        except Exception as e:
            answer = {"failed": f"{type(e).__name__}: {e}"}
        _answers.write(json.dumps(answer) + "\n")
    _answers.flush()
    os._exit(0)  # some pools under test hang in their destructors


if __name__ == "__main__":
    serve()
