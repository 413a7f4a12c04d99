"""`from_pretrained`: a Hugging Face MoE model whose experts live in ktmoe."""

from __future__ import annotations

import logging
from os import PathLike
from typing import Any

import torch

from ktmoe.hf import quantizer  # noqa: F401  (registers the quantizer)
from ktmoe.hf.config import DEFAULT_METHOD, QUANT_METHOD, KTMoEConfig

_log = logging.getLogger("ktmoe")

_CONFIG_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")
_ENGINE_KEYS = ("cpuinfer_threads", "threadpool_count", "chunked_prefill_size", "cache", "packed")


def from_pretrained(
    model: str | PathLike[str], method: str = DEFAULT_METHOD, *, model_class: Any = None, **kwargs: Any
) -> Any:
    """Loads a MoE model from a folder or a Hub id; its experts are packed for `method` while they are read.

    The packed experts are kept in `~/.cache/ktmoe` and mapped at the next start; cache=False or KTMOE_CACHE=off do not.
    packed=DIR maps a folder made by `ktmoe quantize` instead.

    model_class: a transformers (auto) class; AutoModelForCausalLM by default.
    kwargs: `cpuinfer_threads`, `threadpool_count`, `chunked_prefill_size`, `cache`, `packed` go to `KTMoEConfig`,
        everything else to the class's own ``from_pretrained``.
    Returns the model in eval mode, as transformers does. Raises ValueError for an unknown method, a checkpoint that is
    quantised already or is incomplete, UnsupportedExpertsError for experts that cannot be computed exactly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if "quantization_config" in kwargs:
        raise ValueError("from_pretrained makes its own quantization_config; choose the format with method=...")
    engine = {key: kwargs.pop(key) for key in _ENGINE_KEYS if key in kwargs}
    settings = KTMoEConfig(method, **engine)
    config = kwargs.pop("config", None)
    if config is None:
        # trust_remote_code is passed on only if the caller said so.
        config_keys = (*_CONFIG_KEYS, "trust_remote_code")
        config = AutoConfig.from_pretrained(model, **{key: kwargs[key] for key in config_keys if key in kwargs})
    _drop_quantization(config, str(model))
    model_class = AutoModelForCausalLM if model_class is None else model_class
    loaded = model_class.from_pretrained(model, config=config, quantization_config=settings, **kwargs)
    if not fast_bf16() and any(p.dtype == torch.bfloat16 and p.is_cpu for p in loaded.parameters()):
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


def _drop_quantization(config: Any, name: str) -> None:
    """Takes a leftover ktmoe entry out of a model config; a checkpoint that is really quantised is a ValueError."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        found = found if isinstance(found, dict) else found.to_dict()
        kind = str(found.get("quant_method"))
        if kind != QUANT_METHOD:
            raise ValueError(
                f"{name} is quantised already (quant_method '{kind}'); ktmoe cannot repack this format yet. "
                "Use the bf16 version of the model."
            )
        del part.quantization_config
