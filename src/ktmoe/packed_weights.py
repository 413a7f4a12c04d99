"""What a wrapper does with packed files: mapping them, describing its own, and keeping them for the next start."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from . import _ext
from .config import MoEConfig
from .errors import WeightFileError
from .io.fingerprint import folder_fingerprint
from .io.packed_dir import PackedIndex, write_packed_index
from .io.packed_file import PackedInfo, layer_file, open_packed, read_info
from .memory import check_memory
from .methods import METHODS, Method
from .packing import Progress, ReadExpert, pack_layer
from .runtime import log

if TYPE_CHECKING:
    from typing_extensions import Self

    from .io.published import PublishedExpert
    from .io.source import Source


class PackedWeights:
    """The part of `BaseMoEWrapper` that knows packed files."""

    config: MoEConfig
    method: str
    layer: _ext.MoeLayer
    _cpu_experts: list[int]

    if TYPE_CHECKING:  # of BaseMoEWrapper

        def __init__(self, config: MoEConfig, method: Method) -> None: ...
        def _own_formats(self) -> tuple[str, str]: ...
        def _formats_of(self, source: Source) -> tuple[str, str]: ...
        def _open_source(self) -> Source: ...
        def _engine_layer(self, gate_up_format: str, down_format: str) -> _ext.MoeLayer: ...
        def _slots(self, mapping: Tensor | None, n_logical: int, source: str) -> list[tuple[int, int]]: ...
        def _loading(self, formats: tuple[str, str] | None = None) -> AbstractContextManager[None]: ...
        def put_expert(self, expert: int, weights: PublishedExpert) -> None: ...

    def load_packed(self, path: str | os.PathLike[str], physical_to_logical_map: Tensor | None = None) -> None:
        """Maps one file of packed experts (`ktmoe-layer-00007.safetensors`); see `load_weights` for the map.

        The file must have been made for this layer number and these dimensions, by this method or by another one with
        the same formats. With several sub-pools the experts are copied, each part to the memory of its node.
        WeightFileError, naming the file and what differs, or MemoryError if the copies clearly do not fit; the layer
        then is as it was.
        """
        packed = open_packed(path)
        info, path = packed.info, packed.path
        layer = self._layer_for(info, path)
        expected = dataclasses.replace(self.packed_info(info.n_experts, info.source, layer), method=info.method)
        if difference := info.difference(expected):
            raise WeightFileError(f"{path}: {difference} (method {self.method}, layer {self.config.layer_idx})")
        n_experts = self.config.num_experts
        if physical_to_logical_map is None and info.n_experts != n_experts:
            raise WeightFileError(f"{path}: got {info.n_experts} experts, expected num_experts={n_experts}")
        rows = [0] * n_experts
        for slot, logical in self._slots(physical_to_logical_map, info.n_experts, path):
            rows[slot] = logical
        if len(layer.parts) > 1:  # each gets a copy of its own
            n_cpu = len(self._cpu_experts)
            check_memory(layer.expert_bytes * n_cpu, f"{path}: {n_cpu} experts for {len(layer.parts)} sub-pools")
        layer.attach(packed.experts, rows, **packed.biases)
        self.layer = layer

    def _layer_for(self, info: PackedInfo, path: str) -> _ext.MoeLayer:
        """A new engine layer for the file: an older mapping goes when the older layer is no longer used.

        A method whose formats come from its files takes those of the file.
        """
        formats = info.formats
        if formats != formats_of(self.layer) and info.method != self.method:
            expected = " and ".join(dict.fromkeys(formats_of(self.layer)))
            got = " and ".join(dict.fromkeys(formats))
            raise WeightFileError(
                f"{path}: method: got {info.method} ({got}), expected {self.method} or another method of {expected}"
            )
        try:
            return self._engine_layer(*formats)
        except ValueError as error:
            raise WeightFileError(f"{path}: {error}") from error

    def packed_info(self, n_experts: int, source: str, layer: _ext.MoeLayer | None = None) -> PackedInfo:
        """What a packed file of this layer says. n_experts: in the file; source: the fingerprint of its origin."""
        layer = layer or self.layer
        gate_up_format, down_format = formats_of(layer)
        return PackedInfo(
            method=self.method,
            gate_up_format=gate_up_format,
            down_format=down_format,
            layout_version=_ext.LAYOUT_VERSION,
            layer=self.config.layer_idx,
            n_experts=n_experts,
            hidden=self.config.hidden_size,
            inter=self.config.moe_intermediate_size,
            expert_bytes=layer.expert_bytes,
            source=source,
        )

    def packer(self) -> Self:
        """A wrapper of a single expert with this layer's formats, for `ktmoe.packing.pack_layer`."""
        config = dataclasses.replace(
            self.config,
            num_experts=1,
            num_experts_per_tok=1,
            num_gpu_experts=0,
            gpu_experts_mask=None,  # type: ignore[arg-type]  # becomes a tensor in the config
        )
        packer = type(self)(config, METHODS[self.method])
        if formats_of(packer.layer) != formats_of(self.layer):
            packer.layer = packer._engine_layer(*formats_of(self.layer))
        return packer

    # --- cpu_save: WEIGHT_PATH/ktmoe-METHOD/ktmoe-layer-00007.safetensors -----------------------------------------
    @property
    def _keep_folder(self) -> str:
        return os.path.join(self.config.weight_path, f"ktmoe-{self.method}")

    def _kept_file(self) -> str | None:
        """What cpu_save has kept of this layer, if loading the weight files that are there now would make the same."""
        path = os.path.join(self._keep_folder, layer_file(self.config.layer_idx))
        if not os.path.exists(path):
            return None
        try:
            info = read_info(path)
        except WeightFileError as error:
            log.warning("not used: %s", error)
            return None
        current = info.layout_version == _ext.LAYOUT_VERSION and info.source == folder_fingerprint(
            self.config.weight_path
        )
        return path if current and self._would_make(info.formats) else None

    def _would_make(self, formats: tuple[str, str]) -> bool:
        """False if weights were kept with another group_size or gguf_type, which count for files of plain floats."""
        if not METHODS[self.method].published or formats == self._own_formats():
            return True
        try:
            with self._open_source() as source:
                return self._formats_of(source) == formats
        except (WeightFileError, ImportError):  # kept of tensors: there are no files; or they cannot be read here
            return True

    def _load_and_keep(
        self,
        read: ReadExpert,
        n_experts: int,
        mapping: Tensor | None,
        progress: Progress | None = None,
        *,
        formats: tuple[str, str] | None = None,
        biases: Sequence[str] = (),
    ) -> None:
        """Packs all experts to a file under `weight_path`, in place of an older one, and maps that file."""
        folder = self.config.weight_path
        if not os.path.isdir(folder):
            raise ValueError(f"weight_path: got {folder!r}, expected a folder, because cpu_save=True writes to it")
        source = folder_fingerprint(folder)
        path = os.path.join(self._keep_folder, layer_file(self.config.layer_idx))
        with self._loading(formats):
            index = PackedIndex(self.method, _ext.LAYOUT_VERSION, source, os.path.abspath(folder))
            write_packed_index(self._keep_folder, index)
            pack_layer(
                self.packer(), read, self.packed_info(n_experts, source), path, progress, biases=biases, reuse=False
            )
            self.load_packed(path, mapping)


def formats_of(layer: _ext.MoeLayer) -> tuple[str, str]:
    """The formats of gate/up and of down."""
    return layer.format, layer.down_format
