"""Activations, forward and backward: within their roundings of float64, and the same bits on every level."""

import numpy as np
import pytest
import torch
from oracle import bf16
from oracle.bounds import U16, U32, assert_same_bits, assert_within
from oracle.experts import ACTIVATIONS, Activation
from oracle.kernels import Kernels
from oracle.registry import ISAS, each_activation, each_isa

EXTREMES = [0, -0.0, 1e-30, -1e-30, 20, -20, 86, -86, 87.5, -87.5, 88.5, -100, 1e4, -1e4, 1e30, -1e30]


def blocks(m: int, panels: int, activation: Activation) -> np.ndarray:
    c = np.random.default_rng(m).standard_normal((panels, m, 32), dtype=np.float32) * 6
    c[0, 0, :16] = EXTREMES
    if not activation.gated:
        c = np.clip(c, -1e18, 1e18)  # whose square fp32 can hold
    c[0, 0, 16:] = 1
    return c


def in_panel_order(c: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(c.swapaxes(0, 1).reshape(c.shape[1], -1))


def moved_outwards(c: np.ndarray, activation: Activation) -> np.ndarray:
    """Values that the clamp holds are kept 2^-7 further out: rounding must not bring them back to the limit."""
    limit = activation.limit or np.inf
    size = np.concatenate((c[..., :16], np.abs(c[..., 16:])), axis=-1)
    return np.where(size > limit, c + c * np.float32(2.0**-7), c)


class Exact:
    """The activation of gate|up [m, 32 * panels] in float64, and what bounds the error of the kernels.

    The sigmoid: e^x to 1e-6, a few fp32 roundings, and those of its argument q, which count |q| times; e^-x is clamped
    beyond 87. Where torch computes 1 + tanh in float64 it cancels: 2^-50 of g.
    """

    def __init__(self, activation: Activation, gate_up: np.ndarray) -> None:
        m = len(gate_up)
        exact = torch.from_numpy(gate_up.astype(np.float64)).requires_grad_()
        self.leaf = exact
        if not activation.gated:
            self.h = activation(None, exact)
            self.relative, self.floor = np.full(exact.shape, 2.0**-22), np.full(exact.shape, 2.0**-126)
            return
        pairs = exact.reshape(m, -1, 2, 16)
        gate, up = pairs[:, :, 0].reshape(m, -1), pairs[:, :, 1].reshape(m, -1)
        self.h = activation(gate, up)
        limit = activation.limit or np.inf
        g = np.minimum(gate.detach().numpy(), limit)
        self.g, self.factor = g, np.clip(up.detach().numpy(), -limit, limit) + (1 if activation.alpha else 0)
        alpha = activation.alpha or 1
        tanh = activation.name == "gelu_tanh"
        self.q = 1.5957691216 * g + 0.0713548163 * g**3 if tanh else alpha * g
        self.dq = 1.5957691216 + 3 * 0.0713548163 * g**2 if tanh else np.full_like(g, alpha)
        self.s = 1 / (1 + np.exp(-np.clip(self.q, -700, 700)))
        self.relative = 2.0**-18 + np.minimum(np.abs(self.q), 90) * 2.0**-21
        self.floor = np.abs(g * self.factor) * (2.0**-124 + 2.0**-50 * tanh) + 2.0**-130

    def gradient(self, d: np.ndarray) -> np.ndarray:
        (gradient,) = torch.autograd.grad(self.h, self.leaf, torch.from_numpy(d))
        return gradient.numpy()

    def gradient_bound(self, d: np.ndarray, want: np.ndarray) -> np.ndarray:
        """f' = s + f (1 - s) q' may cancel: its error is that of its terms."""
        bound = (U16 + 2.0**-18) * np.abs(want) + 2.0**-130
        if not hasattr(self, "g"):
            return bound
        terms = self.s + np.abs(self.g * self.s * (1 - self.s) * self.dq)
        floor = (2.0**-124 + 2.0**-50) * (1 + np.abs(self.g * self.dq))
        gate = np.abs(d * self.factor) * (2 * self.relative * terms + floor)
        up = np.abs(d * self.g) * (self.relative * self.s + 2.0**-124 + 2.0**-50)
        m = len(d)
        return bound + np.stack([gate.reshape(m, -1, 16), up.reshape(m, -1, 16)], axis=2).reshape(m, -1)


@each_isa
@each_activation
@pytest.mark.parametrize("m", [1, 7, 33])
def test_forward_against_float64(isa: str, activation: Activation, m: int) -> None:
    for panels in (1, 3):
        c = blocks(m, panels, activation)
        h, gate_up = Kernels(isa).activate(c, ld=5, activation=activation)
        exact = Exact(activation, in_panel_order(c))
        want = exact.h.detach().numpy()
        assert_within(bf16.widen(h), want, (U16 + exact.relative) * np.abs(want) + exact.floor, f"h m={m}")
        assert_same_bits(gate_up, bf16.narrow(in_panel_order(moved_outwards(c, activation))), "kept gate and up")


@each_isa
@each_activation
@pytest.mark.parametrize("m", [1, 7, 33])
def test_backward_against_float64(isa: str, activation: Activation, m: int) -> None:
    """Gradients of the function of the kept values, the values of the clamp's limits included."""
    rng = np.random.default_rng(m)
    for panels in (1, 2, 3):
        gate_up = bf16.narrow(in_panel_order(blocks(m, panels, activation)))
        if activation.limit:  # on the limit itself the gradient is whole
            gate_up[-1, :16] = bf16.narrow(np.full(16, activation.limit, np.float32))
            gate_up[-1, 16:32] = bf16.narrow(np.full(16, -activation.limit, np.float32))
        exact = Exact(activation, bf16.widen(gate_up))
        h_columns = exact.h.shape[1]
        dh = rng.standard_normal((-(-h_columns // 32), m, 32), dtype=np.float32)
        weight = rng.random(m, dtype=np.float32)
        got = Kernels(isa).activate_backward(dh, gate_up, weight, ld=5, activation=activation)
        d = in_panel_order(dh)[:, :h_columns].astype(np.float64)
        want = exact.gradient(d * weight[:, None])
        bound = exact.gradient_bound(d * weight[:, None], want)
        assert_within(bf16.widen(got["gradient"]), want, bound, f"gradient m={m}")
        h = exact.h.detach().numpy()
        error = exact.relative * np.abs(h) + exact.floor
        assert_within(bf16.widen(got["h"]), h, U16 * np.abs(h) + error, f"h m={m}")
        dot_bound = ((h_columns + 8) * U32 * np.abs(h * d) + error * np.abs(d)).sum(axis=1)
        assert_within(got["dot"], (h * d).sum(axis=1), dot_bound, f"dot m={m}")


@each_isa
@each_activation
def test_a_clamp_stops_the_gradient(isa: str, activation: Activation) -> None:
    gate_up = np.full((1, 32), 3.0, np.float32)  # beyond every limit of ACTIVATIONS
    dh, weight = np.ones((1, 1, 32), np.float32), np.ones(1, np.float32)
    got = Kernels(isa).activate_backward(dh, bf16.narrow(gate_up), weight, activation=activation)["gradient"]
    assert (bf16.widen(got) == 0).all() == bool(activation.limit)


@each_isa
@each_activation
def test_nan_stays_nan(isa: str, activation: Activation) -> None:
    for column in (3, 20):  # in gate, in up
        c = np.ones((1, 2, 32), np.float32)
        c[0, 1, column] = np.nan
        h, kept = Kernels(isa).activate(c, activation=activation)
        values = bf16.widen(h)
        assert np.isnan(values[1, column % 16 if activation.gated else column])
        assert np.isfinite(values).sum() == values.size - 1
        ones = np.ones((1, 2, 32), np.float32)
        got = Kernels(isa).activate_backward(ones, kept, ones[0, :, 0], activation=activation)
        gradient = bf16.widen(got["gradient"])
        assert np.isnan(gradient[1]).any()
        assert np.isfinite(gradient[0]).all()
        assert np.isnan(got["dot"][1])
        assert np.isfinite(got["dot"][0])


@each_isa
@pytest.mark.parametrize("limit", [1.5, 7.0, 7.01, 1.7, 10.0])
def test_the_way_back_knows_what_the_clamp_held(isa: str, limit: float) -> None:
    """However close to the limit, and whether bf16 can hold the limit or not."""
    limit = float(np.float32(limit))
    near = np.float32(limit) * (1 + np.arange(-8, 8, dtype=np.float32) * np.float32(2.0**-20))
    for sign in (1, -1):
        c = np.ones((1, 1, 32), np.float32)
        c[0, 0, :16], c[0, 0, 16:] = near, sign * near
        activation = Activation(limit=limit)
        _, kept = Kernels(isa).activate(c, activation=activation)
        dh, weight = np.ones((1, 1, 32), np.float32), np.ones(1, np.float32)
        got = bf16.widen(Kernels(isa).activate_backward(dh, kept, weight, activation=activation)["gradient"])[0]
        assert ((got != 0) == np.tile(near <= limit, 2)).all()


@each_activation
def test_equal_bits_on_every_level(activation: Activation) -> None:
    c = blocks(40, 3, activation)
    first = Kernels("portable").activate(c, activation=activation)
    dh, weight = blocks(40, 3, activation) / 4, np.linspace(0, 1, 40, dtype=np.float32)
    finite = bf16.narrow(np.clip(in_panel_order(c), -100, 100))
    back = Kernels("portable").activate_backward(dh, finite, weight, activation=activation)
    for isa in ISAS:
        for got, expected in zip(Kernels(isa).activate(c, activation=activation), first, strict=True):
            assert_same_bits(got, expected, isa)
        again = Kernels(isa).activate_backward(dh, finite, weight, activation=activation)
        for name, expected in back.items():
            assert_same_bits(again[name], expected, f"{isa} {name}")


def test_a_distant_limit_changes_no_bit() -> None:
    c = blocks(9, 2, ACTIVATIONS["silu"])
    plain, far = (Kernels(ISAS[0]).activate(c, activation=Activation(limit=x))[0] for x in (0.0, 3e38))
    assert_same_bits(plain, far, "limit 3e38")
