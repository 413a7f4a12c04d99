"""The single kernels of one level on NumPy arrays; `place` decides where every operand lies."""

import numpy as np

from ktmoe import _ext

from . import bf16, layout
from .experts import SILU, Activation
from .formats import ORACLES, FormatOracle
from .memory import Heap, Place, put, put_rows
from .published import Parts, arrays

_k = _ext.testing


def _rows(values: np.ndarray) -> object:
    return bf16.tensor(values) if values.dtype == np.uint16 else values


class Kernels:
    def __init__(self, isa: str, fmt: str = "bf16", place: Place | None = None) -> None:
        self.isa, self.fmt = isa, fmt
        self.place: Place = place or Heap()

    @property
    def oracle(self) -> FormatOracle:
        return ORACLES[self.fmt]

    def _index(self, index: np.ndarray | None) -> np.ndarray | None:
        return None if index is None else put(self.place, index.astype(np.int32), 4)

    # --- weights ---
    def pack(
        self, w: np.ndarray, up: np.ndarray | None = None, ld: int | None = None, zeroed: bool = True
    ) -> np.ndarray:
        """Packed bytes of bf16 bits [n, k]."""
        n, k = w.shape
        dst = self.place.empty((_k.packed_bytes(self.fmt, layout.n_panels(n, up is not None), k),), np.uint8)
        if zeroed:
            dst[...] = 0
        gate = put_rows(self.place, w, ld or k)
        _k.pack(self.isa, self.fmt, _rows(gate), None if up is None else _rows(put_rows(self.place, up, ld or k)), dst)
        return dst

    def repack(self, parts: Parts, n: int, k: int) -> np.ndarray:
        """Packed bytes of a published matrix."""
        dst = self.place.empty((_k.packed_bytes(self.fmt, layout.n_panels(n, False), k),), np.uint8)
        placed = [put(self.place, part, part.itemsize) for part in parts]
        _k.repack(self.fmt, arrays(placed), n, k, dst)
        return dst

    # --- forward ---
    def quantize_rows(self, x: np.ndarray, ld: int, padded: int) -> tuple[np.ndarray, np.ndarray]:
        q = self.place.empty((len(x), padded), np.int8)
        scale = self.place.empty((len(x),), np.float32, 4)
        _k.quantize_rows(self.isa, _rows(put_rows(self.place, x, ld)), q, scale)
        return q, scale

    def operand(
        self,
        rows: np.ndarray,
        m: int,
        k: int,
        scale: np.ndarray | None = None,
        index: np.ndarray | None = None,
        ld: int = 0,
    ) -> np.ndarray:
        """rows: bf16 bits [*, k], or int8 [*, k padded] with their scales."""
        dst = self.place.empty((int(_k.operand_bytes(self.isa, self.fmt, m, k)),), np.uint8)
        source = put_rows(self.place, rows, ld or rows.shape[1])
        scales = None if scale is None else put(self.place, scale, 4)
        _k.pack_operand(self.isa, self.fmt, _rows(source), self._index(index), scales, m, k, dst)
        return dst

    def _c(self, blocks: int, m: int, start: np.ndarray | None = None) -> np.ndarray:
        c = self.place.empty((blocks, -(-m // 32) * 32, 32), np.float32)
        if start is not None:
            c[:, :m] = start
        return c

    def forward(
        self,
        operand: np.ndarray,
        m: int,
        packed: np.ndarray,
        panels: int,
        k: int,
        part: tuple[int, int] | None = None,
        plus: tuple[np.ndarray, np.ndarray, int] | None = None,
    ) -> np.ndarray:
        """C blocks [panels, m, 32]; plus: operand, weights and k of a bf16 product that is added. An epilogue gets the
        same, each row and panel once."""
        p0, p1 = part or (0, panels)
        c, work = self._c(p1 - p0, m), self._c(p1 - p0, m)
        sums, taken = np.zeros((p1 - p0, m, 32), np.float32), np.zeros((p1 - p0, m), np.int32)
        arguments = (self.isa, self.fmt, operand, m, packed, panels, k, p0, p1)
        _k.forward(*arguments, c, plus)
        _k.forward_taken(*arguments, work, plus, sums, taken)
        assert (taken == 1).all()
        assert sums.tobytes() == np.ascontiguousarray(c[:, :m]).tobytes()
        return c[:, :m]

    # --- backward ---
    def grad_operand(
        self,
        dy: np.ndarray,
        m: int,
        panels: int,
        column_scale: np.ndarray | None = None,
        index: np.ndarray | None = None,
        ld: int = 0,
    ) -> np.ndarray:
        dst = self.place.empty((int(_k.grad_operand_bytes(self.isa, m, panels)),), np.uint8)
        source = put_rows(self.place, dy, ld or dy.shape[1])
        scale = None if column_scale is None else put(self.place, column_scale, 4)
        _k.pack_grad_operand(self.isa, _rows(source), self._index(index), scale, m, dy.shape[1], panels, dst)
        return dst

    def backward(
        self,
        operand: np.ndarray,
        m: int,
        packed: np.ndarray,
        panels: int,
        k: int,
        part: tuple[int, int] | None = None,
        start: np.ndarray | None = None,
    ) -> np.ndarray:
        """dY W, [m, columns of the k-steps of `part`] in natural order."""
        step = int(_k.k_step(self.fmt))
        s0, s1 = part or (0, -(-k // step))
        blocks = (s1 - s0) * step // 32
        c = self._c(blocks, m, None if start is None else start.reshape(m, blocks, 32).swapaxes(0, 1))
        _k.backward(self.isa, self.fmt, operand, m, packed, panels, k, s0, s1, c, start is not None)
        return c[:, :m].swapaxes(0, 1).reshape(m, blocks * 32)

    # --- gradients of small matrices ---
    def outer(
        self,
        p: np.ndarray,
        q: np.ndarray,
        stride: int,
        tiles: int,
        index: np.ndarray | None = None,
        start: np.ndarray | None = None,
        p_ld: int = 0,
        q_ld: int = 0,
        out_ld: int = 0,
    ) -> np.ndarray:
        m, columns = p.shape
        dst = self.place.empty((int(_k.outer_operand_bytes(self.isa, m, columns)),), np.uint8)
        _k.pack_outer_operand(self.isa, _rows(put_rows(self.place, p, p_ld or columns)), m, columns, dst)
        first = np.zeros((columns, 16 * tiles), np.float32) if start is None else start
        out = put_rows(self.place, first, out_ld or 16 * tiles)
        if start is None:
            out[...] = np.nan
        source = put_rows(self.place, q, q_ld or q.shape[1])
        _k.outer(self.isa, dst, m, columns, _rows(source), self._index(index), stride, tiles, out, start is not None)
        return out

    # --- elementwise ---
    def activate(self, c: np.ndarray, ld: int = 0, activation: Activation = SILU) -> tuple[np.ndarray, np.ndarray]:
        """c [panels, m, 32] -> h and gate|up as bf16 bits."""
        panels, m, _ = c.shape
        blocks = self._c(panels, m, c)
        h_columns = panels * (16 if activation.gated else 32)
        h = put_rows(self.place, np.zeros((m, h_columns), np.uint16), ld + h_columns)
        gate_up = put_rows(self.place, np.zeros((m, 32 * panels), np.uint16), ld + 32 * panels)
        _k.activate(self.isa, *activation.arguments, blocks, m, panels, _rows(h), _rows(gate_up))
        return h, gate_up

    def activate_backward(
        self,
        dh: np.ndarray,
        gate_up: np.ndarray,
        weight: np.ndarray,
        ld: int = 0,
        activation: Activation = SILU,
    ) -> dict[str, np.ndarray]:
        """dh [blocks, m, 32], gate|up bf16 bits [m, 32 * panels] -> gradient of gate|up, h (bf16 bits) and dot."""
        m, columns = gate_up.shape
        h_columns = columns // (2 if activation.gated else 1)
        dgate_up = put_rows(self.place, np.zeros((m, columns), np.uint16), ld + columns)
        h = put_rows(self.place, np.zeros((m, h_columns), np.uint16), ld + h_columns)
        dot = put(self.place, np.zeros(m, np.float32), 4)
        kept = put_rows(self.place, gate_up, ld + columns)
        weights = put(self.place, weight, 4)
        blocks = self._c(len(dh), m, dh)
        panels = columns // 32
        _k.activate_backward(
            self.isa, *activation.arguments, blocks, m, panels, _rows(kept), weights, _rows(dgate_up), _rows(h), dot
        )
        return {"gradient": dgate_up, "h": h, "dot": dot}

    def add_bias(self, c: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """c [blocks, m, 32] + bias [32 * blocks]."""
        blocks, m, _ = c.shape
        values = self._c(blocks, m, c)
        _k.add_bias(self.isa, values, m, blocks, put(self.place, bias, 4))
        return values[:, :m]

    def dot_rows(self, rows: np.ndarray, v: np.ndarray, start: np.ndarray, ld: int = 0) -> np.ndarray:
        """start + rows (bf16 bits [m, n]) times v [n padded to 16]."""
        dot = put(self.place, start, 4)
        source = put_rows(self.place, rows, ld + rows.shape[1])
        _k.dot_rows(self.isa, _rows(source), put(self.place, v, 4), dot)
        return dot

    def c_out(self, c: np.ndarray, row_factor: np.ndarray, ld: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """c [blocks, m, 32] -> bf16 bits of 0.5 * row_factor * C, and C as fp32 rows; its bf16 rows are checked."""
        blocks, m, _ = c.shape
        rounded = put_rows(self.place, np.zeros((m, 32 * blocks), np.uint16), ld + 32 * blocks)
        rows = put_rows(self.place, np.zeros((m, 32 * blocks), np.float32), ld + 32 * blocks)
        factors = put(self.place, row_factor, 4)
        _k.c_to_bf16(self.isa, self._c(blocks, m, c), m, blocks, 0.5, factors, _rows(rounded))
        _k.c_to_rows(self.isa, self._c(blocks, m, c), m, blocks, rows)
        streamed = self.place.empty((m, 32 * blocks), np.uint16)
        _k.c_to_rows(self.isa, self._c(blocks, m, c), m, blocks, _rows(streamed))
        assert (streamed == bf16.narrow(rows)).all()
        return rounded, rows

    def combine(
        self, rows: np.ndarray, row_of: np.ndarray, weight: np.ndarray, hidden: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The weighted sum of the rows named by row_of (-1: none), and its first `hidden` values as bf16 bits.

        bf16 rows are checked to give what the same numbers give as fp32.
        """
        total = put(self.place, np.zeros(rows.shape[1], np.float32), 4)
        _k.combine(
            self.isa,
            put_rows(self.place, rows, rows.shape[1] + 3),
            put(self.place, row_of, 4),
            put(self.place, weight, 4),
            total,
        )
        same, few = put(self.place, np.zeros(rows.shape[1], np.float32), 4), bf16.narrow(rows)
        args = put(self.place, row_of, 4), put(self.place, weight, 4)
        _k.combine(self.isa, _rows(put_rows(self.place, few, rows.shape[1] + 3)), *args, same)
        exact = put(self.place, np.zeros(rows.shape[1], np.float32), 4)
        _k.combine(self.isa, put_rows(self.place, bf16.widen(few), rows.shape[1] + 3), *args, exact)
        assert same.tobytes() == exact.tobytes()
        rounded = put(self.place, np.zeros(hidden, np.uint16), 2)
        _k.round_row(self.isa, put(self.place, total[:hidden], 4), bf16.tensor(rounded))
        return total, rounded
