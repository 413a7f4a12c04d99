"""Where the experts of a model come from: a checkpoint in floats, or one whose experts are quantised already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ktmoe.errors import WeightFileError
from ktmoe.hf.checkpoint import CheckpointFiles
from ktmoe.hf.streaming import biases_of, plan_checkpoint, read_expert
from ktmoe.hf.structure import ExpertsSpec
from ktmoe.io.published import PublishedExpert, PublishedMatrix
from ktmoe.io.source import Source
from ktmoe.io.sources import open_source


class ExpertsOnDisk(Protocol):
    """The experts of all layers of one model."""

    def open(self, spec: ExpertsSpec) -> Source:
        """The experts of one module, to be closed. WeightFileError if they do not fit it."""

    def identity(self, spec: ExpertsSpec) -> str:
        """What beside the files decides which weights `open` reads."""


class PlainExperts:
    """Experts in floats, found by transformers' own conversion table. A file stays open from layer to layer."""

    def __init__(
        self, files: CheckpointFiles, specs: Sequence[ExpertsSpec], conversions: Sequence[Any], base_model_prefix: str
    ) -> None:
        self._files = files
        self._plan = plan_checkpoint(files.keys(), specs, conversions, base_model_prefix)

    def open(self, spec: ExpertsSpec) -> Source:
        return _PlainSource(spec, functools.partial(read_expert, spec, self._plan, self._files))

    def identity(self, spec: ExpertsSpec) -> str:
        return repr(sorted(self._plan[spec.name].items()))


class _PlainSource(Source):
    """One module of `PlainExperts`; its files belong to them."""

    kind = "bf16"
    formats = ("bf16", "bf16")

    def __init__(self, spec: ExpertsSpec, read: Callable[[int], PublishedExpert]) -> None:
        self.n_experts = spec.n_experts
        self._read = read

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        return self._read(expert).matrices

    def biases(self, expert: int) -> dict[str, Tensor]:
        return dict(self._read(expert).biases)

    def read_expert(self, expert: int) -> PublishedExpert:
        return self._read(expert)

    def close(self) -> None:
        """Nothing is open."""


class QuantisedExperts:
    """Experts as they were published (FP8, int4, MXFP4), found by the number of the layer in their tensors' names."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def open(self, spec: ExpertsSpec) -> Source:
        if str(spec.layer_idx) not in spec.name.split("."):
            raise WeightFileError(f"{self._folder}: cannot tell which layer of the files {spec.name} is")
        source = open_source(self._folder, spec.layer_idx, spec.hidden, spec.inter, gated=spec.gated)
        try:
            self._check(spec, source)
        except BaseException:
            source.close()
            raise
        return source

    def identity(self, spec: ExpertsSpec) -> str:
        return "as published"

    def _check(self, spec: ExpertsSpec, source: Source) -> None:
        where = f"{self._folder}, layer {spec.layer_idx}"
        if source.n_experts != spec.n_experts:
            raise WeightFileError(f"{where}: got {source.n_experts} experts, but {spec.name} has {spec.n_experts}")
        expected = sorted(biases_of(spec))
        if (found := sorted(source.biases(0))) != expected:
            raise WeightFileError(f"{where}: got the biases {found}, but {spec.name} has {expected}")
