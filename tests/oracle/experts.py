"""The layer in float64 torch: what the engine is held to. Autograd gives its gradients; gradcheck proves those.

Rounding that the engine does on purpose can be switched on: activations of the experts' GEMMs (int8: one scale per
row), h and the LoRA activations to bf16. It counts as the identity for gradients.
"""

from dataclasses import dataclass

import torch

Lora = dict[str, torch.Tensor]  # gate_a [E, r, H], gate_b [E, I, r], up_a, up_b, down_a [E, r, I], down_b [E, H, r]
Weights = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # gate, up [I, H], down [H, I] of each expert

LORA_NAMES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")


def straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded - x).detach()


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return straight_through(x, x.detach().to(torch.float32).to(torch.bfloat16).double())


def to_int8_rows(x: torch.Tensor) -> torch.Tensor:
    """The division is fp32, as in the format: ties such as amax / 2 are common in bf16, and double would break them."""
    values = x.detach().float()
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    levels = torch.where(scale > 0, torch.round(values / torch.where(scale > 0, scale, 1.0)), 0.0)
    return straight_through(x, levels.clamp(-127, 127).double() * scale.double())


@dataclass(frozen=True)
class Rounding:
    """activations: None (exact), "bf16" or "int8"."""

    activations: str | None

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return to_int8_rows(x) if self.activations == "int8" else x

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.activations is None else to_bf16(x)


EXACT = Rounding(None)


def expert_forward(
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    lora: tuple[torch.Tensor, ...] | None,
    scaling: float,
    rounding: Rounding,
) -> torch.Tensor:
    """x [m, H] -> [m, H]."""
    gate, up, down = weights

    def project(v: torch.Tensor, w: torch.Tensor, first: int) -> torch.Tensor:
        out = rounding.operand(v) @ w.T
        if lora is not None:
            out = out + rounding.stored(scaling * (v @ lora[first].T)) @ lora[first + 1].T
        return out

    g, u = project(x, gate, 0), project(x, up, 2)
    return project(rounding.stored(g * torch.sigmoid(g) * u), down, 4)


def layer_forward(
    weights: Weights,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
    lora: Lora | None = None,
    scaling: float = 1.0,
    rounding: Rounding = EXACT,
    skipped: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """sum over slots of routing weight * expert(token); -1, E and `skipped` experts contribute nothing."""
    out = torch.zeros_like(hidden)
    for e, expert in enumerate(weights):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if e in skipped or not len(token):
            continue
        adapters = None if lora is None else tuple(lora[name][e] for name in LORA_NAMES)
        y = expert_forward(expert, hidden[token], adapters, scaling, rounding)
        out = out.index_add(0, token, y * routing[token, slot, None])
    return out
