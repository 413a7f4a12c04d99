"""out[i][j] (+)= sum over rows of P[row][i] Q[row][j]."""

import numpy as np
import pytest
from oracle import bf16
from oracle.bounds import assert_within, sum_bound
from oracle.kernels import Kernels
from oracle.registry import BLOCK_ROWS, each_isa

ROWS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65]


def columns_of(q: np.ndarray, stride: int, tiles: int) -> np.ndarray:
    return np.concatenate([q[:, stride * t : stride * t + 16] for t in range(tiles)], axis=1)


def check(got: np.ndarray, p: np.ndarray, q: np.ndarray, what: str, start: np.ndarray | None = None) -> None:
    a, b = bf16.widen(p).astype(np.float64), bf16.widen(q).astype(np.float64)
    want, magnitude = a.T @ b, np.abs(a).T @ np.abs(b)
    if start is not None:
        want, magnitude = want + start, magnitude + np.abs(start)
    assert_within(got, want, sum_bound(len(p) + 1, magnitude), what)


@each_isa
@pytest.mark.parametrize("p_columns", [1, 4, 15, 16, 17, 33])
def test_every_number_of_rows(isa: str, p_columns: int) -> None:
    rng = np.random.default_rng(1)
    kernels = Kernels(isa)
    for m in (m for m in ROWS if m <= BLOCK_ROWS[isa]):
        for tiles in (1, 3):
            p, q = bf16.normal(rng, m, p_columns), bf16.normal(rng, m, 16 * tiles)
            check(kernels.outer(p, q, 16, tiles), p, q, f"m={m} tiles={tiles}")


@each_isa
def test_a_full_block_of_rows(isa: str) -> None:
    rng = np.random.default_rng(2)
    p, q = bf16.normal(rng, BLOCK_ROWS[isa], 5), bf16.normal(rng, BLOCK_ROWS[isa], 32)
    check(Kernels(isa).outer(p, q, 16, 2), p, q, "full block")


@each_isa
@pytest.mark.parametrize("stride", [16, 32])
def test_tile_stride(isa: str, stride: int) -> None:
    """32: every other tile, as the gate columns of gate|up lie."""
    rng = np.random.default_rng(3)
    p, q = bf16.normal(rng, 19, 6), bf16.normal(rng, 19, stride * 3)
    check(Kernels(isa).outer(p, q, stride, 3), p, columns_of(q, stride, 3), f"stride {stride}")


@each_isa
def test_rows_of_q_are_gathered_by_index(isa: str) -> None:
    rng = np.random.default_rng(4)
    for m in (1, 20, 33):
        p, q, index = bf16.normal(rng, m, 6), bf16.normal(rng, 50, 32), rng.integers(0, 50, m)
        check(Kernels(isa).outer(p, q, 16, 2, index=index, q_ld=75), p, q[index], f"m={m}")


@each_isa
def test_accumulate(isa: str) -> None:
    rng = np.random.default_rng(5)
    for m in (1, 17, 40):
        p, q = bf16.normal(rng, m, 17), bf16.normal(rng, m, 32)
        start = rng.standard_normal((17, 32), dtype=np.float32) * 4
        check(Kernels(isa).outer(p, q, 16, 2, start=start), p, q, f"m={m}", start)


@each_isa
def test_rows_may_lie_apart(isa: str) -> None:
    """P, Q and the result are parts of wider arrays."""
    rng = np.random.default_rng(6)
    p, q = bf16.normal(rng, 21, 18), bf16.normal(rng, 21, 32)
    check(Kernels(isa).outer(p, q, 16, 2, p_ld=40, q_ld=50, out_ld=77), p, q, "strided")
