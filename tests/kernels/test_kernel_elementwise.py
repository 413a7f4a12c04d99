"""Quantisation of activations, and biases: the same bits on every level."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import bf16
from oracle.bounds import U32, assert_same_bits, assert_within, sum_bound
from oracle.formats import int8_quantize_rows
from oracle.kernels import Kernels
from oracle.registry import ISAS, each_isa


def quantized(isa: str, x: np.ndarray, padded: int) -> tuple[np.ndarray, np.ndarray]:
    return Kernels(isa, "int8").quantize_rows(x, ld=x.shape[1] + 7, padded=padded)


def check_rows(isa: str, x: np.ndarray) -> None:
    k = x.shape[1]
    padded = -(-k // 64) * 64
    q, scale = quantized(isa, x, padded)
    want, want_scale = int8_quantize_rows(bf16.widen(x))
    assert (np.isnan(scale) == np.isnan(want_scale)).all()
    assert_same_bits(np.nan_to_num(scale), np.nan_to_num(want_scale), "scales")
    assert_same_bits(q[:, :k], want, "levels")
    assert (q[:, k:] == 0).all(), "padding"


@each_isa
@pytest.mark.parametrize("k", [1, 15, 16, 17, 63, 64, 65, 100, 300])
def test_rows_are_rounded_to_nearest_even(isa: str, k: int) -> None:
    check_rows(isa, bf16.normal(np.random.default_rng(k), 9, k))


@each_isa
def test_hard_rows(isa: str) -> None:
    x = np.random.default_rng(1).standard_normal((12, 50)).astype(np.float32)
    x[0] = 0
    x[1, 49] = 1e4
    x[2] = np.float32(3.3895314e38)
    x[3] = np.float32(1e-40)
    x[4] = 127 * np.float32(2.0**-126)
    x[5, 7] = np.nan
    x[6, 49] = np.inf
    x[7, 0] = -np.inf
    x[8] = np.arange(50) - 25 + 0.5
    x[8, 0] = 127
    x[9] = np.nan
    x[10, :] = -0.0
    check_rows(isa, bf16.narrow(x))


@each_isa
@given(st.integers(1, 150), st.floats(-120, 120), st.integers(0, 2**32 - 1))
def test_any_rows(isa: str, k: int, exponent: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        check_rows(isa, bf16.narrow(np.exp2(rng.normal(exponent, 3, (3, k))) * rng.choice([-1, 1], (3, k))))


@each_isa
@pytest.mark.parametrize("m", [1, 2, 33])
def test_bias_is_one_addition(isa: str, m: int) -> None:
    rng = np.random.default_rng(m)
    c, bias = rng.standard_normal((3, m, 32), dtype=np.float32), rng.standard_normal(96, dtype=np.float32)
    assert_same_bits(Kernels(isa).add_bias(c, bias), c + bias.reshape(3, 1, 32), f"m={m}")


def test_dot_rows_against_float64_and_on_every_level() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 16, 33, 100):
        rows, start = bf16.normal(rng, 5, n), rng.standard_normal(5, dtype=np.float32)
        v = np.zeros(-(-n // 16) * 16, np.float32)
        v[:n] = rng.standard_normal(n)
        first = Kernels("portable").dot_rows(rows, v, start)
        terms = bf16.widen(rows).astype(np.float64) * v[:n]
        # A product of bf16 and fp32 is not exact in fp32.
        bound = sum_bound(n + 1, np.abs(terms).sum(axis=1) + np.abs(start), term_error=U32)
        assert_within(first, terms.sum(axis=1) + start, bound, f"n={n}")
        for isa in ISAS:
            assert_same_bits(Kernels(isa).dot_rows(rows, v, start, ld=3), first, f"{isa} n={n}")
