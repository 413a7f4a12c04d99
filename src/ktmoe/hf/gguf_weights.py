"""What is beside the experts of a GGUF model, under the names that transformers loads.

transformers has tables from GGUF's names, with what llama.cpp's converter does to the values, for a few architectures.
For those of `RENAMED` the values are as in transformers, and the names come from the `gguf` package, which knows them
by the names of published checkpoints. Others are refused: a wrong guess would be a wrong model without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ktmoe import _ext
from ktmoe.errors import WeightFileError
from ktmoe.hf.structure import find_experts
from ktmoe.io.gguf_tensors import GgufTensors
from ktmoe.io.gguf_types import gguf

RENAMED = (
    "afmoe",
    "deepseek2",
    "dots1",
    "ernie4_5-moe",
    "exaone-moe",
    "glm4moe",
    "gpt-oss",
    "lfm2moe",
    "minimax-m2",
    "olmoe",
    "qwen2moe",
    "qwen3moe",
)
"""llama.cpp's names of architectures whose tensors are what transformers has, renamed."""


def conversions(architecture: str, config: Any) -> list[Any] | None:
    """transformers' table from GGUF's names and values to its own, None for an architecture of which it has none."""
    try:
        from transformers.integrations.gguf import utils
    except ImportError:  # of an earlier version
        return None
    known = utils.is_gguf_arch_supported(architecture)
    return list(utils.get_gguf_conversion_mapping(architecture, config)) if known else None


def read_beside_experts(
    tensors: GgufTensors, model: nn.Module, dtype: torch.dtype, pool: _ext.ThreadPool | None = None
) -> dict[str, Tensor]:
    """All of the model but its routed experts, by the names in a checkpoint, or by GGUF's if there are `conversions`.

    model: as made from its config, on the meta device. WeightFileError for a tensor that the file lacks, that has
    another shape, or that the model has no place for; NotImplementedError for an architecture that is not read.
    """
    config: Any = model.config
    layers = int(config.get_text_config().num_hidden_layers)
    names = [name for name in tensors.shapes if _belongs(name, layers)]
    if conversions(tensors.architecture, config) is not None:
        return {name: tensors.read(name, dtype, pool) for name in names}
    if tensors.architecture not in RENAMED:
        raise NotImplementedError(
            f"{tensors.files[0]}: models of architecture {tensors.architecture!r} cannot be loaded from GGUF alone, "
            f"only {', '.join(RENAMED)}. Its experts can be used in the original model: `ktmoe quantize FILE -m "
            "LLAMAFILE -o DIR`, then from_pretrained('MODEL', method='LLAMAFILE', packed='DIR')"
        )
    return _Renamed(tensors, names, layers, dtype, pool).read(model)


def _belongs(name: str, layers: int) -> bool:
    """Not of a layer of multi-token prediction, which comes last, nor a table that the config says as well."""
    parts = name.split(".")
    if parts[0] == "blk" and parts[1].isdigit():
        return int(parts[1]) < layers
    return not name.startswith("rope_")


class _Renamed:
    """Reads the tensors of one of the `RENAMED`."""

    def __init__(
        self,
        tensors: GgufTensors,
        names: Iterable[str],
        layers: int,
        dtype: torch.dtype,
        pool: _ext.ThreadPool | None,
    ) -> None:
        self._tensors, self._dtype, self._pool = tensors, dtype, pool
        package = gguf()
        architecture = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == tensors.architecture)
        self._map = package.get_tensor_name_map(architecture, layers)
        self._unused = set(names)

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        found = {name: self._read(name, tuple(there.shape)) for name, there in _checkpoint_tensors(model)}
        if self._unused:
            raise self._misfit(f"{type(model).__name__} has no place for tensor {min(self._unused)!r}")
        return found

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        parts = self._key_and_value(name)
        if parts is not None:
            return self._joined(*parts, shape)
        gguf_name, found = self._find(self._gguf_name(name), name)
        # A single row has one dimension there.
        if [d for d in found if d != 1] != [d for d in shape if d != 1]:
            raise self._misfit(f"{name}: got shape {list(found)}, expected {list(shape)}")
        return self._take(gguf_name).view(shape)

    def _find(self, gguf_name: str | None, name: str) -> tuple[str, tuple[int, ...]]:
        if gguf_name is None or gguf_name not in self._tensors.shapes:
            raise self._misfit(f"there is no tensor for {name} ({gguf_name or 'GGUF has no name for it'})")
        return gguf_name, self._tensors.shapes[gguf_name]

    def _take(self, gguf_name: str) -> Tensor:
        self._unused.discard(gguf_name)
        return self._tensors.read(gguf_name, self._dtype, self._pool)

    def _gguf_name(self, name: str) -> str | None:
        """llama.cpp gives every tensor the ending .weight or .bias, also those that have none in transformers."""
        ending = "bias" if name.endswith("bias") else "weight"
        for base in (name.removesuffix(f".{ending}"), name.removesuffix(f"_{ending}")):
            found = self._map.get_name(base)
            if found is not None:
                return f"{found}.{ending}"
        return None

    def _key_and_value(self, name: str) -> tuple[str, str] | None:
        """llama.cpp has kv_b_proj of latent attention in two parts (in one in files of before 2025)."""
        if not name.endswith("kv_b_proj.weight") or self._gguf_name(name) in self._tensors.shapes:
            return None
        key, value = (self._gguf_name(name.replace("kv_b_proj", part)) for part in ("k_b_proj", "v_b_proj"))
        return None if key is None or value is None else (key, value)

    def _joined(self, key_name: str, value_name: str, shape: tuple[int, ...]) -> Tensor:
        """key [heads, rank, nope] and value [heads, v, rank] to [heads * (nope + v), rank]."""
        key, value = (self._find(part, part)[1] for part in (key_name, value_name))
        fit = len(key) == len(value) == 3 and key[0] == value[0] and key[1] == value[2] == shape[1]
        if not fit or key[0] * (key[2] + value[1]) != shape[0]:
            found = f"{key_name} {list(key)} and {value_name} {list(value)}"
            raise self._misfit(f"got {found}, expected parts of {list(shape)}")
        return torch.cat((self._take(key_name).transpose(1, 2), self._take(value_name)), 1).view(shape)

    def _misfit(self, what: str) -> WeightFileError:
        return WeightFileError(f"{self._tensors.files[0]}: {what}. Is the config that of another model?")


def _checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name in a checkpoint and meta tensor of all that is saved but routed experts and what is tied to others."""
    from transformers.core_model_loading import revert_weight_conversion

    config: Any = model.config
    experts = {f"{spec.name}.{part}" for spec in find_experts(model, config) for part in (*spec.stacks, *spec.biases)}
    tied = set(getattr(model, "all_tied_weights_keys", {})) if config.get_text_config().tie_word_embeddings else set()
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in experts | tied}
    yield from revert_weight_conversion(model, own).items()
