"""Formats that are unpacked in cache or registers: both GEMMs against float64 on the weights that the bytes mean."""

import numpy as np
import pytest
from oracle import bf16, child, int4, layout
from oracle.addend import Addend
from oracle.bounds import U16, assert_same_bits, assert_within, sum_bound
from oracle.formats import int8_quantize_rows
from oracle.kernels import Kernels
from oracle.memory import Guarded, Heap, Place
from oracle.published import PUBLISHED
from oracle.registry import BLOCK_ROWS, UNPACKED, each_isa, span_rows

from ktmoe import _ext

each_unpacked = pytest.mark.parametrize("fmt", UNPACKED)
# Few rows are unpacked in registers, more in cache; every way to fill the row groups of the levels
ROWS = [1, 2, 3, 4, 7, 9, 12, 13, 16, 17, 24, 25, 32, 33, 64, 97]
EXACT_FP8_ROWS = 96  # for more, AMX scales the weights instead of the sums
# n, k: ragged and whole k-steps (64 to 256), more than one block of 8 direct steps
SHAPES = [(1, 1), (33, 300), (40, 1024), (200, 1100)]


def rounding_bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What rounding x to int8 costs: at most half a step, max |x| / 254 of its 32 k, for each weight."""
    padded = [np.pad(a, ((0, 0), (0, -a.shape[1] % 32))).reshape(len(a), -1, 32) for a in (x, w)]
    return np.abs(padded[0]).max(axis=2) / 254 @ np.abs(padded[1]).sum(axis=2).T


def forward_bound(few: bool, x: np.ndarray, w: np.ndarray, *, exact_weights: bool) -> np.ndarray:
    """few: so few rows that activations are rounded to int8, one scale per 32 k; otherwise weights may be, to bf16."""
    bound = sum_bound(x.shape[1] + 1, np.abs(x) @ np.abs(w).T, 0.0 if few or exact_weights else U16)
    # 2^-6 more: scale * q and the minimum of a block are multiplied apart, and each product is rounded.
    return bound + rounding_bound(x, w) * (1 + 2.0**-6) if few else bound


class Problem:
    def __init__(self, isa: str, fmt: str, n: int, k: int, tokens: int, place: Place | None = None) -> None:
        rng = np.random.default_rng(n + 7 * k)
        self.kernels, self.fmt, self.n, self.k = Kernels(isa, fmt, place), fmt, n, k
        self.panels = layout.n_panels(n, paired=False)
        if fmt == "int4":
            self.packed = self.kernels.pack(bf16.normal(rng, n, k))
            levels, self.scale = int4.unpack(self.packed, self.panels, k)
            self.w = levels.astype(np.float64)  # the column scale is applied apart
        else:
            parts = PUBLISHED[fmt].random(rng, n, k, 1.0)
            self.packed = self.kernels.repack(parts, n, k)
            self.w = np.zeros((32 * self.panels, k))
            self.w[:n] = PUBLISHED[fmt].dequantize(parts, k)
        self.x = bf16.normal(rng, tokens, k)
        self.dy = bf16.normal(rng, tokens, n)

    def rows(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self.fmt != "int4":
            return self.x, None
        q, scale = int8_quantize_rows(bf16.widen(self.x))
        rows = np.zeros((len(q), -(-self.k // 64) * 64), np.int8)
        rows[:, : self.k] = q
        return rows, scale

    def forward(self, m: int, plus: Addend | None = None) -> np.ndarray:
        rows, scale = self.rows()
        operand = self.kernels.operand(rows[:m], m, self.k, None if scale is None else scale[:m])
        c = self.kernels.forward(operand, m, self.packed, self.panels, self.k, plus=plus and plus.argument)
        return c.swapaxes(0, 1).reshape(m, -1)

    def backward(self, m: int) -> np.ndarray:
        operand = self.kernels.grad_operand(self.dy[:m], m, self.panels)
        return self.kernels.backward(operand, m, self.packed, self.panels, self.k)


@each_isa
@each_unpacked
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_both_directions(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    problem = Problem(isa, fmt, *shape, tokens=max(ROWS))
    for m in (m for m in ROWS if m <= BLOCK_ROWS[isa]):
        what = f"{isa}/{fmt} m={m} n,k={shape}"
        rows, scale = problem.rows()
        got = problem.forward(m)
        if scale is not None:
            sums = rows[:m, : problem.k].astype(np.int64) @ problem.w.astype(np.int64).T
            chain = sums.astype(np.int32).astype(np.float32) * scale[:m, None] * problem.scale
            assert_same_bits(got, chain, f"forward {what}")
        else:
            x = bf16.widen(problem.x[:m]).astype(np.float64)
            exact = fmt == "fp8" and m <= EXACT_FP8_ROWS
            bound = forward_bound(m <= span_rows(fmt, isa), x, problem.w, exact_weights=exact)
            assert_within(got, x @ problem.w.T, bound, f"forward {what}")
        dy = bf16.widen(problem.dy[:m]).astype(np.float64)
        w = problem.w[: problem.n]
        bound = sum_bound(problem.n, np.abs(dy) @ np.abs(w), 0.0 if fmt == "int4" else U16)
        assert_within(problem.backward(m)[:, : problem.k], dy @ w, bound, f"backward {what}")


@each_isa
@each_unpacked
def test_another_product_is_added(isa: str, fmt: str) -> None:
    problem = Problem(isa, fmt, 100, 1100, tokens=70)
    for m in (1, 2, 4, 8, 9, 16, 17, 20, 35, 70):
        plus = Addend(isa, m, problem.panels, 40)
        alone, got = problem.forward(m).astype(np.float64), problem.forward(m, plus)
        x = bf16.widen(problem.x[:m]).astype(np.float64)
        magnitude = np.abs(x) @ np.abs(problem.w).T if fmt != "int4" else np.abs(alone)
        bound = sum_bound(problem.k + plus.k + 1, magnitude + plus.magnitude) * 2
        assert_within(got, alone + plus.sums, bound, f"m={m}")


@each_isa
@each_unpacked
@pytest.mark.parametrize("side", ["right", "left"])
def test_nothing_outside_the_operands_is_touched(isa: str, fmt: str, side: str) -> None:
    def body(say: object) -> None:
        for m in (1, 2, 4, 13, 17, 33):
            for n, k in ((1, 1), (33, 300)):
                say(f"m={m} n={n} k={k}")  # type: ignore[operator]
                guarded = Problem(isa, fmt, n, k, m, Guarded(side))
                free = Problem(isa, fmt, n, k, m, Heap())
                assert_same_bits(guarded.forward(m), free.forward(m), "forward")
                assert_same_bits(guarded.backward(m), free.backward(m), "backward")

    child.run(body).check()


def test_direct_formats_are_the_other_grid() -> None:
    assert all(_ext.testing.direct(f) != f for f in UNPACKED)
