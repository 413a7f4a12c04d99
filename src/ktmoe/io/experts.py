"""The experts of one layer in a Hugging Face checkpoint, whatever its naming.

Layouts, recognised by their tensor names under any prefix:
    layers.{L}.{block}.experts.{e}.{gate,up,down}_proj.weight    Qwen, DeepSeek, OLMoE, GLM, ...
    layers.{L}.{block}.experts.{e}.{w1,w3,w2}.weight             Mixtral, MiniMax, ...
    layers.{L}.{block}.experts.{gate_up_proj,down_proj}          fused: [E, 2*inter, hidden] and [E, hidden, inter]
        with {gate_up_proj,down_proj}_bias                       GPT-OSS: [E, hidden, 2*inter], gate and up alternating
                                                                 in the last dimension, and [E, inter, hidden]
Experts without a gate (Nemotron-H) have up and down alone. Biases of separate experts end in ".bias".
Quantised weights have more tensors: "weight_packed", "weight_scale", ... of an expert, "gate_up_proj_scale_inv",
"gate_up_proj_blocks", ... of a fused stack. They are found here and read in `compressed_tensors`, `fp8` and `mxfp4`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import WeightFileError
from .published import PublishedMatrix, plain
from .safetensors_dir import SafetensorsDir
from .source import Source

PROJECTIONS = ("gate", "up", "down")
_ROLE = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STEM = r"(?P<stem>(?:.*\.)?layers\.(?P<layer>[0-9]{1,6})\.(?:[A-Za-z_]+\.)?experts)\."
_SEPARATE = re.compile(
    _STEM + r"(?P<expert>[0-9]{1,6})\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)"
)
_BESIDE = re.compile(
    _STEM + r"(?P<expert>[0-9]{1,6})\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"\.weight_(?P<suffix>packed|scale|scale_inv|shape|zero_point|g_idx)"
)
_FUSED_SCALE = re.compile(_STEM + r"(?P<role>gate_up_proj|up_proj|down_proj)(?:\.weight)?_scale(?:_inv)?")
_MXFP4 = re.compile(_STEM + r"(?P<part>(?:gate_up_proj|down_proj)_(?:blocks|scales))")
_FUSED = re.compile(_STEM + r"(?P<role>(?:gate_up_proj|up_proj|down_proj)(?:_bias)?)(?:\.weight)?")
_ANY = re.compile(_STEM + r".*")


@dataclass
class Group:
    """The tensors under one "...layers.{L}....experts"."""

    separate: dict[tuple[int, str], str] = field(default_factory=dict)
    """(expert, projection) -> name of its ".weight"."""
    biases: dict[tuple[int, str], str] = field(default_factory=dict)
    """As `separate`, of its ".bias"."""
    beside: dict[str, dict[tuple[int, str], str]] = field(default_factory=dict)
    """For "packed", "scale", "scale_inv", ...: (expert, projection) -> name of its ".weight_packed" and so on."""
    fused: dict[str, str] = field(default_factory=dict)
    """For "gate_up_proj" and "down_proj": the name of the stack."""
    fused_scales: dict[str, str] = field(default_factory=dict)
    """As `fused`: the name of its scales."""
    mxfp4: dict[str, str] = field(default_factory=dict)
    """For "gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks" and "down_proj_scales": their names."""

    def gated(self) -> bool:
        """False: the experts have up and down alone."""
        separate = self.beside.get("packed") or self.separate
        return bool(self.mxfp4) or "gate_up_proj" in self.fused or any(role == "gate" for _, role in separate)

    def holds_weights(self) -> bool:
        """False: there are only scales and the like."""
        return bool(self.separate or self.biases or self.fused or self.mxfp4 or "packed" in self.beside)


class ExpertSource(Source):
    """Experts in floats, as bf16."""

    kind = "bf16"
    formats = ("bf16", "bf16")

    def __init__(
        self, folder: SafetensorsDir, group: Group, layer: int, hidden: int, inter: int, gated: bool = True
    ) -> None:
        self._folder = folder
        self._group = group
        self._hidden = hidden
        self._inter = inter
        self._roles = projections_of(gated)
        self._first = "gate_up_proj" if gated else "up_proj"
        self.n_experts = count_experts(folder, group, layer, gated)
        """Experts that the files hold for this layer."""

    def close(self) -> None:
        """Closes the files."""
        self._folder.close()

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert."""
        return tuple(None if weights is None else plain(weights) for weights in self._tensors(expert))

    def _tensors(self, expert: int) -> tuple[Tensor | None, Tensor, Tensor]:
        h, i = self._hidden, self._inter
        if self._group.fused:
            return self._read_fused(expert)
        shapes = {"gate": (i, h), "up": (i, h), "down": (h, i)}
        own = [self._read(self._group.separate[expert, role], shapes[role]) for role in self._roles]
        return (own[0] if len(own) == 3 else None), own[-2], own[-1]

    def _read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        return self._folder.read(name, shape, index)

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
        """gate_bias, up_bias [inter] and down_bias [hidden] of one expert, fp32; empty if there are none."""
        if f"{self._first}_bias" in self._group.fused:
            return fused_biases(self._folder, self._group, expert, self.n_experts, self._hidden, self._inter)
        return separate_biases(self._folder, self._group, expert, self._hidden, self._inter)


