"""The experts of one layer in a Hugging Face checkpoint, whatever its naming.

Layouts, recognised by their tensor names under any prefix:
    layers.{L}.{block}.experts.{e}.{gate,up,down}_proj.weight    Qwen, DeepSeek, OLMoE, GLM, ...
    layers.{L}.{block}.experts.{e}.{w1,w3,w2}.weight             Mixtral, MiniMax, ...
    layers.{L}.{block}.experts.{gate_up_proj,down_proj}          fused: [E, 2*inter, hidden] and [E, hidden, inter]
        with {gate_up_proj,down_proj}_bias                       GPT-OSS: [E, hidden, 2*inter], gate and up alternating
                                                                 in the last dimension, and [E, inter, hidden]
Experts without a gate (Nemotron-H) have up and down alone. Biases of separate experts end in ".bias".
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
_SEPARATE = re.compile(
    _STEM + r"(?P<expert>[0-9]{1,6})\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)"
)
_FUSED = re.compile(_STEM + r"(?P<role>(?:gate_up_proj|up_proj|down_proj)(?:_bias)?)(?:\.weight)?")
_ANY = re.compile(_STEM + r".*")


@dataclass
class _Group:
    """The tensors under one "...layers.{L}....experts"."""

    separate: dict[tuple[int, str], str] = field(default_factory=dict)
    biases: dict[tuple[int, str], str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)


class ExpertSource:
    """Reads the experts of one layer one by one; an open folder, to be closed by close() or `with`."""

    def __init__(
        self, folder: SafetensorsDir, group: _Group, layer: int, hidden: int, inter: int, gated: bool = True
    ) -> None:
        self._folder = folder
        self._group = group
        self._hidden = hidden
        self._inter = inter
        self._roles = _PROJECTIONS if gated else _PROJECTIONS[1:]
        self._first = "gate_up_proj" if gated else "up_proj"
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
            needed = {self._first, "down_proj"}
            if any(role.endswith("_bias") for role in self._group.fused):
                needed |= {f"{self._first}_bias", "down_proj_bias"}
            for role in sorted(needed ^ self._group.fused.keys()):
                what = "have no" if role in needed else f"have a {role}, which does not belong beside"
                other = role if role in needed else self._first
                raise WeightFileError(f"{where}: fused experts {what} {other}")
            name = self._group.fused["down_proj"]
            shape = self._folder.file_of(name).entry(name).shape
            if len(shape) != 3:
                raise WeightFileError(f"{where}: tensor {name!r}: got shape {list(shape)}, expected 3 dimensions")
            return shape[0]
        surplus = [name for (_, role), name in self._group.separate.items() if role not in self._roles]
        if surplus:
            raise WeightFileError(f"{where}: tensor {surplus[0]!r} is a gate, but the layer has experts without one")
        count = 1 + max((expert for expert, _ in self._group.separate), default=0)
        for kind, found in (("weight", self._group.separate), ("bias", self._group.biases)):
            # The highest number comes from a name, that is from anybody: count the tensors before looking for each.
            if len(found) != len(self._roles) * count and (found or kind == "weight"):
                missing = next((e, p) for e in range(count) for p in self._roles if (e, p) not in found)
                raise WeightFileError(f"{where}: expert {missing[0]} has no {missing[1]} {kind}")
        return count

    def read(self, expert: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert, bf16."""
        h, i = self._hidden, self._inter
        if self._group.fused:
            return self._read_fused(expert)
        shapes = {"gate": (i, h), "up": (i, h), "down": (h, i)}
        own = [self._read(self._group.separate[expert, role], shapes[role]) for role in self._roles]
        return (own[0] if len(own) == 3 else None), own[-2], own[-1]

    def _read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        return self._folder.read(name, shape, index).to(torch.bfloat16)

    def _read_fused(self, expert: int) -> tuple[Tensor | None, Tensor, Tensor]:
        n, h, i, names = self.n_experts, self._hidden, self._inter, self._group.fused
        width = (len(self._roles) - 1) * i
        if f"{self._first}_bias" in names:
            first = self._read(names[self._first], (n, h, width), expert).T
            down = self._read(names["down_proj"], (n, i, h), expert).T
        else:
            first = self._read(names[self._first], (n, width, h), expert)
            down = self._read(names["down_proj"], (n, h, i), expert)
        return *self._split(first), down

    def _split(self, first: Tensor) -> tuple[Tensor | None, Tensor]:
        """gate and up, along the first dimension; alternating in the layout that has biases."""
        if self._first == "up_proj":
            return None, first
        if "gate_up_proj_bias" in self._group.fused:
            return first[0::2], first[1::2]
        return first[: self._inter], first[self._inter :]

    def biases(self, expert: int) -> dict[str, Tensor]:
        """gate_bias, up_bias [inter] and down_bias [hidden] of one expert in bf16 or fp32; empty if there are none."""
        h, i, fused = self._hidden, self._inter, self._group.fused
        if f"{self._first}_bias" in fused:
            n, width = self.n_experts, (len(self._roles) - 1) * i
            first = self._folder.read(fused[f"{self._first}_bias"], (n, width), expert).float()
            down = self._folder.read(fused["down_proj_bias"], (n, h), expert).float()
            gate, up = self._split(first)
            return ({} if gate is None else {"gate_bias": gate}) | {"up_bias": up, "down_bias": down}
        sizes = {"gate": i, "up": i, "down": h}
        names = {role: self._group.biases.get((expert, role)) for role in self._roles}
        return {f"{role}_bias": self._folder.read(name, (sizes[role],)).float() for role, name in names.items() if name}


def open_experts(folder: str, layer: int, hidden: int, inter: int, *, gated: bool = True) -> ExpertSource:
    """The experts of `layer` in a folder of safetensors files.

    WeightFileError if the folder has none, has several candidates, lacks a tensor of one, or has gates where the layer
    has none.
    """
    opened = SafetensorsDir(folder)
    try:
        groups = dict(_groups(_Names(opened.shards)).get(layer, {}))
        if len(groups) > 1:
            # Multi-token-prediction heads number their own layers from 0.
            groups = {stem: g for stem, g in groups.items() if "mtp" not in stem.split(".")}
        if len(groups) != 1:
            raise WeightFileError(f"{folder}: {_why_not_one(opened.shards, layer, sorted(groups))}")
        return ExpertSource(opened, next(iter(groups.values())), layer, hidden, inter, gated)
    except BaseException:
        opened.close()
        raise


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
            kind = group.separate if match["kind"] == "weight" else group.biases
            if key in kind:
                raise WeightFileError(f"tensors {kind[key]!r} and {name!r} claim the same weight")
            kind[key] = name
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
