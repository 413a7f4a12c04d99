"""Published formats keep every number: what the engine reads is, bit for bit, what the format's own tools read."""

import numpy as np
import pytest
import torch
from oracle import layout
from oracle.bounds import assert_same_bits
from oracle.layers import make_pool
from oracle.published import PUBLISHED, Parts, arrays
from oracle.registry import FORMATS

from ktmoe import _ext

NAMES = [f for f in _ext.formats() if _ext.testing.published(f)]
each_published = pytest.mark.parametrize("fmt", NAMES)
# n, k: whole and ragged panels, blocks and k-steps (64 to 256)
SHAPES = [(1, 1), (16, 32), (32, 256), (33, 64), (17, 300), (50, 768), (31, 513), (5, 1024)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def repacked(fmt: str, parts: Parts, n: int, k: int) -> np.ndarray:
    packed = np.full(_ext.testing.packed_bytes(fmt, layout.n_panels(n, False), k), 0xA5, np.uint8)
    _ext.testing.repack(fmt, arrays(parts), n, k, packed)
    return packed


def test_every_format_is_in_one_of_the_two_grids() -> None:
    assert set(NAMES) == set(PUBLISHED), "write the oracle of the new format in tests/oracle/published.py"
    assert {*NAMES, *FORMATS, "int4"} == set(_ext.formats())


@each_published
@each_shape
def test_repacked_weights_are_those_of_the_source(fmt: str, shape: tuple[int, int]) -> None:
    n, k = shape
    parts = PUBLISHED[fmt].random(np.random.default_rng(n + k), n, k, 1.0)
    want = PUBLISHED[fmt].dequantize(parts, k)
    panels = layout.n_panels(n, False)
    got = np.full((32 * panels, k), np.nan, np.float32)
    _ext.testing.unpack(fmt, repacked(fmt, parts, n, k), panels, k, got)
    assert 0.3 < want.std() < 3 or want.size < 2, "the oracle makes weights of another size than it says"
    assert_same_bits(got[:n] + np.float32(0), want + np.float32(0), fmt)  # -0 and 0 count as equal
    assert (got[n:] == 0).all(), "padded columns"


@each_published
def test_size_is_that_of_the_format(fmt: str) -> None:
    """Bytes per weight of a large matrix: those of the source and at most 3.2 % more."""
    n, k = 512, 2048
    parts = PUBLISHED[fmt].random(np.random.default_rng(0), n, k, 1.0)
    source = sum(p.nbytes for p in parts)
    packed = _ext.testing.packed_bytes(fmt, n // 32, k)
    assert source * 0.97 <= packed <= source * 1.032 + 2048 * n // 32


@each_published
def test_a_scale_that_is_not_finite_is_refused(fmt: str) -> None:
    n, k = 40, 300
    p = PUBLISHED[fmt]
    parts = p.random(np.random.default_rng(1), n, k, 1.0)
    part, at, size = p.scale_at
    row = parts[part][37].view(np.uint8)
    halves = (0x7F80, 0xFFC1) if part == 1 else (0x7C00, 0xFE01)
    for bits in {1: (253, 255), 2: halves, 4: (0x7F800000,)}[size]:
        row[at : at + size] = np.frombuffer(int(bits).to_bytes(size, "little"), np.uint8)
        with pytest.raises(ValueError, match=r"w: row 37, columns from 0: got a number that is not finite"):
            repacked(fmt, parts, n, k)


def test_a_zero_point_above_15_is_refused() -> None:
    parts = PUBLISHED["int4_g64z"].random(np.random.default_rng(1), 20, 300, 1.0)
    parts[2][7, 4] = 16
    with pytest.raises(ValueError, match="row 7, columns from 256: got a number that is not finite or out of range"):
        repacked("int4_g64z", parts, 20, 300)


def test_a_nan_code_of_fp8_is_refused() -> None:
    parts = PUBLISHED["fp8"].random(np.random.default_rng(1), 20, 300, 1.0)
    parts[0][3, 299] = 0xFF
    with pytest.raises(ValueError, match="row 3, columns from 256"):
        repacked("fp8", parts, 20, 300)


def layer(fmt: str, down: str = "") -> "_ext.MoeLayer":
    return _ext.MoeLayer(make_pool(), 1, 1, 64, 96, fmt, down_format=down)


def expert_parts(fmt: str) -> list[list[object]]:
    rng = np.random.default_rng(0)
    return [arrays(PUBLISHED[fmt].random(rng, n, k, 0.1)) for n, k in ((96, 64), (96, 64), (64, 96))]


@each_published
def test_wrong_parts_are_refused_before_any_work(fmt: str) -> None:
    engine, good = layer(fmt), expert_parts(fmt)
    engine.load_expert_raw(0, *good)
    for bad, error, text in (
        ([good[0][:0], *good[1:]], ValueError, r"gate: got 0 arrays, expected [123] for format"),
        ([good[0], [good[1][0][:-1], *good[1][1:]], good[2]], ValueError, r"\[load_expert_raw\] up"),
        ([*good[:2], good[0]], ValueError, r"\[load_expert_raw\] down"),
        ([[good[0][0].astype(np.float32), *good[0][1:]], *good[1:]], TypeError, r"\[load_expert_raw\] gate"),
    ):
        with pytest.raises(error, match=text):
            engine.load_expert_raw(0, *bad)
    assert engine.loaded
    with pytest.raises(ValueError, match="takes published bytes: expected load_expert_raw"):
        engine.load_expert(0, *(torch.zeros(s, dtype=torch.bfloat16) for s in ((96, 64), (96, 64), (64, 96))))
    assert engine.loaded


def test_a_refused_expert_is_not_loaded() -> None:
    engine, parts = layer("q8_0"), expert_parts("q8_0")
    engine.load_expert_raw(0, *parts)
    parts[2][0].reshape(64, -1)[63, 1] = 0x7C  # f16 infinity or NaN
    with pytest.raises(ValueError, match="down: row 63"):
        engine.load_expert_raw(0, *parts)
    assert not engine.loaded


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_formats_made_here_take_no_raw_bytes(fmt: str) -> None:
    parts = [[torch.zeros(s, dtype=torch.bfloat16)] for s in ((96, 64), (96, 64), (64, 96))]
    with pytest.raises(ValueError, match="expected load_expert"):
        layer(fmt).load_expert_raw(0, *parts)


def test_matrices_may_have_different_formats() -> None:
    engine = layer("q4_k", "bf16")
    assert (engine.format, engine.down_format) == ("q4_k", "bf16")
    down = torch.randn(64, 96).bfloat16()
    engine.load_expert_raw(0, *expert_parts("q4_k")[:2], [down])
    out = [torch.empty(s) for s in ((96, 64), (96, 64), (64, 96))]
    engine.dequantize_expert(0, *out)
    assert torch.equal(out[2], down.float())
    parts = expert_parts("q4_k")
    np.testing.assert_array_equal(out[1].numpy(), PUBLISHED["q4_k"].dequantize(parts[1], 64))
