"""One training pass over a layer: what the stateful API (sft.py) and the differentiable one (autograd.py) share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _ext, large
from .capsule import rows_in_one_piece, to_dlpack
from .lora import PackedLora


class SavedForward(NamedTuple):
    """What the backward of one forward needs. Its memory is freed with the object."""

    cache: _ext.ForwardCache
    packed: PackedLora | None


class Dropout(NamedTuple):
    """Elements of the input of LoRA's A are dropped with probability p; the same seed drops the same ones."""

    p: float = 0.0
    seed: int = 0

    @classmethod
    def draw(cls, p: float) -> Dropout:
        """With a seed from torch's CPU generator: `torch.manual_seed` repeats it, and so does activation checkpointing,
        which restores the generator before it recomputes a forward."""
        return cls(p, int(torch.randint(2**62, (), device="cpu"))) if p else _NO_DROPOUT


_NO_DROPOUT = Dropout()


class Gradients(NamedTuple):
    """Results of one backward; None where not asked for."""

    hidden: Tensor | None
    """[n_tokens, hidden], in the dtype asked for."""
    weights: Tensor | None
    """fp32 [n_tokens, top_k]."""
    lora: list[Tensor] | None
    """fp32, one for each LoRA tensor that there is, in the order of `LORA_NAMES`."""


def run_forward(
    layer: _ext.MoeLayer,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    packed: PackedLora | None,
    dropout: Dropout = _NO_DROPOUT,
) -> tuple[Tensor, SavedForward]:
    """The output, bf16 [n_tokens, hidden], and what `run_backward` needs. Inputs as from `BaseMoEWrapper._inputs`."""
    out = large.empty(hidden.shape, hidden.dtype)
    cache = layer.forward_train(
        to_dlpack(hidden),
        to_dlpack(ids),
        to_dlpack(weights),
        to_dlpack(out),
        packed.adapter if packed else None,
        *dropout,
    )
    return out, SavedForward(cache, packed)


def run_backward(
    layer: _ext.MoeLayer,
    saved: SavedForward,
    grad_out: Tensor,
    *,
    hidden_dtype: torch.dtype | None,
    top_k: int | None,
    lora: list[Tensor] | None,
    base: list[Tensor] | None = None,
) -> Gradients:
    """Gradients of one saved forward; may be called more than once for it.

    grad_out: bf16 [n_tokens, hidden]. hidden_dtype: bf16 or fp32, None = no gradient for hidden.
    top_k: None = no gradient for the routing weights. lora: fp32 tensors, one for each LoRA tensor, that are
    overwritten; rows in one piece, whatever the other strides are (`LoraGradients.targets`). base: fp32 or bf16,
    C-contiguous, the shapes of gate (if there is one), up and down: overwritten with the gradients of the base weights.
    """
    n_tokens = grad_out.shape[0]
    hidden = None if hidden_dtype is None else large.empty(grad_out.shape, hidden_dtype)
    weights = None if top_k is None else large.empty_f32((n_tokens, top_k))
    layer.backward(
        saved.cache,
        to_dlpack(rows_in_one_piece(grad_out)),
        saved.packed.adapter if saved.packed else None,
        None if hidden is None else to_dlpack(hidden),
        None if weights is None else to_dlpack(weights),
        None if lora is None else [to_dlpack(t) for t in lora],
        None if base is None else [to_dlpack(t) for t in base],
    )
    return Gradients(hidden, weights, lora)
