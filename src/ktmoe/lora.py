"""LoRA tensors of one layer and their packed mirror.

The engine computes with a packed bf16 copy of the matrices. `LoraMirror` keeps that copy and renews it only when
the tensors have changed. Whoever runs a forward or backward holds the `PackedLora` it got, and a held copy is never
overwritten: changed tensors then go into a new one. So a backward always uses the values of its own forward.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _ext, large
from .capsule import to_dlpack
from .runtime import reset_after_fork

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class LoraSource(Protocol):
    """Tensors of the caller in which the LoRA matrices of a layer lie, in whatever way: autograd sees these alone."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The caller's tensors."""

    @property
    def matrices(self) -> LoraTensors:
        """Views of them."""

    def new_gradients(self, n_experts: int, hidden: int, inter: int) -> LoraGradients:
        """Memory for their gradients."""


class LoraGradients(NamedTuple):
    """Where the engine writes the gradients of LoRA matrices, and how they become those of a `LoraSource`'s leaves."""

    targets: list[Tensor]
    """fp32, in the order of `LORA_NAMES`, rows in one piece. Where A of gate and up is one matrix, the same tensor
    twice: it gets the sum."""
    of_leaves: Callable[[], Sequence[Tensor | None]]
    """fp32, to be called when the targets are written."""


class LoraTensors(NamedTuple):
    """The LoRA matrices of a layer, bf16 or fp32 on any device, any strides.

    gate_a, up_a [n_experts, rank, hidden]; gate_b, up_b [n_experts, inter, rank]; down_a [n_experts, rank, inter];
    down_b [n_experts, hidden, rank]. `gate_a` may be `up_a`; both gate matrices are None for experts without a gate.
    `scaling` multiplies the LoRA term (alpha / rank). Packed copies are kept by `name`: adapters that take turns should
    have different ones.
    """

    gate_a: Tensor | None
    gate_b: Tensor | None
    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scaling: float
    rank: int
    name: str = ""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The matrices that there are, in the order of `LORA_NAMES`: six, or the last four without a gate."""
        return tuple(t for t in self[:6] if t is not None)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """As `LoraSource`: each matrix is a tensor of its own."""
        return self.tensors

    @property
    def matrices(self) -> LoraTensors:
        """See `LoraSource`."""
        return self

    def new_gradients(self, n_experts: int, hidden: int, inter: int) -> LoraGradients:
        """See `LoraSource`."""
        shapes = lora_shapes(n_experts, hidden, inter, self.rank, gated=self.gate_a is not None)
        grads = [large.empty_f32(shape) for shape in shapes]
        if self.gate_a is not self.up_a:
            return LoraGradients(grads, lambda: grads)
        summed, gate_b, _, *others = grads
        return LoraGradients([summed, gate_b, summed, *others], lambda: [summed, gate_b, None, *others])


def lora_shapes(
    n_experts: int, hidden: int, inter: int, rank: int, gated: bool = True
) -> tuple[tuple[int, int, int], ...]:
    """The six shapes in the order of `LORA_NAMES`; the last four without a gate."""
    a, b = (n_experts, rank, hidden), (n_experts, inter, rank)
    return (a, b) * (2 if gated else 1) + ((n_experts, rank, inter), (n_experts, hidden, rank))


def check_lora(tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], prefix: str = "") -> None:
    """TypeError (type, dtype) or ValueError (shape) naming the first tensor that does not fit.

    tensors: six, of which the first two are None where `shapes` (as from `lora_shapes`) are those of no gate.
    """
    n_none = len(LORA_NAMES) - len(shapes)
    for name, tensor in zip(LORA_NAMES[:n_none], tensors, strict=False):
        if tensor is not None:
            raise TypeError(f"{prefix}{name}: got {type(tensor).__name__}, expected None: the experts have no gate")
    for name, tensor, shape in zip(LORA_NAMES[n_none:], tensors[n_none:], shapes, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{prefix}{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"{prefix}{name}: got dtype {tensor.dtype}, expected torch.bfloat16 or torch.float32")
        if tensor.is_meta:
            raise TypeError(f"{prefix}{name}: got a tensor without values (device meta)")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{prefix}{name}: got shape {tuple(tensor.shape)}, expected {shape}")


# Fused optimizers (the default of the Hugging Face Trainer) write parameters without raising Tensor._version, so
# versions alone would miss every one of their steps.
_optimizer_steps = 0
_hook_installed = False
_hook_lock = threading.Lock()


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


def _install_hook() -> None:
    global _hook_installed
    with _hook_lock:
        if not _hook_installed:
            register_optimizer_step_post_hook(_count_step)
            _hook_installed = True


def fingerprint(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Equal as long as the tensors' values are the same, provided that their memory has been kept alive since."""
    if not _hook_installed:
        _install_hook()
    return (_optimizer_steps, *map(_fingerprint, tensors))


