"""kt-kernel, through its C++ bindings: submit and sync on CPU tensors.

Its pool busy-waits and wants a core more than it has compute threads. `environment()` and the low priority of its
queue thread give it what it needs where there is none to spare: see brisk_sleep.cc. Without that environment it runs
as it is.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.problem import Problem

HELPER = "LD_PRELOAD"
ROW_STEP = 32
INT4_GROUP = 32
FP8_BLOCK = 128
E2M1_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
MATRICES = ("gate", "up", "down")


def environment() -> dict[str, str]:
    """Variables that a process needs from its start. Empty where the helper cannot be built."""
    from bench.limits import NoCompilerError, compile_native

    try:
        helper = compile_native(Path(__file__).with_name("brisk_sleep.cc"), ".so", ("-shared", "-fPIC"))
    except NoCompilerError:
        return {}
    return {HELPER: str(helper)}


class Kt:
    packed_bytes = 0
    # The class of each variant, the best level first; which of them exist depends on the CPU.
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "BF16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
        "AMXINT8": ("AMXInt8_MOE",),
        "AMXINT4": ("AMXInt4_MOE",),
        "RAWINT4": ("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"),
        "FP8": ("AMXFP8_MOE", "AVX2FP8_MOE"),
        "Q8_0": ("MOE",),
        "Q4_K": ("MOE",),
    }

    def __init__(
        self, variant: str, problem: Problem, *, layers: int, threads: int, max_tokens: int, sft: bool
    ) -> None:
        import kt_kernel

        self.ext, self.problem, self.layers = kt_kernel.kt_kernel_ext, problem, layers
        self.cls = self._class(variant)
        self.cpu = self._pool(threads)
        self.max_tokens = -(-max_tokens // ROW_STEP) * ROW_STEP
        self.count = torch.zeros(1, dtype=torch.int32)
        self.out = torch.empty(self.max_tokens, problem.shape.hidden, dtype=torch.bfloat16)
        self.identity = torch.arange(problem.shape.experts)
        config = self._config()
        self.source = self._fill(config, variant)  # kept: some classes read it in every call
        self.moes = [self._load(config, layer) for layer in range(layers)]

    def _class(self, variant: str) -> type:
        if variant not in self.classes:
            raise ValueError(f"kt: got variant {variant!r}, expected one of {', '.join(self.classes)}")
        for name in self.classes[variant]:
            if hasattr(self.ext.moe, name):
                found: type = getattr(self.ext.moe, name)
                return found
        raise RuntimeError(f"kt-kernel has no {' or '.join(self.classes[variant])} on this CPU")

    def _pool(self, threads: int) -> Any:
        config = self.ext.WorkerPoolConfig()
        config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
        mine = {t.native_id for t in threading.enumerate()} | _tasks()
        cpu = self.ext.CPUInfer(config)
        for task in _tasks() - mine if HELPER in os.environ else ():
            if not Path(f"/proc/self/task/{task}/comm").read_text().startswith("numa_"):
                os.setpriority(os.PRIO_PROCESS, task, 19)  # the queue thread: it spins while the pool computes
        return cpu

    def _config(self) -> Any:
        s = self.problem.shape
        config = self.ext.moe.MOEConfig(s.experts, s.top_k, s.hidden, s.inter, 0)
        config.max_len, config.pool = self.max_tokens, self.cpu.backend_
        return config

    def _load(self, config: Any, layer: int) -> Any:
        config.layer_idx = layer
        moe = self.cls(config)
        self._run(moe.load_weights_task(self.identity.data_ptr()))
        return moe

    def _fill(self, config: Any, variant: str) -> list[Tensor]:
        """Points the configuration at weights in the format of the variant; returns what must stay alive."""
        if variant in ("AMXINT8", "AMXINT4"):
            self._point_at_bf16(config)
            return []
        if variant in ("Q8_0", "Q4_K"):
            types = self.ext.kvcache.ggml_type
            kind = getattr(types, variant)
            packed = [self._gguf(w, kind) for w in self.problem.weights]
            config.m_block, config.group_min_len, config.group_max_len = 32, 10, self.max_tokens
            config.hidden_type = int(types.BF16)
            for name, tensor in zip(MATRICES, packed, strict=True):
                setattr(config, f"{name}_proj", tensor.data_ptr())
                setattr(config, f"{name}_type", int(kind))
            return packed
        return self._point_at_published(config, variant)

    def _point_at_bf16(self, config: Any) -> list[Tensor]:
        for name, tensor in zip(MATRICES, self.problem.weights, strict=True):
            setattr(config, f"{name}_proj", tensor.data_ptr())
        return list(self.problem.weights)

    def _point_at_published(self, config: Any, variant: str) -> list[Tensor]:
        """BF16, or values and scales as checkpoints have them: an address for each expert."""
        keep: list[Tensor] = []
        for name, tensor in zip(MATRICES, self.problem.weights, strict=True):
            values, scales = _quantized(self.problem, tensor, variant)
            setattr(config, f"{name}_projs", [[e.data_ptr() for e in values]])
            setattr(
                config, f"{name}_scales", [[0 if scales is None else scales[e].data_ptr() for e in range(len(values))]]
            )
            keep += [values] if scales is None else [values, scales]
        if variant != "BF16":
            config.quant_config.bits = 8 if variant == "FP8" else 4
            config.quant_config.group_size = FP8_BLOCK if variant == "FP8" else INT4_GROUP
            config.quant_config.zero_point = False
        return keep

    def _gguf(self, weights: Tensor, kind: object) -> Tensor:
        def pack(expert: Tensor) -> Tensor:
            values = expert.float().contiguous()
            packed: Tensor = self.ext.utils.from_float(values.data_ptr(), values.numel(), kind)
            return packed

        return torch.stack(self.problem.per_expert(weights, pack))

    def _run(self, task: object) -> None:
        self.cpu.submit(task)
        self.cpu.sync()

    def submit(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> None:
        self.rows = self.count[0] = len(x)
        pointers = (t.data_ptr() for t in (ids, mix, x, self.out))
        self.cpu.submit(self.moes[layer].forward_task(self.count.data_ptr(), ids.shape[1], *pointers, False))

    def sync(self, layer: int) -> Tensor:
        self.cpu.sync()
        return self.out[: self.rows]

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        """There is no other way than the queue."""
        self.submit(layer, x, ids, mix)
        return self.sync(layer)


def _tasks() -> set[int]:
    return {int(task) for task in os.listdir("/proc/self/task")}


def _quantized(problem: Problem, weights: Tensor, variant: str) -> tuple[Tensor, Tensor | None]:
    """[experts, n, k] in the layouts that published checkpoints have, one scale tensor beside it."""
    if variant == "BF16":
        return weights, None
    parts = problem.per_expert(weights, {"RAWINT4": _int4, "FP8": _fp8, "MXFP4": _mxfp4}[variant])
    return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])


def _int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, groups of 32 along k, bf16 scales; two values a byte, offset 8."""
    groups = w.float().unflatten(1, (-1, INT4_GROUP))
    scales = (groups.abs().amax(-1) / 7).clamp(min=1e-12).bfloat16()
    nibbles = (groups / scales.float()[..., None]).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(1)
    return _pairs(nibbles), scales


def _mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """e2m1, groups of 32 along k whose scale is a power of two (bf16 here); two values a byte."""
    groups = w.float().unflatten(1, (-1, INT4_GROUP))
    scales = groups.abs().amax(-1).clamp(min=1e-12).log2().floor().sub(2).exp2()  # the largest value is 6 = 1.5 * 2^2
    scaled = groups / scales[..., None]
    codes = torch.bucketize(scaled.abs(), E2M1_MIDDLES).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    return _pairs(codes.flatten(1)), scales.bfloat16()


def _pairs(nibbles: Tensor) -> Tensor:
    """The first of two in the low half."""
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def _fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 with an fp32 scale for each block of 128 x 128."""
    blocks = w.float().unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    values = (blocks / scales[:, None, :, None]).reshape(w.shape)
    return values.to(torch.float8_e4m3fn), scales
