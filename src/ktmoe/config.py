"""Validated parameters of a layer. Every check on what a user passes to `KTMoEWrapper` is here.

Messages name the argument, what it got and what is expected. TypeError for a wrong type, ValueError for a wrong value.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_DIM = 65_536
"""Bound on hidden and inter: an int32 sum of 65,536 products u8*s8 cannot overflow."""
MAX_EXPERTS = 65_536
MAX_RANK = 4_096
GROUP_SIZES = (32, 64, 128)
GGUF_TYPES = ("Q4_K", "Q8_0", "Q4_0", "MXFP4")
ACTIVATIONS = ("silu", "gelu_tanh", "relu2")
_MAX_COUNT = 2**31 - 1


def _integer(name: str, value: Any, low: int, high: int = _MAX_COUNT) -> int:
    # bool is an int to Python, but never what somebody meant by a count.
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an integer")
    number = operator.index(value)
    if not low <= number <= high:
        expected = f"at least {low}" if high == _MAX_COUNT else f"{low}..{high}"
        raise ValueError(f"{name}: got {number}, expected {expected}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, expected a finite number")
    return number


def _bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a bool")


def check_format_options(group_size: Any, zero_point: Any, gguf_type: Any) -> None:
    """What weights in floats become where the method leaves a choice."""
    if _integer("group_size", group_size, 1) not in GROUP_SIZES:
        raise ValueError(f"group_size: got {group_size}, expected 32, 64 or 128")
    _bool("zero_point", zero_point)
    if gguf_type not in GGUF_TYPES:
        raise ValueError(f"gguf_type: got {gguf_type!r}, expected {', '.join(GGUF_TYPES)}")


def _mask(value: Any, num_experts: int) -> Tensor:
    """The mask, bool [num_experts], contiguous on the CPU: the caller's own memory where it is that already."""
    mask = torch.as_tensor(value, device="cpu")
    if mask.dtype is not torch.bool:
        raise TypeError(f"gpu_experts_mask: got dtype {mask.dtype}, expected torch.bool")
    if tuple(mask.shape) != (num_experts,):
        raise ValueError(f"gpu_experts_mask: got shape {tuple(mask.shape)}, expected ({num_experts},)")
    return mask.detach().contiguous()


@dataclass(frozen=True, eq=False)
class MoEConfig:
    """One MoE layer: its shape, where its weights come from, and what runs it. See `KTMoEWrapper` for the meanings.

    After construction `gpu_experts_mask` is always a bool tensor [num_experts] and `num_gpu_experts` its sum then.
    """

    layer_idx: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    num_gpu_experts: int = 0
    cpuinfer_threads: int | None = None
    threadpool_count: int | None = None
    weight_path: str = ""
    chunked_prefill_size: int = 8192
    cpu_save: bool = False
    max_deferred_experts_per_token: int | None = None
    gpu_experts_mask: Tensor = field(default=None)  # type: ignore[assignment]  # filled in __post_init__
    numa_nodes: Sequence[int] | None = None
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 0.0
    group_size: int = 32
    zero_point: bool = False
    gguf_type: str = "Q4_K"
    activation: str = "silu"
    check_finite: bool = False

    @property
    def gated(self) -> bool:
        """False: the experts have no gate, h comes from up alone."""
        return self.activation != "relu2"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        def check(name: str, low: int, high: int = _MAX_COUNT) -> int:
            value = _integer(name, getattr(self, name), low, high)
            put(name, value)
            return value

        check("layer_idx", 0)
        experts = check("num_experts", 1, MAX_EXPERTS)
        check("num_experts_per_tok", 1, experts)
        check("hidden_size", 1, MAX_DIM)
        check("moe_intermediate_size", 1, MAX_DIM)
        check("chunked_prefill_size", 1)
        check_format_options(self.group_size, self.zero_point, self.gguf_type)
        if self.cpuinfer_threads is not None:
            check("cpuinfer_threads", 1)
        if self.threadpool_count is not None:
            check("threadpool_count", 1)
        self._check_gpu(put, check("num_gpu_experts", 0, experts))
        self._check_nodes(put)
        try:
            put("weight_path", os.fspath(self.weight_path))
        except TypeError:
            raise TypeError(f"weight_path: got {self.weight_path!r}, expected the path of a folder") from None
        for name in ("cpu_save", "check_finite"):
            _bool(name, getattr(self, name))
        self._check_activation(put)
        self._check_inference(put)

    def _check_gpu(self, put: Any, prefix: int) -> None:
        if self.gpu_experts_mask is None:
            mask = torch.arange(self.num_experts, device="cpu") < prefix
        else:
            mask = _mask(self.gpu_experts_mask, self.num_experts)
        put("gpu_experts_mask", mask)
        put("num_gpu_experts", int(mask.sum()))

    def _check_nodes(self, put: Any) -> None:
        if self.numa_nodes is None:
            return
        nodes = tuple(_integer("numa_nodes", n, 0) for n in self.numa_nodes)
        count = self.threadpool_count if self.threadpool_count is not None else len(nodes)
        if not nodes or len(nodes) != count:
            raise ValueError(
                f"numa_nodes: got {len(nodes)} node(s), expected one per sub-pool (threadpool_count={count})"
            )
        put("numa_nodes", nodes)
        put("threadpool_count", count)

    def _check_activation(self, put: Any) -> None:
        if not isinstance(self.activation, str):
            raise TypeError(f"activation: got {self.activation!r}, expected a string")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        for name in ("swiglu_limit", "swiglu_alpha"):
            value = _number(name, getattr(self, name))
            if value < 0:
                raise ValueError(f"{name}: got {value}, expected 0.0 or more")
            if value and self.activation != "silu":
                raise ValueError(f"{name}: got {value} with activation={self.activation!r}, expected 0.0")
            put(name, value)

    def _check_inference(self, put: Any) -> None:
        if self.max_deferred_experts_per_token is not None:
            name = "max_deferred_experts_per_token"
            put(name, _integer(name, self.max_deferred_experts_per_token, 0))


@dataclass(frozen=True)
class SFTConfig:
    """What only training needs.

    `lora_rank` 1..4096 (1..256 is the range that the kernels are tuned for); the scale of the LoRA term is
    `lora_alpha / lora_rank`, with `use_rslora` `lora_alpha / sqrt(lora_rank)`; `max_cache_depth` forwards may wait for
    their backward. `full_weight_grad` is for methods that hold bf16.
    """

    lora_rank: int = 16
    lora_alpha: float = 32.0
    max_cache_depth: int = 1
    lora_dropout: float = 0.0
    use_rslora: bool = False
    full_weight_grad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_rank", _integer("lora_rank", self.lora_rank, 1, MAX_RANK))
        object.__setattr__(self, "lora_alpha", _number("lora_alpha", self.lora_alpha))
        object.__setattr__(self, "max_cache_depth", _integer("max_cache_depth", self.max_cache_depth, 1))
        object.__setattr__(self, "lora_dropout", _number("lora_dropout", self.lora_dropout))
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected 0 <= p < 1")
        for name in ("use_rslora", "full_weight_grad"):
            _bool(name, getattr(self, name))

    @property
    def scaling(self) -> float:
        """Factor of the LoRA term."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)
