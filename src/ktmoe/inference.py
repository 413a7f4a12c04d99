"""Wrappers for inference. The classes differ in the method strings that they serve, not in how they run."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from . import _ext
from .base import BaseMoEWrapper
from .capsule import to_dlpack
from .config import MoEConfig
from .deferred import select_deferred_experts
from .methods import Method
from .runtime import reset_after_fork

_TicketAndResult = tuple["_ext.Ticket | None", Tensor]


class InferenceMoEWrapper(BaseMoEWrapper):
    """forward, and submit/sync, of one layer. All methods may be called from any thread."""

    def __init__(self, config: MoEConfig, method: Method) -> None:
        super().__init__(config, method)
        self._pending: deque[_TicketAndResult] = deque()
        reset_after_fork(self)

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream: int | None = None
    ) -> Tensor:
        """The weighted sum of the routed experts: bf16, shaped like hidden_states. Keeps no graph.

        hidden_states: bf16 [..., hidden]. topk_ids: int32 or int64 [..., top_k]; -1 and num_experts mean "not routed
        here". topk_weights: fp32 or bf16 [..., top_k]. cuda_stream is not used with CPU tensors.
        More tokens than chunked_prefill_size are processed in chunks.
        RuntimeError before load_weights; TypeError for a dtype or device, ValueError for a shape or an expert id.
        """
        hidden, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
        out = self._forward(hidden, ids, weights)
        return out if hidden is hidden_states else out.view(hidden_states.shape)

    def submit_forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        cuda_stream: int | None = None,
        *,
        block: bool = True,
    ) -> None:
        """Starts a forward and returns. The inputs are copied: the caller may overwrite them at once.

        Arguments and errors as in `forward`, but an invalid expert id is reported by `sync_forward`. The queue of an
        engine is bounded (`CPUInfer.queue_capacity`): where it is full, this waits for room, or raises RuntimeError
        with block=False. RuntimeError after `cpu_infer.close()`.
        """
        hidden, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        ticket = None
        if hidden.shape[0]:
            ticket = self.cpu_infer.queue.submit_forward(
                self.layer, to_dlpack(hidden), to_dlpack(ids), to_dlpack(weights), to_dlpack(out), None, block
            )
        self._pending.append((ticket, out.view(hidden_states.shape)))

    def sync_forward(self, hidden_states: Tensor | None = None, cuda_stream: int | None = None) -> Tensor:
        """Waits for the oldest submitted forward of this layer and returns its result, a tensor of its own.

        hidden_states is accepted for the sake of clients and not used. RuntimeError if nothing was submitted;
        raises what the forward raised.
        """
        try:
            ticket, out = self._pending.popleft()
        except IndexError:
            raise RuntimeError("No submitted forward. Call submit_forward(...) before sync_forward()") from None
        if ticket is not None:
            ticket.wait()
        return out

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
