"""Lets PEFT's own expert LoRA (``target_parameters``) train the packed experts.

PEFT wraps the experts module once per parameter: ``ParamWrapper(down_proj, ParamWrapper(gate_up_proj, experts))``. The
stock wrapper adds the low-rank product to the whole weight stack, which packed experts do not have. Here the wrappers
stay in the tree, so that saving, loading, optimizers and adapter switching see nothing new; only their forward hands
the factors to the engine. It is replaced once per process and acts on ktmoe's experts alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ktmoe.hf.peft_lora import PeftLora, lora_tensors, matrices_of
from ktmoe.hf.structure import DOWN
from ktmoe.lora import LoraSource, LoraTensors, fingerprint

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
        return _adapted(self, experts, x, *args, **kwargs)

    return forward


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _adapted(wrapper: Any, experts: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return experts(x, *args, lora=active_lora(wrapper, experts), **kwargs)


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


class _Factors(NamedTuple):
    """What one adapter adds to one parameter of all experts: scaling * B A."""

    peft_a: torch.Tensor
    peft_b: torch.Tensor
    n_experts: int
    scaling: float

    @property
    def rank(self) -> int:
        return self.peft_a.shape[0] // self.n_experts

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [n_experts, rank, in] and B [n_experts, out, rank]."""
        return matrices_of(self.peft_a, self.peft_b, self.n_experts)


class Joined(NamedTuple):
    """The factors that an experts module got last where no gradients were needed. As long as the adapters' tensors do
    not change these are the same tensors, so that the engine need not pack them again."""

    key: tuple[object, ...]
    sources: list[torch.Tensor]
    """Kept alive: a new tensor at a freed address would look like the old one."""
    lora: LoraTensors


def active_lora(wrapper: Any, experts: Any) -> LoraSource | None:
    """The factors of the adapters that are active on a chain of wrappers; their sum, if there are several.

    None if no adapter is active (``disable_adapter()``, or none was added). PEFT's own parameters where one adapter has
    the same rank and scaling everywhere.
    """
    found: dict[str, list[_Factors]] = {}
    names: dict[str, None] = {}
    while wrapper is not experts:
        for name in () if wrapper.disable_adapters else wrapper.active_adapters:
            if name in wrapper.lora_A:
                found.setdefault(wrapper.parameter_name, []).append(_factors(wrapper, name))
                names[name] = None
        wrapper = wrapper.base_layer
    if not found:
        return None
    name = "+".join(names)
    if torch.is_grad_enabled():
        return _as_it_is(found, experts, name) or _to_engine(found, experts, name)
    sources = [tensor for factors in found.values() for f in factors for tensor in (f.peft_a, f.peft_b)]
    key = (name, *((parameter, f.scaling) for parameter, of in found.items() for f in of), *fingerprint(sources))
    if experts.joined_lora is None or experts.joined_lora.key != key:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not count their changes
            experts.joined_lora = Joined(key, sources, _to_engine(found, experts, name))
    lora: LoraTensors = experts.joined_lora.lora
    return lora


def _factors(wrapper: Any, adapter: str) -> _Factors:
    """Those of one adapter."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    return _Factors(a, b, wrapper.num_experts, float(wrapper.scaling[adapter]))


def _as_it_is(found: dict[str, list[_Factors]], experts: Any, name: str) -> PeftLora | None:
    """None unless there is one adapter with one rank and one scaling, on both parameters."""
    spec = experts.spec
    first, down = (found.get(parameter, []) for parameter in (spec.first, DOWN))
    if len(first) != 1 or len(down) != 1 or (first[0].rank, first[0].scaling) != (down[0].rank, down[0].scaling):
        return None
    tensors = (first[0].peft_a, first[0].peft_b, down[0].peft_a, down[0].peft_b)
    return PeftLora(*tensors, spec.n_experts, spec.gated, spec.interleaved, down[0].scaling, down[0].rank, name)


def _to_engine(found: dict[str, list[_Factors]], experts: Any, name: str) -> LoraTensors:
    """One rank and one scaling for all matrices. found: parameter -> its factors, of one adapter or several.

    PEFT's factors have the same shapes whether the module stores its weights transposed or not.
    """
    scalings = {f.scaling for factors in found.values() for f in factors}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    rank = max(sum(f.rank for f in factors) for factors in found.values())
    n, hidden, inter = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    spec = experts.spec
    width = 2 * inter if spec.gated else inter
    return lora_tensors(
        _join(found.get(spec.first, []), rank, scaling, (n, hidden, width)),
        _join(found.get(DOWN, []), rank, scaling, (n, inter, hidden)),
        gated=spec.gated,
        interleaved=spec.interleaved,
        scaling=scaling,
        rank=rank,
        name=name,
    )


def _join(
    factors: list[_Factors], rank: int, scaling: float, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the sum: all A one below the other, all B side by side, zeros up to `rank`. shape: experts, in, out."""
    n_experts, n_in, n_out = shape
    a = [f.matrices[0] for f in factors]
    b = [f.matrices[1] if f.scaling == scaling else f.matrices[1] * (f.scaling / scaling) for f in factors]
    missing = rank - sum(x.shape[1] for x in a)
    if missing:
        device = a[0].device if a else torch.device("cpu")
        a.append(torch.zeros(n_experts, missing, n_in, device=device))
        b.append(torch.zeros(n_experts, n_out, missing, device=device))
    return (a[0], b[0]) if len(a) == 1 else (torch.cat(a, 1), torch.cat(b, 2))
