"""The published formats: quantisers bit for bit against NumPy and the gguf package, and the way back."""

import gguf
import numpy as np
import pytest
import torch
from oracle import bf16

from ktmoe.io.published import (
    INT4_GROUPS,
    PublishedMatrix,
    convert,
    dequantize,
    plain,
    quantize,
    unpack_nibbles,
)

FORMATS = ["bf16", *INT4_GROUPS, "fp8", "q8_0", "q4_0", "q4_k"]
BLOCK = {**INT4_GROUPS, "q8_0": 32, "q4_0": 32, "q4_k": 256}
SHAPES = [(1, 1), (3, 32), (5, 72), (130, 257), (16, 512), (128, 128)]


def weights(n, k, kind="gaussian", seed=0):
    """bf16 [n, k] as a tensor, and the same in fp32 NumPy."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "wild":  # orders of magnitude, zeros, and the smallest and largest numbers
        w *= np.float32(10.0) ** rng.integers(-6, 4, (n, 1))
        w[rng.random((n, k)) < 0.2] = 0
        w[0, :] = 0
        w[-1, k // 2] = -1e30
        w[n // 2, :] = np.float32(1e-40)
    bits = bf16.narrow(w)
    return bf16.tensor(bits), bf16.widen(bits)


def padded(w, block):
    return np.pad(w, ((0, 0), (0, -w.shape[1] % block)))


# --- int4 ---------------------------------------------------------------------------------------------------------
def int4_reference(w, group):
    """Bytes and bf16 bits of the scales."""
    groups = padded(w, group).reshape(w.shape[0], -1, group)
    bits = bf16.narrow(np.abs(groups).max(2) / np.float32(7))
    scale = bf16.widen(bits)[..., None]
    with np.errstate(all="ignore"):
        codes = np.where(scale == 0, 0, np.clip(np.rint(groups / scale), -8, 7)).astype(int) + 8
    codes = codes.reshape(w.shape[0], -1)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8), bits


@pytest.mark.parametrize("kind", ["gaussian", "wild"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_bit_for_bit(group, shape, kind) -> None:
    tensor, w = weights(*shape, kind)
    matrix = quantize(tensor, f"int4_g{group}")
    codes, scales = int4_reference(w, group)
    assert matrix.shape == shape
    assert np.array_equal(matrix.parts[0].numpy(), codes)
    assert np.array_equal(bf16.bits_of(matrix.parts[1]), scales)


def int4_zero_reference(w, group):
    """Bytes, bf16 bits of the scales, zero points."""
    groups = padded(w, group).reshape(w.shape[0], -1, group)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    bits = bf16.narrow((high - low) / np.float32(15))
    scale = np.where(bf16.widen(bits) == 0, np.float32(1), bf16.widen(bits))
    zeros = np.clip(np.rint(-low / scale), 0, 15)
    codes = np.clip(np.rint(groups / scale[..., None]) + zeros[..., None], 0, 15).astype(int).reshape(w.shape[0], -1)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8), bits, zeros.astype(np.uint8)


@pytest.mark.parametrize("kind", ["gaussian", "wild"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_with_zero_points_bit_for_bit(group, shape, kind) -> None:
    tensor, w = weights(*shape, kind)
    codes, scales, zeros = quantize(tensor, f"int4_g{group}z").parts
    want = int4_zero_reference(w, group)
    assert np.array_equal(codes.numpy(), want[0])
    assert np.array_equal(bf16.bits_of(scales), want[1])
    assert np.array_equal(zeros.numpy(), want[2])


def test_zero_points_pay_where_weights_lie_on_one_side() -> None:
    w = weights(16, 512)[0].float().abs().bfloat16()
    error = {f: float((dequantize(quantize(w, f)) - w.float()).norm()) for f in ("int4_g32", "int4_g32z")}
    assert error["int4_g32z"] < 0.6 * error["int4_g32"]  # steps: largest / 15 and largest / 7


def test_int4_layout_and_way_back() -> None:
    w = torch.zeros(1, 32, dtype=torch.bfloat16)
    w[0, 0], w[0, 1], w[0, 2] = 7.0, -7.0, 3.0
    matrix = quantize(w, "int4_g32")
    assert matrix.parts[0][0, :3].tolist() == [0x1F, 0x8B, 0x88]
    assert matrix.parts[1].tolist() == [[1.0]]
    assert torch.equal(dequantize(matrix), w.float())
    assert unpack_nibbles(matrix.parts[0])[0, :4].tolist() == [15, 1, 11, 8]
    codes = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    assert torch.equal(unpack_nibbles(codes[:, 0::2] | codes[:, 1::2] << 4), codes)


# --- fp8 ----------------------------------------------------------------------------------------------------------
def e4m3_table():
    """All 256 values by the definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; only 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[code & 127 == 127] = np.nan
    return np.where(code & 128, -value, value)


