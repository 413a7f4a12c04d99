"""The weight types of GGUF, and the `gguf` package, which is imported only when one of them is used."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

GGUF_TYPE_OF = {name: name.upper() for name in ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "mxfp4")}
"""The formats of the engine that are GGUF's own bytes, and GGUF's names for them."""
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMAT_OF = {kind: format for format, kind in GGUF_TYPE_OF.items()} | dict.fromkeys(FLOAT_TYPES, "bf16")
"""GGUF's name of a type -> the engine's format that holds it as it is, or rounded to bf16."""
BLOCK_WEIGHTS = {"q4_0": 32, "q8_0": 32, "q4_k": 256, "q5_k": 256, "q6_k": 256, "iq4_nl": 32, "mxfp4": 32}
"""Weights of a block of each format; a row is padded with zeros to whole blocks."""
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34, "q4_k": 144, "q5_k": 176, "q6_k": 210, "iq4_nl": 18, "mxfp4": 17}


def gguf() -> Any:
    """The `gguf` package. ImportError that says how to install it if it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(f'GGUF weights need the package gguf: pip install "ktmoe[gguf]" ({error})') from error


def type_of(number: int) -> Any:
    """The `GGMLQuantizationType` with this number, None for one that the installed package does not know."""
    try:
        return gguf().GGMLQuantizationType(number)
    except ValueError:
        return None


def kind_of(name: str) -> Any:
    """The `GGMLQuantizationType` of this name."""
    return gguf().GGMLQuantizationType[name]


def block_of(kind: Any) -> tuple[int, int]:
    """(weights, bytes) of a block of this type."""
    weights, nbytes = gguf().GGML_QUANT_SIZES[kind]
    return int(weights), int(nbytes)


@functools.lru_cache(maxsize=64)
def can_dequantize(kind: Any) -> bool:
    """True if the package has the arithmetic of this type, and not only its name."""
    try:
        dequantize_rows(torch.zeros(1, block_of(kind)[1], dtype=torch.uint8), kind)
    except NotImplementedError:
        return False
    return True


def dequantize_rows(rows: Tensor, kind: Any) -> Tensor:
    """fp32 [n, k] from the bytes of rows, uint8 [n, bytes of a row]."""
    with np.errstate(all="ignore"):  # a scale may be anything; NaN and Inf are passed on
        values = gguf().quants.dequantize(rows.numpy(), kind)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
