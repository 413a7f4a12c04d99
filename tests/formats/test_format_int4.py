"""int4: what the bytes mean, how well they were chosen, and what the format promises about its error and size."""

import numpy as np
import pytest
import torch
from oracle import bf16, int4, layout
from oracle.bounds import assert_same_bits
from oracle.experts import EXACT, expert_forward
from oracle.kernels import Kernels
from oracle.layers import make_pool
from oracle.registry import ISAS, each_isa

from ktmoe import _ext

SHAPES = [(1, 1), (16, 64), (33, 65), (17, 100), (40, 512), (33, 1024)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def pack(w: np.ndarray, isa: str = ISAS[0]) -> np.ndarray:
    return Kernels(isa, "int4").pack(w)


def weights(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    got = np.full((32 * layout.n_panels(n, False), k), np.nan, np.float32)
    _ext.testing.unpack("int4", packed, len(got) // 32, k, got)
    return got


def gaussian(n: int, k: int, seed: int = 0) -> np.ndarray:
    return bf16.normal(np.random.default_rng(seed), n, k, scale=0.02)


def heavy_tailed(n: int, k: int) -> np.ndarray:
    return bf16.narrow(np.random.default_rng(1).standard_t(4, (n, k)).astype(np.float32))


@each_isa
@each_shape
def test_every_level_packs_the_same_bytes(isa: str, shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    assert_same_bits(pack(w, isa), pack(w, "portable"), "packed bytes")


@each_shape
def test_the_bytes_mean_what_the_format_says(shape: tuple[int, int]) -> None:
    n, k = shape
    w = gaussian(n, k)
    packed = pack(w)
    levels, scale = int4.unpack(packed, layout.n_panels(n, False), k)
    assert np.abs(levels[:n]).max() <= 127
    assert_same_bits(scale[:n], np.abs(bf16.widen(w)).max(axis=1) / np.float32(127), "scales")
    assert_same_bits(weights(packed, n, k)[:n], levels[:n].astype(np.float32) * scale[:n, None], "weights")
    assert (weights(packed, n, k)[n:] == 0).all()


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_the_search_finds_nearly_the_best_choice(make: object) -> None:
    w = make(48, 1024)  # type: ignore[operator]
    true = bf16.widen(w).astype(np.float64)
    error = float(((weights(pack(w), 48, 1024)[:48] - true) ** 2).sum())
    best = int4.best_error(true)
    assert best * (1 - 1e-5) <= error <= best * 1.02**2


def test_extreme_rows() -> None:
    """Zeros, one spike, constants, huge and tiny values: no level is further off than the coarsest block allows.

    m = 16 spans 15 * 16 = 240 of the 254 levels, its zero points lie 16/3 apart: (254 - 240) / 2 + 16 / 6 < 10.
    """
    k = 75
    w = np.random.default_rng(7).standard_normal((9, k)).astype(np.float32)
    w[0] = 0
    w[1] = 0
    w[1, 30] = 5
    w[2] = 3
    w[3] = -3
    w[4] = np.where(np.arange(k) % 2, 127, -127)
    w[5] *= 1e37
    w[6] *= 1e-30
    w[7] = 1e-39  # below what has a scale
    w[8] = np.arange(k)
    bits = bf16.narrow(w)
    true = bf16.widen(bits).astype(np.float64)
    for isa in ISAS:
        got = weights(pack(bits, isa), 9, k)[:9].astype(np.float64)
        most = np.abs(true).max(axis=1, keepdims=True)
        assert (np.abs(got - true) <= most * 10 / 127 + 1e-38).all()
        assert (got[[0, 7]] == 0).all()
        np.testing.assert_allclose(got[[2, 3]], true[[2, 3]], rtol=1 / 126)


def test_a_column_with_nan_is_nan() -> None:
    w = gaussian(20, 100)
    w[3, 50] = 0x7FC0
    got = weights(pack(w), 20, 100)
    assert np.isnan(got[3]).all()
    assert np.isfinite(got[np.arange(32) != 3]).all()


def test_size() -> None:
    """At most 4.6 bits per weight, scales and gaps included: the layer of hidden 2048, inter 768."""
    gate_up, down = (_ext.testing.packed_bytes("int4", p, k) for p, k in ((48, 2048), (64, 768)))
    assert (gate_up + down) * 8 / (3 * 2048 * 768) <= 4.6


def layer_error(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """Relative L2 error of one expert's output: int4 weights and int8 activations, as the engine runs them."""
    inter, hidden = gate.shape
    engine = _ext.MoeLayer(make_pool(), 1, 1, hidden, inter, "int4")
    engine.load_expert(0, gate, up, down)
    x = torch.randn(64, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(64, hidden, dtype=torch.bfloat16)
    engine.forward(x, torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1), out)
    want = expert_forward((gate.double(), up.double(), down.double()), x.double(), None, 1.0, EXACT)
    return float((out.double() - want).norm() / want.norm())


def test_error_of_a_gaussian_layer() -> None:
    g = torch.Generator().manual_seed(3)
    gate, up = ((torch.randn(768, 2048, generator=g) / 2048**0.5).bfloat16() for _ in "gu")
    down = (torch.randn(2048, 768, generator=g) / 768**0.5).bfloat16()
    assert layer_error(gate, up, down) <= 0.115


def test_heavy_tails_lose_a_third_of_what_row_scales_lose() -> None:
    w = heavy_tailed(64, 2048)
    true = bf16.widen(w).astype(np.float64)
    error = float(((weights(pack(w), 64, 2048)[:64] - true) ** 2).sum())
    assert 9 * error <= int4.row_scaled_error(true)
