"""Makers of safetensors files, good and bad."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header: an object that becomes JSON, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def per_expert(
    stacks: tuple[Tensor, Tensor, Tensor], layer: int, prefix: str = "model.", block: str = "mlp"
) -> dict[str, Tensor]:
    """gate/up/down_proj names, or w1/w3/w2 for a block_sparse_moe."""
    names = ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    return {
        f"{prefix}layers.{layer}.{block}.experts.{e}.{name}.weight": stack[e].clone()
        for e in range(stacks[0].shape[0])
        for name, stack in zip(names, stacks, strict=True)
    }


def fused(stacks: tuple[Tensor, Tensor, Tensor], layer: int, prefix: str = "model.") -> dict[str, Tensor]:
    """gate_up_proj [E, 2I, H] and down_proj."""
    stem = f"{prefix}layers.{layer}.mlp.experts."
    return {stem + "gate_up_proj": torch.cat(stacks[:2], 1), stem + "down_proj": stacks[2].clone()}


def save_sharded(folder: Path, tensors: dict[str, Tensor], n_shards: int = 3) -> Path:
    """Tensors dealt out over shards, with an index, as save_pretrained does it."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[number % n_shards][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{n_shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
