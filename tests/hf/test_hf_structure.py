"""Experts are recognised by what they are; what cannot be computed exactly is refused with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from ktmoe.hf.activation import GateFunction, recognise
from ktmoe.hf.structure import UnsupportedExpertsError, find_experts, looks_like_experts, recognise_or_reason

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


class Clamped(Experts):
    """As in GPT-OSS, MiniMax-M3 (alpha), HY-V4 (no alpha): the names of the attributes differ."""

    def __init__(self, limit: float, alpha: float | None = None, shift: float = 1, **flags: Any) -> None:
        super().__init__(**flags)
        self.swiglu_limit, self.alpha, self.shift = limit, alpha, shift

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1) if self.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
        gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        if self.alpha is None:
            return nn.functional.silu(gate) * up
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.shift)


class Ungated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(E, INTER, H, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(E, H, INTER, device="meta"))
        self.act_fn = act
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = False, False, False, True


class Transposed(Experts):
    """With biases, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__((E, H, 2 * INTER), has_bias=True, is_transposed=True)
        self.down_proj = nn.Parameter(torch.empty(E, INTER, H, device="meta"))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * INTER, device="meta"))
        self.down_proj_bias = nn.Parameter(torch.empty(E, H, device="meta"))


class OwnGate(Experts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up


class Raising(Experts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs something else")


def relu2(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


@pytest.mark.parametrize(
    ("module", "gate"),
    [
        (Experts(), GateFunction("silu")),
        (Experts(act_fn=nn.GELU("tanh")), GateFunction("gelu_tanh")),
        (Experts(is_concatenated=False), None),  # its gate takes halves
        (Clamped(7.0), GateFunction("silu", 7.0)),
        (Clamped(7.0, 1.702), GateFunction("silu", 7.0, 1.702)),
        (Clamped(0.5, 1.0), GateFunction("silu", 0.5, 1.0)),
        (Clamped(30.0, 1.702, is_concatenated=False), GateFunction("silu", 30.0, 1.702)),
        (Clamped(7.0, 1.702, shift=0), None),
        (Clamped(-1.0), None),
        (Ungated(relu2), GateFunction("relu2")),
        (Ungated(nn.ReLU()), None),
        (Ungated(nn.SiLU()), None),
        (OwnGate(), None),
        (Raising(), None),
    ],
)
def test_gates_are_recognised_by_trying_them(module: nn.Module, gate: GateFunction | None) -> None:
    assert recognise(module) == gate
    if gate is not None:
        assert recognise_or_reason(module) == gate


def test_transposed_and_biased() -> None:
    (spec,) = find_experts(Model(Transposed()), SimpleNamespace(num_experts_per_tok=2))
    assert (spec.n_experts, spec.hidden, spec.inter) == (E, H, INTER)
    assert spec.stacks == {"gate_up_proj": (E, H, 2 * INTER), "down_proj": (E, INTER, H)}
    assert spec.biases == {"gate_up_proj_bias": (E, 2 * INTER), "down_proj_bias": (E, H)}
    assert spec.transposed
    assert not spec.interleaved


def test_ungated() -> None:
    (spec,) = find_experts(Model(Ungated(relu2)), SimpleNamespace(num_experts_per_tok=2))
    assert spec.stacks == {"up_proj": (E, INTER, H), "down_proj": (E, H, INTER)}
    assert not spec.gated


class Model(nn.Module):
    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": module}) for module in experts)


def test_recognised() -> None:
    specs = find_experts(Model(Experts(), nn.Linear(2, 2), Experts()), SimpleNamespace(num_experts_per_tok=2))
    assert [(spec.name, spec.layer_idx) for spec in specs] == [("layers.0.moe", 0), ("layers.2.moe", 2)]
    assert [(spec.n_experts, spec.hidden, spec.inter, spec.top_k) for spec in specs] == [(E, H, INTER, 2)] * 2
    assert not looks_like_experts(nn.Linear(3, 3))


class Shared(nn.Module):
    """As in Inkling: experts that every token uses, in stacks of their own."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"gate_proj": (2, INTER, H), "up_proj": (2, INTER, H), "down_proj": (2, H, INTER)}.items():
            setattr(self, name, nn.Parameter(torch.empty(*shape, device="meta")))

    def forward(self, hidden_states: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_shared_experts_stay_beside_routed_ones() -> None:
    config = SimpleNamespace(num_experts_per_tok=2)
    assert [spec.name for spec in find_experts(Model(Experts(), Shared()), config)] == ["layers.0.moe"]
    with pytest.raises(UnsupportedExpertsError, match=r"'layers.0.moe' \(Shared\).*interface"):
        find_experts(Model(Shared()), config)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Experts(has_gate=False), "up_proj: it is missing"),
        (Experts(has_bias=True), "gate_up_proj_bias: it is missing"),
        (Experts(is_transposed=True), "do not fit together"),
        (Experts(has_post_expert_norm=True), "ends in a norm"),
        (Experts(act_fn=nn.GELU()), "its activation is none that ktmoe knows (act_fn GELU, has_gate=True)"),
        (Experts(gate_up=(E, H, 2 * INTER)), "do not fit together"),
        (OwnGate(), "its activation is none that ktmoe knows"),
        (Ungated(nn.SiLU()), "act_fn SiLU, has_gate=False"),
    ],
)
def test_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    assert reason in str(recognise_or_reason(module))
    with pytest.raises(UnsupportedExpertsError, match=type(module).__name__):
        find_experts(Model(module), SimpleNamespace(num_experts_per_tok=2))


def test_modules_outside_the_interface_are_refused() -> None:
    module = Experts()
    del module.has_gate, module.is_transposed
    assert "interface (no has_gate, is_transposed)" in str(recognise_or_reason(module))


def test_top_k_must_be_known() -> None:
    with pytest.raises(UnsupportedExpertsError, match="how many experts a token uses"):
        find_experts(Model(Experts()), SimpleNamespace())
