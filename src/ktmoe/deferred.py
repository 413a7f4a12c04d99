"""Deferred experts: which experts of a batch may run one layer later, and what one layer has left for the next."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from .streams import of_parent


def select_deferred_experts(expert_ids: Tensor, scores: Tensor, protected_k: int) -> tuple[Tensor, Tensor]:
    """Splits the routing of a batch into experts that must run now and experts that may be deferred.

    expert_ids: integer [n_tokens, top_k], -1 = not routed. scores: float [n_tokens, top_k], higher = more important.
    protected_k: that many best entries of each token are protected; clamped to 0..top_k.
    Returns (immediate, deferred), both like expert_ids, with -1 in the entries that belong to the other one.

    An expert that any token protects is immediate for every token of the batch: no expert is visited twice.
    TypeError or ValueError if the two tensors do not fit each other.
    """
    if expert_ids.dtype.is_floating_point or expert_ids.dtype is torch.bool:
        raise TypeError(f"expert_ids: got dtype {expert_ids.dtype}, expected integers")
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores: got dtype {scores.dtype}, expected floating point")
    if expert_ids.dim() != 2 or scores.shape != expert_ids.shape:
        raise ValueError(
            f"expert_ids, scores: got shapes {tuple(expert_ids.shape)} and {tuple(scores.shape)}, "
            "expected the same [n_tokens, top_k]"
        )
    absent = torch.full_like(expert_ids, -1)
    keep = min(max(int(protected_k), 0), expert_ids.shape[1])
    if keep == 0:
        return absent, expert_ids.clone()
    # An absent slot must not win a place among the best. Where it does for want of others it stays -1 in both results.
    ranked = scores.masked_fill(expert_ids < 0, float("-inf"))
    best = expert_ids.gather(1, ranked.topk(keep, dim=1).indices)
    now = torch.isin(expert_ids, best)
    return torch.where(now, expert_ids, absent), torch.where(now, absent, expert_ids)


class Layer(Protocol):
    """What a chain knows of a layer."""

    layer_idx: int
    max_deferred_experts_per_token: int | None


class Forward(Protocol):
    """A submitted forward that may have put off experts."""

    layer_idx: int
    n_tokens: int
    place: object
    """Where its tensors are: None for the CPU, else its stream."""
    job: Any
    """What the engine adds from."""

    def deferred_result(self) -> Tensor:
        """Waits for the deferred experts: bf16 [n_tokens, hidden]."""

    def drop_deferred(self) -> None:
        """Nobody will ask for them."""


class LayerChain:
    """The layers of one model on one engine, in the order of their layer_idx, and what the last one that ran has left.

    A pass runs its layers in ascending order, in one thread, all for the same tokens; the numbers need not be
    consecutive. Each thread has a pass of its own. What was left can go only into a later layer of a pass with as many
    tokens in the same place; anything else that runs meanwhile ends that pass, and what it had left is dropped.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Layer] = weakref.WeakSet()
        self._pass = threading.local()
        self.defers = False
        """True from the first layer on that may defer: the others then have to look what is left for them."""

    def add(self, layer: Layer) -> None:
        """Every layer of the model is added, those that defer nothing too: they pick up, and one is the last."""
        self._layers.add(layer)
        self.defers = self.defers or bool(layer.max_deferred_experts_per_token)

    def is_last(self, layer_idx: int) -> bool:
        """Whether no layer that exists comes after this one: it must not leave anything."""
        return all(layer.layer_idx <= layer_idx for layer in list(self._layers))

    def left_for(self, layer_idx: int, n_tokens: int, place: object) -> Forward | None:
        """The forward whose deferred experts belong to the output of this one. `leave` then ends its turn."""
        left: Forward | None = getattr(self._pass, "left", None)
        if left is None or (left.n_tokens, left.place) != (n_tokens, place) or left.layer_idx >= layer_idx:
            return None
        return left

    def leave(self, forward: Forward | None, added: Forward | None = None) -> None:
        """A layer has run: `forward` if it has put something off, and `added` is what it has picked up."""
        left = getattr(self._pass, "left", None)
        self._pass.left = forward
        if left is not None and left is not added:
            left.drop_deferred()

    def flush(self) -> Forward | None:
        """What is left, for the one who asks and for nobody after."""
        left: Forward | None = getattr(self._pass, "left", None)
        self._pass.left = None
        return left

    def _after_fork(self) -> None:
        of_parent.append(self._pass)  # what is left would be computed there
        self._pass = threading.local()
