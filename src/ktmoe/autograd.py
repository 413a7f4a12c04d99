"""The differentiable forward of a layer: a pure function of hidden states, routing weights and LoRA tensors."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .base import BaseMoEWrapper
from .errors import weights_not_loaded
from .lora import LoraSource, LoraTensors
from .train import Dropout, SavedForward, run_backward, run_forward

__all__ = ["LoraTensors", "moe_forward"]


def moe_forward(
    wrapper: BaseMoEWrapper,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: LoraSource | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The output of the layer, with gradients for `hidden`, `weights` and the LoRA tensors.

    hidden: bf16, fp16 or fp32 [..., hidden]; the layer computes in bf16, output and gradient have hidden's dtype.
    ids: int32 or int64 [..., top_k]; -1 and num_experts mean "not routed here". weights: floating point [..., top_k].
    lora: `LoraTensors`, or tensors of another layout (`ktmoe.lora.LoraSource`). None = the base experts alone, also for
    a wrapper that has LoRA weights of its own.

    dropout: elements of the input of each LoRA A are dropped with this probability, as `torch.nn.Dropout` would: pass 0
    for evaluation. Masks follow torch's CPU generator.
    Inputs and LoRA tensors may be on other devices: the experts compute on the CPU, results and gradients come back.
    Works with a wrapper of either mode. Keeps nothing where no gradient is needed; otherwise what backward needs is
    freed with the graph, and under activation checkpointing at once. Any number of forwards may wait for a backward,
    in any order. Changes of the LoRA tensors between forward and backward do not disturb the backward.
    Errors as in `InferenceMoEWrapper.forward`. torch.compile cannot look into it, or into any call of a wrapper: in
    modules of your own that are compiled, call it through `torch.compiler.disable` (models of `from_pretrained` do).
    """
    device = hidden.device
    hidden, ids, weights = (t if t.is_cpu else t.to("cpu") for t in (hidden, ids, weights))
    drop = Dropout.draw(dropout if lora is not None else 0.0)
    if torch.is_grad_enabled() and (
        hidden.requires_grad
        or weights.requires_grad
        or (lora is not None and any(t.requires_grad for t in lora.leaves))
    ):
        leaves = lora.leaves if lora is not None else ()
        out: Tensor = _MoEFunction.apply(wrapper, lora, drop, ids, hidden, weights, *leaves)  # type: ignore[no-untyped-call]
    else:
        rows, flat_ids, flat_weights = wrapper._inputs(_narrow(hidden), ids, _widen(weights))
        packed = wrapper.mirror.acquire(lora.matrices) if lora is not None else None
        out = wrapper._forward(rows, flat_ids, flat_weights, packed, drop).view(hidden.shape)
    return out.to(device, hidden.dtype)


def _narrow(hidden: Tensor) -> Tensor:
    return hidden.to(torch.bfloat16) if hidden.dtype in (torch.float16, torch.float32) else hidden


def _widen(weights: Tensor) -> Tensor:
    return weights.to(torch.float32) if weights.dtype is torch.float16 else weights


class _Holder(bytearray):
    """Eight bytes that own a saved forward: the memory behind the tensor that `_hold` makes."""

    saved: SavedForward


_numbers = itertools.count(1)
_holders: weakref.WeakValueDictionary[int, _Holder] = weakref.WeakValueDictionary()


def _hold(saved: SavedForward) -> Tensor:
    """A tensor that keeps `saved` alive.

    Activation checkpointing decides about *tensors*: it drops those saved by the first forward and takes those of the
    recomputed one. What is attached to ctx in any other way would stay in memory for the whole forward pass. So the
    saved forward lives exactly as long as the storage of this tensor, whatever torch.Tensor object wraps it.
    """
    number = next(_numbers)
    holder = _Holder(number.to_bytes(8, "little"))
    holder.saved = saved
    _holders[number] = holder
    return torch.frombuffer(holder, dtype=torch.int64)


def _held(tensor: Tensor) -> SavedForward:
    holder = _holders.get(int(tensor))
    if holder is None:
        raise RuntimeError(
            "The saved forward of a MoE layer is gone: a saved-tensors hook replaced the tensor that owns it by a "
            "copy. Let such hooks pass on CPU tensors unchanged"
        )
    return holder.saved


class _MoEFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        wrapper: BaseMoEWrapper,
        lora: LoraSource | None,
        dropout: Dropout,
        ids: Tensor,
        hidden: Tensor,
        weights: Tensor,
        *leaves: Any,  # of `lora`
    ) -> Tensor:
        rows, flat_ids, flat_weights = wrapper._inputs(_narrow(hidden), ids, _widen(weights))
        packed = wrapper.mirror.acquire(lora.matrices) if lora is not None else None
        out, saved = run_forward(wrapper.layer, rows, flat_ids, flat_weights, packed, dropout)
        ctx.save_for_backward(_hold(saved))
        ctx.set_materialize_grads(False)
        ctx.wrapper = wrapper
        ctx.lora = lora
        ctx.hidden_dtype, ctx.weights_shape, ctx.weights_dtype = hidden.dtype, weights.shape, weights.dtype
        ctx.leaf_kinds = [(t.device, t.dtype) for t in leaves]
        return out.view(hidden.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        if grad_out is None or not any(need):
            return (None,) * len(need)
        wrapper: BaseMoEWrapper = ctx.wrapper
        if not wrapper.layer.loaded:
            raise weights_not_loaded(wrapper.layer_idx)
        (holder,) = ctx.saved_tensors  # once: checkpointing recomputes on access
        lora = None
        if any(need[6:]):
            lora = ctx.lora.new_gradients(wrapper.num_experts, wrapper.hidden_size, wrapper.moe_intermediate_size)
        grads = run_backward(
            wrapper.layer,
            _held(holder),
            grad_out.reshape(-1, wrapper.hidden_size),
            # Rounded once: to the dtype that the caller computes in.
            hidden_dtype=(torch.bfloat16 if ctx.hidden_dtype is torch.bfloat16 else torch.float32) if need[4] else None,
            top_k=wrapper.num_experts_per_tok if need[5] else None,
            lora=None if lora is None else lora.targets,
        )
        of_leaves = [None] * len(need[6:]) if lora is None else lora.of_leaves()
        return (
            *(None,) * 4,
            None if grads.hidden is None else grads.hidden.view(grad_out.shape).to(ctx.hidden_dtype),
            None if grads.weights is None else grads.weights.view(ctx.weights_shape).to(ctx.weights_dtype),
            *(
                grad.to(*kind) if grad is not None and needed else None
                for grad, needed, kind in zip(of_leaves, need[6:], ctx.leaf_kinds, strict=True)
            ),
        )
