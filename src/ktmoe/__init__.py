"""ktmoe: the routed experts of Mixture-of-Experts models on the CPU, for inference and LoRA fine-tuning.

Everything is loaded on first use, so that `ktmoe doctor` can run, and report, where torch is broken or absent.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autograd import LoraTensors, moe_forward
    from .deferred import select_deferred_experts
    from .errors import WeightFileError
    from .hf import KTMoEConfig, from_pretrained, lora_config
    from .inference import AMXMoEWrapper, GeneralMoEWrapper, LlamafileMoEWrapper, NativeMoEWrapper
    from .methods import METHODS
    from .placement import generate_gpu_experts_masks
    from .runtime import CPUInfer, WorkerPoolConfig
    from .sft import AMXSFTMoEWrapper
    from .wrapper import KTMoEWrapper

_MODULE_OF = {
    "AMXMoEWrapper": "inference",
    "AMXSFTMoEWrapper": "sft",
    "CPUInfer": "runtime",
    "GeneralMoEWrapper": "inference",
    "KTMoEConfig": "hf",
    "KTMoEWrapper": "wrapper",
    "LlamafileMoEWrapper": "inference",
    "LoraTensors": "autograd",
    "METHODS": "methods",
    "NativeMoEWrapper": "inference",
    "WeightFileError": "errors",
    "WorkerPoolConfig": "runtime",
    "from_pretrained": "hf",
    "generate_gpu_experts_masks": "placement",
    "lora_config": "hf",
    "moe_forward": "autograd",
    "select_deferred_experts": "deferred",
}

__all__ = [
    "METHODS",
    "AMXMoEWrapper",
    "AMXSFTMoEWrapper",
    "CPUInfer",
    "GeneralMoEWrapper",
    "KTMoEConfig",
    "KTMoEWrapper",
    "LlamafileMoEWrapper",
    "LoraTensors",
    "NativeMoEWrapper",
    "WeightFileError",
    "WorkerPoolConfig",
    "__version__",
    "from_pretrained",
    "generate_gpu_experts_masks",
    "lora_config",
    "moe_forward",
    "select_deferred_experts",
]

_SUBMODULES = ("autograd", "config", "deferred", "errors", "hf", "methods", "runtime", "wrapper")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            value: Any = importlib.metadata.version("ktmoe")
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            value = "0+unknown"
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


# With transformers in use already, `quantization_config=KTMoEConfig(...)` and configs that name ktmoe work from here
# on; without it nothing of Hugging Face is imported until somebody asks for it.
if "transformers" in sys.modules:
    try:
        importlib.import_module(f"{__name__}.hf").register()
    except ImportError:
        importlib.import_module("logging").getLogger("ktmoe").debug("Hugging Face support is off", exc_info=True)
