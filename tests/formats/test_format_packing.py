"""Packed bytes: equal to the NumPy oracle on every level, and what comes back is what went in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import bf16, layout
from oracle.bounds import assert_same_bits
from oracle.formats import ORACLES
from oracle.kernels import Kernels
from oracle.registry import FORMATS, ISAS, each_format, each_isa

from ktmoe import _ext

# rows, k: every granule (16, 32 columns; k-steps 32, 64) at, below and above its size; 512 and 1024: panels 32 KB apart
SHAPES = [
    (1, 1),
    (16, 32),
    (15, 31),
    (17, 33),
    (32, 64),
    (33, 65),
    (31, 63),
    (48, 128),
    (70, 100),
    (40, 512),
    (33, 1024),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
each_pairing = pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])


def matrices(shape: tuple[int, int], paired: bool, seed: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    return bf16.normal(rng, *shape), bf16.normal(rng, *shape) if paired else None


def expected(fmt: str, w: np.ndarray, up: np.ndarray | None) -> np.ndarray:
    return layout.pack(fmt, bf16.widen(w), None if up is None else bf16.widen(up))


def test_every_registered_format_has_an_oracle() -> None:
    assert set(FORMATS) <= set(ORACLES), "write the oracle of the new format in tests/oracle/formats.py"
    for fmt in FORMATS:
        assert _ext.testing.k_step(fmt) == ORACLES[fmt].k_step


@each_format
@pytest.mark.parametrize("k", [1, 32, 63, 64, 65, 511, 512, 513, 1024, 1025, 7168])
def test_sizes_follow_the_formulas(fmt: str, k: int) -> None:
    for panels in (1, 2, 5):
        assert _ext.testing.panel_stride(fmt, panels, k) == layout.panel_stride(fmt, k)
        assert _ext.testing.packed_bytes(fmt, panels, k) == layout.packed_bytes(fmt, panels, k)


@each_isa
@each_format
@each_shape
@each_pairing
def test_packed_bytes_equal_the_oracle(isa: str, fmt: str, shape: tuple[int, int], paired: bool) -> None:
    w, up = matrices(shape, paired)
    assert_same_bits(Kernels(isa, fmt).pack(w, up), expected(fmt, w, up), "packed bytes")


@each_isa
@each_format
@each_pairing
def test_padding_is_written_as_zero(isa: str, fmt: str, paired: bool) -> None:
    """Into memory full of garbage: only the gap between panels may keep it."""
    for shape in ((17, 33), (33, 1000)):
        w, up = matrices(shape, paired)
        packed = Kernels(isa, fmt).pack(w, up, zeroed=False)
        used = ~layout.gap_mask(fmt, layout.n_panels(shape[0], paired), shape[1])
        assert_same_bits(packed[used], expected(fmt, w, up)[used], f"{shape}")


@each_isa
@each_format
def test_rows_may_lie_apart(isa: str, fmt: str) -> None:
    w, up = matrices((35, 70), True)
    assert_same_bits(Kernels(isa, fmt).pack(w, up, ld=91), expected(fmt, w, up), "strided source")


@each_format
@each_shape
@each_pairing
def test_unpack_returns_the_weights_in_panel_order(fmt: str, shape: tuple[int, int], paired: bool) -> None:
    w, up = matrices(shape, paired)
    f, panels, k = ORACLES[fmt], layout.n_panels(shape[0], paired), shape[1]
    packed = Kernels(ISAS[0], fmt).pack(w, up)
    got = np.full((32 * panels, k), np.nan, np.float32)
    _ext.testing.unpack(fmt, packed, panels, k, got)
    assert_same_bits(got, f.dequantize(*layout.unpack(fmt, packed, panels, k)), "unpack against the formulas")
    for matrix, is_up in ((w, False), (up, True)):
        if matrix is not None:
            columns = layout.panel_columns(shape[0], paired, is_up)
            assert_same_bits(got[columns], f.dequantize(*f.quantize(bf16.widen(matrix))), "round trip")


@each_format
def test_format_error_is_that_of_round_to_nearest(fmt: str) -> None:
    """Against a float64 quantisation of the same format: not above 1.02 times its error."""
    w = bf16.normal(np.random.default_rng(5), 64, 300)
    packed = Kernels(ISAS[0], fmt).pack(w)
    got = np.empty((64, 300), np.float32)
    _ext.testing.unpack(fmt, packed, 2, 300, got)
    true = bf16.widen(w).astype(np.float64)
    if not ORACLES[fmt].scaled:
        assert (got == true).all()
        return
    scale = np.abs(true).max(axis=1, keepdims=True) / 127
    nearest = np.rint(true / scale) * scale
    assert np.linalg.norm(got - true) <= 1.02 * np.linalg.norm(nearest - true)
    assert np.abs(got - true).max() <= 0.51 * scale.max()


def extremes() -> np.ndarray:
    """One hard case per row."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal((20, 75), dtype=np.float32)
    w[0] = 0
    w[1, 3] = 1e4
    w[2] = np.float32(3.3895314e38)  # the largest bf16
    w[3, ::2] = -np.float32(3.3895314e38)
    w[4] = np.float32(1e-40)  # subnormal
    w[5] *= np.float32(1e-38)
    w[6] = 127 * np.float32(2.0**-126)  # the smallest maximum that has a scale
    w[7] = 126 * np.float32(2.0**-126)
    w[8] = np.where(np.arange(75) % 2, 127, -127)
    w[9] = np.arange(75) - 37 + 0.5  # ties
    w[9, 0] = 127
    w[10] = -0.0
    w[11] = 0
    w[11, 74] = -1
    return bf16.narrow(w)


@each_isa
@each_format
@each_pairing
def test_extreme_values(isa: str, fmt: str, paired: bool) -> None:
    w = extremes()
    up = w[::-1].copy() if paired else None
    assert_same_bits(Kernels(isa, fmt).pack(w, up), expected(fmt, w, up), "extremes")


@each_isa
@each_format
@given(st.integers(1, 70), st.integers(1, 140), st.booleans(), st.integers(-30, 30), st.integers(0, 2**32 - 1))
def test_any_matrix(isa: str, fmt: str, rows: int, k: int, paired: bool, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, up = (bf16.narrow(np.exp2(rng.normal(exponent, 4, (rows, k))) * rng.choice([-1, 0, 1], (rows, k))) for _ in "wu")
    up_or_none = up if paired else None
    assert_same_bits(Kernels(isa, fmt).pack(w, up_or_none), expected(fmt, w, up_or_none), f"{rows}x{k} seed {seed}")
