"""The factory of the public API."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence

from torch import Tensor

from . import staging
from .base import BaseMoEWrapper
from .config import MoEConfig, SFTConfig
from .inference import (
    AMXMoEWrapper,
    GeneralMoEWrapper,
    InferenceMoEWrapper,
    LlamafileMoEWrapper,
    NativeMoEWrapper,
)
from .methods import resolve
from .sft import AMXSFTMoEWrapper

_INFERENCE: dict[str, type[InferenceMoEWrapper]] = {
    cls.__name__: cls for cls in (AMXMoEWrapper, NativeMoEWrapper, LlamafileMoEWrapper, GeneralMoEWrapper)
}


class KTMoEWrapper(BaseMoEWrapper):
    """Makes the wrapper of one MoE layer: `KTMoEWrapper(...)` returns an object of the backend class of `method`.

    layer_idx: number of the layer in the weight files, from 0.
    num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size: the shape of the layer (1..65536 each).
    num_gpu_experts: experts [0, n) are on the GPU, so this layer gives them no memory and skips them.
    cpuinfer_threads: threads of the engine, None = one per physical core. threadpool_count: sub-pools, None = one per
        NUMA node; each holds and computes its slice of moe_intermediate_size (tensor parallelism; 1: none), see
        docs/numa.md. Layers with equal values share one engine.
    weight_path: what load_weights reads: a folder of safetensors files, a GGUF file or a folder of them, or a folder
        made by `ktmoe quantize`.
    chunked_prefill_size: tokens that are processed at a time; bounds the working memory.
    cpu_save: keep the packed experts on disk, in the folder ktmoe-METHOD under weight_path; the next load_weights maps
        them, with or without cpu_save, as long as the weight files of weight_path have not changed.
    max_deferred_experts_per_token: inference only: so many experts of a token, those of the least weight, may run while
        the next layer has begun already; their part goes into the output of the next MoE layer of the model, and the
        last one defers nothing (see `InferenceMoEWrapper.submit_forward`). It changes the model's numbers a little, so
        None or 0, the default, is off; more than num_experts_per_tok is all of them.
    method, mode: see `ktmoe.methods.METHODS`; mode is "inference" or "sft".
    lora_rank (1..4096, tuned for up to 256), lora_alpha, max_cache_depth: only with mode="sft". The LoRA term is scaled
        by lora_alpha / lora_rank; max_cache_depth forwards may wait for their backward.
    lora_dropout (0 <= p < 1), use_rslora (scaled by lora_alpha / sqrt(lora_rank)), full_weight_grad (also gradients of
        the expert weights; AMXBF16_SFT only): see `AMXSFTMoEWrapper`; only with mode="sft".
    gpu_experts_mask: bool [num_experts], which experts are on the GPU; wins over num_gpu_experts. A contiguous CPU
        tensor is shared: changes in place count from the next forward on (see `BaseMoEWrapper`).
    group_size, zero_point: how RAWINT4 and AMXINT4_KGroup_SFT quantise bf16 tensors: 32, 64 or 128 weights to a scale,
        and whether such a group also gets a zero point (asymmetric). Files bring their own.
    gguf_type: "Q4_K", "Q8_0", "Q4_0" or "MXFP4", what LLAMAFILE and LLAMAFILE_SFT make of bf16 tensors.
    numa_nodes: the NUMA node of each sub-pool; None: 0, 1, ...
    activation: what an expert does with g = gate(x) and u = up(x) before its down projection.
        "silu": h = g * sigmoid(g) * u. swiglu_limit > 0 clamps first: g <= limit, -limit <= u <= limit.
        swiglu_alpha > 0 makes it h = g * sigmoid(alpha * g) * (u + 1), with a limit or without (GPT-OSS, MiniMax-M3).
        "gelu_tanh": h = gelu(g, tanh approximation) * u.
        "relu2": h = max(u, 0)^2. These experts have no gate: gate is None wherever matrices or LoRA tensors are given.
    check_finite: True makes a NaN or an infinity in hidden_states, in weights of routed entries, or in grad_output a
        ValueError that says where it is, before any work; it reads them once more. False: the token's row becomes NaN.

    ValueError for an unknown mode, a method of the other mode, and a value out of range; TypeError for a wrong type;
    NotImplementedError for what is not built yet.
    """

    def __new__(  # type: ignore[misc]  # a factory: its products are not instances of it
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_gpu_experts: int = 0,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | os.PathLike[str] = "",
        chunked_prefill_size: int = 8192,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        mode: str = "inference",
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
        *,
        gpu_experts_mask: Tensor | None = None,
        numa_nodes: Sequence[int] | None = None,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        group_size: int = 32,
        zero_point: bool = False,
        gguf_type: str = "Q4_K",
        activation: str = "silu",
        check_finite: bool = False,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        full_weight_grad: bool = False,
    ) -> BaseMoEWrapper:
        row = resolve(method, mode)
        config = MoEConfig(
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            num_gpu_experts=num_gpu_experts,
            cpuinfer_threads=cpuinfer_threads,
            threadpool_count=threadpool_count,
            weight_path=weight_path,  # type: ignore[arg-type]  # becomes a str in the config
            chunked_prefill_size=chunked_prefill_size,
            cpu_save=cpu_save,
            max_deferred_experts_per_token=max_deferred_experts_per_token,
            gpu_experts_mask=gpu_experts_mask,  # type: ignore[arg-type]  # becomes a tensor in the config
            numa_nodes=numa_nodes,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            group_size=group_size,
            zero_point=zero_point,
            gguf_type=gguf_type,
            activation=activation,
            check_finite=check_finite,
        )
        if row.mode == "sft":
            sft = SFTConfig(lora_rank, lora_alpha, max_cache_depth, lora_dropout, use_rslora, full_weight_grad)
            return AMXSFTMoEWrapper(config, row, sft)
        return _INFERENCE[row.backend](config, row)

    # For servers that capture CUDA graphs: class-level, as they expect.
    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """Batch sizes of a server's CUDA graphs: forwards of these many CUDA tokens keep their host memory.

        To be called before anything is captured. ValueError for a size below 1.
        """
        sizes = [operator.index(size) for size in capture_bs]
        if any(size < 1 for size in sizes):
            raise ValueError(f"capture_bs: got {sizes}, expected sizes of at least 1")
        staging.set_captured_sizes(sizes)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """The batch sizes set last."""
        return staging.captured_sizes()

    @staticmethod
    def set_replay_batch_size(captured: int, n_tokens: int) -> None:
        """From now on, graphs captured with `captured` tokens compute the first n_tokens only; the others become zeros.

        Read whenever a graph runs, so not to be called while one does. ValueError unless 0 <= n_tokens <= captured.
        """
        if not 0 <= n_tokens <= captured:
            raise ValueError(f"n_tokens: got {n_tokens}, expected 0..{captured}")
        staging.replay_size(captured)[0] = n_tokens

    @staticmethod
    def clear_buffer_cache() -> None:
        """Frees the memory kept for captured batch sizes, once the devices have finished: none for CPU tensors.

        Graphs captured before must not run any more.
        """
        staging.clear_all()
