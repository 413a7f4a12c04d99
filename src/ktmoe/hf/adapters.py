"""`lora_config`: the LoRA settings that train the experts of a MoE model, as a plain ``peft.LoraConfig``."""

from __future__ import annotations

from typing import Any

from ktmoe.hf.structure import DOWN, GATE_UP, UP

# Those that a model does not have are passed over.
TARGET_PARAMETERS = (f"experts.{DOWN}", f"experts.{GATE_UP}", f"experts.{UP}")
# The projections of the common attention blocks, multi-head latent attention (q_a, q_b, kv_a, kv_b) included.
ATTENTION_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
)


def lora_config(r: int = 16, alpha: float = 32, attention: bool = True, **kwargs: Any) -> Any:
    """A ``peft.LoraConfig`` with rank `r` and scaling alpha/r on all experts and, if `attention`, on the attention.

    kwargs go to LoraConfig as they are; ``target_modules`` and ``target_parameters`` replace ours. The adapter is a
    plain PEFT adapter and opens without ktmoe. ValueError for dropout, which has no meaning on merged expert weights.
    """
    if kwargs.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout={kwargs['lora_dropout']} is not possible on experts: PEFT adapts their weights, not their "
            "inputs. Use lora_dropout=0."
        )
    from peft import LoraConfig

    from ktmoe.hf import peft_bridge

    peft_bridge.install()
    settings: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(ATTENTION_MODULES) if attention else [],
        "target_parameters": list(TARGET_PARAMETERS),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(settings | kwargs))
