"""Which experts of a batch may run one layer later (deferred experts)."""

from __future__ import annotations

import torch
from torch import Tensor


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
