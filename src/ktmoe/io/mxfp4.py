"""The experts of a checkpoint in MXFP4 (GPT-OSS): 4-bit floats (e2m1), 32 of which share a power of two.

Of a stack of matrices [E, n, k]:
    {gate_up_proj,down_proj}_blocks    U8 [E, n, ceil(k/32), 16]: two codes in a byte, the even k in the low nibble
    {gate_up_proj,down_proj}_scales    U8 [E, n, ceil(k/32)]: the exponent of two, 127 added to it; 255 is NaN
    {gate_up_proj,down_proj}_bias      floats [E, n]
Rows of gate and up alternate. The weights are passed on as bf16, which holds each of them exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightFileError
from .experts import Group
from .published import PublishedMatrix, blocks_along, plain, unpack_nibbles
from .safetensors_dir import SafetensorsDir
from .source import Source

_BLOCK = 32
_BYTES = {"U8": torch.uint8}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
_PARTS = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")


class Mxfp4Source(Source):
    """See `Source`."""

    kind = "bf16"
    formats = ("bf16", "bf16")

    def __init__(self, folder: SafetensorsDir, group: Group, layer: int, hidden: int, inter: int) -> None:
        self._folder = folder
        self._names = {**group.mxfp4, **group.fused}
        self._hidden, self._inter = hidden, inter
        self._biased = any(part in _BIASES for part in self._names)
        needed = _PARTS + (_BIASES if self._biased else ())
        if missing := [part for part in needed if part not in self._names]:
            raise WeightFileError(f"{folder.folder}, layer {layer}: MXFP4 experts have no {missing[0]}")
        if surplus := [part for part in self._names if part not in needed]:
            where = f"{folder.folder}, layer {layer}"
            raise WeightFileError(f"{where}: MXFP4 experts have a {surplus[0]}, which does not belong beside blocks")
        shape = folder.entry(self._names["down_proj_scales"]).shape
        self.n_experts = shape[0] if shape else 0
        """Experts that the files hold for this layer."""

    def close(self) -> None:
        """Closes the files."""
        self._folder.close()

    def read(self, expert: int) -> tuple[PublishedMatrix, ...]:
        """gate, up [inter, hidden] and down [hidden, inter] of one expert."""
        gate_up = self._matrix("gate_up_proj", expert, 2 * self._inter, self._hidden)
        down = self._matrix("down_proj", expert, self._hidden, self._inter)
        return plain(gate_up[0::2]), plain(gate_up[1::2]), plain(down)

    def biases(self, expert: int) -> dict[str, Tensor]:
        """gate_bias, up_bias [inter] and down_bias [hidden] of one expert, fp32; empty if there are none."""
        if not self._biased:
            return {}
        gate_up = self._folder.read(self._names["gate_up_proj_bias"], (self.n_experts, 2 * self._inter), expert).float()
        down = self._folder.read(self._names["down_proj_bias"], (self.n_experts, self._hidden), expert).float()
        return {"gate_bias": gate_up[0::2], "up_bias": gate_up[1::2], "down_bias": down}

    def _matrix(self, stack: str, expert: int, n: int, k: int) -> Tensor:
        blocks = blocks_along(k, _BLOCK)
        shape = (self.n_experts, n, blocks)
        codes = self._folder.read(self._names[f"{stack}_blocks"], (*shape, _BLOCK // 2), expert, dtypes=_BYTES)
        scales = self._folder.read(self._names[f"{stack}_scales"], shape, expert, dtypes=_BYTES)
        return decode(codes, scales)[:, :k]


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 [n, 32 blocks] from the codes [n, blocks, 16] and scales [n, blocks] of one matrix."""
    n, blocks = scales.shape
    values = _VALUES[unpack_nibbles(codes.view(n, -1)).long()].view(n, blocks, _BLOCK)
    powers = torch.where(scales == 255, torch.nan, torch.exp2(scales.float() - 127))
    return (values * powers[..., None]).view(n, -1)
