"""ktmoe through its public interface, and the direct extension call beside it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor

import ktmoe
from bench.problem import LORA_ALPHA, LORA_RANK, Gradients, Problem
from ktmoe.capsule import to_dlpack
from ktmoe.lora import LoraTensors


class Ktmoe:
    """variant: a method, with keyword arguments of KTMoEWrapper after a question mark: LLAMAFILE?gguf_type=Q4_K."""

    def __init__(
        self, variant: str, problem: Problem, *, layers: int, threads: int, max_tokens: int, sft: bool
    ) -> None:
        s, self.layers, self.sft = problem.shape, layers, sft
        method, _, query = variant.partition("?")
        options: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in parse_qsl(query)}
        self.wrappers = []
        self.lora: list[Tensor] = []
        for layer in range(layers):
            wrapper = ktmoe.KTMoEWrapper(
                layer, s.experts, s.top_k, s.hidden, s.inter, 0, threads, 1, "", max_tokens,
                method=method, mode="sft" if sft else "inference", lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA,
                **options,
            )  # fmt: skip
            wrapper.load_weights_from_tensors(*problem.weights)
            self.wrappers.append(wrapper)
        self.packed_bytes = self.wrappers[0].layer.packed_bytes
        self.isa = self.wrappers[0].layer.isa

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        wrapper = self.wrappers[layer]
        if self.sft:
            return wrapper.forward_sft(x, ids, mix, save_for_backward=True)
        return wrapper.forward(x, ids, mix)

    def submit(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> None:
        self.wrappers[layer].submit_forward(x, ids, mix)

    def sync(self, layer: int) -> Tensor:
        return self.wrappers[layer].sync_forward()

    def defer(self, count: int) -> None:
        """Needs max_deferred_experts_per_token in the variant."""
        for wrapper in self.wrappers:
            wrapper.max_deferred_experts_per_token = count

    def set_lora(self, lora: list[Tensor]) -> None:
        self.lora = lora
        for wrapper in self.wrappers:
            wrapper.init_lora_weights(*lora)

    def backward(self, grad: Tensor) -> Gradients:
        grad_x, grad_lora = self.wrappers[0].backward(grad)
        return Gradients(grad_x, list(grad_lora.values()))

    def give_buffers(self) -> None:
        """From now on backward writes the LoRA gradients into tensors of ours instead of new ones."""
        for wrapper in self.wrappers:
            wrapper.init_lora_weights(*self.lora, *(torch.empty_like(t) for t in self.lora))

    def direct(self) -> Direct:
        return Direct(self.wrappers[0], self.lora)


class Direct:
    """The calls of the extension under the first layer as the shortest caller would write them: nothing is checked, and
    every result has a tensor that was made once."""

    def __init__(self, wrapper: Any, lora: list[Tensor]) -> None:
        self.layer = wrapper.layer
        self.outs: dict[torch.Size, Tensor] = {}
        self.adapter = None
        if lora:
            tensors = LoraTensors(*lora, wrapper.lora_scaling, wrapper.lora_rank)
            self.adapter = wrapper.mirror.acquire(tensors).adapter
        self.grad_lora = [torch.empty_like(t) for t in lora]

    def _like(self, x: Tensor) -> Tensor:
        if x.shape not in self.outs:
            self.outs[x.shape] = torch.empty_like(x)
        return self.outs[x.shape]

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        out = self._like(x)
        inputs = to_dlpack(x), to_dlpack(ids), to_dlpack(mix), to_dlpack(out)
        if self.adapter is None:
            self.layer.forward(*inputs, None)
        else:
            self.cache = self.layer.forward_train(*inputs, self.adapter)
            self.grad_mix = torch.empty_like(mix)
        return out

    def backward(self, grad: Tensor) -> Gradients:
        grad_x = self._like(grad)
        lora = [to_dlpack(t) for t in self.grad_lora]
        outputs = to_dlpack(grad_x), to_dlpack(self.grad_mix), lora
        self.layer.backward(self.cache, to_dlpack(grad), self.adapter, *outputs)
        del self.cache
        return Gradients(grad_x, self.grad_lora)
