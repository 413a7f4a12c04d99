"""Attention of one token on the CPU as eager torch code does it: what stands between two layers of experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

HEAD = 128
GROUP = 8
"""Query heads that share keys and values."""
CONTEXT = 1024
"""Tokens before this one."""


class Attention:
    """Grouped queries, twice as wide as the hidden states, as in Qwen3-30B-A3B: for hidden 2048, 32 heads of 128.

    In fp32: torch's bf16 products are several times slower on CPUs that have no instructions for them.
    """

    def __init__(self, hidden: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.group = min(GROUP, max(1, hidden // 64))
        self.kv_heads = max(1, hidden // 64 // self.group)
        heads = self.kv_heads * self.group
        self.into = torch.randn((heads + 2 * self.kv_heads) * HEAD, hidden, generator=g) / math.sqrt(hidden)
        self.out = torch.randn(hidden, heads * HEAD, generator=g) / math.sqrt(heads * HEAD)
        self.keys, self.values = torch.randn(2, 1, self.kv_heads, CONTEXT, HEAD, generator=g)

    def __call__(self, x: Tensor) -> Tensor:
        """bf16 [1, hidden] to the same. The heads of a group are rows of one product."""
        heads = self.kv_heads * self.group
        queries = linear(x.float(), self.into)[:, : heads * HEAD].view(1, self.kv_heads, self.group, HEAD)
        mixed = scaled_dot_product_attention(queries, self.keys, self.values)
        return linear(mixed.reshape(1, -1), self.out).to(x.dtype)
