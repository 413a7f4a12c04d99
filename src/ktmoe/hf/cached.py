"""Filling the experts of a model: from the cache if it has them, else from the checkpoint, and into the cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from ktmoe import cache
from ktmoe.errors import WeightFileError
from ktmoe.hf.experts import KTExperts
from ktmoe.hf.experts_on_disk import ExpertsOnDisk
from ktmoe.hf.streaming import biases_of
from ktmoe.io.fingerprint import fingerprint, folder_fingerprint
from ktmoe.io.packed_dir import packed_file_of, read_packed_index
from ktmoe.io.packed_file import PackedInfo, layer_file
from ktmoe.memory import check_memory
from ktmoe.packing import Progress, ReadExpert, holds, pack_layer

_log = logging.getLogger("ktmoe")


def fill_layers(
    layers: Sequence[KTExperts], experts: ExpertsOnDisk, kept: ExpertCache | None, progress: Progress
) -> None:
    """Loads every layer. progress: called once per expert with the bytes read for it.

    MemoryError before any work if what must be held in memory clearly does not fit.
    """
    for layer in layers:
        with experts.open(layer.spec) as source:
            layer.backend.adopt_formats(source)
    missing = [layer for layer in layers if kept is None or not kept.map(layer, progress)]
    if kept is not None and missing and not kept.has_room(missing):
        kept = None
    if kept is None and missing:
        check_memory(_packed_bytes(missing), f"{len(missing)} layers of experts")
    for layer in missing:
        with experts.open(layer.spec) as source:
            if kept is None or not kept.fill(layer, source.read_expert, progress):
                layer.backend.load_experts(source.read_expert, progress=progress)


def map_folder(layers: Sequence[KTExperts], folder: str, files: Sequence[Path]) -> None:
    """Maps every layer from a folder made by `ktmoe quantize`. WeightFileError if one does not fit.

    files: the weight files of the model; a folder that was made of others is a warning, since a copy looks like one.
    """
    source = read_packed_index(folder).source
    if source != folder_fingerprint(str(files[0].parent)):
        _log.warning("%s was packed from other files than those in %s, or from a copy", folder, files[0].parent)
    for layer in layers:
        layer.backend.load_packed(packed_file_of(folder, layer.spec.layer_idx))


class ExpertCache:
    """The packed layers of one model in one method. What goes wrong while writing is one warning, and no cache."""

    def __init__(self, folder: Path, source: str, experts: ExpertsOnDisk) -> None:
        self._folder = folder
        self._source = source
        self._experts = experts
        self._writable = True

    @classmethod
    def open(cls, files: Sequence[Path], variant: str, experts: ExpertsOnDisk) -> ExpertCache | None:
        """The cache of the model in `files`, whose experts are `experts`; None if the cache is off.

        variant: the method, and what else there is more than one of (`KTMoEConfig.variant`).
        """
        folder = cache.entry_folder(files, variant)
        return None if folder is None else cls(folder, fingerprint(files), experts)

    def map(self, layer: KTExperts, progress: Progress) -> bool:
        """True if the layer was there, and is mapped now."""
        path = self._path(layer)
        if not holds(path, self._info(layer)):
            return False
        try:
            layer.backend.load_packed(path)
        except WeightFileError:  # deleted or replaced a moment ago
            return False
        for _ in range(layer.spec.n_experts):
            progress(0)
        return True

    def has_room(self, layers: Sequence[KTExperts]) -> bool:
        """True if these layers fit on the disk; makes the folder."""
        need = _packed_bytes(layers)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            return self._give_up(error)
        if need > free:
            return self._give_up(f"{need / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")
        return True

    def fill(self, layer: KTExperts, read: ReadExpert, progress: Progress) -> bool:
        """Packs the layer into the cache and maps it; False, with the layer as it was, if that is not possible."""
        if not self._writable:
            return False
        path = self._path(layer)
        try:
            biases = biases_of(layer.spec)
            pack_layer(layer.backend.packer(), read, self._info(layer), path, progress, biases=biases)
        except OSError as error:
            return self._give_up(error)
        layer.backend.load_packed(path)
        return True

    def _path(self, layer: KTExperts) -> str:
        return str(self._folder / layer_file(layer.spec.layer_idx))

    def _info(self, layer: KTExperts) -> PackedInfo:
        # With another conversion table other tensors of the same files would be read.
        identity = self._experts.identity(layer.spec)
        source = hashlib.sha256(f"{self._source} {identity}".encode()).hexdigest()[:32]
        info: PackedInfo = layer.backend.packed_info(layer.spec.n_experts, source)
        return info

    def _give_up(self, reason: object) -> bool:
        self._writable = False
        _log.warning("packed experts are not kept in %s (KTMOE_CACHE=off stops trying): %s", self._folder, reason)
        return False


def _packed_bytes(layers: Sequence[KTExperts]) -> int:
    return sum(layer.spec.n_experts * layer.backend.layer.expert_bytes for layer in layers)
