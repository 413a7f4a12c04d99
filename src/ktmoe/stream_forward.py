"""One submitted forward of tensors on a device. Everything is enqueued on one stream; Python never waits."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ext
from .capsule import to_dlpack
from .deferred import Forward
from .staging import Staging, replay_size
from .streams import Stream

if TYPE_CHECKING:
    from .base import BaseMoEWrapper
    from .lora import PackedLora


class Jobs(weakref.WeakKeyDictionary[Staging, dict[Hashable, "_ext.StreamForward"]]):
    """What a layer has made of staging memory: captured graphs run these again, so they live as long as the memory."""


class StreamForward:
    """Copies the inputs to the host, starts the forward when the stream gets there, and copies the result back."""

    def __init__(
        self,
        wrapper: BaseMoEWrapper,
        jobs: Jobs,
        stream: Stream,
        inputs: tuple[Tensor, Tensor, Tensor],
        packed: PackedLora | None,
        protected_k: int,
        earlier: Forward | None,
    ) -> None:
        hidden = inputs[0]
        self.layer_idx, self.n_tokens, self.shape = wrapper.layer_idx, hidden.shape[0], hidden.shape
        self.place: object = place_of(stream)
        queue = wrapper.cpu_infer.queue  # or an error, before anything is enqueued
        self.job: _ext.StreamForward | None = None
        self.later: Tensor | None = None
        self._stream, self._engine, self._earlier = stream, wrapper.cpu_infer, earlier
        if not self.n_tokens:
            self._empty = torch.empty_like(hidden)
            return
        self._staging = staging = self._engine.staging.take(stream, inputs)
        self._uses = 1
        if protected_k < wrapper.num_experts_per_tok:
            self.later = staging.later
            self._uses = 2
        try:
            self.job = self._job_of(wrapper, queue, jobs, packed, protected_k)
            for host, tensor in zip(staging.inputs, inputs, strict=True):
                stream.to_host(host, tensor)
            self.job.start(stream.handle)
        except BaseException:
            self._engine.staging.give_back(staging)
            raise

    @property
    def handle(self) -> int:
        """Of the stream."""
        return self._stream.handle

    def _job_of(
        self,
        wrapper: BaseMoEWrapper,
        queue: _ext.TaskQueue,
        jobs: Jobs,
        packed: PackedLora | None,
        protected_k: int,
    ) -> _ext.StreamForward:
        """The engine's side of it. Made once for everything that differs: what runs in graphs must not change.

        That holds for LoRA too: a graph keeps the packed copy that it was captured with.
        """
        staging, capturing = self._staging, self._stream.capturing
        earlier = None if self._earlier is None else self._earlier.job
        made = jobs.setdefault(staging, {})
        key = (wrapper.layer, earlier, packed, protected_k, capturing)
        if key not in made:
            n_tokens = replay_size(staging.rows) if capturing else staging.n_tokens
            arrays = [to_dlpack(t) for t in (n_tokens, *staging.inputs, staging.out)]
            later = None if self.later is None else to_dlpack(self.later)
            life = "captured" if capturing else "kept" if staging.persistent else "once"
            name = f"layer {wrapper.layer_idx}, on a CUDA stream"
            errors, layer = self._engine.stream_errors, wrapper.layer
            lora = None if packed is None else packed.adapter
            made[key] = _ext.StreamForward(queue, errors, name, layer, arrays, lora, protected_k, later, earlier, life)
        return made[key]

    def result(self) -> Tensor:
        """Enqueues the wait for the result and its copy to the device: bf16 [n_tokens, hidden], on the stream."""
        if self.job is None:
            return self._empty
        try:
            with self._stream.use():
                self.job.wait(self.handle)
                return self._stream.to_device(self._staging.out)
        finally:
            self._done()

    def abandon(self) -> None:
        """Nobody will ask for the result. What it has deferred is dropped on its own."""
        if self.job is not None:
            self._settle()
            self._done()

    def deferred_result(self) -> Tensor:
        """As `result`, of the deferred experts."""
        assert self.job is not None
        try:
            with self._stream.use():
                self.job.wait_later(self.handle)
                return self._stream.to_device(self._staging.later)
        finally:
            self._unuse()

    def drop_deferred(self) -> None:
        """Nobody will ask for them: the memory is free when they have run."""
        self._settle()
        self._unuse()

    def _settle(self) -> None:
        assert self.job is not None
        with self._stream.use():
            self.job.settle(self.handle)

    def _done(self) -> None:
        """The result is on its way, and with it what the layer before had deferred."""
        self._unuse()
        if isinstance(self._earlier, StreamForward):
            self._earlier._unuse()
        self._earlier = None  # or every layer of a pass would keep those before it

    def _unuse(self) -> None:
        """One of the two parts no longer needs the memory."""
        self._uses -= 1
        if self._uses == 0:
            self._engine.staging.give_back(self._staging)


def place_of(stream: Stream) -> object:
    """What a forward captures stays in its graph: it has nothing to do with forwards that run now."""
    return stream.key, stream.capturing
