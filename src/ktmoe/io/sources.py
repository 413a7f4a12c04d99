"""Opens the experts of one layer wherever they are, and says in which formats they lie there."""

from __future__ import annotations

from torch import Tensor

from ..errors import WeightFileError
from .compressed_tensors import CompressedTensorsSource
from .experts import ExpertSource, find_group
from .fp8 import Fp8Source, is_fp8
from .gguf_file import GgufSource, is_gguf
from .published import PublishedMatrix, plain
from .safetensors_dir import SafetensorsDir
from .source import Source


class PlainSource(Source):
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
