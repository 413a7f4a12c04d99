"""Opens the experts of one layer wherever they are, and says in which formats they lie there."""

from __future__ import annotations

from .compressed_tensors import CompressedTensorsSource
from .experts import ExpertSource, find_group
from .fp8 import Fp8Source, is_fp8
from .gguf_file import GgufSource, is_gguf
from .mxfp4 import Mxfp4Source
from .safetensors_dir import SafetensorsDir
from .source import Source


def open_source(
    path: str, layer: int, hidden: int, inter: int, *, gated: bool = True, prefer_gguf: bool = False
) -> Source:
    """The experts of `layer` in a GGUF file, a folder of GGUF files, or a folder of safetensors files.

    gated: False for experts that have up and down alone. prefer_gguf: what is read of a folder that has both.
    WeightFileError if there are none or several candidates, or if a tensor is missing; ImportError for GGUF without the
    package gguf.
    """
    if is_gguf(path, prefer_gguf):
        return GgufSource(path, layer, hidden, inter, gated)
    folder = SafetensorsDir(path)
    try:
        group = find_group(folder, layer)
        if group.mxfp4:
            return Mxfp4Source(folder, group, layer, hidden, inter, gated)
        if "packed" in group.beside:
            return CompressedTensorsSource(folder, group, layer, hidden, inter, gated)
        if is_fp8(folder, group):
            return Fp8Source(folder, group, layer, hidden, inter, gated)
        return ExpertSource(folder, group, layer, hidden, inter, gated)
    except BaseException:
        folder.close()
        raise