def nearest_e4m3(values):
    """Codes of the nearest finite value, ties to the even code."""
    table = e4m3_table()[:127]
    size = np.minimum(np.abs(values.astype(np.float64)), 448)
    above = np.searchsorted(table, size)
    below = np.maximum(above - 1, 0)
    up, down = table[np.minimum(above, 126)] - size, size - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["gaussian", "wild"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_bit_for_bit(shape, kind) -> None:
    n, k = shape
    tensor, w = weights(n, k, kind)
    bits, scales = quantize(tensor, "fp8").parts
    assert scales.dtype is torch.float32
    assert scales.shape == (n, -(-k // 128))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            block = w[i : i + 128, j : j + 128]
            scale = np.abs(block).max() / np.float32(448)
            assert (scales[i : i + 128, j // 128].numpy() == scale).all()
            with np.errstate(all="ignore"):
                values = np.where(block == 0, np.float32(0), block / scale)
            got = bits[i : i + 128, j : j + 128].numpy()
            want = nearest_e4m3(values)
            assert np.array_equal(np.where(got == 128, 0, got), np.where(want == 128, 0, want))  # -0 is 0


def test_fp8_way_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scales = torch.tensor([[0.5, 3.0]])
    got = dequantize(PublishedMatrix("fp8", (codes, scales), (1, 256)))[0].double().numpy()
    want = e4m3_table() * np.repeat([0.5, 3.0], 128)
    assert np.array_equal(got, want, equal_nan=True)


# --- GGUF ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_gguf_bit_for_bit(format, shape) -> None:
    tensor, w = weights(*shape)
    matrix = quantize(tensor, format)
    want = gguf.quants.quantize(padded(w, 32), gguf.GGMLQuantizationType[format.upper()])
    assert np.array_equal(matrix.parts[0].numpy(), want)
    decoded = gguf.quants.dequantize(want, gguf.GGMLQuantizationType[format.upper()])
    assert np.array_equal(dequantize(matrix).numpy(), decoded[:, : shape[1]])


def q4_k(weights):
    return quantize(weights, "q4_k").parts[0]


def q4_k_fields(rows):
    """d, dmin [b], scale, low [b, 8], codes [b, 8, 32] of Q4_K rows, by a second reading of the layout."""
    blocks = rows.reshape(-1, 144)
    d, dmin = blocks[:, :4].copy().view(np.float16).astype(np.float64).T
    six = blocks[:, 4:16].astype(int)
    scale, low = np.zeros((2, blocks.shape[0], 8), int)
    for j in range(8):
        if j < 4:
            scale[:, j], low[:, j] = six[:, j] & 63, six[:, j + 4] & 63
        else:
            scale[:, j] = (six[:, j + 4] & 15) + 16 * (six[:, j - 4] >> 6)
            low[:, j] = (six[:, j + 4] >> 4) + 16 * (six[:, j] >> 6)
    pairs = blocks[:, 16:].reshape(-1, 4, 32)
    return d, dmin, scale, low, np.stack((pairs & 15, pairs >> 4), 2).reshape(-1, 8, 32)


DISTRIBUTIONS = {
    "gaussian": (lambda rng, s: rng.standard_normal(s), 0.075),
    "gaussian, small": (lambda rng, s: rng.standard_normal(s) * 1e-3, 0.075),
    "gaussian, large": (lambda rng, s: rng.standard_normal(s) * 1e4, 0.075),
    "Student t": (lambda rng, s: rng.standard_t(4, s), 0.09),
    "uniform": (lambda rng, s: rng.uniform(-1, 1, s), 0.065),
    "positive": (lambda rng, s: rng.uniform(1, 2, s), 0.03),
    "negative": (lambda rng, s: rng.uniform(-2, -1, s), 0.03),
    "two values": (lambda rng, s: rng.choice([-1.0, 2.0], s), 0.005),
    "one value": (lambda rng, s: np.full(s, -0.37), 0.005),
    "next to nothing": (lambda rng, s: rng.standard_normal(s) * 1e-6, 0.1),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_q4_k_quality(name) -> None:
    make, bound = DISTRIBUTIONS[name]
    w = make(np.random.default_rng(0), (64, 1024)).astype(np.float32)
    rows = q4_k(torch.from_numpy(w)).numpy()
    decoded = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_K)
    assert np.linalg.norm(decoded - w) <= bound * np.linalg.norm(w)


@pytest.mark.parametrize("name", ["gaussian", "Student t", "positive"])
def test_q4_k_codes_are_the_nearest(name) -> None:
    """Whatever scales the search took: no code may be better by one step."""
    w = DISTRIBUTIONS[name][0](np.random.default_rng(1), (8, 512)).astype(np.float32)
    d, dmin, scale, low, codes = q4_k_fields(q4_k(torch.from_numpy(w)).numpy())
    step, floor = (d[:, None] * scale)[..., None], (dmin[:, None] * low)[..., None]
    target = w.reshape(codes.shape)
    error = np.abs(step * codes - floor - target)
    for other in (-1, 1):
        moved = np.clip(codes.astype(int) + other, 0, 15)
        assert (error <= np.abs(step * moved - floor - target) * (1 + 1e-5) + 1e-6).all()


def test_q4_k_beats_the_simple_way() -> None:
    """Full range of each 32 on the grid of 16 values, scales not even rounded."""
    w = np.random.default_rng(2).standard_normal((64, 1024)).astype(np.float32)
    subs = w.reshape(-1, 32)
    low, high = subs.min(1, keepdims=True), subs.max(1, keepdims=True)
    simple = np.rint((subs - low) / (high - low) * 15) * (high - low) / 15 + low
    decoded = dequantize(quantize(torch.from_numpy(w), "q4_k")).numpy()
    assert np.linalg.norm(decoded - w) < 0.95 * np.linalg.norm(simple - subs)


def test_q4_k_does_not_depend_on_its_neighbours() -> None:
    w = torch.from_numpy(np.random.default_rng(3).standard_normal((600, 256)).astype(np.float32))
    together = q4_k(w)
    assert torch.equal(q4_k(w[590:591]), together[590:591])


# --- all ----------------------------------------------------------------------------------------------------------
ERROR = {
    # Relative RMS on Gaussian weights: step / sqrt(12), where the step is / 7 or / 127 of the largest weight of a block
    # (about 2.3, 2.6 and 2.9 among 32, 64 and 128).
    "bf16": 2.0**-9,
    "int4_g32": 0.1,
    "int4_g64": 0.111,
    "int4_g128": 0.121,
    "int4_g32z": 0.09,  # the range of 32 is about 4.1, in 15 steps
    "int4_g64z": 0.1,
    "int4_g128z": 0.11,
    "fp8": 0.03,
    "q8_0": 0.006,
    "q4_0": 0.09,
    "q4_k": 0.075,
}


@pytest.mark.parametrize("shape", [(9, 300), (64, 512)])
@pytest.mark.parametrize("format", FORMATS)
def test_error_on_gaussian_weights(format, shape) -> None:
    tensor, w = weights(*shape, seed=5)
    got = dequantize(quantize(tensor, format))
    assert got.dtype is torch.float32
    assert got.shape == shape
    assert np.linalg.norm(got.numpy() - w) <= ERROR[format] * np.linalg.norm(w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format, shape) -> None:
    assert (dequantize(quantize(torch.zeros(shape, dtype=torch.bfloat16), format)) == 0).all()


@pytest.mark.parametrize("shape", [(5, 72), (130, 257)])
@pytest.mark.parametrize("format", [f for f in BLOCK if f != "q4_k"])  # whose grid need not have a zero
def test_the_weights_behind_a_ragged_row_are_zeros(format, shape) -> None:
    n, k = shape
    matrix = quantize(weights(n, k)[0], format)
    whole = -(-k // BLOCK[format]) * BLOCK[format]
    assert (dequantize(PublishedMatrix(format, matrix.parts, (n, whole)))[:, k:] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_never_turned_into_a_number(format, bad) -> None:
    clean, _ = weights(130, 512)
    dirty = clean.clone()
    dirty[3, 40] = bad
    got, want = dequantize(quantize(dirty, format)), dequantize(quantize(clean, format))
    assert not got[3, 40].isfinite()
    block = BLOCK.get(format, 1)
    touched = torch.zeros_like(got, dtype=torch.bool)
    touched[3, 40 // block * block : (40 // block + 1) * block] = True
    if format == "fp8":  # the scale of its block is that of the others
        assert got[~touched].isfinite().all()
    else:
        assert torch.equal(got[~touched], want[~touched])


def test_convert() -> None:
    matrix = quantize(weights(8, 64)[0], "int4_g32")
    assert convert(matrix, "int4_g32") is matrix
    assert torch.equal(convert(matrix, "bf16").parts[0], dequantize(matrix).bfloat16())
    assert torch.equal(convert(plain(weights(8, 64)[0]), "fp8").parts[0], quantize(weights(8, 64)[0], "fp8").parts[0])
    assert matrix.nbytes == 8 * 32 + 8 * 2 * 2
    with pytest.raises(NotImplementedError, match="cannot be quantised to q6_k, only to bf16, int4_g32"):
        convert(matrix, "q6_k")


@pytest.mark.parametrize("format", FORMATS)
def test_parts_are_in_one_piece(format) -> None:
    turned = weights(300, 40)[0].T
    matrix = quantize(turned, format)
    assert all(part.is_contiguous() for part in matrix.parts[: None if format != "bf16" else 0])
    assert torch.equal(dequantize(matrix), dequantize(quantize(turned.contiguous(), format)))
