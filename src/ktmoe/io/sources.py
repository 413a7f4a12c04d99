"""Opens the experts of one layer wherever they are, and says in which formats they lie there."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from .compressed_tensors import CompressedTensorsSource
from .experts import ExpertSource, find_group
from .fp8 import Fp8Source, is_fp8
from .gguf_file import GgufSource, is_gguf
from .published import PublishedMatrix, plain
from .safetensors_dir import SafetensorsDir


class Source(Protocol):
    """Reads the experts of one layer one by one. WeightFileError for whatever is wrong with the files."""

    @property
    def kind(self) -> str:
        """ "bf16", "int4", "fp8" or "gguf"."""

    @property
    def n_experts(self) -> int:
        """Experts that the files hold for this layer."""

    @property
    def formats(self) -> tuple[str, str]:
        """Formats, as in `published`, of gate/up and of down."""

    def read(self, expert: int) -> tuple[PublishedMatrix, ...]:
        """gate, up [inter, hidden] and down [hidden, inter] of one expert, in `formats`."""

    def close(self) -> None:
        """Closes the files."""

    def __enter__(self) -> Source: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlainSource:
    """Experts in floats, as bf16."""

    kind = "bf16"
    formats = ("bf16", "bf16")

    def __init__(self, experts: ExpertSource) -> None:
        self._experts = experts
        self.n_experts = experts.n_experts

    def read(self, expert: int) -> tuple[PublishedMatrix, ...]:
        """gate, up [inter, hidden] and down [hidden, inter] of one expert."""
        return tuple(plain(weights) for weights in self._experts.read(expert))

    def close(self) -> None:
        """Closes the files."""
        self._experts.close()

    def __enter__(self) -> PlainSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(path: str, layer: int, hidden: int, inter: int, prefer_gguf: bool = False) -> Source:
    """The experts of `layer` in a GGUF file, a folder of GGUF files, or a folder of safetensors files.

    prefer_gguf: what is read of a folder that has both. WeightFileError if there are none or several candidates, or if
    a tensor is missing; ImportError for GGUF without the package gguf.
    """
    if is_gguf(path, prefer_gguf):
        return GgufSource(path, layer, hidden, inter)
    folder = SafetensorsDir(path)
    try:
        group = find_group(folder, layer)
        if "packed" in group.beside:
            return CompressedTensorsSource(folder, group, layer, hidden, inter)
        if is_fp8(folder, group):
            return Fp8Source(folder, group, layer, hidden, inter)
        return PlainSource(ExpertSource(folder, group, layer, hidden, inter))
    except BaseException:
        folder.close()
        raise
