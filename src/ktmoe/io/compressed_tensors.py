"""The experts of a compressed-tensors checkpoint in the format "pack-quantized", 4 bits (Kimi-K2 and more).

Of a matrix [n, k] in groups of g = 32, 64 or 128 along k:
    .weight_packed    int32 [n, ceil(k/8)]: eight codes each, the first in the lowest four bits; code 8 is zero
    .weight_scale     bf16, fp16 or fp32 [n, k/g], or [n, 1]: one scale a row
    .weight_zero_point    int32 [ceil(n/8), k/g], eight rows in a word like the codes, or int8 [n, k/g] without the
                      added 8: the code that is zero, where it is not 8; columns as the scales have
    .weight_shape     int64 [2] = (n, k); optional
In memory the int32 are, byte by byte, what the engine takes: the even k in the low nibble. Scales that are not bf16 are
rounded to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightFileError
from .experts import Group, count_experts, projections_of, separate_biases
from .published import PublishedMatrix, blocks_along
from .safetensors_dir import SafetensorsDir
from .source import Source

_PACKED_DTYPES = {"I32": torch.int32, "U8": torch.uint8}
_ZERO_DTYPES = {"I32": torch.int32, "I8": torch.int8}
_INTEGER_DTYPES = {"I64": torch.int64, "I32": torch.int32}
_GROUPS = (32, 64, 128)


class CompressedTensorsSource(Source):
    """See `Source`."""

    kind = "int4"

    def __init__(
        self, folder: SafetensorsDir, group: Group, layer: int, hidden: int, inter: int, gated: bool = True
    ) -> None:
        self._folder = folder
        self._group = group
        self._hidden, self._inter = hidden, inter
        self._gated = gated
        self._shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        self._refuse_what_is_not_built()
        self.n_experts = count_experts(folder, group, layer, gated)
        self._groups = {p: self._group_size(0, p) for p in projections_of(gated)}
        if gated and self._groups["gate"] != self._groups["up"]:
            raise WeightFileError(
                f"{folder.folder}, layer {layer}: gate has groups of {self._groups['gate']} and up of "
                f"{self._groups['up']} weights, expected the same"
            )
        self._zero = "z" if "zero_point" in group.beside else ""
        self.formats = (f"int4_g{self._groups['up']}{self._zero}", f"int4_g{self._groups['down']}{self._zero}")
        """Formats of gate/up and of down."""

    def close(self) -> None:
        """Closes the files."""
        self._folder.close()

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert."""
        gate = self._matrix(expert, "gate") if self._gated else None
        return gate, self._matrix(expert, "up"), self._matrix(expert, "down")

    def biases(self, expert: int) -> dict[str, Tensor]:
        """See `Source`."""
        return separate_biases(self._folder, self._group, expert, self._hidden, self._inter)

    def _refuse_what_is_not_built(self) -> None:
        if names := self._group.beside.get("g_idx"):
            where = self._where(next(iter(names.values())))
            raise WeightFileError(f"{where}: an activation order is not supported, only groups in order")

    def _where(self, name: str) -> str:
        return f"{self._folder.file_of(name).path}: tensor {name!r}"

    def _name(self, suffix: str, expert: int, projection: str) -> str:
        name = self._group.beside.get(suffix, {}).get((expert, projection))
        if name is None:
            packed = self._group.beside["packed"][expert, projection]
            raise WeightFileError(f"{self._where(packed)}: there is no weight_{suffix} beside it")
        return name

    def _group_size(self, expert: int, projection: str) -> int:
        """From the shape of the scales."""
        _, k = self._shapes[projection]
        name = self._name("scale", expert, projection)
        shape = self._folder.entry(name).shape
        columns = shape[1] if len(shape) == 2 else 0
        for size in _GROUPS:
            if columns == blocks_along(k, size):
                return size
        if columns == 1:
            return max(_GROUPS)
        raise WeightFileError(
            f"{self._where(name)}: got shape {list(shape)}, expected one scale for each row, or for each 32, 64 or 128 "
            f"of its {k} weights"
        )

    def _matrix(self, expert: int, projection: str) -> PublishedMatrix:
        n, k = self._shapes[projection]
        self._check_shape(expert, projection)
        size = self._groups[projection]
        scales = self._scales(expert, projection, size)
        zeros = self._zeros(expert, projection, scales.shape[1]) if self._zero else None
        parts = (self._codes(expert, projection, zeros), scales)
        return PublishedMatrix(f"int4_g{size}{self._zero}", parts if zeros is None else (*parts, zeros), (n, k))

    def _codes(self, expert: int, projection: str, zeros: Tensor | None) -> Tensor:
        """uint8 [n, kp/2]; behind k the code of zero."""
        n, k = self._shapes[projection]
        name = self._name("packed", expert, projection)
        columns = blocks_along(k, 8) if self._folder.entry(name).dtype == "I32" else blocks_along(k, 2)
        stored = self._folder.read(name, (n, columns), dtypes=_PACKED_DTYPES).view(torch.uint8)
        padded = blocks_along(k, self._groups[projection]) * self._groups[projection]
        if stored.shape[1] * 2 == k == padded:
            return stored
        zero = torch.full((n,), 8, dtype=torch.uint8) if zeros is None else zeros[:, -1]
        codes = (zero | zero << 4)[:, None].repeat(1, padded // 2)
        codes[:, : blocks_along(k, 2)] = stored[:, : blocks_along(k, 2)]
        if k % 2:
            codes[:, k // 2] = (codes[:, k // 2] & 15) | zero << 4
        return codes

    def _zeros(self, expert: int, projection: str, columns: int) -> Tensor:
        """uint8 [n, kp/g] 0..15."""
        n, _ = self._shapes[projection]
        name = self._name("zero_point", expert, projection)
        entry = self._folder.entry(name)
        stored = 1 if entry.shape[-1:] == (1,) else columns
        if entry.dtype == "I8":
            zeros = self._folder.read(name, (n, stored), dtypes=_ZERO_DTYPES) + 8
            if ((zeros < 0) | (zeros > 15)).any():
                raise WeightFileError(f"{self._where(name)}: got a value outside -8..7")
        else:
            words = self._folder.read(name, (blocks_along(n, 8), stored), dtypes=_ZERO_DTYPES)
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            zeros = (words[:, None, :] >> shifts[:, None] & 15).reshape(-1, stored)[:n]
        return zeros.to(torch.uint8).expand(n, columns).contiguous()

    def _scales(self, expert: int, projection: str, size: int) -> Tensor:
        """bf16 [n, kp/g]."""
        n, k = self._shapes[projection]
        name = self._name("scale", expert, projection)
        columns = blocks_along(k, size)
        if self._folder.entry(name).shape == (n, 1):
            return self._folder.read(name, (n, 1)).to(torch.bfloat16).expand(n, columns).contiguous()
        return self._folder.read(name, (n, columns)).to(torch.bfloat16)

    def _check_shape(self, expert: int, projection: str) -> None:
        name = self._group.beside.get("shape", {}).get((expert, projection))
        if name is None:
            return
        got = self._folder.read(name, (2,), dtypes=_INTEGER_DTYPES).tolist()
        if tuple(got) != self._shapes[projection]:
            raise WeightFileError(f"{self._where(name)}: got {got}, expected {list(self._shapes[projection])}")
