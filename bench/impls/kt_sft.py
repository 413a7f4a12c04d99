"""kt-kernel's LoRA fine-tuning, through its C++ bindings: one layer, one forward that waits for its backward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.impls.kt import Kt
from bench.problem import LORA_ALPHA, LORA_RANK, Gradients, Problem

NO_LIMIT = 1e4
"""Of the clamp before the activation, which MXFP4 always has: far from any value here."""
PUBLISHED = {"AMXINT4_KGroup_SFT": "RAWINT4", "FP8_SFT": "FP8", "MXFP4_SFT": "MXFP4"}
"""Variants that take published weights, by the format's name in `kt`. The others quantise bf16 themselves."""


class KtSft(Kt):
    """LoRA matrices and their gradients are bf16 here; the gradients go into buffers."""

    # All but the last are for AMX: elsewhere the package does not have them.
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "AMXBF16_SFT": ("AMXBF16_SFT_MOE",),
        "AMXINT8_SFT": ("AMXInt8_SFT_MOE",),
        "AMXINT4_SFT": ("AMXInt4_SFT_MOE",),
        "AMXINT4_KGroup_SFT": ("AMXInt4_KGroup_SFT_MOE",),
        "FP8_SFT": ("AMXFP8_SFT_MOE",),
        "MXFP4_SFT": ("MXFP4_SFT_MOE",),
    }

    def __init__(self, variant: str, problem: Problem, **options: Any) -> None:
        super().__init__(variant, problem, **options)
        if variant == "MXFP4_SFT":
            self.source.clear()  # copied by now; nothing says so of the others

    def _config(self) -> Any:
        s = self.problem.shape
        config = self.ext.moe.MOESFTConfig(s.experts, s.top_k, s.hidden, s.inter)
        config.max_len, config.pool = self.max_tokens, self.cpu.backend_
        config.lora_rank, config.lora_alpha, config.max_cache_depth = LORA_RANK, LORA_ALPHA, 1
        config.physical_to_logical_map = self.identity.data_ptr()
        return config

    def _fill(self, config: Any, variant: str) -> list[Tensor]:
        if variant not in PUBLISHED:
            return self._point_at_bf16(config)
        # As its own front end sets them up: FP8 has no second copy for backward, MXFP4 always clamps.
        config.share_backward_bb = variant == "FP8_SFT"
        if variant == "MXFP4_SFT":
            config.swiglu_limit = NO_LIMIT
        return self._point_at_published(config, PUBLISHED[variant])

    def _load(self, config: Any, layer: int) -> Any:
        config.layer_idx = layer
        moe = self.cls(config)
        self._run(moe.load_weights_task())
        return moe

    def set_lora(self, lora: list[Tensor]) -> None:
        self.lora = [t.bfloat16() for t in lora]
        self.grads = [torch.zeros_like(t) for t in self.lora]
        self.grad_x = torch.empty_like(self.out)
        self.grad_mix = torch.empty(self.max_tokens, self.problem.shape.top_k)
        self._run(self.moes[0].update_lora_weights_task(*_addresses(self.lora)))

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        self.count[0] = len(x)
        self.inputs = x, ids, mix  # backward reads them
        pointers = _addresses([ids, mix, x, self.out])
        self._run(self.moes[layer].forward_sft_task(self.count.data_ptr(), ids.shape[1], *pointers, True))
        return self.out[: len(x)]

    def backward(self, grad: Tensor) -> Gradients:
        pointers = _addresses([grad, self.grad_x, *self.grads, self.grad_mix])
        self._run(self.moes[0].backward_task(*pointers, 0, 0, 0))  # no gradients of the base weights
        return Gradients(self.grad_x[: len(grad)], self.grads)


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
