"""Plain PyTorch: the loop over active experts in bf16 and fp32, grouped_mm, and autograd for training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.problem import Gradients, Problem, expert_loop, with_lora


class Torch:
    """variant: bf16 or fp32 (the loop), or grouped (one grouped_mm for each of gate|up and down, bf16)."""

    packed_bytes = 0

    def __init__(
        self, variant: str, problem: Problem, *, layers: int, threads: int, max_tokens: int, sft: bool
    ) -> None:
        if variant not in ("bf16", "fp32", "grouped"):
            raise ValueError(f"torch: got variant {variant!r}, expected bf16, fp32 or grouped")
        if variant == "grouped" and not hasattr(functional, "grouped_mm"):
            raise RuntimeError(f"torch {torch.__version__} has no functional.grouped_mm")
        if variant == "grouped" and sft:
            raise ValueError("torch:grouped: only inference is measured")
        self.layers, self.sft, self.variant, self.problem = layers, sft, variant, problem
        self.dtype = torch.float32 if variant == "fp32" else torch.bfloat16
        # For inference bf16 weights stay in the mapped file: every layer is the same memory, larger than the caches or
        # not. In training the memory of the process is measured, so it has its own.
        self.weights = [w.to(self.dtype, copy=sft) for w in problem.weights]

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.sft):
            if self.variant == "grouped":
                return self._grouped(x, ids, mix)
            self.x = x.to(self.dtype).detach().requires_grad_(self.sft)
            times = self._times if not self.sft else with_lora(self._times, self.lora)
            self.y = expert_loop(self.x, ids, mix, times)
            return self.y.detach()

    def _times(self, rows: Tensor, which: int, expert: int) -> Tensor:
        return functional.linear(rows, self.weights[which][expert])

    def _grouped(self, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        tokens, top_k = ids.shape
        order = ids.flatten().argsort(stable=True)
        ends = ids.flatten().bincount(minlength=self.problem.shape.experts).cumsum(0).to(torch.int32)

        def times(rows: Tensor, which: int) -> Tensor:
            return functional.grouped_mm(rows, self.weights[which].transpose(1, 2), offs=ends)

        rows = x[order // top_k]
        rows = times(functional.silu(times(rows, 0)) * times(rows, 1), 2)
        rows = rows * mix.flatten()[order, None].to(rows.dtype)
        y = torch.empty_like(rows)
        y[order] = rows
        return y.view(tokens, top_k, -1).sum(1)

    def set_lora(self, lora: list[Tensor]) -> None:
        self.lora = [t.to(self.dtype).requires_grad_() for t in lora]

    def backward(self, grad: Tensor) -> Gradients:
        grad_x, *grad_lora = torch.autograd.grad(self.y, [self.x, *self.lora], grad.to(self.dtype))
        del self.x, self.y  # the graph lives with them
        return Gradients(grad_x, grad_lora)
