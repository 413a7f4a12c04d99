"""The implementations under test, by family: `family:variant`, one class each behind one small interface.

An implementation is made for one shape, loads `layers` copies of the problem's weights, and runs. Adapters import
what they drive when they are made, so that a family that is not installed costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.problem import Gradients, Problem


class Implementation(Protocol):
    layers: int
    packed_bytes: int
    """Bytes of one layer's weights as they lie in memory; 0 if not known."""

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor: ...


class Queueing(Implementation, Protocol):
    """With a queue of its own."""

    def submit(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> None: ...

    def sync(self, layer: int) -> Tensor:
        """The result of the one forward that was submitted."""
        ...


class Deferring(Queueing, Protocol):
    def defer(self, count: int) -> None:
        """From now on so many experts of a token may run behind the others. 0: none."""
        ...


class Trainable(Implementation, Protocol):
    """In sft mode."""

    def set_lora(self, lora: list[Tensor]) -> None:
        """Once, before the first forward. lora: as from `Problem.lora`."""
        ...

    def backward(self, grad: Tensor) -> Gradients:
        """Of the last forward."""
        ...


CLASSES = {
    "inference": {
        "ktmoe": "bench.impls.ours:Ktmoe",
        "torch": "bench.impls.eager:Torch",
        "kt": "bench.impls.kt:Kt",
        "llamacpp": "bench.impls.ggml:LlamaCpp",
    },
    "sft": {
        "ktmoe": "bench.impls.ours:Ktmoe",
        "torch": "bench.impls.eager:Torch",
        "kt": "bench.impls.kt_sft:KtSft",
    },
}

PEERS = {
    "inference": (
        *("torch:bf16", "torch:fp32", "torch:grouped"),
        *("kt:BF16", "kt:AMXINT8", "kt:AMXINT4", "kt:RAWINT4", "kt:FP8", "kt:Q8_0", "kt:Q4_K"),
        *("llamacpp:BF16", "llamacpp:Q8_0", "llamacpp:Q4_K"),
    ),
    "sft": (
        *("torch:bf16", "torch:fp32"),
        *("kt:AMXBF16_SFT", "kt:AMXINT8_SFT", "kt:AMXINT4_SFT", "kt:AMXINT4_KGroup_SFT", "kt:FP8_SFT", "kt:MXFP4_SFT"),
    ),
}


def family_of(name: str) -> str:
    return name.partition(":")[0]


def bytes_per_weight(name: str) -> float:
    """About what an implementation holds for a weight, guessed from its name, to plan what fits the memory."""
    parts = {"fp32": 4.0, "MXFP4": 0.65, "INT4": 0.65, "Q4": 0.65, "INT8": 1.1, "Q8": 1.1, "FP8": 1.1, "LLAMAFILE": 1.1}
    return next((size for part, size in parts.items() if part in name), 2.0)


def class_of(name: str, *, sft: bool) -> Callable[..., Any]:
    """ValueError for a family that the mode does not have."""
    classes = CLASSES["sft" if sft else "inference"]
    if family_of(name) not in classes:
        raise ValueError(f"implementation: got {name!r}, expected one of the families {', '.join(classes)}")
    module, _, cls = classes[family_of(name)].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), cls)
    return found


def make(name: str, problem: Problem, **options: Any) -> Trainable:
    """Base weights loaded; without sft it is an `Implementation` only. options: layers, threads, max_tokens, sft."""
    torch.set_num_threads(options["threads"])
    made: Trainable = class_of(name, sft=options["sft"])(name.partition(":")[2], problem, **options)
    return made