def projections_of(gated: bool) -> tuple[str, ...]:
    """The projections of an expert."""
    return PROJECTIONS if gated else PROJECTIONS[1:]


def fused_biases(
    folder: SafetensorsDir, group: Group, expert: int, n_experts: int, hidden: int, inter: int
) -> dict[str, Tensor]:
    """The "..._bias" stacks of one expert, as `Source.biases` gives them; those of gate and up alternate."""

    def read(stack: str, n: int) -> Tensor:
        return folder.read(group.fused[f"{stack}_bias"], (n_experts, n), expert).float()

    down = {"down_bias": read("down_proj", hidden)}
    if "gate_up_proj_bias" not in group.fused:
        return {"up_bias": read("up_proj", inter)} | down
    first = read("gate_up_proj", 2 * inter)
    return {"gate_bias": first[0::2], "up_bias": first[1::2]} | down


def separate_biases(folder: SafetensorsDir, group: Group, expert: int, hidden: int, inter: int) -> dict[str, Tensor]:
    """The ".bias" tensors of one expert, as `Source.biases` gives them."""
    sizes = {"gate": inter, "up": inter, "down": hidden}
    names = {role: group.biases.get((expert, role)) for role in PROJECTIONS}
    return {f"{role}_bias": folder.read(name, (sizes[role],)).float() for role, name in names.items() if name}


def count_experts(folder: SafetensorsDir, group: Group, layer: int, gated: bool = True) -> int:
    """Experts of a group. WeightFileError if there are gaps among the weights, or gates where there should be none."""
    where = f"{folder.folder}, layer {layer}"
    roles = projections_of(gated)
    if group.fused:
        return _count_fused(folder, group, where, "gate_up_proj" if gated else "up_proj")
    weights = group.beside.get("packed") or group.separate
    surplus = [name for (_, role), name in weights.items() if role not in roles]
    if surplus:
        raise WeightFileError(f"{where}: tensor {surplus[0]!r} is a gate, but the layer has experts without one")
    count = 1 + max((expert for expert, _ in weights), default=0)
    for kind, found in (("weight", weights), ("bias", group.biases)):
        # The highest number comes from a name, that is from anybody: count the tensors before looking for each.
        if len(found) != len(roles) * count and (found or kind == "weight"):
            missing = next((e, p) for e in range(count) for p in roles if (e, p) not in found)
            raise WeightFileError(f"{where}: expert {missing[0]} has no {missing[1]} {kind}")
    return count


def _count_fused(folder: SafetensorsDir, group: Group, where: str, first: str) -> int:
    needed = {first, "down_proj"}
    if any(role.endswith("_bias") for role in group.fused):
        needed |= {f"{first}_bias", "down_proj_bias"}
    for role in sorted(needed ^ group.fused.keys()):
        what = "have no" if role in needed else f"have a {role}, which does not belong beside"
        raise WeightFileError(f"{where}: fused experts {what} {role if role in needed else first}")
    name = group.fused["down_proj"]
    shape = folder.entry(name).shape
    if len(shape) != 3:
        raise WeightFileError(f"{where}: tensor {name!r}: got shape {list(shape)}, expected 3 dimensions")
    return shape[0]


def find_group(folder: SafetensorsDir, layer: int) -> Group:
    """The expert tensors of `layer`. WeightFileError if the folder has none or several candidates."""
    groups = dict(_groups(_Names(folder.shards)).get(layer, {}))
    groups = {stem: g for stem, g in groups.items() if g.holds_weights()}
    if len(groups) > 1:
        # Multi-token-prediction heads number their own layers from 0.
        groups = {stem: g for stem, g in groups.items() if "mtp" not in stem.split(".")}
    if len(groups) != 1:
        raise WeightFileError(f"{folder.folder}: {_why_not_one(folder.shards, layer, sorted(groups))}")
    return next(iter(groups.values()))


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
def _groups(names: _Names) -> dict[int, dict[str, Group]]:
    """layer -> stem -> tensors. Cached, because a model of many layers asks for the same folder once a layer."""
    layers: dict[int, dict[str, Group]] = {}
    for name in names.shards:
        match = _SEPARATE.fullmatch(name) or _FUSED.fullmatch(name) or _BESIDE.fullmatch(name)
        match = match or _FUSED_SCALE.fullmatch(name) or _MXFP4.fullmatch(name)
        if not match:
            continue
        group = layers.setdefault(int(match["layer"]), {}).setdefault(match["stem"], Group())
        if match.re is _FUSED:
            group.fused[match["role"]] = name
        elif match.re is _FUSED_SCALE:
            group.fused_scales[match["role"]] = name
        elif match.re is _MXFP4:
            group.mxfp4[match["part"]] = name
        else:
            if match.re is _BESIDE:
                same = group.beside.setdefault(match["suffix"], {})
            else:
                same = group.separate if match["kind"] == "weight" else group.biases
            key = (int(match["expert"]), _ROLE[match["role"]])
            if key in same:
                raise WeightFileError(f"tensors {same[key]!r} and {name!r} claim the same weight")
            same[key] = name
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
