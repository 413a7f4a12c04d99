"""The reference itself: finite differences prove its gradients, and plain loops its sums."""

import pytest
import torch

from oracle.experts import (
    ACTIVATIONS,
    EXACT,
    Activation,
    Rounding,
    layer_forward,
    lora_names,
    to_bf16,
    to_int8_rows,
)
from oracle.layers import Shape, doubled, make_biases, make_inputs, make_lora, make_weights

SHAPE = Shape(experts=3, top_k=2, hidden=5, inter=4)


def doubles(gated: bool = True) -> tuple[list, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    x = make_inputs(SHAPE, 4, "mixed", seed=3)
    weights = [doubled(expert) for expert in make_weights(SHAPE, gated=gated)]
    lora = {n: t.double() for n, t in make_lora(SHAPE, rank=2, gated=gated).items()}
    return weights, x.hidden.double(), x.ids, x.weights.double(), lora


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("with_biases", [False, True])
def test_finite_differences_prove_the_gradients(activation: Activation, with_biases: bool) -> None:
    weights, hidden, ids, routing, lora = doubles(activation.gated)
    names = lora_names(activation)
    biases = [doubled(b) for b in make_biases(SHAPE, activation.gated)] if with_biases else None

    def f(hidden: torch.Tensor, routing: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
        own = dict(zip(names, adapters, strict=True))
        return layer_forward(weights, hidden, ids, routing, own, 1.7, activation=activation, biases=biases)

    inputs = [t.clone().requires_grad_() for t in (hidden, routing, *(lora[n] for n in names))]
    assert torch.autograd.gradcheck(f, inputs)


def test_activations_are_those_of_transformers() -> None:
    """Written out once more, as the models of transformers have them."""
    gate, up = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    want = {
        "silu": torch.nn.functional.silu(gate) * up,
        "clamped": torch.nn.functional.silu(gate.clamp(max=1.25)) * up.clamp(-1.25, 1.25),
        "oai": gate.clamp(max=1.5) * torch.sigmoid(gate.clamp(max=1.5) * 1.702) * (up.clamp(-1.5, 1.5) + 1),
        "oai without limit": gate * torch.sigmoid(gate * 1.702) * (up + 1),
        "gelu_tanh": torch.nn.functional.gelu(gate, approximate="tanh") * up,
        "relu2": torch.square(torch.relu(up)),
    }
    for name, activation in ACTIVATIONS.items():
        torch.testing.assert_close(activation(gate if activation.gated else None, up), want[name])


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_layer_is_the_weighted_sum_of_its_experts(with_lora: bool) -> None:
    weights, hidden, ids, routing, lora = doubles()
    got = layer_forward(weights, hidden, ids, routing, lora if with_lora else None, scaling=1.7)
    for t in range(len(hidden)):
        want = torch.zeros(SHAPE.hidden, dtype=torch.float64)
        for s in range(SHAPE.top_k):
            e = int(ids[t, s])
            if not 0 <= e < SHAPE.experts:
                continue
            effective = list(weights[e])
            if with_lora:
                for i, name in enumerate(("gate", "up", "down")):
                    effective[i] = effective[i] + 1.7 * lora[f"{name}_b"][e] @ lora[f"{name}_a"][e]
            g = effective[0] @ hidden[t]
            want += routing[t, s] * (effective[2] @ (g / (1 + torch.exp(-g)) * (effective[1] @ hidden[t])))
        torch.testing.assert_close(got[t], want, rtol=1e-12, atol=1e-12)


def test_rounding_changes_values_a_little_and_gradients_not_at_all() -> None:
    x = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for rounded, relative in ((to_bf16(x), 2.0**-8), (to_int8_rows(x), 0.02)):
        assert 0 < float((rounded - x).detach().norm() / x.detach().norm()) < relative
        (gradient,) = torch.autograd.grad(rounded.sum(), x)
        assert (gradient == 1).all()
    assert EXACT.operand(x) is x
    assert EXACT.stored(x) is x
    assert Rounding("bf16").operand(x) is x
