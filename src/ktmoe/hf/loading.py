"""`from_pretrained`: a Hugging Face MoE model whose experts live in ktmoe."""

from __future__ import annotations

import inspect
import logging
import os
from os import PathLike
from typing import Any

import torch

from ktmoe.hf import quantizer  # noqa: F401  (registers the quantizer)
from ktmoe.hf.config import DEFAULT_METHOD, KTMoEConfig
from ktmoe.hf.gguf_model import GgufModel
from ktmoe.hf.quantised import take_quantization

_log = logging.getLogger("ktmoe")

_WHERE_KEYS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
    "proxies",
    "trust_remote_code",
)
"""Keywords that say where a model is; passed on only if the caller said them."""
_ENGINE_KEYS = inspect.signature(KTMoEConfig).parameters.keys() - {"method", "checkpoint", "kwargs"}


def from_pretrained(
    model: str | PathLike[str],
    method: str = DEFAULT_METHOD,
    *,
    gguf_file: str | PathLike[str] | None = None,
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Loads a MoE model from a folder, a Hub id or a GGUF file; its experts are packed for `method` while read.

    The checkpoint holds floats, FP8 (DeepSeek-V3, MiniMax-M2, ...), compressed-tensors (Kimi-K2, ...) or MXFP4
    (GPT-OSS). The methods of a kind (`FP8`, `FP8_SFT`; `RAWINT4`, `AMXINT4_KGroup_SFT`; `LLAMAFILE`, `LLAMAFILE_SFT`)
    compute with published experts as they are, the other methods quantise what those stand for. What is not an expert
    is computed in floats.

    gguf_file: a GGUF file, by its path or by its name in the folder or Hub repository `model`, which holds all weights
        (split files: the first). `model` gives the config, or the file itself does if there is none. `LLAMAFILE` and
        `LLAMAFILE_SFT` compute with its experts as they are. Architectures: those of `ktmoe.hf.gguf_weights.RENAMED`,
        and those for which transformers has conversions.

    The packed experts are kept in `~/.cache/ktmoe` and mapped at the next start; cache=False or KTMOE_CACHE=off do not.
    packed=DIR maps a folder made by `ktmoe quantize` instead.

    model_class: a transformers (auto) class; AutoModelForCausalLM by default.
    kwargs: the parameters of `KTMoEConfig` (`cpuinfer_threads`, `packed`, `group_size`, `gguf_type`, ...) go there,
        everything else to the class's own ``from_pretrained``.
    Returns the model in eval mode, as transformers does. Raises ValueError for an unknown method, a checkpoint that is
    incomplete or quantised in another way, UnsupportedExpertsError for experts that cannot be computed exactly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if "quantization_config" in kwargs:
        raise ValueError("from_pretrained makes its own quantization_config; choose the format with method=...")
    engine = {key: kwargs.pop(key) for key in _ENGINE_KEYS if key in kwargs}
    settings = KTMoEConfig(method, **engine)
    config = kwargs.pop("config", None)
    where = {key: kwargs[key] for key in _WHERE_KEYS if key in kwargs}
    gguf = GgufModel.find(str(model), None if gguf_file is None else os.fspath(gguf_file), **where)
    if config is None:
        config = AutoConfig.from_pretrained(model, **where) if gguf is None else gguf.config(**where)
    model_class = AutoModelForCausalLM if model_class is None else model_class
    if gguf is None:
        settings.checkpoint = take_quantization(config, str(model))
        loaded = model_class.from_pretrained(model, config=config, quantization_config=settings, **kwargs)
    else:
        how = {key: value for key, value in kwargs.items() if key not in where}
        loaded = gguf.load(config, model_class, settings, **how)
    result = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
    if not fast_bf16() and any(p.dtype == torch.bfloat16 and p.is_cpu for p in result.parameters()):
        _log.warning(
            "torch multiplies bf16 matrices very slowly on this CPU. What is not an expert runs much faster with "
            "from_pretrained(..., dtype=torch.float32)."
        )
    return loaded


def fast_bf16() -> bool:
    """True if torch has a fast bf16 matrix product on this CPU (it needs AVX-512; without it, it is ~60 times slower).

    ktmoe's own kernels do not depend on this: only attention, embeddings and what else torch computes.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())
