"""C = dY W from the packed bytes of the forward, columns in natural k order."""

import numpy as np
import pytest
from oracle import bf16, layout
from oracle.bounds import U16, assert_within, sum_bound
from oracle.formats import ORACLES
from oracle.kernels import Kernels
from oracle.registry import BLOCK_ROWS, each_format, each_isa

ROWS = [1, 2, 3, 5, 6, 7, 12, 13, 16, 17, 31, 32, 33, 64, 65]
# n, k; many panels pass the rounds that are expanded into L1 (2 panels or more)
SHAPES = [(1, 1), (32, 64), (33, 65), (70, 100), (300, 40)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


class Problem:
    def __init__(self, isa: str, fmt: str, n: int, k: int, tokens: int, paired: bool = False, columns: int = 0) -> None:
        """dY has `columns` columns in panel order (default: those of the whole padded matrix)."""
        rng = np.random.default_rng(11)
        self.kernels, self.k, self.panels = Kernels(isa, fmt), k, layout.n_panels(n, paired)
        self.packed = self.kernels.pack(bf16.normal(rng, n, k), bf16.normal(rng, n, k) if paired else None)
        elements, self.scale = layout.unpack(fmt, self.packed, self.panels, k)
        unscaled = ORACLES[fmt].dequantize(elements, np.ones_like(self.scale))
        self.columns = columns or 32 * self.panels
        self.w = np.zeros((self.columns, self.padded), np.float64)
        self.w[:, :k] = unscaled[: self.columns]
        self.dy = bf16.normal(rng, tokens, self.columns)

    @property
    def padded(self) -> int:
        step = self.kernels.oracle.k_step
        return -(-self.k // step) * step

    def operand(
        self, m: int, scale: np.ndarray | None = None, index: np.ndarray | None = None, ld: int = 0
    ) -> np.ndarray:
        return self.kernels.grad_operand(self.dy, m, self.panels, scale, index, ld)

    def run(self, m: int, operand: np.ndarray, **options: object) -> np.ndarray:
        return self.kernels.backward(operand, m, self.packed, self.panels, self.k, **options)

    def want(self, rows: np.ndarray, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        dy = bf16.widen(self.dy[rows]).astype(np.float64)
        if scale is not None:
            dy = dy * scale[: self.columns]
        return dy @ self.w, np.abs(dy) @ np.abs(self.w)

    def check(self, got: np.ndarray, rows: np.ndarray, what: str, columns: slice = slice(None)) -> None:
        want, magnitude = self.want(rows)
        assert_within(got, want[:, columns], sum_bound(self.columns, magnitude[:, columns]), what)


@each_isa
@each_format
@each_shape
def test_every_number_of_rows(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    problem = Problem(isa, fmt, *shape, tokens=max(ROWS))
    for m in (m for m in ROWS if m <= BLOCK_ROWS[isa]):
        got = problem.run(m, problem.operand(m))
        problem.check(got, np.arange(m), f"{isa}/{fmt} m={m} n,k={shape}")
        assert (got[:, problem.k :] == 0).all(), "columns beyond k come from padding"


@each_isa
@each_format
def test_a_full_block_of_rows(isa: str, fmt: str) -> None:
    m = BLOCK_ROWS[isa]
    problem = Problem(isa, fmt, 40, 64, tokens=m)
    problem.check(problem.run(m, problem.operand(m)), np.arange(m), f"m={m}")


@each_isa
@each_format
def test_many_panels(isa: str, fmt: str) -> None:
    """A contraction in several parts, times several blocks of rows; a row does not depend on how a call is cut."""
    problem = Problem(isa, fmt, 750, 260, tokens=100)
    step = problem.kernels.oracle.k_step
    for m in (m for m in (20, 48, 100) if m <= BLOCK_ROWS[isa]):
        operand = problem.operand(m)
        got = problem.run(m, operand)
        problem.check(got, np.arange(m), f"m={m}")
        for s in range(problem.padded // step):
            part = problem.run(m, operand, part=(s, s + 1))
            np.testing.assert_array_equal(part, got[:, s * step : (s + 1) * step], f"m={m} step {s}")


@each_isa
@each_format
def test_columns_come_in_natural_order(isa: str, fmt: str) -> None:
    """W = one number per k: a permuted column would show at once."""
    k = 150
    kernels = Kernels(isa, fmt)
    w = np.zeros((32, k), np.float32)
    w[0] = np.arange(k) % 100 + 1
    w[0, 0] = 127  # scale 1: integer levels stay what they are
    packed = kernels.pack(bf16.narrow(w))
    dy = np.zeros((3, 32), np.uint16)
    dy[:, 0] = bf16.narrow(np.array([1, 2, -1], np.float32))
    for m in (1, 3):
        got = kernels.backward(kernels.grad_operand(dy, m, 1), m, packed, 1, k)
        np.testing.assert_array_equal(got[:, :k], np.array([[1], [2], [-1]])[:m] * w[:1])


@each_isa
@each_format
def test_pairs_of_matrices(isa: str, fmt: str) -> None:
    """dY columns in panel order: gate 16, up 16, gate 16, ..."""
    problem = Problem(isa, fmt, 40, 96, tokens=20, paired=True)
    for m in (1, 3, 20):
        problem.check(problem.run(m, problem.operand(m)), np.arange(m), f"m={m}")


@each_isa
@each_format
def test_missing_columns_count_as_zero(isa: str, fmt: str) -> None:
    for columns in (1, 15, 16, 17, 33, 63):
        problem = Problem(isa, fmt, 64, 70, tokens=18, columns=columns)
        for m in (2, 18):
            problem.check(problem.run(m, problem.operand(m)), np.arange(m), f"m={m} columns={columns}")


@each_isa
@each_format
def test_rows_are_gathered_by_index(isa: str, fmt: str) -> None:
    problem = Problem(isa, fmt, 40, 70, tokens=30)
    for m in (1, 3, 17, 40):
        index = np.random.default_rng(m).integers(0, 30, m)
        problem.check(problem.run(m, problem.operand(m, index=index, ld=150)), index, f"m={m}")


@each_isa
@each_format
def test_a_range_of_steps(isa: str, fmt: str) -> None:
    problem = Problem(isa, fmt, 40, 300, tokens=18)
    step = problem.kernels.oracle.k_step
    last = problem.padded // step
    for m in (1, 18):
        operand = problem.operand(m)
        for s0, s1 in ((0, 1), (1, 3), (last - 1, last)):
            got = problem.run(m, operand, part=(s0, s1))
            problem.check(got, np.arange(m), f"m={m} steps {s0}..{s1}", slice(s0 * step, s1 * step))


@each_isa
@each_format
def test_accumulate(isa: str, fmt: str) -> None:
    problem = Problem(isa, fmt, 300, 70, tokens=33)
    for m in (1, 2, 3, 16, 33):
        start = np.random.default_rng(m).standard_normal((m, problem.padded), dtype=np.float32) * 8
        want, magnitude = problem.want(np.arange(m))
        bound = sum_bound(problem.columns + 1, magnitude + np.abs(start))
        assert_within(problem.run(m, problem.operand(m), start=start), want + start, bound, f"m={m}")


@each_isa
@each_format
def test_column_scales(isa: str, fmt: str) -> None:
    """Powers of two are exact; for the rest a level may round the scaled gradient to bf16."""
    problem = Problem(isa, fmt, 70, 64, tokens=18)
    rng = np.random.default_rng(2)
    for scale, term_error in ((2.0 ** rng.integers(-9, 9, 96), 0.0), (rng.uniform(0.001, 3, 96), U16)):
        scale = scale.astype(np.float32)
        for m in (1, 2, 3, 18):
            want, magnitude = problem.want(np.arange(m), scale)
            bound = sum_bound(problem.columns, magnitude, term_error + 2.0**-23)
            assert_within(problem.run(m, problem.operand(m, scale)), want, bound, f"m={m}")
