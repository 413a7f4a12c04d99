"""What every implementation gets: a shape, weights, token batches, and the slow result to compare with.

Needs torch alone, because the interpreters of peers import it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

Packed = TypeVar("Packed")


class Gradients(NamedTuple):
    """What one backward gives."""

    x: Tensor
    """[tokens, hidden]"""
    lora: Sequence[Tensor]
    """In the order and shapes of `Problem.lora`."""


LORA_RANK = 16
LORA_ALPHA = 32.0
CHECK_TOKENS = 16
CHECK_SEED = 7_000_000
DISTINCT_EXPERTS = 16
"""Experts repeat after this many: time does not depend on the values, and packing them all would take minutes."""


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    full_experts: int = 0
    """Experts of the model's own layer, where `experts` was reduced to fit the memory."""

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.inter

    @property
    def n_weights(self) -> int:
        return self.experts * self.expert_weights

    def flops(self, tokens: int) -> int:
        """A multiply and an add for each weight that a token meets."""
        return 2 * tokens * self.top_k * self.expert_weights

    def reduced(self, experts: int) -> Shape:
        """The same layer with fewer experts: more rows meet each of them, decode reads as much."""
        return self if experts >= self.experts else replace(self, experts=experts, full_experts=self.experts)

    def __str__(self) -> str:
        of = f" (reduced from {self.full_experts})" if self.full_experts else ""
        return f"{self.name}: hidden {self.hidden}, inter {self.inter}, {self.experts} experts{of}, top {self.top_k}"


SHAPES = {
    s.name: s
    for s in (
        Shape("S1", 2048, 768, 128, 8),  # a Qwen3-30B-A3B layer
        Shape("S2", 7168, 2048, 256, 8),  # a DeepSeek-V3 layer
        Shape("T", 256, 256, 8, 2),
        Shape("TINY", 64, 64, 8, 2),  # call overhead
    )
}


def save_problem(folder: Path, shape: Shape, *, sft: bool) -> None:
    """Writes weights of one layer (bf16, Gaussian, std 1/sqrt(fan in)) and the reference result to `folder`."""
    generator = torch.Generator().manual_seed(0)
    e, h, i = shape.experts, shape.hidden, shape.inter
    for name, (n, k) in {"gate": (i, h), "up": (i, h), "down": (h, i)}.items():
        path = str(folder / name)
        weights = torch.from_file(path, shared=True, size=e * n * k, dtype=torch.bfloat16).view(e, n, k)
        for index, expert in enumerate(weights):
            first = index % DISTINCT_EXPERTS
            expert.copy_(torch.randn(n, k, generator=generator) / math.sqrt(k) if first == index else weights[first])
    problem = Problem(folder, shape)
    x, ids, mix = problem.batch(CHECK_TOKENS, CHECK_SEED)
    torch.save(reference(problem, x, ids, mix, sft=sft), folder / "reference.pt")


@dataclass
class Problem:
    """One layer, mapped from the files of `save_problem`: gate, up [experts, inter, hidden], down the other way."""

    folder: Path
    shape: Shape

    def __post_init__(self) -> None:
        self.gate, self.up, self.down = (self._map(name) for name in ("gate", "up", "down"))

    def _map(self, name: str) -> Tensor:
        s = self.shape
        flat = torch.from_file(str(self.folder / name), shared=True, size=s.n_weights // 3, dtype=torch.bfloat16)
        return flat.view(s.experts, *((s.hidden, s.inter) if name == "down" else (s.inter, s.hidden)))

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.up, self.down

    def batch(self, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """hidden bf16 [tokens, hidden], ids of `routing`, weights fp32 [tokens, top_k]."""
        g = torch.Generator().manual_seed(seed + 1)
        mix = torch.rand(tokens, self.shape.top_k, generator=g).softmax(-1)
        return torch.randn(tokens, self.shape.hidden, generator=g).bfloat16(), routing(self.shape, tokens, seed), mix

    def per_expert(self, weights: Tensor, pack: Callable[[Tensor], Packed]) -> list[Packed]:
        """`pack` of every expert's matrix; the repeated ones are packed once."""
        done = [pack(expert) for expert in weights[:DISTINCT_EXPERTS]]
        return [done[e % DISTINCT_EXPERTS] for e in range(len(weights))]

    def lora(self) -> list[Tensor]:
        """gate A, B, up A, B, down A, B in fp32; the same in every process."""
        g = torch.Generator().manual_seed(1)
        e, h, i, r = self.shape.experts, self.shape.hidden, self.shape.inter, LORA_RANK
        shapes = ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r))
        return [torch.randn(s, generator=g).div_(math.sqrt(s[2])) for s in shapes]  # in place: memory is measured

    def expected(self) -> dict[str, list[Tensor]]:
        """What `reference` gave."""
        found: dict[str, list[Tensor]] = torch.load(self.folder / "reference.pt")
        return found


