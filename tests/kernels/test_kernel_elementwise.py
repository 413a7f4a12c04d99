"""Quantisation of activations and SwiGLU: the same bits on every level."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import bf16
from oracle.bounds import U16, assert_same_bits, assert_within
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


def gate_up_blocks(m: int, panels: int) -> np.ndarray:
    rng = np.random.default_rng(m)
    c = rng.standard_normal((panels, m, 32), dtype=np.float32) * 6
    c[0, 0, :16] = [0, -0.0, 1e-30, -1e-30, 20, -20, 86, -86, 87.5, -87.5, 88.5, -100, 1e4, -1e4, 1e30, -1e30]
    c[0, 0, 16:] = 1
    return c


@each_isa
@pytest.mark.parametrize("m", [1, 2, 7, 31, 33])
def test_swiglu_against_float64(isa: str, m: int) -> None:
    """Error: e^x to 1e-6, a handful of fp32 roundings, one rounding to bf16; e^-x is clamped beyond |x| = 87."""
    for panels in (1, 3):
        c = gate_up_blocks(m, panels)
        h, gate_up = Kernels(isa).swiglu(c, h_ld=16 * panels + 5, gate_up_ld=32 * panels + 3)
        g, u = (c[:, :, i : i + 16].astype(np.float64).swapaxes(0, 1).reshape(m, -1) for i in (0, 16))
        with np.errstate(over="ignore"):
            want = g / (1 + np.exp(-g)) * u
        bound = (U16 + 2.0**-18) * np.abs(want) + np.abs(g * u) * 2.0**-124 + 2.0**-130
        assert_within(bf16.widen(h), want, bound, f"h m={m}")
        assert_same_bits(gate_up, bf16.narrow(c.swapaxes(0, 1).reshape(m, -1)), "kept gate and up")


@each_isa
def test_swiglu_of_nan_is_nan(isa: str) -> None:
    for column in (3, 20):  # in gate, in up
        c = np.ones((1, 2, 32), np.float32)
        c[0, 1, column] = np.nan
        h = bf16.widen(Kernels(isa).swiglu(c)[0])
        assert np.isnan(h[1, column % 16])
        assert np.isfinite(h).sum() == 31


def test_swiglu_gives_equal_bits_on_every_level() -> None:
    c = gate_up_blocks(40, 3)
    want = Kernels("portable").swiglu(c)
    for isa in ISAS:
        for got, expected in zip(Kernels(isa).swiglu(c), want, strict=True):
            assert_same_bits(got, expected, isa)
