"""`KTMoEConfig`: the quantization config that makes `from_pretrained` keep the experts in ktmoe.

Registered with transformers under the name "ktmoe" when this module is imported.
"""

from __future__ import annotations

import os
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktmoe.config import check_format_options
from ktmoe.methods import METHODS, methods_of

QUANT_METHOD = "ktmoe"
DEFAULT_METHOD = "AMXBF16_SFT"
DEFAULT_CHUNK = 8192


@register_quantization_config(QUANT_METHOD)
class KTMoEConfig(QuantizationConfigMixin):
    """How ktmoe holds the experts of a model.

    method: a name of `ktmoe.methods.METHODS`. A method that ends in ``_SFT`` can be trained and used for inference,
        every other method is for inference only.
    cpuinfer_threads: number of threads; None means one per physical core that this process may use.
    threadpool_count: number of sub-pools; None means one per NUMA node.
    chunked_prefill_size: longer inputs are computed in chunks of this many tokens.
    cache: keep the packed experts in ktmoe's cache, and map them at the next start (KTMOE_CACHE=off turns it off, too).
    group_size, zero_point, gguf_type: what the int4 and GGUF methods make of experts in floats, as in `KTMoEWrapper`.
    packed: a folder that `ktmoe quantize` has made of this model; its experts are mapped and not read.
    checkpoint: the quantization_config of a checkpoint that is quantised already; `from_pretrained` finds it.

    Raises ValueError for an unknown method or a number out of range, NotImplementedError for a method to come.
    """

    def __init__(
        self,
        method: str = DEFAULT_METHOD,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        chunked_prefill_size: int = DEFAULT_CHUNK,
        cache: bool = True,
        packed: str | os.PathLike[str] | None = None,
        checkpoint: dict[str, Any] | None = None,
        group_size: int = 32,
        zero_point: bool = False,
        gguf_type: str = "Q4_K",
        **kwargs: Any,
    ) -> None:
        # A config read back from JSON carries its own name.
        kwargs.pop("quant_method", None)
        if kwargs:
            raise TypeError(f"KTMoEConfig got unknown options: {', '.join(sorted(kwargs))}")
        check_method(method)
        for name, value in (
            ("cpuinfer_threads", cpuinfer_threads),
            ("threadpool_count", threadpool_count),
            ("chunked_prefill_size", chunked_prefill_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"KTMoEConfig: {name} must be at least 1, got {value}")
        check_format_options(group_size, zero_point, gguf_type)
        self.quant_method = QUANT_METHOD
        self.method = method
        self.cpuinfer_threads = cpuinfer_threads
        self.threadpool_count = threadpool_count
        self.chunked_prefill_size = chunked_prefill_size
        self.cache = bool(cache)
        self.packed = None if packed is None else os.fspath(packed)
        self.checkpoint = checkpoint
        self.group_size = group_size
        self.zero_point = zero_point
        self.gguf_type = gguf_type

    @property
    def variant(self) -> str:
        """The method, and what it makes of floats where that is not what it usually makes of them."""
        row = METHODS[self.method]
        made = row.format_of_floats(self.group_size, self.zero_point, self.gguf_type)
        return self.method if made == row.format else f"{self.method}-{made}"


def check_method(method: str) -> None:
    """Raises ValueError for an unknown method name."""
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"Unknown method: {method!r}. Methods that work: {known}")


def trainable_twin(method: str) -> str:
    """The training method that holds its weights as this one does, else the first one."""
    candidates = methods_of("sft")
    same = [row.name for row in candidates if row.format == METHODS[method].format]
    return (same or [candidates[0].name])[0]
