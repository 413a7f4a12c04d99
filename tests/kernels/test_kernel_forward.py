"""C = X W^T: bf16 within the bound of its fp32 sums, integer formats bit for bit."""

import numpy as np
import pytest
from oracle import bf16, layout
from oracle.addend import Addend
from oracle.bounds import assert_same_bits, assert_within, sum_bound
from oracle.formats import int8_quantize_rows
from oracle.kernels import Kernels
from oracle.registry import BLOCK_ROWS, ISAS, SCALED, each_format, each_isa

ROWS = [1, 2, 3, 5, 6, 7, 12, 13, 16, 17, 31, 32, 33, 64, 65]
# n, k; the last ones pass the k-blocks that stay in L1 (8 and 16 k-steps of 32 or 64)
SHAPES = [(1, 1), (32, 32), (33, 65), (70, 100), (31, 127), (40, 560), (33, 1100)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def to_rows(c: np.ndarray, n: int) -> np.ndarray:
    """C blocks [panels, m, 32] -> [m, n]."""
    return c.swapaxes(0, 1).reshape(c.shape[1], -1)[:, :n]


class Problem:
    """Random weights and activations as the kernel of a format wants them, and the exact answer."""

    def __init__(self, isa: str, fmt: str, n: int, k: int, tokens: int, seed: int = 3, scale: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.kernels, self.n, self.k = Kernels(isa, fmt), n, k
        self.panels = layout.n_panels(n, paired=False)
        self.packed = self.kernels.pack(bf16.normal(rng, n, k, scale=0.5))
        elements, self.w_scale = layout.unpack(fmt, self.packed, self.panels, k)
        self.x = bf16.normal(rng, tokens, k, scale=scale)
        self.x_scale: np.ndarray | None = None
        if self.kernels.oracle.activations == "int8":
            step = self.kernels.oracle.k_step
            q, self.x_scale = int8_quantize_rows(bf16.widen(self.x))
            self.rows = np.zeros((tokens, -(-k // step) * step), np.int8)
            self.rows[:, :k] = q
            self.sums = q.astype(np.int64) @ elements.astype(np.int64).T
        else:
            self.rows = self.x
            x, w = bf16.widen(self.x).astype(np.float64), bf16.widen(elements).astype(np.float64)
            self.want, self.magnitude = x @ w.T, np.abs(x) @ np.abs(w).T

    def operand(self, m: int, index: np.ndarray | None = None, ld: int = 0) -> np.ndarray:
        return self.kernels.operand(self.rows, m, self.k, self.x_scale, index, ld)

    def run(self, m: int, index: np.ndarray | None = None, ld: int = 0, **options: object) -> np.ndarray:
        return self.kernels.forward(self.operand(m, index, ld), m, self.packed, self.panels, self.k, **options)

    def check(self, c: np.ndarray, rows: np.ndarray, what: str, panels: slice = slice(None)) -> None:
        got = to_rows(c, 32 * c.shape[0])
        columns = np.arange(32 * self.panels).reshape(-1, 32)[panels].ravel()
        at = np.ix_(rows, columns)
        if self.x_scale is None:
            assert_within(got, self.want[at], sum_bound(self.k, self.magnitude[at]), what)
            return
        assert_same_bits(got, self.chain(rows, columns), what)

    def chain(self, rows: np.ndarray, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Integer sums and their scales, in the order of the kernels."""
        exact = self.sums[rows][:, columns]
        assert np.abs(exact).max() < 2**31
        return exact.astype(np.int32).astype(np.float32) * self.x_scale[rows, None] * self.w_scale[columns]


@each_isa
@each_format
@each_shape
def test_every_number_of_rows(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    problem = Problem(isa, fmt, *shape, tokens=max(ROWS))
    for m in (m for m in ROWS if m <= BLOCK_ROWS[isa]):
        problem.check(problem.run(m), np.arange(m), f"{isa}/{fmt} m={m} n,k={shape}")


@each_isa
@each_format
def test_a_full_block_of_rows(isa: str, fmt: str) -> None:
    m = BLOCK_ROWS[isa]
    problem = Problem(isa, fmt, 32, 70, tokens=m)
    problem.check(problem.run(m), np.arange(m), f"m={m}")


@each_isa
@each_format
def test_more_panels_and_columns_than_pass_at_once(isa: str, fmt: str) -> None:
    """Several visits of tiles, the last one ragged in both directions, and sums that wait in memory between them."""
    problem = Problem(isa, fmt, 200, 4300, tokens=70)
    for m in (20, 33, 70):
        problem.check(problem.run(m), np.arange(m), f"m={m}")


@each_isa
@each_format
def test_rows_are_gathered_by_index(isa: str, fmt: str) -> None:
    """Also from rows that lie apart; row scales follow the index."""
    problem = Problem(isa, fmt, 40, 96, tokens=50)
    rng = np.random.default_rng(0)
    for m in (1, 2, 3, 17, 40):
        index = rng.integers(0, 50, m)
        problem.check(problem.run(m, index=index, ld=200), index, f"m={m}")


@each_isa
@each_format
def test_a_range_of_panels(isa: str, fmt: str) -> None:
    problem = Problem(isa, fmt, 130, 100, tokens=20)
    for m in (1, 5, 20):
        for part in ((0, 1), (1, 4), (4, 5)):
            c = problem.run(m, part=part)
            problem.check(c, np.arange(m), f"m={m} panels {part}", slice(*part))


@each_isa
@each_format
@pytest.mark.parametrize("shape", [(33, 65), (40, 560), (200, 4300)], ids=str)
def test_another_product_is_added(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    problem = Problem(isa, fmt, *shape, tokens=70)
    for m, k in ((1, 32), (2, 1), (3, 512), (13, 32), (33, 70), (70, 32)):
        plus = Addend(isa, m, problem.panels, k)
        got = to_rows(problem.run(m, plus=plus.argument), 32 * problem.panels)
        if problem.x_scale is None:
            want, magnitude, terms = problem.want[:m], problem.magnitude[:m], shape[1] + k + 1
        else:
            want = problem.chain(np.arange(m)).astype(np.float64)
            magnitude, terms = np.abs(want), k + 1
        assert_within(got, want + plus.sums, sum_bound(terms, magnitude + plus.magnitude), f"m={m} k={k}")


@each_isa
@each_format
def test_a_row_does_not_see_its_neighbours(isa: str, fmt: str) -> None:
    """A row of NaN or of huge values changes no bit of the others."""
    clean = Problem(isa, fmt, 40, 70, tokens=20)
    for m in (2, 3, 20):
        want = clean.run(m)
        dirty = Problem(isa, fmt, 40, 70, tokens=20)
        if dirty.x_scale is None:
            dirty.rows[1] = bf16.narrow(np.full(70, np.nan, np.float32))
        else:
            dirty.x_scale[1] = np.nan
        got = dirty.run(m)
        others = np.arange(m) != 1
        assert_same_bits(got[:, others], want[:, others], f"m={m}")
        assert np.isnan(got[:, 1].swapaxes(0, 1).ravel()[:40]).all()


@each_isa
@pytest.mark.parametrize("fmt", SCALED)
@pytest.mark.parametrize("k", [64, 130, 1088])
def test_saturation_patterns(isa: str, fmt: str, k: int) -> None:
    """Levels of +-127 in the patterns that overflow 16-bit pair sums."""
    kernels = Kernels(isa, fmt)
    n, m = 32, 8
    signs = np.stack([np.ones(k), -np.ones(k), (-1.0) ** np.arange(k), (-1.0) ** (np.arange(k) // 2)])
    w = np.resize(signs, (n, k)) * 127
    q = np.zeros((m, -(-k // 64) * 64), np.int8)
    q[:, :k] = np.resize(signs, (m, k)) * 127
    packed = kernels.pack(bf16.narrow(w.astype(np.float32)))
    scale = np.ones(m, np.float32)
    want = (q[:, :k].astype(np.int64) @ w.astype(np.int64).T).astype(np.float32)
    for rows in (1, 2, 3, 8):
        c = kernels.forward(kernels.operand(q, rows, k, scale), rows, packed, 1, k)
        assert_same_bits(c[0], want[:rows], f"m={rows}")


@each_isa
@pytest.mark.parametrize("fmt", SCALED)
def test_the_longest_sum_does_not_overflow(isa: str, fmt: str) -> None:
    k = 65536
    kernels = Kernels(isa, fmt)
    w = np.full((2, k), 127, np.float32)
    w[1] = -127
    packed = kernels.pack(bf16.narrow(w))
    q = np.full((3, k), 127, np.int8)
    for m in (1, 3):
        c = kernels.forward(kernels.operand(q, m, k, np.ones(3, np.float32)), m, packed, 1, k)
        assert (c[0, :, 0] == np.float32(127 * 127 * k)).all()
        assert (c[0, :, 1] == -np.float32(127 * 127 * k)).all()
        assert (c[0, :, 2:] == 0).all()


@each_format
def test_bf16_extremes_stay_within_the_bound(fmt: str) -> None:
    """One outlier of 1e4, and values near the smallest normal number."""
    for isa in ISAS:
        for scale in (1e4, 2.0**-60, 1e-37):
            problem = Problem(isa, fmt, 33, 65, tokens=7, scale=scale)
            problem.check(problem.run(7), np.arange(7), f"{isa} scale {scale}")


@pytest.mark.parametrize("fmt", SCALED)
@pytest.mark.parametrize("m", [1, 2, 5, 33])
def test_integer_formats_give_equal_bits_on_every_level(fmt: str, m: int) -> None:
    want = Problem("portable", fmt, 70, 200, tokens=33).run(m)
    for isa in ISAS:
        assert_same_bits(Problem(isa, fmt, 70, 200, tokens=33).run(m), want, isa)
