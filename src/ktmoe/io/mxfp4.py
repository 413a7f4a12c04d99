"""The experts of a checkpoint in MXFP4 (GPT-OSS): 4-bit floats (e2m1), 32 of which share a power of two.

Of a stack of matrices [E, n, k]:
    {gate_up_proj,down_proj}_blocks    U8 [E, n, ceil(k/32), 16]: two codes in a byte, the even k in the low nibble
    {gate_up_proj,down_proj}_scales    U8 [E, n, ceil(k/32)]: the exponent of two, 127 added to it; 255 is NaN
    {gate_up_proj,down_proj}_bias      floats [E, n]
Rows of gate and up alternate. They are passed on in the order of GGUF: the scale of a block, the codes of k and k + 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightFileError
from .experts import Group, fused_biases
from .gguf_types import BLOCK_WEIGHTS
from .published import PublishedMatrix, blocks_along, mxfp4_rows, unpack_nibbles
from .safetensors_dir import SafetensorsDir
from .source import Source

_BYTES = {"U8": torch.uint8}
_PARTS = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")


class Mxfp4Source(Source):
    """See `Source`."""

    kind = "mxfp4"
    formats = ("mxfp4", "mxfp4")

    def __init__(
        self, folder: SafetensorsDir, group: Group, layer: int, hidden: int, inter: int, gated: bool = True
    ) -> None:
        where = f"{folder.folder}, layer {layer}"
        if not gated:
            raise WeightFileError(f"{where}: MXFP4 experts have a gate, but the layer has none")
        self._folder = folder
        self._group = group
        self._names = {**group.mxfp4, **group.fused}
        self._hidden, self._inter = hidden, inter
        self._biased = any(part in _BIASES for part in self._names)
        needed = _PARTS + (_BIASES if self._biased else ())
        if missing := [part for part in needed if part not in self._names]:
            raise WeightFileError(f"{where}: MXFP4 experts have no {missing[0]}")
        if surplus := [part for part in self._names if part not in needed]:
            raise WeightFileError(f"{where}: MXFP4 experts have a {surplus[0]}, which does not belong beside blocks")
        shape = folder.entry(self._names["down_proj_scales"]).shape
        self.n_experts = shape[0] if shape else 0
        """Experts that the files hold for this layer."""

    def close(self) -> None:
        """Closes the files."""
        self._folder.close()

    def read(self, expert: int) -> tuple[PublishedMatrix, ...]:
        """gate, up [inter, hidden] and down [hidden, inter] of one expert."""
        h, i = self._hidden, self._inter
        gate_up, down = self._rows("gate_up_proj", expert, 2 * i, h), self._rows("down_proj", expert, h, i)
        matrices = (gate_up[0::2], (i, h)), (gate_up[1::2], (i, h)), (down, (h, i))
        return tuple(PublishedMatrix("mxfp4", (rows.contiguous(),), shape) for rows, shape in matrices)

    def biases(self, expert: int) -> dict[str, Tensor]:
        """See `Source`."""
        if not self._biased:
            return {}
        return fused_biases(self._folder, self._group, expert, self.n_experts, self._hidden, self._inter)

    def _rows(self, stack: str, expert: int, n: int, k: int) -> Tensor:
        """uint8 [n, 17 * blocks]."""
        shape = (self.n_experts, n, blocks_along(k, BLOCK_WEIGHTS["mxfp4"]))
        codes = self._folder.read(self._names[f"{stack}_blocks"], (*shape, 16), expert, dtypes=_BYTES)
        scales = self._folder.read(self._names[f"{stack}_scales"], shape, expert, dtypes=_BYTES)
        return mxfp4_rows(scales, unpack_nibbles(codes.view(-1, 16)).view(*shape[1:], 32))
