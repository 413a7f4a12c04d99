"""Opens the experts of one layer wherever they are, and says in which formats they lie there."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from torch import Tensor

from ..errors import WeightFileError
from .compressed_tensors import CompressedTensorsSource
from .experts import ExpertSource, find_group
from .fp8 import Fp8Source, is_fp8
from .gguf_file import GgufSource, is_gguf
from .published import PublishedExpert, PublishedMatrix, plain
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

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert, in `formats`."""

    def biases(self, expert: int) -> dict[str, Tensor]:
        """gate_bias, up_bias [inter] and down_bias [hidden] of one expert, fp32; empty if there are none."""

    def close(self) -> None:
        """Closes the files."""

    def __enter__(self) -> Source: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def read_expert(source: Source, expert: int) -> PublishedExpert:
    """All of one expert."""
    return PublishedExpert(source.read(expert), source.biases(expert))


class PlainSource:
    """Experts in floats, as bf16."""

    kind = "bf16"
    formats = ("bf16", "bf16")

    def __init__(self, experts: ExpertSource) -> None:
        self._experts = experts
        self.n_experts = experts.n_experts

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert."""
        return tuple(None if weights is None else plain(weights) for weights in self._experts.read(expert))

    def biases(self, expert: int) -> dict[str, Tensor]:
        """gate_bias, up_bias [inter] and down_bias [hidden] of one expert, fp32; empty if there are none."""
        return self._experts.biases(expert)

    def close(self) -> None:
        """Closes the files."""
        self._experts.close()

    def __enter__(self) -> PlainSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(
    path: str, layer: int, hidden: int, inter: int, *, gated: bool = True, prefer_gguf: bool = False
) -> Source:
    """The experts of `layer` in a GGUF file, a folder of GGUF files, or a folder of safetensors files.

    gated: False for experts that have up and down alone. prefer_gguf: what is read of a folder that has both.
    WeightFileError if there are none or several candidates, or if a tensor is missing; ImportError for GGUF without the
    package gguf.
    """
    if is_gguf(path, prefer_gguf):
        _need_gates(gated, f"{path}, layer {layer}", "GGUF")
        return GgufSource(path, layer, hidden, inter)
    folder = SafetensorsDir(path)
    try:
        group = find_group(folder, layer)
        quantised = "packed" in group.beside or is_fp8(folder, group)
        if quantised:
            _need_gates(gated and not group.biases, f"{path}, layer {layer}", "quantised")
        if "packed" in group.beside:
            return CompressedTensorsSource(folder, group, layer, hidden, inter)
        if quantised:
            return Fp8Source(folder, group, layer, hidden, inter)
        return PlainSource(ExpertSource(folder, group, layer, hidden, inter, gated))
    except BaseException:
        folder.close()
        raise


def _need_gates(usual: bool, where: str, kind: str) -> None:
    if not usual:
        raise WeightFileError(
            f"{where}: {kind} experts without a gate, or with biases, are not read; expected bf16 files"
        )
