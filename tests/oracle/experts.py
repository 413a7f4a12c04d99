"""The layer in float64 torch: what the engine is held to. Autograd gives its gradients; gradcheck proves those.

Rounding that the engine does on purpose can be switched on: activations of the experts' GEMMs (int8: one scale per
row), h and the LoRA activations to bf16. It counts as the identity for gradients.
"""

from dataclasses import dataclass

import torch

from . import dropout

Lora = dict[str, torch.Tensor]  # gate_a [E, r, H], gate_b [E, I, r], up_a, up_b, down_a [E, r, I], down_b [E, H, r]
Expert = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]  # gate (None: no gate), up [I, H], down [H, I]
Weights = list[Expert]
Biases = list[Expert]  # of gate, up [I], down [H]

LORA_NAMES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")


def straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded - x).detach()


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return straight_through(x, x.detach().to(torch.float32).to(torch.bfloat16).double())


def to_int8_rows(x: torch.Tensor) -> torch.Tensor:
    """The reciprocal is fp32, as in the kernels: ties such as amax / 2 are common in bf16; double would break them."""
    values = x.detach().float()
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    levels = torch.where(scale > 0, torch.round(values * (1 / torch.where(scale > 0, scale, 1.0))), 0.0)
    return straight_through(x, levels.clamp(-127, 127).double() * scale.double())


def to_int8_spans(x: torch.Tensor) -> torch.Tensor:
    """One scale for each 32 columns; the levels come from the fp32 reciprocal, as in the kernels."""
    m, k = x.shape
    spans = torch.nn.functional.pad(x.detach().float(), (0, -k % 32)).reshape(m, -1, 32)
    scale = spans.abs().amax(dim=2, keepdim=True) / 127
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0.0)
    rounded = torch.round(spans * inverse).double() * scale.double()
    return straight_through(x, rounded.reshape(m, -1)[:, :k])


@dataclass(frozen=True)
class Rounding:
    """activations: None (exact), "bf16" or "int8". slices: (first, number) of columns of h with their own scale.

    span_rows: an expert with so many rows rounds its activations to int8, one scale for each 32 columns.
    h_span_rows: the same for h, if down's format is another one.
    """

    activations: str | None
    slices: tuple[tuple[int, int], ...] = ()
    span_rows: int = 0
    h_span_rows: int | None = None

    def operand(self, x: torch.Tensor, is_h: bool = False) -> torch.Tensor:
        if len(x) <= (self.h_span_rows if is_h and self.h_span_rows is not None else self.span_rows):
            return to_int8_spans(x)
        if self.activations != "int8":
            return x
        if not (is_h and self.slices):
            return to_int8_rows(x)
        return torch.cat([to_int8_rows(x[:, first : first + n]) for first, n in self.slices], dim=1)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.activations is None else to_bf16(x)


EXACT = Rounding(None)


@dataclass(frozen=True)
class Activation:
    """h from gate and up. limit 0: no clamp; alpha 0: plain SwiGLU."""

    name: str = "silu"
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def gated(self) -> bool:
        return self.name != "relu2"

    @property
    def arguments(self) -> tuple[str, float, float]:
        return self.name, self.limit, self.alpha

    def __call__(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        if gate is None:
            return up.clamp(min=0) ** 2
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.name == "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        if self.alpha:
            return gate * torch.sigmoid(self.alpha * gate) * (up + 1)
        return gate * torch.sigmoid(gate) * up


SILU = Activation()
ACTIVATIONS = {
    "silu": SILU,
    "clamped": Activation(limit=1.25),
    "oai": Activation(limit=1.5, alpha=1.702),
    "oai without limit": Activation(alpha=1.702),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2"),
}


@dataclass(frozen=True)
class Dropout:
    p: float
    seed: int

    def masks(self, token: torch.Tensor, expert: int, hidden: int, inter: int) -> tuple[torch.Tensor, torch.Tensor]:
        """0 or 1 / (1 - p), of x [tokens, hidden] and of h [tokens, inter]."""

        def mask(site: str, n: int) -> torch.Tensor:
            kept = dropout.keep(self.p, self.seed, site, token.numpy(), expert, n)
            return torch.from_numpy(kept * dropout.factor(self.p))

        return mask("x", hidden), mask("h", inter)


def lora_names(activation: Activation) -> tuple[str, ...]:
    """The LoRA matrices that there are."""
    return LORA_NAMES if activation.gated else LORA_NAMES[2:]


def expert_forward(
    weights: Expert,
    x: torch.Tensor,
    lora: dict[str, torch.Tensor] | None,
    scaling: float,
    rounding: Rounding,
    activation: Activation = SILU,
    biases: Expert | None = None,
    masks: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x [m, H] -> [m, H]. masks: what LoRA's A sees of x [m, H] and of h [m, I] (0 or 1 / (1 - p))."""

    def project(v: torch.Tensor, which: int) -> torch.Tensor | None:
        w = weights[which]
        if w is None:
            return None
        out = rounding.operand(v, which == 2) @ w.T
        if lora is not None:
            a, b = (lora[n] for n in LORA_NAMES[2 * which : 2 * which + 2])
            seen = v if masks is None else v * masks[which // 2]
            out = out + rounding.stored(scaling * (seen @ a.T)) @ b.T
        bias = biases[which] if biases else None
        return out if bias is None else out + bias

    return project(rounding.stored(activation(project(x, 0), project(x, 1))), 2)


def layer_forward(
    weights: Weights,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
    lora: Lora | None = None,
    scaling: float = 1.0,
    rounding: Rounding = EXACT,
    skipped: frozenset[int] = frozenset(),
    activation: Activation = SILU,
    biases: Biases | None = None,
    drop: Dropout | None = None,
) -> torch.Tensor:
    """sum over slots of routing weight * expert(token); -1, E and `skipped` experts contribute nothing."""
    out = torch.zeros_like(hidden)
    for e, expert in enumerate(weights):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if e in skipped or not len(token):
            continue
        adapters = None if lora is None else {name: matrix[e] for name, matrix in lora.items()}
        own = biases[e] if biases else None
        masks = drop.masks(token, e, hidden.shape[1], expert[1].shape[0]) if drop else None
        y = expert_forward(expert, hidden[token], adapters, scaling, rounding, activation, own, masks)
        out = out.index_add(0, token, y * routing[token, slot, None])
    return out