def routing(shape: Shape, tokens: int, seed: int) -> Tensor:
    """Expert ids int64 [tokens, top_k], uniform without repetition."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, shape.experts, generator=g).argsort(-1)[:, : shape.top_k].contiguous()


def touched_experts(shape: Shape, tokens: int) -> float:
    """Distinct experts of a batch, mean over the batches that calls rotate through."""
    counts = [len(routing(shape, tokens, seed).unique()) for seed in batch_seeds(tokens)]
    return sum(counts) / len(counts)


def batch_seeds(tokens: int) -> range:
    """The batches that calls rotate through: many for few tokens, so that no expert stays in the caches."""
    return range(64 if tokens <= 16 else 8 if tokens <= 256 else 2)


Linear = Callable[[Tensor, int, int], Tensor]
"""(rows, which: 0 gate, 1 up, 2 down, expert) -> rows times that matrix."""


def expert_loop(x: Tensor, ids: Tensor, mix: Tensor, times: Linear) -> Tensor:
    """The routed experts as eager model code writes them: a loop over the experts that have tokens."""
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        t, k = (ids == e).nonzero(as_tuple=True)
        h = silu(times(x[t], 0, e)) * times(x[t], 1, e)
        y = y.index_add(0, t, times(h, 2, e) * mix[t, k, None].to(x.dtype))
    return y


def with_lora(times: Linear, lora: list[Tensor]) -> Linear:
    """Adds scaling * B A x. One view per expert, so that backward builds no full-size gradient for each."""
    factors = [t.unbind(0) for t in lora]

    def both(v: Tensor, which: int, e: int) -> Tensor:
        a, b = factors[2 * which][e], factors[2 * which + 1][e]
        return times(v, which, e) + (LORA_ALPHA / LORA_RANK) * linear(linear(v, a), b)

    return both


class _InDouble(torch.autograd.Function):
    """linear(v, w) in float64 for a frozen bf16 w, of which backward keeps no float64 copy."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, w: Tensor) -> Tensor:
        ctx.w = w
        return linear(v, w.double())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.w.double(), None


def reference(problem: Problem, x: Tensor, ids: Tensor, mix: Tensor, *, sft: bool) -> dict[str, list[Tensor]]:
    """float64 on the bf16 weights: {"y"}; with `sft` (LoRA added) gradients of y.sum(), too: {"x", "lora"}."""

    def times(v: Tensor, which: int, e: int) -> Tensor:
        out: Tensor = _InDouble.apply(v, problem.weights[which][e])
        return out

    x = x.double().requires_grad_(sft)
    if not sft:
        return {"y": [expert_loop(x, ids, mix, times)]}
    lora = [t.double().requires_grad_() for t in problem.lora()]
    y = expert_loop(x, ids, mix, with_lora(times, lora))
    grad_x, *grad_lora = torch.autograd.grad(y.sum(), [x, *lora])
    return {"y": [y.detach()], "x": [grad_x], "lora": grad_lora}


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """||got - want|| / ||want|| over all elements of all tensors."""
    off = sum(float((g.double() - w).square().sum()) for g, w in zip(got, want, strict=True))
    return math.sqrt(off / sum(float(w.square().sum()) for w in want))
