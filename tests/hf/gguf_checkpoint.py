"""Writes a checkpoint as llama.cpp's converter does, with its names written out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf_files import finish
from safetensors.torch import load_file
from torch import Tensor

_NAMES = {
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"lm_head": "output",
    r"model\.layers\.(\d+)": r"blk.\1",
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"self_attn\.q_proj": "attn_q",
    r"self_attn\.k_proj": "attn_k",
    r"self_attn\.v_proj": "attn_v",
    r"self_attn\.o_proj": "attn_output",
    r"self_attn\.q_norm": "attn_q_norm",
    r"self_attn\.k_norm": "attn_k_norm",
    r"self_attn\.sinks": "attn_sinks.weight",
    r"self_attn\.q_a_proj": "attn_q_a",
    r"self_attn\.q_b_proj": "attn_q_b",
    r"self_attn\.q_a_layernorm": "attn_q_a_norm",
    r"self_attn\.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    r"self_attn\.kv_a_layernorm": "attn_kv_a_norm",
    r"self_attn\.k_b_proj": "attn_k_b",
    r"self_attn\.v_b_proj": "attn_v_b",
    r"linear_attn\.in_proj_qkv": "attn_qkv",
    r"linear_attn\.in_proj_z": "attn_gate",
    r"linear_attn\.in_proj_a": "ssm_alpha",
    r"linear_attn\.in_proj_b": "ssm_beta",
    r"linear_attn\.conv1d": "ssm_conv1d",
    r"linear_attn\.norm": "ssm_norm",
    r"linear_attn\.out_proj": "ssm_out",
    r"linear_attn\.A_log": "ssm_a",
    r"linear_attn\.dt_bias": "ssm_dt.bias",
    r"mlp\.gate\.e_score_correction_bias": "exp_probs_b.bias",
    r"mlp\.(gate|router)\.": "ffn_gate_inp.",
    r"mlp\.shared_expert_gate": "ffn_gate_inp_shexp",
    r"mlp\.shared_experts?\.(gate|up|down)_proj": r"ffn_\1_shexp",
    r"mlp\.(gate|up|down)_proj": r"ffn_\1",
    r"mlp\.experts\.(gate|up|down)_proj": r"ffn_\1_exps",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def llama_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in fp32, by llama.cpp's names: experts in stacks of gate, up and down."""
    stacks: dict[str, dict[int, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensor = tensor.float()
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name):
            stacks.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for name, entries in stacks.items():
        found[name] = torch.stack([entries[e] for e in range(len(entries))])
    return {gguf_name(name): tensor for name, tensor in found.items()}


def write_model(
    path: Path,
    architecture: str,
    tensors: dict[str, Tensor],
    keys: dict[str, Any] | None = None,
    tokenizer: Any = None,
    types: dict[str, str] | None = None,
    per_file: int = 0,
) -> Path:
    """A GGUF file of `tensors` ("name" -> fp32), or a set of them. Returns the (first) file.

    keys: of the architecture ("block_count": 2). types: regex -> type of the tensors that are not to be F32.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_file)
    for key, value in (keys or {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    for name, tensor in tensors.items():
        values = tensor.contiguous().numpy()
        kind = next((kind for pattern, kind in (types or {}).items() if re.search(pattern, name)), "F32")
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    return finish(writer, path)


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.get_added_vocab())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def qwen3_keys(config: Any) -> dict[str, Any]:
    """What a file says of a Qwen3-MoE model."""
    return {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def split_latent(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """kv_b_proj of latent attention in llama.cpp's two parts: key [heads, rank, nope], value [heads, v, rank]."""
    result = dict(tensors)
    for name in [name for name in tensors if "kv_b_proj" in name]:
        both = result.pop(name).view(config.num_attention_heads, -1, config.kv_lora_rank)
        layer = name.split(".")[1]
        result[f"blk.{layer}.attn_k_b.weight"] = both[:, : config.qk_nope_head_dim].transpose(1, 2)
        result[f"blk.{layer}.attn_v_b.weight"] = both[:, config.qk_nope_head_dim :]
    return result


def interleaved_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-OSS: stacks [E, in, out], in which gate and up alternate, as gate, up and down [E, out, in]."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = ".".join(name.split(".")[:2])
        what = "bias" if name.endswith("_bias") else "weight"
        if "experts" not in name and "_exps" not in name:
            result[name] = tensor
            continue
        rows = tensor if what == "bias" else tensor.transpose(1, 2)
        if "gate_up" in name:
            result[f"{layer}.ffn_gate_exps.{what}"], result[f"{layer}.ffn_up_exps.{what}"] = rows[:, ::2], rows[:, 1::2]
        else:
            result[f"{layer}.ffn_down_exps.{what}"] = rows
    return result