def _fingerprint(tensor: Tensor) -> tuple[object, ...]:
    # Tensors made under inference_mode do not count their changes: never equal.
    version: object = object() if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype)


class PackedLora:
    """One packed copy and what it was made from. Immutable while anybody but the mirror holds it."""

    __slots__ = ("__weakref__", "_kept", "adapter", "key")

    def __init__(self, adapter: _ext.LoraAdapter, key: tuple[object, ...], tensors: Sequence[Tensor]) -> None:
        self.adapter = adapter
        self.key = key
        # Keeps the source memory: a new tensor at a freed address would look like the old one.
        self._kept = tuple(t.untyped_storage() for t in tensors)


class LoraMirror:
    """The packed LoRA of one layer, for tensors that the caller owns and changes. Safe to use from several threads.

    Keeps one packed copy for each of the last `MOST_NAMES` names.
    """

    MOST_NAMES = 8

    def __init__(self, pool: _ext.ThreadPool, n_experts: int, hidden: int, inter: int, gated: bool = True) -> None:
        self._pool = pool
        self._dims = (n_experts, hidden, inter)
        self._gated = gated
        self._current: dict[str, PackedLora] = {}  # in order of use
        self._lock = threading.Lock()
        self.packs = 0
        """How often tensors have been packed."""
        reset_after_fork(self)

    def acquire(self, lora: LoraTensors, *, force: bool = False) -> PackedLora:
        """The packed copy of these tensors as they are now; packs only if they changed, or if `force`.

        TypeError or ValueError if a tensor does not fit the layer.
        """
        key = (lora.scaling, lora.rank, *fingerprint(lora.tensors))
        with self._lock:
            current = self._current.get(lora.name)
            if current is not None and current.key == key and not force:
                self._current[lora.name] = self._current.pop(lora.name)
                return current
            del current
            check_lora(lora[:6], lora_shapes(*self._dims, lora.rank, self._gated))
            on_cpu = [None if t is None else t.detach().to("cpu") for t in lora[:6]]
            adapter = self._free_adapter(lora)
            adapter.update(self._pool, *(None if t is None else to_dlpack(t) for t in on_cpu))
            self.packs += 1
            self._current[lora.name] = packed = PackedLora(adapter, key, lora.tensors)
            while len(self._current) > self.MOST_NAMES:
                del self._current[next(iter(self._current))]
            return packed

    def drop(self) -> None:
        """Frees the packed copies, unless a forward that waits for its backward still holds them."""
        with self._lock:
            self._current.clear()

    def _after_fork(self) -> None:
        # Another thread of the parent may have held it.
        self._lock = threading.Lock()

    def _free_adapter(self, lora: LoraTensors) -> _ext.LoraAdapter:
        """The present adapter of this name if nobody else holds it and it fits, otherwise a new one."""
        old = self._current.pop(lora.name, None)
        if old is not None:
            adapter, fits, holders = old.adapter, old.key[:2] == (lora.scaling, lora.rank), weakref.ref(old)
            del old
            # Reference counting frees it at once, so a live reference means a forward that waits for its backward.
            if fits and holders() is None:
                return adapter
        return _ext.LoraAdapter(*self._dims, lora.rank, lora.scaling, self._gated)
