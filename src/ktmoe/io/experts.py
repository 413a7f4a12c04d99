"""The experts of one layer in a Hugging Face checkpoint, whatever its naming.

Layouts, recognised by their tensor names under any prefix:
    layers.{L}.{block}.experts.{e}.{gate,up,down}_proj.weight    Qwen, DeepSeek, OLMoE, GLM, ...
    layers.{L}.{block}.experts.{e}.{w1,w3,w2}.weight             Mixtral, MiniMax, ...
    layers.{L}.{block}.experts.{gate_up_proj,down_proj}          fused: [E, 2*inter, hidden] and [E, hidden, inter]
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import WeightFileError
from .safetensors_dir import SafetensorsDir

_PROJECTIONS = ("gate", "up", "down")
_ROLE = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STEM = r"(?P<stem>(?:.*\.)?layers\.(?P<layer>[0-9]{1,6})\.(?:[A-Za-z_]+\.)?experts)\."
_SEPARATE = re.compile(_STEM + r"(?P<expert>[0-9]{1,6})\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_FUSED = re.compile(_STEM + r"(?P<role>gate_up_proj|down_proj)(?:\.weight)?")
_ANY = re.compile(_STEM + r".*")


@dataclass
class _Group:
    """The tensors under one "...layers.{L}....experts"."""

    separate: dict[tuple[int, str], str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)


class ExpertSource:
    """Reads the experts of one layer one by one; an open folder, to be closed by close() or `with`."""

    def __init__(self, folder: SafetensorsDir, group: _Group, layer: int, hidden: int, inter: int) -> None:
        self._folder = folder
        self._group = group
        self._hidden = hidden
        self._inter = inter
        self.n_experts = self._count(layer)
        """Experts that the files hold for this layer."""

    def __enter__(self) -> ExpertSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._folder.close()

    def _count(self, layer: int) -> int:
        where = f"{self._folder.folder}, layer {layer}"
        if self._group.fused:
            for role in ("gate_up_proj", "down_proj"):
                if role not in self._group.fused:
                    raise WeightFileError(f"{where}: fused experts have no {role}")
            name = self._group.fused["down_proj"]
            shape = self._folder.file_of(name).entry(name).shape
            if len(shape) != 3:
                raise WeightFileError(f"{where}: tensor {name!r}: got shape {list(shape)}, expected 3 dimensions")
            return shape[0]
        count = 1 + max(expert for expert, _ in self._group.separate)
        # The highest number comes from a name, that is from anybody: count the tensors before looking for each.
        if len(self._group.separate) != 3 * count:
            missing = next((e, p) for e in range(count) for p in _PROJECTIONS if (e, p) not in self._group.separate)
            raise WeightFileError(f"{where}: expert {missing[0]} has no {missing[1]} weight")
        return count

    def read(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up [inter, hidden] and down [hidden, inter] of one expert, bf16, contiguous."""
        h, i = self._hidden, self._inter
        if self._group.fused:
            n = self.n_experts
            gate_up = self._folder.read(self._group.fused["gate_up_proj"], (n, 2 * i, h), expert).to(torch.bfloat16)
            down = self._folder.read(self._group.fused["down_proj"], (n, h, i), expert).to(torch.bfloat16)
            return gate_up[:i], gate_up[i:], down
        gate, up, down = (
            self._folder.read(self._group.separate[expert, role], shape).to(torch.bfloat16)
            for role, shape in zip(_PROJECTIONS, ((i, h), (i, h), (h, i)), strict=True)
        )
        return gate, up, down


def open_experts(folder: str, layer: int, hidden: int, inter: int) -> ExpertSource:
    """The experts of `layer` in a folder of safetensors files.

    WeightFileError if the folder has none, has several candidates, or lacks a tensor of one.
    """
    opened = SafetensorsDir(folder)
    try:
        groups = dict(_groups(_Names(opened.shards)).get(layer, {}))
        if len(groups) > 1:
            # Multi-token-prediction heads number their own layers from 0.
            groups = {stem: g for stem, g in groups.items() if "mtp" not in stem.split(".")}
        if len(groups) != 1:
            raise WeightFileError(f"{folder}: {_why_not_one(opened.shards, layer, sorted(groups))}")
        return ExpertSource(opened, next(iter(groups.values())), layer, hidden, inter)
    except BaseException:
        opened.close()
        raise


def expert_layers(folder: str) -> list[int]:
    """The numbers of the layers that have experts, in a folder of safetensors files; without multi-token heads."""
    opened = SafetensorsDir(folder)
    opened.close()
    found = (match for match in map(_ANY.fullmatch, opened.shards) if match)
    return sorted({int(match["layer"]) for match in found if "mtp" not in match["stem"].split(".")})


class _Names:
    """The name map of a folder as a cache key, by identity: `shard_map` remembers the object too."""

    def __init__(self, shards: Mapping[str, str]) -> None:
        self.shards = shards

    def __hash__(self) -> int:
        return id(self.shards)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and other.shards is self.shards


@functools.lru_cache(maxsize=2)
def _groups(names: _Names) -> dict[int, dict[str, _Group]]:
    """layer -> stem -> tensors. Cached, because a model of many layers asks for the same folder once a layer."""
    layers: dict[int, dict[str, _Group]] = {}
    for name in names.shards:
        if match := _SEPARATE.fullmatch(name):
            group = layers.setdefault(int(match["layer"]), {}).setdefault(match["stem"], _Group())
            key = (int(match["expert"]), _ROLE[match["role"]])
            if key in group.separate:
                raise WeightFileError(f"tensors {group.separate[key]!r} and {name!r} claim the same weight")
            group.separate[key] = name
        elif match := _FUSED.fullmatch(name):
            group = layers.setdefault(int(match["layer"]), {}).setdefault(match["stem"], _Group())
            group.fused[match["role"]] = name
    return layers


def _why_not_one(shards: Mapping[str, str], layer: int, stems: list[str]) -> str:
    if stems:
        return f"layer {layer} is there more than once: {', '.join(stems[:4])}"
    other = [name for name in shards if (match := _ANY.fullmatch(name)) and int(match["layer"]) == layer]
    if other:
        return (
            f"layer {layer} has experts, but not as plain weights (for example {other[0]!r}); "
            "expected BF16, F16 or F32 weights"
        )
    return f"no experts of layer {layer} found"
