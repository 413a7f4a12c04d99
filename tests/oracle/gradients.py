"""The gradients of a layer in float64, and how far the engine's may be from them.

Bounds: relative L2 of 1e-2 for bf16 and 2e-2 where activations are rounded to int8, cosine 0.9999. LoRA gradients are
compared for all experts at once, as an optimiser sees them. Two exceptions are for dot products that may cancel, where
three standard deviations are allowed: a router gradient is one product <dy, y>, held against the size that it has for
independent vectors, |dy| |y| / sqrt(hidden); and the gradient of A for few tokens and a small rank is a few products
<dG, B>.
"""

import torch

from .bounds import cosine, relative
from .experts import Lora, layer_forward
from .layers import Inputs, Layer, grad_out, make_inputs
from .published import PUBLISHED
from .registry import LAYER_SCALED

BASE_NAMES = ("gate", "up", "down")


def reference(layer: Layer, x: Inputs, dy: torch.Tensor, lora: Lora | None, scaling: float) -> dict[str, torch.Tensor]:
    leaves = {"input": x.hidden.double(), "weights": x.weights.double()}
    leaves |= {n: t.double() for n, t in (lora or {}).items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    adapters = {n: leaves[n] for n in lora} if lora else None
    out = layer.exact(leaves["input"], x.ids, leaves["weights"], adapters, scaling)
    grads = torch.autograd.grad(out, list(leaves.values()), dy.double(), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def router_size(layer: Layer, x: Inputs, dy: torch.Tensor, lora: Lora | None, scaling: float) -> float:
    """Norm over all slots of |dy| |y| / sqrt(hidden)."""
    total = 0.0
    for slot in range(layer.shape.top_k):
        y = torch.from_numpy(layer.reference(Inputs(x.hidden, x.ids, only(x.weights, slot)), lora, scaling))
        total += float((dy.double().norm(dim=1) * y.norm(dim=1)).square().sum()) / layer.shape.hidden
    return total**0.5


def only(weights: torch.Tensor, slot: int) -> torch.Tensor:
    one = torch.zeros_like(weights)
    one[:, slot] = 1
    return one


def check(layer: Layer, x: Inputs, lora: Lora | None, scaling: float, what: str) -> None:
    fmt, dy = layer.fmt, grad_out(x.tokens, layer.shape.hidden)
    what = f"{layer.isa}/{fmt} {what}"
    adapter = layer.adapter(lora, scaling) if lora else None
    got = layer.backward(layer.train(x, adapter)[1], dy, adapter, lora)
    want = reference(layer, x, dy, lora, scaling)
    error = float((got["weights"].double() - want["weights"]).norm())
    size = router_size(layer, x, dy, lora, scaling)
    assert error <= 3 * bound_of(fmt) * size, f"{what}: router gradient is off by {error:.4g} of {size:.4g}"
    few = lora is not None and x.tokens * layer.shape.top_k * lora["up_a"].shape[1] < 16
    compare(got, {n: g for n, g in want.items() if n != "weights"}, fmt, what, 3 if few else 1)


def bound_of(fmt: str) -> float:
    return 2e-2 if fmt in (*LAYER_SCALED, *PUBLISHED) else 1e-2


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], fmt: str, what: str, slack: int = 1) -> None:
    bound = slack * bound_of(fmt)
    for name, exact in want.items():
        error = relative(got[name].double().numpy(), exact.numpy())
        assert error <= bound, f"{what}: gradient of {name} is off by {error:.4f}"
        if exact.abs().max() > 0:
            turned = 2e-4 if fmt in PUBLISHED else 1e-4  # a relative error of 2e-2 turns by 2e-4
            assert cosine(got[name].numpy(), exact.numpy()) >= 1 - turned * slack**2, (
                f"{what}: {name} has another direction"
            )


def run_base(
    layer: Layer, x: Inputs, dy: torch.Tensor, dtype: torch.dtype = torch.float32, lora: Lora | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of the base weights by name, as the engine writes them."""
    s = layer.shape
    shapes = {
        "gate": (s.experts, s.inter, s.hidden),
        "up": (s.experts, s.inter, s.hidden),
        "down": (s.experts, s.hidden, s.inter),
    }
    names = BASE_NAMES if layer.activation.gated else BASE_NAMES[1:]
    grads = {n: torch.full(shapes[n], torch.nan, dtype=dtype) for n in names}
    adapter = layer.adapter(lora) if lora else None
    _, cache = layer.train(x, adapter)
    layer.engine.backward(cache, dy, adapter, None, None, None, list(grads.values()))
    return grads


def reference_base(layer: Layer, x: Inputs, dy: torch.Tensor, lora: Lora | None = None) -> dict[str, torch.Tensor]:
    weights = layer.dequantized()
    leaves = [[None if w is None else w.requires_grad_() for w in expert] for expert in weights]
    exact_lora = {n: t.double() for n, t in lora.items()} if lora else None
    out = layer_forward(
        leaves, x.hidden.double(), x.ids, x.weights.double(), exact_lora, 1.0, layer.rounding,
        activation=layer.activation, biases=None if layer.biases is None else
        [tuple(None if b is None else b.double() for b in own) for own in layer.biases],
    )  # fmt: skip
    flat = [w for expert in leaves for w in expert if w is not None]
    grads = iter(torch.autograd.grad(out, flat, dy.double(), allow_unused=True, materialize_grads=True))
    stacks = [[None if w is None else next(grads) for w in expert] for expert in leaves]
    return {n: torch.stack([s[i] for s in stacks]) for i, n in enumerate(BASE_NAMES) if stacks[0][i] is not None}


def check_base(
    layer: Layer, tokens: int, kind: str = "mixed", dtype: torch.dtype = torch.float32, lora: Lora | None = None
) -> None:
    x, dy = make_inputs(layer.shape, tokens, kind), grad_out(tokens, layer.shape.hidden)
    got, want = run_base(layer, x, dy, dtype, lora), reference_base(layer, x, dy, lora)
    assert list(got) == list(want)
    for name, exact in want.items():
        error = relative(got[name].double().numpy(), exact.numpy())
        assert error <= 1e-2, f"{layer.isa} {layer.shape} tokens={tokens}: gradient of {name} is off by {error:.4f}"
        assert cosine(got[name].double().numpy(), exact.numpy()) >= 0.9999
