"""Wrappers for inference. The classes differ in the method strings that they serve, not in how they run."""

from __future__ import annotations

from collections import deque
from types import EllipsisType

import torch
from torch import Tensor

from . import _ext
from .adapters import Adapters
from .base import BaseMoEWrapper
from .capsule import to_dlpack
from .config import MoEConfig
from .deferred import Forward, select_deferred_experts
from .errors import weights_not_loaded
from .lora import PackedLora
from .methods import Method
from .runtime import reset_after_fork
from .stream_forward import Jobs, StreamForward, place_of
from .streams import Stream, of_parent, stream_of


class InferenceMoEWrapper(BaseMoEWrapper):
    """forward, and submit/sync, of one layer. All methods may be called from any thread."""

    def __init__(self, config: MoEConfig, method: Method) -> None:
        super().__init__(config, method)
        self._adapters = Adapters(self._new_mirror)
        self._pending: deque[QueuedForward | StreamForward] = deque()
        self._jobs: Jobs = Jobs()
        self._jobs_of: _ext.MoeLayer = self.layer
        # What a layer defers goes into the next layer of the same model. Nothing names a model but its files and width.
        self._chain = self.cpu_infer.chain((config.weight_path, config.hidden_size))
        self._chain.add(self)
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
        here". topk_weights: fp32 or bf16 [..., top_k]. All on the CPU or on one CUDA device; the result is there too.
        cuda_stream: for CUDA tensors, the stream (CUstream as an integer) that has made them and goes on with the
        result, None: the current one; not used with CPU tensors. Nothing waits for the stream: see `submit_forward`.
        adapter: the LoRA adapter of this call; None: none; left out: the active one (see `add_adapter`).
        More tokens than chunked_prefill_size are processed in chunks.
        RuntimeError before load_weights; TypeError for a dtype or device, ValueError for a shape or an expert id.
        Where layers of the model defer experts, this is `submit_forward` and its `sync_forward`.
        """
        stream = stream_of(hidden_states, cuda_stream)
        if stream is not None:
            started = self._start_on(stream, hidden_states, topk_ids, topk_weights, self._packed_adapter(adapter))
            return self._finish(started).view(hidden_states.shape)
        hidden, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
        packed = self._packed_adapter(adapter)
        if self._chain.defers:
            out = self._start(hidden, ids, weights, packed, block=True).result()
        else:
            out = self._forward(hidden, ids, weights, packed)
        return out if hidden is hidden_states else out.view(hidden_states.shape)

    def submit_forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        cuda_stream: int | None = None,
        *,
        adapter: str | EllipsisType | None = ...,
        block: bool = True,
    ) -> None:
        """Starts a forward and returns. The inputs are copied: the caller may overwrite them at once.

        Arguments and errors as in `forward`, but an invalid expert id is reported by `sync_forward`. The queue of an
        engine is bounded (`CPUInfer.queue_capacity`): where it is full, this waits for room, or raises RuntimeError
        with block=False. RuntimeError after `cpu_infer.close()`.

        With max_deferred_experts_per_token > 0 the result has only the immediate experts of
        `select_deferred_experts(topk_ids, topk_weights, top_k - max_deferred_experts_per_token)` in it, and what the
        layer before has deferred; the others run behind it in the queue, and are in the result of the next layer of
        the same model that is submitted, that is, the next higher layer_idx in this pass, for as many tokens, in the
        same thread. Layers belong to one model if they share the engine, weight_path and hidden_size. The layer with
        the highest layer_idx of those that exist defers nothing. `flush_deferred` is for a pass that ends earlier.

        CUDA tensors: everything is enqueued on the stream, and the forward begins when the stream gets there (it is the
        stream that waits for room). In a stream that is being captured all of it becomes part of the graph; the batch
        size must then be one of `KTMoEWrapper.set_capture_batch_sizes`. An error of such a forward makes its result NaN
        and is raised by the next `sync_forward` of any layer of the engine.
        """
        forward: QueuedForward | StreamForward
        packed = self._packed_adapter(adapter)
        stream = stream_of(hidden_states, cuda_stream)
        if stream is not None:
            forward = self._start_on(stream, hidden_states, topk_ids, topk_weights, packed)
        else:
            hidden, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
            forward = self._start(hidden, ids, weights, packed, block)
        forward.shape = hidden_states.shape
        self._pending.append(forward)

    def sync_forward(self, hidden_states: Tensor | None = None, cuda_stream: int | None = None) -> Tensor:
        """Waits for the oldest submitted forward of this layer and returns its result, a tensor of its own.

        hidden_states is accepted for the sake of clients and not used. CUDA tensors: the stream waits, not the caller;
        cuda_stream is that of submit_forward (ValueError otherwise) or None.
        RuntimeError if nothing was submitted; raises what the forward raised.
        """
        try:
            forward = self._pending[0]
            if cuda_stream is not None and forward.place is not None and cuda_stream != forward.handle:
                raise ValueError(f"cuda_stream: got {cuda_stream}, expected {forward.handle} as in submit_forward")
            forward = self._pending.popleft()
        except IndexError:
            raise RuntimeError("No submitted forward. Call submit_forward(...) before sync_forward()") from None
        return self._finish(forward).view(forward.shape)

    def discard_submitted(self) -> None:
        """Forgets the submitted forwards of this layer that nobody will sync: for a pass that was given up.

        What is in the queue still runs. What they have deferred is dropped when the next pass begins.
        """
        while self._pending:
            self._pending.popleft().abandon()

    def flush_deferred(self) -> Tensor | None:
        """What this thread's pass has deferred and no layer has picked up: bf16 [n_tokens, hidden], or None.

        For a pass that ends before the last layer: add it to the output. May be called on any layer of the model.
        """
        left = self._chain.flush()
        return None if left is None else left.deferred_result()

    def select_deferred_experts(self, expert_ids: Tensor, scores: Tensor, protected_k: int) -> tuple[Tensor, Tensor]:
        """(immediate_ids, deferred_ids): see `ktmoe.deferred.select_deferred_experts`."""
        return select_deferred_experts(expert_ids, scores, protected_k)

    def _start(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, packed: PackedLora | None, block: bool
    ) -> QueuedForward:
        """Submits inputs from `_inputs`, and what belongs to the layers around."""
        chain, n_tokens = self._chain, hidden.shape[0]
        earlier = chain.left_for(self.layer_idx, n_tokens, None) if chain.defers else None
        forward = QueuedForward(self, (hidden, ids, weights), packed, self._protected_k(), earlier, block)
        if chain.defers:
            chain.leave(forward if forward.later is not None else None, earlier)
        return forward

    def _start_on(
        self, stream: Stream, hidden: Tensor, ids: Tensor, weights: Tensor, packed: PackedLora | None
    ) -> StreamForward:
        """The same on a stream."""
        if not self.layer.loaded:
            raise weights_not_loaded(self.layer_idx)
        if self._jobs_of is not self.layer:  # it was loaded again: nothing may keep the old weights
            self._jobs, self._jobs_of = Jobs(), self.layer
        chain = self._chain
        with stream.use():
            inputs = self._unusual_inputs(hidden, ids, weights, hidden.device)
            earlier = chain.left_for(self.layer_idx, inputs[0].shape[0], place_of(stream))
            forward = StreamForward(self, self._jobs, stream, inputs, packed, self._protected_k(), earlier)
        chain.leave(forward if forward.later is not None else None, earlier)
        return forward

    def _finish(self, forward: QueuedForward | StreamForward) -> Tensor:
        """Its result. An error of an earlier one on a stream is raised when this one is on its way."""
        if forward.place is None:
            return forward.result()
        error: Exception | None = None
        try:
            self.cpu_infer.raise_stream_error()
        except Exception as found:
            error = found
        out = forward.result()
        if error is not None:
            raise error
        return out

    def _protected_k(self) -> int:
        """Entries of a token that must not be deferred; top_k: nothing is."""
        top_k, deferred = self.num_experts_per_tok, self.max_deferred_experts_per_token
        if not deferred or self._chain.is_last(self.layer_idx):
            return top_k
        return max(0, top_k - deferred)

    def _after_fork(self) -> None:
        # The results belong to the parent's queue; nobody would ever write them here.
        of_parent.append((self._pending, self._jobs))
        self._pending, self._jobs = deque(), Jobs()


class QueuedForward:
    """A submitted forward of CPU tensors."""

    place: object = None
    handle = 0

    def __init__(
        self,
        wrapper: InferenceMoEWrapper,
        inputs: tuple[Tensor, Tensor, Tensor],
        packed: PackedLora | None,
        protected_k: int,
        earlier: Forward | None,
        block: bool,
    ) -> None:
        hidden, ids, weights = inputs
        # Held, so that changed LoRA tensors do not go into the copy that the queue computes with.
        self._packed = packed
        lora = None if packed is None else packed.adapter
        self.layer_idx, self.n_tokens = wrapper.layer_idx, hidden.shape[0]
        self.shape = hidden.shape
        self.out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self.later: Tensor | None = None
        self.job: _ext.ForwardJob | None = None
        self.ticket: _ext.Ticket | None = None
        if not self.n_tokens:
            return
        queue = wrapper.cpu_infer.queue
        layer, top_k = wrapper.layer, wrapper.num_experts_per_tok
        x, i, w, out = to_dlpack(hidden), to_dlpack(ids), to_dlpack(weights), to_dlpack(self.out)
        if protected_k == top_k and earlier is None:
            self.ticket = queue.submit_forward(layer, x, i, w, out, lora, block)
            return
        if protected_k < top_k:
            self.later = torch.empty_like(self.out)
        later = None if self.later is None else to_dlpack(self.later)
        added = None if earlier is None else earlier.job
        self.job = _ext.ForwardJob(layer, x, i, w, out, lora, protected_k, later, added)
        self.ticket = queue.submit(self.job, block)
        if later is not None:
            self.later_ticket = queue.submit_later(self.job)

    def result(self) -> Tensor:
        """Waits for it: bf16 [n_tokens, hidden]. Raises what the forward raised."""
        if self.ticket is not None:
            self.ticket.wait()
        return self.out

    def deferred_result(self) -> Tensor:
        """Waits for the deferred experts: bf16 [n_tokens, hidden]."""
        assert self.later is not None
        self.later_ticket.wait()
        return self.later

    def drop_deferred(self) -> None:
        """The queue finishes it and lets it go."""

    def abandon(self) -> None:
        """The same."""


class AMXMoEWrapper(InferenceMoEWrapper):
    """AMXINT4, AMXINT8: quantised while loading."""


class NativeMoEWrapper(InferenceMoEWrapper):
    """RAWINT4, FP8, BF16: the precision of the files."""


class LlamafileMoEWrapper(InferenceMoEWrapper):
    """LLAMAFILE: GGUF files."""


class GeneralMoEWrapper(InferenceMoEWrapper):
    """MOE_INT4, MOE_INT8: as AMXMoEWrapper, on kernels that need no AMX."""
