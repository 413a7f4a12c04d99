"""Floats into published formats and back: the same bytes on every level, for any threads, and what they stand for.

What the quantisers choose is judged in tests/io/test_published_formats.py.
"""

import numpy as np
import pytest
import torch
from oracle import bf16
from oracle.bounds import assert_same_bits
from oracle.layers import make_pool
from oracle.published import PUBLISHED
from oracle.registry import each_isa

from ktmoe import _ext
from ktmoe.io.published import QUANTISED, empty_matrix

each_published = pytest.mark.parametrize("fmt", list(PUBLISHED))
each_quantised = pytest.mark.parametrize("fmt", QUANTISED)
# n, k: whole and ragged blocks, groups of 16 rows or blocks, and 128 rows
SHAPES = [(1, 1), (16, 256), (33, 72), (130, 300), (17, 513), (3, 4352)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def weights(n: int, k: int) -> torch.Tensor:
    """fp32: sizes from row to row orders of magnitude apart, zeros, ties of the largest."""
    g = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=g) * torch.exp2(torch.randint(-30, 12, (n, 1), generator=g).float())
    w[0] = torch.randint(-2, 3, (k,), generator=g).float()
    w[n // 2, : k // 2] = 0
    return w


def quantised(fmt: str, w: torch.Tensor, pool: "_ext.ThreadPool | None" = None, isa: str = "") -> list[np.ndarray]:
    parts = empty_matrix(fmt, *w.shape).parts
    for part in parts:
        part.view(torch.uint8).fill_(0xA5)
    _ext.quantize(fmt, w, list(parts), pool, isa)
    return [part.view(torch.uint8).numpy() for part in parts]


@each_isa
@each_quantised
@each_shape
def test_every_level_makes_the_same_bytes(fmt: str, shape: tuple[int, int], isa: str) -> None:
    w = weights(*shape)
    want = quantised(fmt, w, isa="portable")
    for got, expected in zip(quantised(fmt, w, isa=isa), want, strict=True):
        assert_same_bits(got, expected, f"{fmt} on {isa}")


@each_quantised
@each_shape
def test_threads_strides_and_bf16_change_nothing(fmt: str, shape: tuple[int, int]) -> None:
    n, k = shape
    w = weights(n, k).bfloat16()
    want = quantised(fmt, w.float())
    wide = torch.full((n, k + 5), torch.nan, dtype=torch.bfloat16)
    wide[:, :k] = w
    for source in (w, wide[:, :k]):
        for pool in (None, make_pool(1), make_pool(3), make_pool(2, parts=2)):
            for got, expected in zip(quantised(fmt, source, pool), want, strict=True):
                assert_same_bits(got, expected, fmt)


@each_isa
@each_published
@each_shape
def test_the_way_back_is_what_the_format_says(fmt: str, shape: tuple[int, int], isa: str) -> None:
    n, k = shape
    parts = PUBLISHED[fmt].random(np.random.default_rng(n + k), n, k, 1.0)
    want = PUBLISHED[fmt].dequantize(parts, k) + np.float32(0)  # -0 and 0 count as equal
    arrays = [bf16.tensor(p) if p.dtype == np.uint16 else torch.from_numpy(p) for p in parts]
    for pool in (None, make_pool(3)):
        for dtype in (torch.float32, torch.bfloat16):
            got = torch.full((n, k), torch.nan, dtype=dtype)
            _ext.dequantize(fmt, arrays, got, pool, isa)
            assert torch.equal(got + 0, torch.from_numpy(want).to(dtype))


@each_published
def test_a_scale_that_is_not_finite_shows(fmt: str) -> None:
    p = PUBLISHED[fmt]
    parts = p.random(np.random.default_rng(1), 20, 300, 1.0)
    part, at, size = p.scale_at
    parts[part][7].view(np.uint8)[at : at + size] = {1: [255], 2: [0, 0x7C] if part == 0 else [0x80, 0x7F]}.get(
        size, [0, 0, 0x80, 0x7F]
    )
    arrays = [bf16.tensor(x) if x.dtype == np.uint16 else torch.from_numpy(x) for x in parts]
    got = torch.empty(20, 300)
    _ext.dequantize(fmt, arrays, got)
    block = 128 if fmt == "fp8" else p.block
    # Infinity times a code of zero is NaN, times any other infinity.
    assert not got[7, :block].isfinite().any()
    assert got[7, block:].isfinite().all()
    assert got[torch.arange(20) != 7].isfinite().all()


@pytest.mark.parametrize("fmt", [f for f in _ext.formats() if f not in QUANTISED])
def test_other_formats_are_refused(fmt: str) -> None:
    with pytest.raises(ValueError, match=rf"\[quantize\] format: got {fmt}, expected a published format"):
        _ext.quantize(fmt, torch.zeros(4, 32), [torch.zeros(4, 32, dtype=torch.uint8)])


def test_wrong_arrays_are_refused() -> None:
    w, parts = torch.zeros(4, 40), list(empty_matrix("int4_g32", 4, 40).parts)
    for bad, error, text in (
        ((w[0], parts), ValueError, r"\[quantize\] weights shape: got \[40\]"),
        ((w.T, parts), ValueError, r"\[quantize\] weights strides: got 40"),
        ((w.double(), parts), TypeError, r"\[quantize\] weights dtype: got an unsupported type, expected bf16 or fp32"),
        ((w, parts[:1]), ValueError, r"\[quantize\] parts: got 1 arrays, expected 2 for format int4_g32"),
        ((w, [parts[0][:, :-1], parts[1]]), ValueError, r"\[quantize\] parts shape: got \[4, 31\], expected \[4, 32\]"),
        ((w, [parts[0], parts[1].half()]), TypeError, r"\[quantize\] parts dtype"),
    ):
        with pytest.raises(error, match=text):
            _ext.quantize("int4_g32", *bad)
    with pytest.raises(ValueError, match=r"\[dequantize\] parts: got 1 arrays, expected 2"):
        _ext.dequantize("int4_g32", parts[:1], w)
    with pytest.raises(ValueError, match=r"\[dequantize\] format: got int8, expected a published format"):
        _ext.dequantize("int8", parts, w)
    with pytest.raises(ValueError, match=r"\[dequantize\] weights strides"):
        _ext.dequantize("int4_g32", parts, torch.zeros(40, 4).T)
    with pytest.raises(ValueError, match="expected at most 65536 rows and columns"):
        _ext.quantize("q8_0", torch.zeros(1, 65568), [torch.zeros(1, 65568 // 32 * 34, dtype=torch.uint8)])


def test_nothing_gives_nothing() -> None:
    for fmt in QUANTISED:
        for shape in ((0, 64), (0, 0)):
            assert all(part.size == 0 for part in quantised(fmt, torch.zeros(shape)))
