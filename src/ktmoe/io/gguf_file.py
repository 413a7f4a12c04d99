"""The experts of one layer in GGUF files.

    blk.{L}.ffn_{gate,up,down}_exps.weight      stacks [E, n, k]
    blk.{L}.ffn_gate_up_exps.weight             gate above up, [E, 2*inter, hidden]
    blk.{L}.ffn_{gate,up,down}.{e}.weight       one by one, in old files
    blk.{L}.ffn_{gate,up,down}_exps.bias        [E, n], floats
Experts without a gate have up and down alone.

Types that the engine computes with are passed on byte by byte. Others that the `gguf` package can decode become Q8_0,
F16 and F32 become bf16. Gate and up share one format: where their types differ both become Q8_0, or bf16 if one of them
is a float (Q8_0 adds an error of about 0.4 %, far below that of any type of fewer bits).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from torch import Tensor

from ..errors import WeightFileError
from .experts import projections_of
from .gguf_files import GGUF_SUFFIX, OpenFiles, check_known, files_of, headers_of
from .gguf_header import GgufEntry, read_header
from .gguf_types import FLOAT_TYPES, FORMAT_OF, dequantize_rows, kind_of
from .limits import MAX_TENSORS
from .published import PublishedMatrix, plain, quantize
from .source import Source

_Tensors = dict[str, tuple[str, GgufEntry]]  # name -> file and entry
_Stack = tuple[str, str, GgufEntry]  # file, name and entry


@dataclass(frozen=True, slots=True)
class _Piece:
    """One matrix [n, k] of one expert."""

    file: str
    name: str
    type: str
    offset: int
    nbytes: int


def is_gguf(path: str, prefer: bool = False) -> bool:
    """True for a GGUF file, by its name or its first bytes, and for a folder of GGUF files.

    A folder that has safetensors files too counts only with `prefer`.
    """
    if os.path.isdir(path):
        try:
            names = os.listdir(path)
        except OSError:  # named by whoever reads the folder next
            return False
        return any(n.endswith(GGUF_SUFFIX) for n in names) and (
            prefer or not any(n.endswith(".safetensors") for n in names)
        )
    if path.endswith(GGUF_SUFFIX) or not os.path.isfile(path):
        return path.endswith(GGUF_SUFFIX)
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


_ANY_EXPERT = re.compile(r"blk\.[0-9]+\.ffn_(?:(?:gate|up|gate_up|down)_exps|(?:gate|up|down)\.[0-9]+)\..*")


def is_expert(name: str) -> bool:
    """True if this is the name of a tensor of routed experts."""
    return bool(_ANY_EXPERT.fullmatch(name))


_EXPERTS = re.compile(r"blk\.(?P<layer>[0-9]{1,6})\.ffn_(?P<projection>gate|up|gate_up|down)(?:_exps|\.0)\.weight")


def gguf_layers(path: str) -> dict[int, dict[str, GgufEntry]]:
    """Layer -> projection -> its stack, or in old files the first expert's matrix, of each layer that has experts.

    Without layers of multi-token prediction, which come last.
    """
    layers: dict[int, dict[str, GgufEntry]] = {}
    depth = MAX_TENSORS
    for file in files_of(path):
        header = read_header(file)
        if "block_count" in header.keys:
            depth = header.keys["block_count"] - header.keys.get("nextn_predict_layers", 0)
        for match in filter(None, map(_EXPERTS.fullmatch, header.tensors)):
            layers.setdefault(int(match["layer"]), {})[match["projection"]] = header.tensors[match[0]]
    return {layer: layers[layer] for layer in sorted(layers) if layer < depth}


class GgufSource(Source):
    """Reads the experts of one layer one by one; open files, to be closed by close() or `with`."""

    kind = "gguf"

    def __init__(self, path: str, layer: int, hidden: int, inter: int, gated: bool = True) -> None:
        self._where = f"{path}, layer {layer}"
        self._hidden, self._inter = hidden, inter
        self._layer = layer
        self._roles = projections_of(gated)
        self._tensors, self._biases, stamps = _tensors_of(files_of(path), layer)
        if gates := [name for name in self._tensors | self._biases if not gated and ".ffn_gate" in name]:
            raise WeightFileError(f"{self._where}: {gates[0]} is a gate, but the layer has experts without one")
        self._stacked = any("exps" in name for name in self._tensors)
        self.n_experts = self._count()
        """Experts that the files hold for this layer."""
        # A stack has one type; in old files every expert may have another.
        experts = range(1) if self._stacked else range(self.n_experts)
        gate_up = {self._piece(e, p).type for e in experts for p in self._roles[:-1]}
        self.formats = (_common_format(gate_up), _common_format({self._piece(e, "down").type for e in experts}))
        """Formats of gate/up and of down."""
        self._bias_stacks = self._find_biases()
        used = {file for file, _ in (*self._tensors.values(), *self._biases.values())}
        self._files = OpenFiles({file: stamps[file] for file in used})

    def close(self) -> None:
        """Closes the files; harmless if repeated."""
        self._files.close()

    def read(self, expert: int) -> tuple[PublishedMatrix | None, ...]:
        """gate (None without one), up [inter, hidden] and down [hidden, inter] of one expert, in `formats`."""
        gate_up, down = self.formats
        gate = self._piece(expert, "gate") if "gate" in self._roles else None
        return (
            None if gate is None else self._matrix(gate, self._inter, self._hidden, gate_up),
            self._matrix(self._piece(expert, "up"), self._inter, self._hidden, gate_up),
            self._matrix(self._piece(expert, "down"), self._hidden, self._inter, down),
        )

    def biases(self, expert: int) -> dict[str, Tensor]:
        """See `Source`."""
        found = {}
        for role, stack in self._bias_stacks.items():
            piece = self._slice(stack, role, expert)
            found[f"{role}_bias"] = self._bytes(piece).view(FLOAT_TYPES[piece.type]).float()
        return found

    # --- which tensor ---------------------------------------------------------------------------------------------
    def _count(self) -> int:
        if not self._tensors:
            raise WeightFileError(f"{self._where}: no experts (tensors ffn_gate_exps, ffn_up_exps, ...) found")
        if self._stacked:
            file, name, entry = self._stack("down")
            if len(entry.shape) != 3 or entry.shape[0] == 0:
                raise WeightFileError(
                    f"{file}: tensor {name!r}: got shape {list(entry.shape)}, expected [experts, hidden, inter]"
                )
            return entry.shape[0]
        count = 1 + max(int(name.split(".")[3]) for name in self._tensors)
        # The highest number comes from a name, that is from anybody: count the tensors before looking for each.
        if len(self._tensors) != len(self._roles) * count:
            pairs = ((e, p) for e in range(count) for p in self._roles)
            expert, projection = next((e, p) for e, p in pairs if self._old_name(e, p) not in self._tensors)
            raise WeightFileError(f"{self._where}: expert {expert} has no {projection} weight")
        return count

    def _old_name(self, expert: int, projection: str) -> str:
        return f"blk.{self._layer}.ffn_{projection}.{expert}.weight"

    def _stack(self, projection: str) -> _Stack:
        """The stack that holds the weights of this projection."""
        found = self._stack_in(self._tensors, projection, "weight")
        if found is None:
            raise WeightFileError(f"{self._where}: there is no ffn_{projection}_exps.weight")
        return found

    def _stack_in(self, tensors: _Tensors, projection: str, what: str) -> _Stack | None:
        """The stack of this projection alone, or else that of gate and up together."""
        for stack in (projection,) if projection == "down" else (projection, "gate_up"):
            name = f"blk.{self._layer}.ffn_{stack}_exps.{what}"
            if name in tensors:
                return tensors[name][0], name, tensors[name][1]
        return None

    def _piece(self, expert: int, projection: str) -> _Piece:
        n, k = (self._hidden, self._inter) if projection == "down" else (self._inter, self._hidden)
        if not self._stacked:
            name = self._old_name(expert, projection)
            file, entry = self._tensors[name]
            self._check(file, name, entry, (n, k))
            return _Piece(file, name, entry.type, entry.offset, entry.nbytes)
        file, name, entry = self._stack(projection)
        self._check(file, name, entry, (self.n_experts, _halves(name) * n, k))
        return self._slice((file, name, entry), projection, expert)

    def _slice(self, stack: _Stack, projection: str, expert: int) -> _Piece:
        """What of a stack belongs to one projection of one expert."""
        file, name, entry = stack
        halves = _halves(name)
        nbytes = entry.nbytes // (self.n_experts * halves)
        half = 1 if halves == 2 and projection == "up" else 0
        return _Piece(file, name, entry.type, entry.offset + (expert * halves + half) * nbytes, nbytes)

    def _find_biases(self) -> dict[str, _Stack]:
        """Projection -> the stack that holds its biases, of those that have any."""
        found = {}
        for projection in self._roles:
            stack = self._stack_in(self._biases, projection, "bias")
            if stack is None:
                continue
            file, name, entry = stack
            n = self._hidden if projection == "down" else self._inter
            self._check(file, name, entry, (self.n_experts, _halves(name) * n))
            if entry.type not in FLOAT_TYPES:
                expected = ", ".join(FLOAT_TYPES)
                raise WeightFileError(f"{file}: tensor {name!r}: got {entry.type}, expected one of {expected}")
            found[projection] = stack
        return found

    def _check(self, file: str, name: str, entry: GgufEntry, shape: tuple[int, ...]) -> None:
        if entry.shape != shape:
            raise WeightFileError(f"{file}: tensor {name!r}: got shape {list(entry.shape)}, expected {list(shape)}")
        check_known(file, name, entry)

    # --- its bytes ------------------------------------------------------------------------------------------------
    def _bytes(self, piece: _Piece) -> Tensor:
        return self._files.read(piece.file, piece.name, piece.offset, piece.nbytes)

    def _matrix(self, piece: _Piece, n: int, k: int, format: str) -> PublishedMatrix:
        rows = self._bytes(piece).view(n, -1)
        if piece.type in FLOAT_TYPES:
            weights = rows.view(FLOAT_TYPES[piece.type])
            return plain(weights) if format == "bf16" else quantize(weights, format)
        if FORMAT_OF.get(piece.type) == format:
            return PublishedMatrix(format, (rows,), (n, k))
        return quantize(dequantize_rows(rows, kind_of(piece.type)), format)


def _halves(name: str) -> int:
    """2: the stack has gate above up."""
    return 2 if "gate_up" in name else 1


def _common_format(types: set[str]) -> str:
    """One format for matrices of these types."""
    if len(types) == 1:
        return FORMAT_OF.get(next(iter(types)), "q8_0")
    return "bf16" if types & FLOAT_TYPES.keys() else "q8_0"


# --- which tensors ------------------------------------------------------------------------------------------------
def _tensors_of(files: list[str], layer: int) -> tuple[_Tensors, _Tensors, dict[str, tuple[int, ...]]]:
    """Name -> (file, entry) of the weights of a layer's experts, of their biases, and file -> stamp of its header."""
    wanted = re.compile(
        rf"blk\.{layer}\.ffn_(?:(?:gate|up|down|gate_up)_exps|(?:gate|up|down)\.(?:0|[1-9][0-9]{{0,5}}))\."
        r"(?P<what>weight|bias|scale)"
    )
    weights: _Tensors = {}
    biases: _Tensors = {}
    stamps = {}
    for file, header in headers_of(files):
        stamps[file] = header.stamp
        for name, entry in header.tensors.items():
            match = wanted.fullmatch(name)
            if not match:
                continue
            found = weights if match["what"] == "weight" else biases
            if match["what"] == "scale" or (found is biases and "_exps" not in name):
                # To ignore it would be a wrong result without a word.
                raise WeightFileError(f"{file}: tensor {name!r}: a {match['what']} like this is not read")
            if name in found:
                raise WeightFileError(f"{file}: tensor {name!r} is in {found[name][0]} too")
            found[name] = (file, entry)
    return weights, biases, stamps
