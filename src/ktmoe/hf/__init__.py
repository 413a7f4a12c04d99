"""Hugging Face models with ktmoe's experts: loading, LoRA through PEFT, and what rides along in a Trainer.

Importing this package imports transformers and registers the quantizer; `import ktmoe` alone does neither.
"""

from ktmoe.hf.adapters import lora_config
from ktmoe.hf.callback import ThroughputCallback
from ktmoe.hf.config import KTMoEConfig
from ktmoe.hf.experts import KTExperts
from ktmoe.hf.loading import fast_bf16, from_pretrained
from ktmoe.hf.quantizer import ktmoe_layers
from ktmoe.hf.structure import UnsupportedExpertsError

__all__ = [
    "KTExperts",
    "KTMoEConfig",
    "ThroughputCallback",
    "UnsupportedExpertsError",
    "fast_bf16",
    "from_pretrained",
    "ktmoe_layers",
    "lora_config",
    "register",
]


def register() -> None:
    """Makes transformers know the quantization method "ktmoe".

    Importing this package has done so; a caller that imports it for nothing else says it with this call.
    """
