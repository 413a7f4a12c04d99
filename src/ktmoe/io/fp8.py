"""The experts of a checkpoint in 8-bit floats (e4m3fn), with scales of blocks, rows or whole matrices.

Of a matrix [n, k], w = weight * scale:
    .weight              F8_E4M3 [n, k]
    .weight_scale_inv    or .weight_scale: one of
        [ceil(n/128), ceil(k/128)]   blocks of 128 x 128 (DeepSeek-V3 and others)
        [n, 1] or [n]                a scale for each row
        [] or [1]                    one scale
The scales are BF16, F16, F32 or powers of two (F8_E8M0). Fused stacks (`gate_up_proj`, `down_proj`) and their scales
(`..._scale_inv`) have the same with the experts in front; gate_up_proj may have the scales of gate, then those of up.
All become one scale for each row and 128 weights, which loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightFileError
from .experts import Group, count_experts, separate_biases
from .published import FP8_BLOCK, PublishedMatrix, blocks_along, expand_rows
from .safetensors_dir import SafetensorsDir
from .safetensors_file import FLOAT_DTYPES
from .source import Source

_CODE_DTYPES = {"F8_E4M3": torch.uint8}
_SCALE_DTYPES = {**FLOAT_DTYPES, "F8_E8M0": torch.uint8}


def is_fp8(folder: SafetensorsDir, group: Group) -> bool:
    """True if the first matrix of the group has 8-bit floats and scales."""
    if group.fused:
        name = group.fused.get("down_proj") if group.fused_scales else None
    else:
        scaled = group.beside.get("scale_inv") or group.beside.get("scale")
        name = group.separate.get((0, "up")) if scaled else None
    return name is not None and folder.entry(name).dtype == "F8_E4M3"


class Fp8Source(Source):
    """See `Source`."""

    kind = "fp8"
    formats = ("fp8", "fp8")

    def __init__(
        self, folder: SafetensorsDir, group: Group, layer: int, hidden: int, inter: int, gated: bool = True
    ) -> None:
        self._folder = folder
        self._group = group
        self._hidden, self._inter = hidden, inter
        self._gated = gated
        self.n_experts = count_experts(folder, group, layer, gated)
        if any(role.endswith("_bias") for role in group.fused):
            raise WeightFileError(f"{folder.folder}, layer {layer}: fused FP8 experts with biases are not read")

    def close(self) -> None:
        """Closes the files."""
        self._folder.close()

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert."""
        h, i = self._hidden, self._inter
        if not self._group.fused:
            gate = self._separate(expert, "gate", i, h) if self._gated else None
            return gate, self._separate(expert, "up", i, h), self._separate(expert, "down", h, i)
        down = _matrix(*self._fused("down_proj", expert, h, i))
        if not self._gated:
            return None, _matrix(*self._fused("up_proj", expert, i, h)), down
        codes, scales = self._fused("gate_up_proj", expert, 2 * i, h)
        return _matrix(codes[:i], scales[:i]), _matrix(codes[i:], scales[i:]), down

    def biases(self, expert: int) -> dict[str, Tensor]:
        """See `Source`."""
        return separate_biases(self._folder, self._group, expert, self._hidden, self._inter)

    def _separate(self, expert: int, projection: str, n: int, k: int) -> PublishedMatrix:
        name = self._group.separate[expert, projection]
        codes = self._folder.read(name, (n, k), dtypes=_CODE_DTYPES)
        beside = self._group.beside.get("scale_inv") or self._group.beside["scale"]
        scale = beside.get((expert, projection))
        if scale is None:
            raise WeightFileError(f"{self._where(name)}: there are no scales beside it")
        shape = self._folder.entry(scale).shape
        if _form(shape, n, k) is None:
            raise self._wrong_shape(scale, shape, n, k)
        return fp8_matrix(codes, self._folder.read(scale, shape, dtypes=_SCALE_DTYPES))

    def _fused(self, role: str, expert: int, n: int, k: int) -> tuple[Tensor, Tensor]:
        experts = self.n_experts
        name = self._group.fused[role]
        codes = self._folder.read(name, (experts, n, k), expert, dtypes=_CODE_DTYPES)
        scale = self._group.fused_scales.get(role)
        if scale is None:
            raise WeightFileError(f"{self._where(name)}: there are no scales beside it")
        shape = self._folder.entry(scale).shape
        fits = _form(shape[1:], n, k) is not None
        if role == "gate_up_proj" and len(shape) == 3 and shape[1] % 2 == 0:
            fits = fits or _form((shape[1] // 2, shape[2]), n // 2, k) is not None
        if not fits or shape[:1] != (experts,):
            raise self._wrong_shape(scale, shape, n, k)
        return codes, _per_row(self._folder.read(scale, shape, expert, dtypes=_SCALE_DTYPES), n, k)

    def _where(self, name: str) -> str:
        return f"{self._folder.file_of(name).path}: tensor {name!r}"

    def _wrong_shape(self, name: str, shape: tuple[int, ...], n: int, k: int) -> WeightFileError:
        blocks = [blocks_along(n, FP8_BLOCK), blocks_along(k, FP8_BLOCK)]
        stack = f", each for {self.n_experts} experts" if self._group.fused else ""
        return WeightFileError(
            f"{self._where(name)}: got shape {list(shape)}, expected {blocks} (blocks of 128 x 128), [{n}, 1], [{n}] "
            f"or one scale{stack}"
        )


def fp8_matrix(codes: Tensor, scales: Tensor) -> PublishedMatrix:
    """A matrix from its bits, uint8 [n, k], and scales in any of the forms above. ValueError if these do not fit."""
    n, k = codes.shape
    if _form(tuple(scales.shape), n, k) is None:
        raise ValueError(f"got FP8 scales of shape {list(scales.shape)}, which do not fit a matrix {[n, k]}")
    return _matrix(codes, _per_row(scales, n, k))


def _matrix(codes: Tensor, scales: Tensor) -> PublishedMatrix:
    return PublishedMatrix("fp8", (codes, scales), (codes.shape[0], codes.shape[1]))


def _form(shape: tuple[int, ...], n: int, k: int) -> str | None:
    """What scales of this shape are for; None if they do not fit a matrix [n, k]."""
    if shape == (blocks_along(n, FP8_BLOCK), blocks_along(k, FP8_BLOCK)):
        return "blocks"
    if shape in ((n,), (n, 1)):
        return "rows"
    return "one" if shape in ((), (1,), (1, 1)) else None


def _per_row(scales: Tensor, n: int, k: int) -> Tensor:
    """fp32 [n, ceil(k/128)]."""
    if scales.dtype is torch.uint8:
        scales = torch.exp2(scales.float() - 127)
    form = _form(tuple(scales.shape), n, k)
    if form is None:  # gate, then up
        return torch.cat([_per_row(half, n // 2, k) for half in scales.chunk(2)])
    if form == "blocks":
        return expand_rows(scales, n)
    rows = scales.float().view(n if form == "rows" else 1, 1)
    return rows.expand(n, blocks_along(k, FP8_BLOCK)).contiguous()
