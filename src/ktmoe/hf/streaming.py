"""Maps the tensors of a checkpoint to experts and reads them one expert at a time.

The names are translated by transformers' own conversion table, so every layout that transformers can read under a name
of its own ("w1/w3/w2", "gate_proj/up_proj/down_proj", already fused stacks) needs no code here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ktmoe.errors import WeightFileError
from ktmoe.hf.structure import DOWN, GATE_UP, UP, ExpertsSpec, UnsupportedExpertsError
from ktmoe.io.published import PublishedExpert, plain_expert

ROLES = ("gate", "up", "down")
# What each parameter of an experts module holds.
_FUSED_ROLES = {
    GATE_UP: ("gate", "up"),
    UP: ("up",),
    DOWN: ("down",),
    f"{GATE_UP}_bias": ("gate_bias", "up_bias"),
    f"{UP}_bias": ("up_bias",),
    f"{DOWN}_bias": ("down_bias",),
}
_PER_EXPERT_OPS = {
    GATE_UP: ["MergeModulelist", "Concatenate"],
    UP: ["MergeModulelist"],
    DOWN: ["MergeModulelist"],
}


def roles_of(spec: ExpertsSpec) -> list[str]:
    """What every expert of the module needs."""
    return [role for name in (*spec.stacks, *spec.biases) for role in _FUSED_ROLES[name]]


def biases_of(spec: ExpertsSpec) -> list[str]:
    """Those of `roles_of` that are biases."""
    return [role for role in roles_of(spec) if role.endswith("_bias")]


class TensorSource(Protocol):
    """Where tensors come from: one tensor of a known shape, or entry `index` of a fused stack, by its name."""

    def read(self, key: str, shape: tuple[int, ...], index: int | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Piece:
    """One matrix or bias of one expert: tensor `key`, entry `index` of it if it is a stack, `part` of `parts`."""

    key: str
    index: int | None = None
    part: int = 0
    parts: int = 1


Plan = dict[str, dict[tuple[int, str], Piece]]
"""Experts module name -> (expert, role) -> where that matrix is."""


def plan_checkpoint(
    keys: Iterable[str], specs: Sequence[ExpertsSpec], conversions: Sequence[Any], base_model_prefix: str
) -> Plan:
    """Finds every expert matrix of `specs` among the checkpoint's `keys`.

    conversions: transformers' conversion table of the model. Raises WeightFileError that names the missing, surplus or
    duplicate matrix; UnsupportedExpertsError if the checkpoint stores experts in a way we cannot split.
    """
    names = _NameTable(specs, conversions, base_model_prefix)
    plan: Plan = {spec.name: {} for spec in specs}
    for key in keys:
        for spec, expert, role, piece in names.locate(key):
            if not 0 <= expert < spec.n_experts:
                raise WeightFileError(f"'{key}' is expert {expert}, but {spec.name} has {spec.n_experts} experts")
            other = plan[spec.name].setdefault((expert, role), piece)
            if other != piece:
                raise WeightFileError(f"'{key}' and '{other.key}' both hold {role} of expert {expert} of {spec.name}")
    _check_complete(plan, specs)
    return plan


def _check_complete(plan: Plan, specs: Sequence[ExpertsSpec]) -> None:
    missing = [
        f"{role} of expert {expert} of {spec.name}"
        for spec in specs
        for expert in range(spec.n_experts)
        for role in roles_of(spec)
        if (expert, role) not in plan[spec.name]
    ]
    if missing:
        shown = "; ".join(missing[:3]) + (f"; and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise WeightFileError(f"The checkpoint lacks {shown}. Is the download complete?")


class _NameTable:
    """Translates checkpoint names to (experts module, expert, role) with transformers' conversion table."""

    def __init__(self, specs: Sequence[ExpertsSpec], conversions: Sequence[Any], base_model_prefix: str) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = base_model_prefix
        self._targets = {f"{spec.name}.{name}": (spec, name) for spec in specs for name in (*spec.stacks, *spec.biases)}

    def locate(self, key: str) -> list[tuple[ExpertsSpec, int, str, Piece]]:
        """Every expert matrix that tensor `key` holds; empty if it has none."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._targets)
        if target not in self._targets:
            # The table must not touch a name that is right already; transformers' loader has the same second look.
            target, pattern = rename_source_key(key, [], [], self._prefix, self._targets)
        if target not in self._targets:
            return []
        spec, stack = self._targets[target]
        if pattern is None:
            roles = _FUSED_ROLES[stack]
            return [
                (spec, expert, role, Piece(key, expert, part, len(roles)))
                for expert in range(spec.n_experts)
                for part, role in enumerate(roles)
            ]
        return [(spec, self._expert_number(key, pattern), self._role(spec, key, pattern, stack), Piece(key))]

    def _role(self, spec: ExpertsSpec, key: str, pattern: str, stack: str) -> str:
        converter = self._by_pattern[pattern]
        operations = [type(op).__name__ for op in converter.operations]
        roles = _FUSED_ROLES[stack]
        plain = not (spec.transposed or spec.interleaved) and operations == _PER_EXPERT_OPS.get(stack)
        if not plain or len(converter.source_patterns) != len(roles):
            raise UnsupportedExpertsError(
                f"The checkpoint stores '{key}' in a way that ktmoe cannot split by expert yet "
                f"({', '.join(operations)})"
            )
        part: int = converter.source_patterns.index(pattern)
        return roles[part]

    def _expert_number(self, key: str, pattern: str) -> int:
        from transformers.core_model_loading import apply_renamings

        numbered = re.search(pattern.replace("*.", r"(?P<expert>\d+)\.", 1), apply_renamings(key, self._renamings))
        if numbered is None:
            raise UnsupportedExpertsError(f"Cannot tell which expert the tensor '{key}' belongs to")
        return int(numbered["expert"])


def read_expert(spec: ExpertsSpec, plan: Plan, source: TensorSource, expert: int) -> PublishedExpert:
    """One expert, its matrices in bf16 and its biases in fp32.


    WeightFileError if a tensor has another shape or is not made of plain floats.
    """
    pieces = plan[spec.name]
    stored: dict[str, torch.Tensor] = {}

    def read(role: str) -> torch.Tensor:
        piece = pieces[expert, role]
        if piece.key not in stored:
            tensor = source.read(piece.key, _stored_shape(spec, role, piece), piece.index)
            stored[piece.key] = tensor.T if spec.transposed and tensor.dim() == 2 else tensor
        if spec.interleaved and piece.parts > 1:
            return stored[piece.key][piece.part :: piece.parts]
        return stored[piece.key].chunk(piece.parts)[piece.part]

    gate = read("gate") if "gate" in roles_of(spec) else None
    biases = {role: read(role) for role in biases_of(spec)}
    return plain_expert(gate, read("up"), read("down"), **biases)


def _stored_shape(spec: ExpertsSpec, role: str, piece: Piece) -> tuple[int, ...]:
    if piece.index is not None:
        shapes: dict[str, tuple[int, ...]] = {**spec.stacks, **spec.biases}
        return next(shape for name, shape in shapes.items() if role in _FUSED_ROLES[name])
    return (spec.hidden, spec.inter) if role == "down" else (spec.inter, spec.hidden)
