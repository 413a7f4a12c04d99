"""`KTExperts`: the module that stands where the experts of a transformers model stood.

It has no Parameters, so nothing that walks the model (state_dict, optimizer, DDP, FSDP, ``.to()``) sees or moves the
packed weights. PEFT, which asks the module itself for its parameters, is shown zero-storage tensors of the true shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktmoe.autograd import moe_forward
from ktmoe.hf.config import KTMoEConfig, trainable_twin
from ktmoe.hf.structure import ExpertsSpec
from ktmoe.lora import LoraSource
from ktmoe.methods import METHODS
from ktmoe.wrapper import KTMoEWrapper

if TYPE_CHECKING:
    from ktmoe.hf.peft_bridge import Joined


class KTExperts(nn.Module):
    """Routed experts of one layer, held by the engine: ``forward(hidden[T, H], ids[T, k], weights[T, k])``."""

    is_ktmoe = True

    def __init__(self, spec: ExpertsSpec, config: KTMoEConfig) -> None:
        super().__init__()
        self.spec = spec
        self.method = config.method
        self.trainable = METHODS[config.method].mode == "sft"
        self.num_experts, self.hidden_dim, self.intermediate_dim = spec.n_experts, spec.hidden, spec.inter
        # PEFT and transformers read the layout from these.
        self.has_gate, self.has_bias = spec.gated, spec.has_bias
        self.is_transposed, self.is_concatenated = spec.transposed, not spec.interleaved
        for name, shape in spec.stacks.items():
            setattr(self, name, _placeholder(*shape))
        self._backend: Any = None
        self._config = config
        self.joined_lora: Joined | None = None
        """Belongs to `ktmoe.hf.peft_bridge`."""

    @property
    def backend(self) -> Any:
        """The `ktmoe.wrapper` backend of this layer. It is made on first use."""
        if self._backend is None:
            self._backend = KTMoEWrapper(
                layer_idx=self.spec.layer_idx,
                num_experts=self.spec.n_experts,
                num_experts_per_tok=self.spec.top_k,
                hidden_size=self.spec.hidden,
                moe_intermediate_size=self.spec.inter,
                num_gpu_experts=0,
                cpuinfer_threads=self._config.cpuinfer_threads,
                threadpool_count=self._config.threadpool_count,
                weight_path="",
                chunked_prefill_size=self._config.chunked_prefill_size,
                group_size=self._config.group_size,
                zero_point=self._config.zero_point,
                gguf_type=self._config.gguf_type,
                **self.spec.gate._asdict(),
                method=self.method,
                mode=METHODS[self.method].mode,
            )
        return self._backend

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        lora: LoraSource | None = None,
    ) -> torch.Tensor:
        """hidden [T, H] of any float type, ids [T, k] int, weights [T, k] float -> [T, H] of hidden's type.

        Ids -1 and E mean "not routed here". The backward of a method for inference only is a RuntimeError.
        torch.compile leaves it as it is: graphs end before the experts and go on behind them.
        """
        if self.trainable or not torch.is_grad_enabled():
            return moe_forward(self.backend, hidden_states, top_k_index, top_k_weights, lora)
        leaves = () if lora is None else lora.leaves
        out: torch.Tensor = _InferenceOnly.apply(self, lora, top_k_index, hidden_states, top_k_weights, *leaves)  # type: ignore[no-untyped-call]
        return out

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """The placeholders, for callers that ask this very module (PEFT's ``target_parameters``)."""
        dot = f"{prefix}." if prefix else ""
        for name in self.spec.stacks:
            yield dot + name, getattr(self, name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> KTExperts:
        """``.to()``, ``.half()``, ``.cuda()``: the experts stay where and what they are."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KTExperts:
        """A copied model shares the packed weights: they are immutable."""
        clone = type(self)(self.spec, self._config)
        clone._backend = self._backend
        clone.train(self.training)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "Packed experts cannot be pickled. Save the adapter, which is a plain PEFT one, with save_pretrained(); "
            "the model itself is its checkpoint, which ktmoe.from_pretrained() opens again"
        )

    def extra_repr(self) -> str:
        spec = self.spec
        gate = ", ".join(f"{name}={value}" for name, value in spec.gate._asdict().items() if value)
        return f"{spec.n_experts} experts, hidden={spec.hidden}, inter={spec.inter}, {gate}, method={self.method}"


def _placeholder(*shape: int) -> torch.Tensor:
    """A bf16 tensor of `shape` that holds two bytes. The device is named: models are built on the meta device."""
    return torch.zeros(1, dtype=torch.bfloat16, device="cpu").expand(*shape)


class _InferenceOnly(torch.autograd.Function):
    """The forward of a method without gradients. A backward through it names the method to load instead."""

    @staticmethod
    def forward(ctx: Any, experts: KTExperts, lora: LoraSource | None, ids: torch.Tensor, *tensors: Any) -> Any:
        ctx.experts = experts
        hidden, weights = tensors[:2]
        return moe_forward(experts.backend, hidden, ids, weights, lora)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        method, layer = ctx.experts.method, ctx.experts.spec.layer_idx
        raise RuntimeError(
            f"Method {method} is for inference only and has no gradients (layer {layer}). "
            f"To train, load the model with method='{trainable_twin(method)}'."
        )
