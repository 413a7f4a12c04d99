"""Which experts belong on the GPU."""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def generate_gpu_experts_masks(freq: Tensor, n: int) -> Tensor:
    """The n most used experts of all layers together: bool [n_layers, num_experts], True for those on the GPU.

    freq: how often each expert was chosen, integers or floats [n_layers, num_experts], not negative; NaN and infinities
    are refused. Of equally used experts that of the lower layer, then of the lower number, comes first. n: 0 to all.
    Row i is the `gpu_experts_mask` of layer i. TypeError or ValueError naming the argument.
    """
    freq = torch.as_tensor(freq, device="cpu")
    if freq.dtype is torch.bool or freq.is_complex():
        raise TypeError(f"freq: got dtype {freq.dtype}, expected integers or floats")
    if freq.dim() != 2:
        raise ValueError(f"freq: got shape {tuple(freq.shape)}, expected [n_layers, num_experts]")
    counts = freq.detach().double()
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ValueError("freq: got a number that is negative or not finite, expected counts")
    if isinstance(n, bool):
        raise TypeError("n: got a bool, expected an integer")
    count = operator.index(n)
    if not 0 <= count <= freq.numel():
        raise ValueError(f"n: got {count}, expected 0..{freq.numel()}")
    mask = torch.zeros(freq.numel(), dtype=torch.bool, device="cpu")
    mask[counts.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view(freq.shape)
