"""What a model's `config.json` says about its experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import WeightFileError
from .experts import expert_layers, find_group
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


def read_model_shape(folder: str) -> ModelShape:
    """From `config.json` and the tensor names. WeightFileError, naming file and key, if something is missing.

    Layers beyond num_hidden_layers are multi-token-prediction heads and are left out.
    """
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
