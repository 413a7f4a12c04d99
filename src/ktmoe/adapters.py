"""LoRA adapters that an inference layer carries unmerged: several by name, one of them (or none) in use."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from .config import SFTConfig
from .lora import LoraMirror, LoraTensors, PackedLora
from .runtime import reset_after_fork


class Adapters:
    """The adapters of one layer. Each has a packed copy of its own, renewed when its tensors change.

    Safe to use from several threads.
    """

    def __init__(self, new_mirror: Callable[[], LoraMirror]) -> None:
        self._new_mirror = new_mirror
        self._adapters: dict[str, tuple[LoraTensors, LoraMirror]] = {}
        self._lock = threading.Lock()
        self.active: str | None = None
        """The adapter of calls that do not name one; None: the base experts alone."""
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(self._adapters)

    def add(self, name: str, tensors: tuple[Tensor | None, ...], lora_alpha: float, use_rslora: bool) -> None:
        """Adds or replaces one. The rank is that of the tensors. TypeError or ValueError before anything is changed."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: got {name!r}, expected a string that is not empty")
        lora = _lora_tensors(tensors, lora_alpha, use_rslora)
        mirror = self._new_mirror()
        mirror.acquire(lora)
        with self._lock:
            self._adapters[name] = lora, mirror

    def choose(self, name: str | None) -> None:
        """Makes an adapter the active one."""
        with self._lock:
            if name is not None:
                self._of(name)
            self.active = name

    def delete(self, name: str) -> None:
        """Removes an adapter; if it was the active one, none is active afterwards."""
        with self._lock:
            self._of(name)
            del self._adapters[name]
            if self.active == name:
                self.active = None

    def packed(self, name: str | None) -> PackedLora | None:
        """The packed copy of an adapter as its tensors are now; None for None."""
        if name is None:
            return None
        with self._lock:
            lora, mirror = self._of(name)
        return mirror.acquire(lora)

    def _of(self, name: str) -> tuple[LoraTensors, LoraMirror]:
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none: call add_adapter(...) first"
            raise ValueError(f"adapter: got {name!r}, expected one of those added ({known})")
        return self._adapters[name]


def _lora_tensors(tensors: tuple[Tensor | None, ...], lora_alpha: float, use_rslora: bool) -> LoraTensors:
    up_a = tensors[2]
    if not isinstance(up_a, Tensor) or up_a.dim() != 3 or not up_a.shape[1]:
        got = tuple(up_a.shape) if isinstance(up_a, Tensor) else type(up_a).__name__
        raise ValueError(f"up_lora_a: got {got}, expected a tensor [num_experts, rank, hidden]")
    own = SFTConfig(up_a.shape[1], lora_alpha, use_rslora=use_rslora)
    return LoraTensors._make((*tensors, own.scaling, own.lora_rank, ""))
