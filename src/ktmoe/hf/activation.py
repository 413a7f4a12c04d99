"""Finds out what an experts module does between its two products: by trying it, not by its name.

A gate of its own (``_apply_gate``) is code, which cannot be read. So it is called with numbers that reach beyond every
limit, and what comes out is compared with what ktmoe can compute. Only a gate that agrees everywhere is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu

_LIMIT_NAMES = ("limit", "swiglu_limit")
_ALPHA_NAMES = ("alpha", "swiglu_alpha")


class GateFunction(NamedTuple):
    """The parameters of `KTMoEWrapper` that describe it."""

    activation: str
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 0.0

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """h of gate and up; "relu2" does not look at the gate."""
        if self.activation == "relu2":
            return torch.relu(up) ** 2
        if self.swiglu_limit:
            gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        if self.activation == "gelu_tanh":
            return gelu(gate, approximate="tanh") * up
        if self.swiglu_alpha:
            return gate * torch.sigmoid(self.swiglu_alpha * gate) * (up + 1)
        return gate * torch.sigmoid(gate) * up


def recognise(module: nn.Module) -> GateFunction | None:
    """What the module computes, or None if it is nothing that ktmoe knows. The module may be on the meta device."""
    limits, alphas = (_numbers(module, names) for names in (_LIMIT_NAMES, _ALPHA_NAMES))
    gate, up = _probe(max((4.0, *limits)))
    try:
        with torch.no_grad(), torch.device("cpu"):
            got = _tried(module, gate, up)
    except Exception:  # somebody's code, on arguments that it may not expect
        return None
    for candidate in _candidates(bool(module.has_gate), limits, alphas):
        want = candidate(gate, up)
        # Loose enough for a gate that computes in fp32; the two kinds of GELU differ by 5e-4.
        if got.shape == want.shape and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5):
            return candidate
    return None


def _tried(module: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not module.has_gate:
        return module.act_fn(up)  # type: ignore[no-any-return, operator]
    joined = torch.cat((gate, up), -1) if module.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
    return module._apply_gate(joined)  # type: ignore[no-any-return, operator]


def _candidates(has_gate: bool, limits: list[float], alphas: list[float]) -> Iterator[GateFunction]:
    if not has_gate:
        yield GateFunction("relu2")
        return
    yield GateFunction("silu")
    yield GateFunction("gelu_tanh")
    for limit in (0.0, *limits):
        for alpha in (0.0, *alphas):
            yield GateFunction("silu", limit, alpha)


def _numbers(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    found = (getattr(module, name, None) for name in names)
    return [float(n) for n in found if isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0]


def _probe(reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up [66, 66], float64: every pair of values, near zero and to twice `reach`."""
    grid = torch.linspace(-2 * reach, 2 * reach, 33, dtype=torch.float64, device="cpu")
    fine = torch.linspace(-5, 5, 33, dtype=torch.float64, device="cpu")  # where activations differ
    gate, up = torch.cat((grid, fine)), torch.cat((fine, grid))
    return gate[:, None].expand(66, 66).contiguous(), up[None, :].expand(66, 66).contiguous()
