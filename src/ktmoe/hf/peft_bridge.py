"""Lets PEFT's own expert LoRA (``target_parameters``) train the packed experts.

PEFT wraps the experts module once per parameter: ``ParamWrapper(down_proj, ParamWrapper(gate_up_proj, experts))``. The
stock wrapper adds the low-rank product to the whole weight stack, which packed experts do not have. Here the wrappers
stay in the tree, so that saving, loading, optimizers and adapter switching see nothing new; only their forward hands
the factors to the engine. It is replaced once per process and acts on ktmoe's experts alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ktmoe.autograd import LoraTensors
from ktmoe.hf.structure import DOWN

MERGE_HINT = (
    "experts are packed ({method}) and cannot take a merged adapter. Merge in plain transformers instead: "
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER).merge_and_unload()"
)


def install() -> None:
    """Teaches PEFT about ktmoe's experts. Does nothing if PEFT is not installed or has been taught already."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.lora.model import LoraModel

    if getattr(ParamWrapper, "_ktmoe", False):
        return
    for owner, name in ((ParamWrapper, "forward"), (ParamWrapper, "merge"), (LoraModel, "_check_merge_allowed")):
        if not callable(getattr(owner, name, None)):
            import peft

            raise RuntimeError(f"ktmoe does not know peft {peft.__version__}: {owner.__name__} has no {name}()")
    ParamWrapper.forward = _forward_or(ParamWrapper.forward)
    ParamWrapper.merge = _refuse_merge_or(ParamWrapper.merge)
    LoraModel._check_merge_allowed = _check_merge_or(LoraModel._check_merge_allowed)
    ParamWrapper._ktmoe = True


def _packed_experts(wrapper: Any) -> Any:
    """The ktmoe experts under a (nested) wrapper, or None if it wraps anything else."""
    base = wrapper.get_base_layer()
    return base if getattr(base, "is_ktmoe", False) else None


def _forward_or(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        experts = _packed_experts(self)
        if experts is None:
            return stock(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        return experts(x, *args, lora=active_lora(self, experts), **kwargs)

    return forward


def _refuse_merge_or(stock: Callable[..., Any]) -> Callable[..., Any]:
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        experts = _packed_experts(self)
        if experts is not None:
            raise RuntimeError(MERGE_HINT.format(method=experts.method))
        return stock(self, *args, **kwargs)

    return merge


def _check_merge_or(stock: Callable[..., Any]) -> Callable[..., Any]:
    # PEFT merges layer by layer; refusing before the first one leaves the model as it was.
    def check_merge_allowed(self: Any) -> Any:
        for module in self.model.modules():
            if hasattr(module, "parameter_name") and hasattr(module, "get_base_layer"):
                experts = _packed_experts(module)
                if experts is not None:
                    raise RuntimeError(MERGE_HINT.format(method=experts.method))
        return stock(self)

    return check_merge_allowed


def active_lora(wrapper: Any, experts: nn.Module) -> LoraTensors | None:
    """The factors of the one adapter that is active on a chain of wrappers, as views of PEFT's own parameters.

    None if no adapter is active (``disable_adapter()``, or none was added). ValueError if more than one is.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    adapters: set[str] = set()
    while wrapper is not experts:
        if not wrapper.disable_adapters:
            names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            adapters.update(names)
            for name in names:
                factors[wrapper.parameter_name] = _factors(wrapper, name)
        wrapper = wrapper.base_layer
    if len(adapters) > 1:
        raise ValueError(
            f"Several adapters are active on packed experts ({', '.join(sorted(adapters))}); ktmoe computes "
            "one at a time. Choose one with set_adapter(name)."
        )
    return _to_engine(factors, experts, next(iter(adapters))) if factors else None


def _factors(wrapper: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A [E, r, in], B [E, out, r], scaling) of one adapter. PEFT has A's rows as e*r + k, B's columns as k*E + e."""
    n_experts = wrapper.num_experts
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    return (
        a.reshape(n_experts, -1, a.shape[1]),
        b.reshape(b.shape[0], -1, n_experts).permute(2, 0, 1),
        float(wrapper.scaling[adapter]),
    )


def _to_engine(factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]], experts: Any, name: str) -> LoraTensors:
    """One rank and one scaling for all matrices: pads and rescales where they differ (``rank_pattern``).

    PEFT's factors have the same shapes whether the module stores its weights transposed or not.
    """
    rank = max(a.shape[1] for a, _, _ in factors.values())
    scaling = next(iter(factors.values()))[2]
    n, hidden, inter = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    spec = experts.spec
    first_a, first_b = _fit(factors.get(spec.first), rank, scaling, (n, hidden, 2 * inter if spec.gated else inter))
    down_a, down_b = _fit(factors.get(DOWN), rank, scaling, (n, inter, hidden))
    gate_b: torch.Tensor | None
    if not spec.gated:
        gate_b, up_b = None, first_b
    elif spec.interleaved:
        gate_b, up_b = first_b[:, 0::2], first_b[:, 1::2]
    else:
        gate_b, up_b = first_b[:, :inter], first_b[:, inter:]
    # gate and up share A: the same tensor twice, so that the engine sums both gradients into one.
    return LoraTensors(
        gate_a=first_a if spec.gated else None,
        gate_b=gate_b,
        up_a=first_a,
        up_b=up_b,
        down_a=down_a,
        down_b=down_b,
        scaling=scaling,
        rank=rank,
        name=name,
    )


def _fit(
    factors: tuple[torch.Tensor, torch.Tensor, float] | None, rank: int, scaling: float, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    n_experts, n_in, n_out = shape
    if factors is None:
        return torch.zeros(n_experts, rank, n_in), torch.zeros(n_experts, n_out, rank)
    a, b, own_scaling = factors
    if own_scaling != scaling:
        b = b * (own_scaling / scaling)
    if a.shape[1] != rank:
        a, b = pad(a, (0, 0, 0, rank - a.shape[1])), pad(b, (0, rank - b.shape[2]))
    return a, b
