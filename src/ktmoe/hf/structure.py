"""Recognises experts modules by what they are, never by what their model is called.

transformers v5 gives every MoE family one shape: an experts module holds 3-D parameters and is called as
``experts(hidden[T, H], ids[T, k], weights[T, k])``. The decorator ``use_experts_implementation`` writes flags on the
module that say how its numbers are laid out. Whatever we cannot compute exactly is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

GATE_UP = "gate_up_proj"
DOWN = "down_proj"

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_SILU_CLASSES = ("SiLU", "SiLUActivation")
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ExpertsSpec:
    """What ktmoe must know about one experts module. `gate_up_proj` is [E, 2I, H], `down_proj` is [E, H, I]."""

    name: str
    layer_idx: int
    module_class: str
    n_experts: int
    top_k: int
    hidden: int
    inter: int


class UnsupportedExpertsError(NotImplementedError):
    """The model has experts whose arithmetic ktmoe does not implement. The text names the class and the reason."""


def looks_like_experts(module: nn.Module) -> bool:
    """True if the module holds a 3-D down projection and a 3-D up (or fused gate|up) projection of its own."""
    params = module._parameters
    stacks = {name for name, p in params.items() if p is not None and p.dim() == 3}
    return DOWN in stacks and bool(stacks & {GATE_UP, "up_proj"})


def find_experts(model: nn.Module, config: Any) -> list[ExpertsSpec]:
    """Describes every experts module of `model` (which may be on the meta device), in module order.

    Raises UnsupportedExpertsError for experts that cannot be computed exactly, ValueError if there are none.
    """
    found = [(name, module) for name, module in model.named_modules() if looks_like_experts(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts modules that ktmoe recognises "
            f"(a module with 3-D '{GATE_UP}' and '{DOWN}'). Load dense models with plain transformers."
        )
    numbers = _layer_numbers([name for name, _ in found])
    return [_describe(model, config, name, module, idx) for (name, module), idx in zip(found, numbers, strict=True)]


def _describe(model: nn.Module, config: Any, name: str, module: nn.Module, layer_idx: int) -> ExpertsSpec:
    module_class = type(module).__name__
    reason = why_unsupported(module)
    if reason:
        raise UnsupportedExpertsError(
            f"Experts module '{name}' ({module_class}) is not supported yet: {reason}. "
            "ktmoe computes experts of the form down(silu(gate(x)) * up(x)) without bias."
        )
    n_experts, hidden, inter = module.down_proj.shape  # type: ignore[misc]
    parent = model.get_submodule(name.rpartition(".")[0])
    top_k = _top_k(parent, config)
    if top_k is None:
        raise UnsupportedExpertsError(
            f"Experts module '{name}' ({module_class}): cannot tell how many experts a token uses; "
            f"neither its router nor the config has one of {', '.join(_TOP_K_NAMES)}."
        )
    return ExpertsSpec(name, layer_idx, module_class, int(n_experts), top_k, int(hidden), int(inter))


def why_unsupported(module: nn.Module) -> str | None:
    """The reason why an experts module cannot run on ktmoe, or None if it can."""
    missing = [flag for flag in _FLAGS if not hasattr(module, flag)]
    if missing:
        return "it does not follow transformers' experts interface (no " + ", ".join(missing) + ")"
    if not module.has_gate:
        return "it has no gate (has_gate=False)"
    if module.has_bias:
        return "its projections have a bias (has_bias=True)"
    if module.is_transposed:
        return "its weights are stored transposed (is_transposed=True)"
    if not module.is_concatenated:
        return "gate and up are interleaved (is_concatenated=False)"
    if getattr(module, "has_post_expert_norm", False):
        return "each expert ends in a norm (has_post_expert_norm=True)"
    return _why_gate_unsupported(module) or _why_shapes_unsupported(module)


def _why_gate_unsupported(module: nn.Module) -> str | None:
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return "it has a gate of its own (_apply_gate is overridden)"
    act = type(getattr(module, "act_fn", None)).__name__
    if act not in _SILU_CLASSES:
        return f"its activation is {act}, not SiLU"
    return None


def _why_shapes_unsupported(module: nn.Module) -> str | None:
    gate_up, down = module._parameters[GATE_UP], module._parameters[DOWN]
    assert gate_up is not None  # by `looks_like_experts`
    assert down is not None
    n_experts, hidden, inter = down.shape
    if tuple(gate_up.shape) != (n_experts, 2 * inter, hidden):
        return f"its shapes do not fit together ({GATE_UP} {tuple(gate_up.shape)}, {DOWN} {tuple(down.shape)})"
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
