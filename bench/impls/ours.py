"""ktmoe through its public interface, and the direct extension call beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor

import ktmoe
from bench.problem import LORA_ALPHA, LORA_RANK, Gradients, Problem
from ktmoe.capsule import to_dlpack


class Ktmoe:
    """variant: a method, with keyword arguments of KTMoEWrapper after a question mark: LLAMAFILE?gguf_type=Q4_K."""

    def __init__(
        self, variant: str, problem: Problem, *, layers: int, threads: int, max_tokens: int, sft: bool
    ) -> None:
        s, self.layers, self.sft = problem.shape, layers, sft
        method, _, query = variant.partition("?")
        options: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in parse_qsl(query)}
        self.wrappers = []
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

    def set_lora(self, lora: list[Tensor]) -> None:
        for wrapper in self.wrappers:
            wrapper.init_lora_weights(*lora)

    def backward(self, grad: Tensor) -> Gradients:
        grad_x, grad_lora = self.wrappers[0].backward(grad)
        return Gradients(grad_x, list(grad_lora.values()))

    def direct(self) -> Callable[[Tensor, Tensor, Tensor], None]:
        """The extension's forward of layer 0 as the shortest caller would write it: nothing checked, one output."""
        call = self.wrappers[0].layer.forward
        outs: dict[torch.Size, Tensor] = {}

        def run(x: Tensor, ids: Tensor, mix: Tensor) -> None:
            out = outs.get(x.shape)
            if out is None:
                out = outs[x.shape] = torch.empty_like(x)
            call(to_dlpack(x), to_dlpack(ids), to_dlpack(mix), to_dlpack(out), None)

        return run
