"""The dimensions of a model's experts: from its `config.json`, or from the tensors of GGUF files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import WeightFileError
from .experts import expert_layers, find_group
from .gguf_file import gguf_layers, is_gguf
from .index_json import open_regular, parse_object
from .limits import MAX_INDEX_BYTES
from .safetensors_dir import SafetensorsDir

_HIDDEN = ("moe_latent_size", "hidden_size")
_INTER = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
_LAYERS = ("num_hidden_layers",)
_LAYER_LISTS = ("layers_block_type", "layer_types")  # one entry for each layer, where their number is not given


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that all MoE layers of a model share, and their numbers."""

    hidden: int
    inter: int
    layers: tuple[int, ...]
    gated: bool
    """False: the experts have up and down alone."""


def read_model_shape(path: str, *, prefer_gguf: bool = False) -> ModelShape:
    """Of a model folder, or of a GGUF file. WeightFileError, naming file and key, if something is missing.

    Layers of multi-token-prediction heads are left out. prefer_gguf: see `open_source`.
    """
    return _of_gguf(path) if is_gguf(path, prefer_gguf) else _of_config(path)


def _of_gguf(path: str) -> ModelShape:
    shapes: dict[int, tuple[int, ...]] = {}
    for layer, found in gguf_layers(path).items():
        if "down" not in found or len(found["down"].shape) < 2:
            raise WeightFileError(f"{path}, layer {layer}: there is no stack of down, [experts, hidden, inter]")
        shapes[layer] = (*found["down"].shape[-2:], "gate" in found or "gate_up" in found)
    if not shapes:
        raise WeightFileError(f"{path}: no layer has experts (tensors ffn_gate_exps, ffn_up_exps, ...)")
    first = next(iter(shapes.values()))
    for layer, shape in shapes.items():
        if shape != first:
            raise WeightFileError(
                f"{path}, layer {layer}: got hidden, inter, gated = {shape}, but {first} in layer {min(shapes)}"
            )
    hidden, inter, gated = first
    return ModelShape(hidden, inter, tuple(shapes), bool(gated))


def _of_config(folder: str) -> ModelShape:
    # Layers from num_hidden_layers on are multi-token-prediction heads.
    path = os.path.join(folder, "config.json")
    with open(open_regular(path), "rb") as file:
        config = parse_object(file.read(MAX_INDEX_BYTES), path)
    text = config.get("text_config")
    if isinstance(text, dict):  # a model with other modalities
        config = {**config, **text}
    lists = [value for name in _LAYER_LISTS if isinstance(value := config.get(name), list)]
    depth = len(lists[0]) if "num_hidden_layers" not in config and lists else _positive(config, _LAYERS, path)
    layers = tuple(layer for layer in expert_layers(folder) if layer < depth)
    if not layers:
        raise WeightFileError(f"{folder}: no layer has experts that ktmoe recognises")
    with SafetensorsDir(folder) as files:
        gated = find_group(files, layers[0]).gated()
    return ModelShape(_positive(config, _HIDDEN, path), _positive(config, _INTER, path), layers, gated)


def _positive(config: dict[str, Any], names: Sequence[str], path: str) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    raise WeightFileError(f"{path}: got no positive number {' or '.join(map(repr, names))}")
