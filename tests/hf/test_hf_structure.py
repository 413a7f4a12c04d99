"""Experts are recognised by what they are; what cannot be computed exactly is refused with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from ktmoe.hf.structure import UnsupportedExpertsError, find_experts, looks_like_experts, why_unsupported

E, H, INTER = 4, 16, 6


class Experts(nn.Module):
    """What transformers' decorator makes of a plain SwiGLU experts class."""

    _apply_gate = _default_apply_gate

    def __init__(self, gate_up: tuple[int, ...] = (E, 2 * INTER, H), **flags: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(*gate_up, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(E, H, INTER, device="meta"))
        self.act_fn = nn.SiLU()
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = True, False, False, True
        self.has_post_expert_norm = False
        for name, value in flags.items():
            setattr(self, name, value)


class OwnGate(Experts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up


class Model(nn.Module):
    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": module}) for module in experts)


def test_recognised() -> None:
    specs = find_experts(Model(Experts(), nn.Linear(2, 2), Experts()), SimpleNamespace(num_experts_per_tok=2))
    assert [(spec.name, spec.layer_idx) for spec in specs] == [("layers.0.moe", 0), ("layers.2.moe", 2)]
    assert [(spec.n_experts, spec.hidden, spec.inter, spec.top_k) for spec in specs] == [(E, H, INTER, 2)] * 2
    assert not looks_like_experts(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Experts(has_gate=False), "no gate"),
        (Experts(has_bias=True), "bias"),
        (Experts(is_transposed=True), "transposed"),
        (Experts(is_concatenated=False), "interleaved"),
        (Experts(has_post_expert_norm=True), "ends in a norm"),
        (Experts(act_fn=nn.GELU()), "GELU, not SiLU"),
        (Experts(gate_up=(E, H, 2 * INTER)), "do not fit together"),
        (OwnGate(), "a gate of its own"),
    ],
)
def test_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    assert reason in str(why_unsupported(module))
    with pytest.raises(UnsupportedExpertsError, match=type(module).__name__):
        find_experts(Model(module), SimpleNamespace(num_experts_per_tok=2))


def test_modules_outside_the_interface_are_refused() -> None:
    module = Experts()
    del module.has_gate, module.is_transposed
    assert "interface (no has_gate, is_transposed)" in str(why_unsupported(module))


def test_top_k_must_be_known() -> None:
    with pytest.raises(UnsupportedExpertsError, match="how many experts a token uses"):
        find_experts(Model(Experts()), SimpleNamespace())
