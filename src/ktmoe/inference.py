"""Wrappers for inference. The classes differ in the method strings that they serve, not in how they run."""

from __future__ import annotations

from collections import deque
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ext
from .adapters import Adapters
from .base import BaseMoEWrapper
from .capsule import to_dlpack
from .config import MoEConfig
from .deferred import select_deferred_experts
from .lora import PackedLora
from .methods import Method
from .runtime import reset_after_fork


class _Pending(NamedTuple):
    ticket: _ext.Ticket | None
    out: Tensor
    lora: PackedLora | None
    """Held, so that changed LoRA tensors do not go into the copy that the queue computes with."""


class InferenceMoEWrapper(BaseMoEWrapper):
    """forward, and submit/sync, of one layer. All methods may be called from any thread."""

    def __init__(self, config: MoEConfig, method: Method) -> None:
        super().__init__(config, method)
        self._pending: deque[_Pending] = deque()
        self._adapters = Adapters(self._new_mirror)
        reset_after_fork(self)

    # --- LoRA adapters --------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        name: str,
        gate_lora_a: Tensor | None,
        gate_lora_b: Tensor | None,
        up_lora_a: Tensor,
        up_lora_b: Tensor,
        down_lora_a: Tensor,
        down_lora_b: Tensor,
        *,
        lora_alpha: float = 32.0,
        use_rslora: bool = False,
    ) -> None:
        """Adds (or replaces) a LoRA adapter, which is computed beside the experts and never merged into them.

        Tensors as in `AMXSFTMoEWrapper.init_lora_weights`, of any rank: they stay the caller's, and changed values are
        noticed by the next forward. The term is scaled by lora_alpha / rank, with use_rslora lora_alpha / sqrt(rank).
        The first adapter becomes the active one. TypeError or ValueError; what was there before then stays.
        """
        tensors = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        first = not self._adapters.names
        self._adapters.add(name, tensors, lora_alpha, use_rslora)
        if first:
            self._adapters.choose(name)

    def set_adapter(self, name: str | None) -> None:
        """Chooses the adapter of calls that do not name one; None: the base experts. ValueError if there is none."""
        self._adapters.choose(name)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; if it was the active one, the base experts answer. ValueError if there is none."""
        self._adapters.delete(name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were added."""
        return self._adapters.names

    @property
    def active_adapter(self) -> str | None:
        """The adapter of calls that do not name one."""
        return self._adapters.active

    def _packed_adapter(self, name: str | EllipsisType | None) -> PackedLora | None:
        chosen = self._adapters.active if isinstance(name, EllipsisType) else name
        return self._adapters.packed(chosen)

    # --- forward --------------------------------------------------------------------------------------------------
    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        cuda_stream: int | None = None,
        *,
        adapter: str | EllipsisType | None = ...,
    ) -> Tensor:
        """The weighted sum of the routed experts: bf16, shaped like hidden_states. Keeps no graph.

        hidden_states: bf16 [..., hidden]. topk_ids: int32 or int64 [..., top_k]; -1 and num_experts mean "not routed
        here". topk_weights: fp32 or bf16 [..., top_k]. cuda_stream is not used with CPU tensors.
        adapter: the LoRA adapter of this call; None: none; left out: the active one (see `add_adapter`).
        More tokens than chunked_prefill_size are processed in chunks.
        RuntimeError before load_weights; TypeError for a dtype or device, ValueError for a shape or an expert id.
        """
        hidden, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
        out = self._forward(hidden, ids, weights, self._packed_adapter(adapter))
        return out if hidden is hidden_states else out.view(hidden_states.shape)

    def submit_forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        cuda_stream: int | None = None,
        *,
        adapter: str | EllipsisType | None = ...,
    ) -> None:
        """Starts a forward and returns. The inputs are copied: the caller may overwrite them at once.

        Arguments and errors as in `forward`, but an invalid expert id is reported by `sync_forward`.
        """
        hidden, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        packed = self._packed_adapter(adapter)
        ticket = None
        if hidden.shape[0]:
            ticket = self.cpu_infer.queue.submit_forward(
                self.layer,
                to_dlpack(hidden),
                to_dlpack(ids),
                to_dlpack(weights),
                to_dlpack(out),
                packed.adapter if packed is not None else None,
            )
        self._pending.append(_Pending(ticket, out.view(hidden_states.shape), packed))

    def sync_forward(self, hidden_states: Tensor | None = None, cuda_stream: int | None = None) -> Tensor:
        """Waits for the oldest submitted forward of this layer and returns its result, a tensor of its own.

        hidden_states is accepted for the sake of clients and not used. RuntimeError if nothing was submitted;
        raises what the forward raised.
        """
        try:
            pending = self._pending.popleft()
        except IndexError:
            raise RuntimeError("No submitted forward. Call submit_forward(...) before sync_forward()") from None
        if pending.ticket is not None:
            pending.ticket.wait()
        return pending.out

    def select_deferred_experts(self, expert_ids: Tensor, scores: Tensor, protected_k: int) -> tuple[Tensor, Tensor]:
        """(immediate_ids, deferred_ids): see `ktmoe.deferred.select_deferred_experts`."""
        return select_deferred_experts(expert_ids, scores, protected_k)

    def _after_fork(self) -> None:
        # The results belong to the parent's queue; nobody would ever write them here.
        self._pending = deque()


class AMXMoEWrapper(InferenceMoEWrapper):
    """AMXINT4, AMXINT8: quantised while loading."""


class NativeMoEWrapper(InferenceMoEWrapper):
    """RAWINT4, FP8, BF16: the precision of the files."""


class LlamafileMoEWrapper(InferenceMoEWrapper):
    """LLAMAFILE: GGUF files."""


class GeneralMoEWrapper(InferenceMoEWrapper):
    """MOE_INT4, MOE_INT8: as AMXMoEWrapper, on kernels that need no AMX."""
