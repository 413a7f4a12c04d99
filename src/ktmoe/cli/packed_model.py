"""One run of `ktmoe quantize`: which layers there are, which are finished, and packing the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ktmoe import _ext
from ktmoe.base import BaseMoEWrapper
from ktmoe.cli.console import UserError
from ktmoe.cli.transfer import Transfer
from ktmoe.errors import WeightFileError
from ktmoe.io.fingerprint import folder_fingerprint
from ktmoe.io.model_shape import read_model_shape
from ktmoe.io.packed_dir import PackedIndex, is_packed_dir, read_packed_index, write_packed_index
from ktmoe.io.packed_file import PackedInfo, layer_file
from ktmoe.io.packed_writer import PART
from ktmoe.io.source import Source
from ktmoe.io.sources import open_source
from ktmoe.methods import METHODS
from ktmoe.packing import held, pack_layer
from ktmoe.wrapper import KTMoEWrapper


class PackedModel:
    """All MoE layers of the model in `source`, a folder or a GGUF file, packed for `method` into `output`.

    options: group_size, zero_point and gguf_type of `KTMoEWrapper`.
    """

    def __init__(self, source: str, output: Path, method: str, threads: int | None = None, **options: Any) -> None:
        self._source = source
        self._output = output
        self._method = method
        self._threads = threads
        self._options = options
        self._prefer_gguf = METHODS[method].published == "gguf"
        self._shape = read_model_shape(source, prefer_gguf=self._prefer_gguf)
        self.layers = self._shape.layers
        self._fingerprint = folder_fingerprint(source)
        self._experts = {layer: self._count(layer) for layer in self.layers}
        self._wanted: dict[int, PackedInfo] = {}
        self._finished: set[int] = set()

    @property
    def finished(self) -> int:
        """Layers that need no work any more."""
        return len(self._finished)

    def prepare(self) -> None:
        """Makes the folder and its index; finds finished layers. UserError if the folder holds something else."""
        index = PackedIndex(
            self._method, _ext.LAYOUT_VERSION, self._fingerprint, os.path.abspath(self._source), self.layers
        )
        for layer, n_experts in self._experts.items():
            self._wanted[layer] = self._wrapper(layer).packed_info(n_experts, self._fingerprint)
        there = {layer: held(self._path(layer)) for layer in self.layers}
        if is_packed_dir(str(self._output)):
            self._check_same(index, there)
        elif self._output.is_dir() and any(file.suffix != PART for file in self._output.iterdir()):
            raise UserError(f"{self._output} is not empty and holds no packed experts: choose another folder")
        write_packed_index(str(self._output), index)
        self._finished = {layer for layer in self.layers if there[layer] == self._wanted[layer]}

    def missing_bytes(self) -> int:
        """Packed bytes that are still to be written."""
        missing = (info for layer, info in self._wanted.items() if layer not in self._finished)
        return sum(info.expert_bytes * info.n_experts for info in missing)

    def run(self) -> str:
        """Packs what is missing; returns the speed of reading."""
        with Transfer(f"packing ({self._method})", sum(self._experts.values())) as bar:
            for layer in self.layers:
                bar.note(f"layer {layer}")
                if layer in self._finished:
                    bar.step(0, self._experts[layer])
                    continue
                self._pack(layer, bar)
                self._finished.add(layer)
        return bar.speed

    def _pack(self, layer: int, bar: Transfer) -> None:
        with self._open(layer) as source:
            packer, biases = self._wrapper(layer).packer(), tuple(source.biases(0))
            pack_layer(packer, source.read_expert, self._wanted[layer], self._path(layer), bar.step, biases=biases)

    def _open(self, layer: int) -> Source:
        shape = self._shape
        return open_source(
            self._source, layer, shape.hidden, shape.inter, gated=shape.gated, prefer_gguf=self._prefer_gguf
        )

    def _count(self, layer: int) -> int:
        with self._open(layer) as source:
            return source.n_experts

    def _path(self, layer: int) -> str:
        return str(self._output / layer_file(layer))

    def _wrapper(self, layer: int) -> BaseMoEWrapper:
        wrapper: BaseMoEWrapper = KTMoEWrapper(
            layer_idx=layer,
            num_experts=self._experts[layer],
            num_experts_per_tok=1,
            hidden_size=self._shape.hidden,
            moe_intermediate_size=self._shape.inter,
            cpuinfer_threads=self._threads,
            weight_path=self._source,
            method=self._method,
            mode=METHODS[self._method].mode,
            **self._options,
            activation="silu" if self._shape.gated else "relu2",  # packed bytes do not depend on more
        )
        with self._open(layer) as source:
            wrapper.adopt_formats(source)
        return wrapper

    def _check_same(self, index: PackedIndex, there: dict[int, PackedInfo | None]) -> None:
        """A folder with another model's or method's files must not become a mixture."""
        try:
            found = read_packed_index(str(self._output))
        except WeightFileError as error:
            raise UserError(f"{error}. Choose another folder, or delete this one") from error
        for name in ("method", "layout_version", "source"):
            got, want = getattr(found, name), getattr(index, name)
            if got != want:
                raise UserError(
                    f"{self._output} holds packed experts of another {name} ({got}, not {want}): choose another folder"
                )
        for layer, info in there.items():
            if info is not None and info.formats != self._wanted[layer].formats:
                got = " and ".join(dict.fromkeys(info.formats))
                raise UserError(f"{self._path(layer)} holds {got}, as other options make it: choose another folder")
