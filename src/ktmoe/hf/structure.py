"""Recognises experts modules by what they are, never by what their model is called.

transformers v5 gives every MoE family one shape: an experts module holds 3-D parameters and is called as
``experts(hidden[T, H], ids[T, k], weights[T, k])``. The decorator ``use_experts_implementation`` writes flags on the
module that say how its numbers are laid out. Whatever we cannot compute exactly is refused with the reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktmoe.hf.activation import GateFunction, recognise

GATE_UP = "gate_up_proj"
UP = "up_proj"
DOWN = "down_proj"

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ExpertsSpec:
    """What ktmoe must know about one experts module.

    `gate_up_proj` is [E, 2I, H] (`up_proj` [E, I, H] without a gate), `down_proj` is [E, H, I]; with `transposed` the
    last two dimensions change places. Of the 2I the first half is the gate; with `interleaved` every second one.
    """

    name: str
    layer_idx: int
    module_class: str
    n_experts: int
    top_k: int
    hidden: int
    inter: int
    gate: GateFunction
    has_bias: bool = False
    transposed: bool = False
    interleaved: bool = False

    @property
    def gated(self) -> bool:
        """False: there is an up projection alone."""
        return self.gate.activation != "relu2"

    @property
    def first(self) -> str:
        """Name of the stack before the activation."""
        return GATE_UP if self.gated else UP

    @property
    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """The parameters that hold matrices, and their shapes."""
        e, h, i, width = self.n_experts, self.hidden, self.inter, self.inter * (2 if self.gated else 1)
        if self.transposed:
            return {self.first: (e, h, width), DOWN: (e, i, h)}
        return {self.first: (e, width, h), DOWN: (e, h, i)}

    @property
    def biases(self) -> dict[str, tuple[int, int]]:
        """The parameters that hold biases, and their shapes."""
        e, width = self.n_experts, self.inter * (2 if self.gated else 1)
        return {f"{self.first}_bias": (e, width), f"{DOWN}_bias": (e, self.hidden)} if self.has_bias else {}


class UnsupportedExpertsError(NotImplementedError):
    """The model has experts whose arithmetic ktmoe does not implement. The text names the class and the reason."""


def looks_like_experts(module: nn.Module) -> bool:
    """True if the module holds a 3-D down projection and a 3-D up (or fused gate|up) projection of its own."""
    params = module._parameters
    stacks = {name for name, p in params.items() if p is not None and p.dim() == 3}
    return DOWN in stacks and bool(stacks & {GATE_UP, UP})


def is_routed(module: nn.Module) -> bool:
    """True if the module is called with (hidden, ids, weights), not, as shared experts are, for every token."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return len(kinds) >= 3 or inspect.Parameter.VAR_POSITIONAL in kinds


def find_experts(model: nn.Module, config: Any) -> list[ExpertsSpec]:
    """Describes every module of routed experts of `model` (which may be on the meta device), in module order.

    Beside routed experts, those that every token uses stay what they are. Raises UnsupportedExpertsError for experts
    that cannot be computed exactly, ValueError if there are none.
    """
    found = [(name, module) for name, module in model.named_modules() if looks_like_experts(module)]
    found = [(name, module) for name, module in found if is_routed(module)] or found
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts modules that ktmoe recognises "
            f"(a module with 3-D '{GATE_UP}' or '{UP}' and '{DOWN}'). Load dense models with plain transformers."
        )
    numbers = _layer_numbers([name for name, _ in found])
    return [_describe(model, config, name, module, idx) for (name, module), idx in zip(found, numbers, strict=True)]


def _describe(model: nn.Module, config: Any, name: str, module: nn.Module, layer_idx: int) -> ExpertsSpec:
    module_class = type(module).__name__
    gate = recognise_or_reason(module)
    if isinstance(gate, str):
        raise UnsupportedExpertsError(
            f"Experts module '{name}' ({module_class}) is not supported yet: {gate}. "
            "ktmoe computes experts with plain, clamped or OAI SwiGLU, with gelu_tanh(gate) * up, and with relu(up)^2."
        )
    n_experts, hidden, inter = _dimensions(module)
    parent = model.get_submodule(name.rpartition(".")[0])
    top_k = _top_k(parent, config)
    if top_k is None:
        raise UnsupportedExpertsError(
            f"Experts module '{name}' ({module_class}): cannot tell how many experts a token uses; "
            f"neither its router nor the config has one of {', '.join(_TOP_K_NAMES)}."
        )
    return ExpertsSpec(
        name,
        layer_idx,
        module_class,
        n_experts,
        top_k,
        hidden,
        inter,
        gate,
        has_bias=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        interleaved=not module.is_concatenated,
    )


def recognise_or_reason(module: nn.Module) -> GateFunction | str:
    """What an experts module computes, or the reason why it cannot run on ktmoe."""
    missing = [flag for flag in _FLAGS if not hasattr(module, flag)]
    if missing:
        return "it does not follow transformers' experts interface (no " + ", ".join(missing) + ")"
    if getattr(module, "has_post_expert_norm", False):
        return "each expert ends in a norm (has_post_expert_norm=True)"
    shapes = _why_shapes_unsupported(module)
    if shapes:
        return shapes
    act = type(getattr(module, "act_fn", None)).__name__
    return recognise(module) or f"its activation is none that ktmoe knows (act_fn {act}, has_gate={module.has_gate})"


def _dimensions(module: nn.Module) -> tuple[int, int, int]:
    """Experts, hidden, inter."""
    down = module._parameters[DOWN]
    assert down is not None  # by `looks_like_experts`
    n_experts, rows, columns = down.shape
    return (n_experts, columns, rows) if module.is_transposed else (n_experts, rows, columns)


def _why_shapes_unsupported(module: nn.Module) -> str | None:
    n_experts, hidden, inter = _dimensions(module)
    name, width = (GATE_UP, 2 * inter) if module.has_gate else (UP, inter)
    want: dict[str, tuple[int, ...]] = {
        name: (n_experts, hidden, width) if module.is_transposed else (n_experts, width, hidden)
    }
    if module.has_bias:
        want |= {f"{name}_bias": (n_experts, width), f"{DOWN}_bias": (n_experts, hidden)}
    for parameter, shape in want.items():
        got = module._parameters.get(parameter)
        if got is None or tuple(got.shape) != shape:
            found = "it is missing" if got is None else f"got {tuple(got.shape)}"
            return f"its shapes do not fit together ({parameter}: {found}, expected {shape})"
    return None


def _top_k(parent: nn.Module, config: Any) -> int | None:
    """Experts per token: asks the MoE block, then its router, then the config."""
    for holder in _holders(parent, config):
        for name in _TOP_K_NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _holders(parent: nn.Module, config: Any) -> Iterator[Any]:
    yield parent
    yield from parent.children()
    yield config
    text_config = getattr(config, "get_text_config", None)
    if text_config is not None:
        yield text_config()


def _layer_numbers(names: list[str]) -> list[int]:
    """The layer number that each name carries ("model.layers.3.mlp.experts" -> 3); counts if that is not unique."""
    digits = [re.findall(r"\.(\d+)\.", f".{name}.") for name in names]
    numbers = [int(found[-1]) for found in digits if found]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))
