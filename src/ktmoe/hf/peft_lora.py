"""How PEFT holds the LoRA factors of all experts of a layer: two matrices for each parameter.

    A [experts * rank, in]      row e * rank + k
    B [out, rank * experts]     column k * experts + e

The engine reads both where they lie. The gradient of A is written as A lies; that of B with the rows of an expert in
one piece, a line of memory each, and then turned.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ktmoe import large
from ktmoe.lora import LoraGradients, LoraTensors

_LINE = 16
"""fp32 in a line of memory."""


def matrices_of(a: Tensor, b: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Views of one parameter's factors: A [n_experts, rank, in], B [n_experts, out, rank]."""
    return a.reshape(n_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, n_experts).permute(2, 0, 1)


def gate_and_up(b: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Their rows of B [n_experts, 2 * inter, rank]."""
    if interleaved:
        return b[:, 0::2], b[:, 1::2]
    inter = b.shape[1] // 2
    return b[:, :inter], b[:, inter:]


def lora_tensors(
    first: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    gated: bool,
    interleaved: bool,
    scaling: float,
    rank: int,
    name: str,
) -> LoraTensors:
    """Of (A, B) of gate and up together, or of up alone, and of down, as from `matrices_of`."""
    a, b = first
    gate_b, up_b = gate_and_up(b, interleaved) if gated else (None, b)
    # gate and up share A: the same tensor twice, so that the engine sums both gradients into one.
    return LoraTensors(a if gated else None, gate_b, a, up_b, *down, scaling, rank, name)


class PeftLora(NamedTuple):
    """The factors of one adapter with one rank and one scaling, as a `LoraSource`."""

    first_a: Tensor
    first_b: Tensor
    down_a: Tensor
    down_b: Tensor
    n_experts: int
    gated: bool
    interleaved: bool
    scaling: float
    rank: int
    name: str

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """PEFT's own parameters."""
        return self[:4]

    @property
    def matrices(self) -> LoraTensors:
        """Views; gate and up share A."""
        first_a, first_b, down_a, down_b = (leaf.detach() for leaf in self.leaves)
        return lora_tensors(
            matrices_of(first_a, first_b, self.n_experts),
            matrices_of(down_a, down_b, self.n_experts),
            gated=self.gated,
            interleaved=self.interleaved,
            scaling=self.scaling,
            rank=self.rank,
            name=self.name,
        )

    def new_gradients(self, n_experts: int, hidden: int, inter: int) -> LoraGradients:
        """See `LoraSource`."""
        rank = self.rank
        first_a, down_a = (large.empty_f32((n_experts, rank, k)) for k in (hidden, inter))
        first_b, down_b = (_rows_of_experts(out, n_experts, rank) for out in (self.first_b.shape[0], hidden))
        of_first = first_b.transpose(0, 1)
        if self.gated:
            gate_b, up_b = gate_and_up(of_first, self.interleaved)
            targets = [first_a, gate_b, first_a, up_b]
        else:
            targets = [first_a, of_first]

        def of_leaves() -> list[Tensor]:
            return [first_a.flatten(0, 1), _turned(first_b), down_a.flatten(0, 1), _turned(down_b)]

        return LoraGradients([*targets, down_a, down_b.transpose(0, 1)], of_leaves)


def _rows_of_experts(out: int, n_experts: int, rank: int) -> Tensor:
    """fp32 [out, n_experts, rank]. A line between the rows keeps them from competing for the same sets of a cache."""
    rows = large.empty_f32((out, n_experts * rank + _LINE))
    return rows[:, : n_experts * rank].view(out, n_experts, rank)


def _turned(rows: Tensor) -> Tensor:
    """[out, rank * n_experts] of [out, n_experts, rank]."""
    out, n_experts, rank = rows.shape
    turned = large.empty_f32((out, rank, n_experts))
    return turned.copy_(rows.transpose(1, 2)).flatten(1)
