"""Tiny random checkpoints of real model families, saved by transformers itself (per-expert keys on disk).

The expert width is ragged (48) on purpose; a family is one line, its expert count and top-k differ where that is cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB, HIDDEN, INTER, LAYERS = 96, 64, 48, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN: dict[str, Any] = {"num_key_value_heads": 2, "moe_intermediate_size": INTER, "norm_topk_prob": True}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_QWEN, "num_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    ),
    "olmoe": (
        "Olmoe",
        {"num_key_value_heads": 2, "intermediate_size": INTER, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral": (
        "Mixtral",
        {"num_key_value_heads": 2, "intermediate_size": INTER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_MLA,
            "intermediate_size": 96,
            "moe_intermediate_size": INTER,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    # Biases, OAI SwiGLU, transposed stacks in which gate and up alternate.
    "gpt_oss": (
        "GptOss",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": INTER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 2.5,
        },
    ),
    # OAI SwiGLU on stacks as usual.
    "minimax_m3": (
        "MiniMaxM3VL",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rotary_dim": 8,
            "intermediate_size": INTER,
            "shared_intermediate_size": INTER,
            "dense_intermediate_size": INTER,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["sparse", "sparse"],
            "layer_types": ["full_attention", "full_attention"],
            "swiglu_limit": 2.5,
        },
    ),
    # Clamped SwiGLU.
    "hy_v4": (
        "HYV4",
        {
            **_MLA,
            "head_dim": 24,
            "intermediate_size": 96,
            "moe_intermediate_size": INTER,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["sparse", "sparse"],
            "swiglu_limit": 2.5,
        },
    ),
    # gelu_tanh(gate) * up.
    "gemma4": (
        "Gemma4",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": INTER,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "tie_word_embeddings": False,
        },
    ),
    # No gate: relu(up)^2.
    "nemotron_h": (
        "NemotronH",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layers_block_type": ["attention", "moe", "attention", "moe"],
            "moe_intermediate_size": INTER,
            "moe_shared_expert_intermediate_size": INTER,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
}


def make_checkpoint(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Saves a random bf16 model of `family` to `folder` and returns it."""
    name, settings = FAMILIES[family]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**(_COMMON | settings | overrides)))
    with torch.no_grad():
        # The default init of 0.02 makes experts whose output is lost beside the residual stream.
        for param_name, param in model.named_parameters():
            if ".experts." in param_name:
                param.copy_(torch.randn_like(param) * param.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tokens(n_rows: int = 2, n_cols: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids [n_rows, n_cols]."""
    return torch.randint(3, VOCAB, (n_rows, n_cols), generator=torch.Generator().manual_seed(seed))
