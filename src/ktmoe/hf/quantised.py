"""Checkpoints that are quantised already: which kinds are read, and how what is not an expert becomes floats."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from ktmoe.hf.config import QUANT_METHOD
from ktmoe.io.fp8 import fp8_matrix
from ktmoe.io.published import dequantize

KINDS = ("fp8", "compressed-tensors", "mxfp4")
"""Values of `quant_method` whose experts `ktmoe.io` reads."""


def take_quantization(config: Any, name: str) -> dict[str, Any] | None:
    """Takes the quantization_config out of a model config: the model is made as one in floats.

    None if there is none, or only a leftover of ktmoe's. ValueError for a kind that is not read.
    """
    taken = None
    for found in drop_quantization(config):
        found = dict(found) if isinstance(found, dict) else found.to_dict()
        kind = found.get("quant_method")
        kind = found["quant_method"] = str(getattr(kind, "value", kind))  # of an enumeration in config objects
        if kind != QUANT_METHOD:
            if kind not in KINDS:
                raise ValueError(
                    f"{name} is quantised already (quant_method '{kind}'); ktmoe reads {', '.join(KINDS)} and floats. "
                    "Use another version of the model."
                )
            taken = found
    return taken


def drop_quantization(config: Any) -> list[Any]:
    """Deletes every quantization_config in a model config, and returns them."""
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    found = [part.quantization_config for part in parts if getattr(part, "quantization_config", None) is not None]
    for part in parts:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return found


def floats_beside_experts(quantizer: Any, checkpoint: dict[str, Any] | None) -> list[Any]:
    """Converters for transformers' loader that turn quantised weights into floats of the model's dtype.

    quantizer: the one of the model that is loaded. checkpoint: its `quantization_config`. ImportError if the package
    compressed-tensors is needed and missing.
    """
    if checkpoint is None or checkpoint["quant_method"] == "mxfp4":  # GPT-OSS quantises experts alone
        return []
    if checkpoint["quant_method"] == "fp8":
        return [WeightConverter(list(_Fp8ToFloats.NAMES), "weight", [_Fp8ToFloats(quantizer)])]
    from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

    settings = AutoQuantizationConfig.from_dict({**checkpoint, "dequantize": True})
    of_its_own = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    of_its_own.validate_environment()
    converters: list[Any] = of_its_own.get_weight_conversions()
    if not converters:  # the weights would stay what they were initialised with
        raise ImportError("reading compressed-tensors checkpoints needs transformers >= 5.23")
    return converters


class _Fp8ToFloats(ConversionOps):
    """One weight in 8-bit floats and its scales, in any form that `ktmoe.io.fp8` knows, edges that are no whole block
    among them. Weights in other floats pass."""

    NAMES = ("weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale")

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # tells the loader that this wants tensors as they are in the files

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: torch.nn.Module, **kwargs: Any
    ) -> dict[str, Tensor]:
        """name -> [tensor] of one module to {full_layer_name: the weight in the dtype of the model's parameter}."""
        tensors = {name: t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        weight = tensors["weight"]
        scales = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
        if scales is None and weight.dtype is torch.float8_e4m3fn:
            raise ValueError(f"{full_layer_name}: got FP8 without scales beside it")
        if scales is not None:
            if weight.dim() != 2:
                raise ValueError(f"{full_layer_name}: got FP8 of shape {list(weight.shape)}, expected a matrix")
            weight = dequantize(fp8_matrix(weight.view(torch.uint8), scales))
        return {full_layer_name: weight.to(attrgetter(full_layer_name)(model).dtype)}
