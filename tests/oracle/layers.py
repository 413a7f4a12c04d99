"""Small MoE layers with random weights, inputs of every kind, and the calls that the tests repeat."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ktmoe import _ext

from .experts import (
    LORA_NAMES,
    SILU,
    Activation,
    Biases,
    Dropout,
    Expert,
    Lora,
    Rounding,
    Weights,
    layer_forward,
    lora_names,
)
from .published import PUBLISHED, arrays
from .registry import activations, span_rows

NO_DROPOUT = Dropout(0.0, 0)


@dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    hidden: int
    inter: int

    def __str__(self) -> str:
        return f"E{self.experts}k{self.top_k}H{self.hidden}I{self.inter}"


@dataclass
class Inputs:
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def part(self, rows: slice) -> "Inputs":
        return Inputs(self.hidden[rows], self.ids[rows], self.weights[rows])

    @property
    def tokens(self) -> int:
        return len(self.hidden)


def route(shape: Shape, tokens: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    e, k = shape.experts, shape.top_k
    if kind == "uniform":
        return torch.rand(tokens, e, generator=generator).argsort(dim=1)[:, :k].contiguous()
    if kind == "all to one":
        ids = torch.full((tokens, k), -1)
        ids[:, 0] = e - 1
        return ids
    if kind == "one each":  # token t to experts t, t + 1, ...
        return (torch.arange(tokens)[:, None] + torch.arange(k)) % e
    if kind == "masked":
        return torch.where(torch.rand(tokens, k, generator=generator) < 0.5, -1, e)
    if kind == "duplicates":
        return torch.randint(0, e, (tokens, 1), generator=generator).expand(tokens, k).contiguous()
    if kind == "mixed":  # some slots not routed here
        ids = route(shape, tokens, "uniform", generator)
        ids[torch.rand(tokens, k, generator=generator) < 0.3] = -1
        ids[torch.rand(tokens, k, generator=generator) < 0.2] = e
        return ids
    raise ValueError(kind)


def make_inputs(shape: Shape, tokens: int, kind: str = "uniform", seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden, generator=g).bfloat16()
    return Inputs(hidden, route(shape, tokens, kind, g), torch.rand(tokens, shape.top_k, generator=g) + 0.1)


def grad_out(tokens: int, hidden: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_weights(shape: Shape, seed: int = 0, gated: bool = True) -> Weights:
    g = torch.Generator().manual_seed(1000 + seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=g) / columns**0.5).bfloat16()

    h, i = shape.hidden, shape.inter
    return [(matrix(i, h) if gated else None, matrix(i, h), matrix(h, i)) for _ in range(shape.experts)]


def make_biases(shape: Shape, gated: bool = True) -> Biases:
    """fp32, half as large as what they are added to."""
    g = torch.Generator().manual_seed(3000)

    def vector(n: int) -> torch.Tensor:
        return torch.randn(n, generator=g) / 2

    h, i = shape.hidden, shape.inter
    return [(vector(i) if gated else None, vector(i), vector(h)) for _ in range(shape.experts)]


def make_lora(shape: Shape, rank: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, gated: bool = True) -> Lora:
    g = torch.Generator().manual_seed(2000 + seed)
    sizes = {
        "gate": (shape.hidden, shape.inter),
        "up": (shape.hidden, shape.inter),
        "down": (shape.inter, shape.hidden),
    }
    lora = {}
    for name, (k, n) in sizes.items():
        if name == "gate" and not gated:
            continue
        lora[f"{name}_a"] = torch.randn(shape.experts, rank, k, generator=g).div(k**0.5).bfloat16().to(dtype)
        lora[f"{name}_b"] = torch.randn(shape.experts, n, rank, generator=g).mul(0.3 / rank**0.5).bfloat16().to(dtype)
    return lora


def make_pool(threads: int = 2, parts: int = 1) -> "_ext.ThreadPool":
    """threads: of each sub-pool."""
    return _ext.ThreadPool([threads] * parts, [-1] * parts)


@dataclass
class Layer:
    """A layer of the engine, loaded."""

    shape: Shape
    fmt: str
    isa: str
    threads: int = 2  # of each sub-pool
    parts: int = 1  # sub-pools
    chunk_tokens: int = 0
    on_gpu: list[bool] | None = None
    activation: Activation = SILU
    with_biases: bool = False
    pool: "_ext.ThreadPool" = field(default=None)  # type: ignore[assignment]
    engine: "_ext.MoeLayer" = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self.pool = self.pool or make_pool(self.threads, self.parts)
        mask = None if self.on_gpu is None else torch.tensor(self.on_gpu)
        self.engine = _ext.MoeLayer(
            self.pool, s.experts, s.top_k, s.hidden, s.inter, self.fmt, self.isa, self.chunk_tokens, mask,
            *self.activation.arguments,
        )  # fmt: skip
        for e, weights in enumerate(make_weights(s, gated=self.activation.gated)):
            if not (self.on_gpu and self.on_gpu[e]):
                self.load(e, *weights, *(self.biases[e] if self.biases else ()))

    def load(self, e: int, gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor, *biases: object) -> None:
        """Published formats get random weights of about the same size instead of these."""
        if self.fmt not in PUBLISHED:
            return self.engine.load_expert(e, gate, up, down, *biases)
        rng, random = np.random.default_rng(e), PUBLISHED[self.fmt].random
        parts = [None if w is None else arrays(random(rng, *w.shape, w.shape[1] ** -0.5)) for w in (gate, up, down)]
        return self.engine.load_expert_raw(e, *parts, *biases)

    def load_zeros(self, e: int) -> None:
        h, i = self.shape.hidden, self.shape.inter
        shapes = ((i, h), (i, h), (h, i))
        if self.fmt not in PUBLISHED:
            return self.engine.load_expert(e, *(torch.zeros(s, dtype=torch.bfloat16) for s in shapes))
        random = PUBLISHED[self.fmt].random
        parts = [[0 * p for p in random(np.random.default_rng(0), *s, 1.0)] for s in shapes]
        return self.engine.load_expert_raw(e, *(arrays(p) for p in parts))

    @property
    def biases(self) -> Biases | None:
        return make_biases(self.shape, self.activation.gated) if self.with_biases else None

    @property
    def rounding(self) -> Rounding:
        return Rounding(activations(self.fmt), tuple(self.engine.parts), span_rows(self.fmt, self.engine.isa))

    def dequantized(self) -> Weights:
        """The weights that the kernels use, in float64."""
        weights: Weights = []
        for e in range(self.shape.experts):
            h, i = self.shape.hidden, self.shape.inter
            gate, up, down = torch.zeros(i, h) if self.activation.gated else None, torch.zeros(i, h), torch.zeros(h, i)
            if not (self.on_gpu and self.on_gpu[e]):
                self.engine.dequantize_expert(e, gate, up, down)
            weights.append(doubled((gate, up, down)))
        return weights

    def exact(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        lora: Lora | None = None,
        scaling: float = 1.0,
        drop: Dropout | None = None,
    ) -> torch.Tensor:
        """The layer in float64 torch: differentiable, on the weights that the kernels use."""
        skipped = frozenset(e for e, gpu in enumerate(self.on_gpu or []) if gpu)
        biases = None if self.biases is None else [doubled(b) for b in self.biases]
        rounding = self.rounding
        return layer_forward(
            self.dequantized(), hidden, ids, weights, lora, scaling, rounding, skipped, self.activation, biases, drop
        )

    def adapter(self, lora: Lora, scaling: float = 1.0) -> "_ext.LoraAdapter":
        s = self.shape
        adapter = _ext.LoraAdapter(s.experts, s.hidden, s.inter, lora["up_a"].shape[1], scaling, self.activation.gated)
        adapter.update(self.pool, *(lora.get(n) for n in LORA_NAMES))
        return adapter

    def forward(self, x: Inputs, adapter: "_ext.LoraAdapter | None" = None, drop: Dropout = NO_DROPOUT) -> torch.Tensor:
        out = torch.full((x.tokens, self.shape.hidden), torch.nan, dtype=torch.bfloat16)
        self.engine.forward(x.hidden, x.ids, x.weights, out, adapter, drop.p, drop.seed)
        return out

    def train(
        self, x: Inputs, adapter: "_ext.LoraAdapter | None" = None, drop: Dropout = NO_DROPOUT
    ) -> tuple[torch.Tensor, "_ext.ForwardCache"]:
        out = torch.full((x.tokens, self.shape.hidden), torch.nan, dtype=torch.bfloat16)
        return out, self.engine.forward_train(x.hidden, x.ids, x.weights, out, adapter, drop.p, drop.seed)

    def backward(
        self,
        cache: "_ext.ForwardCache",
        dy: torch.Tensor,
        adapter: "_ext.LoraAdapter | None" = None,
        lora: Lora | None = None,
    ) -> dict[str, torch.Tensor]:
        """Every gradient by name: input, weights, and those of LoRA if `lora` gives their shapes."""
        grads = {
            "input": torch.full((cache.n_tokens, self.shape.hidden), torch.nan),
            "weights": torch.full((cache.n_tokens, self.shape.top_k), torch.nan),
        }
        names = lora_names(self.activation) if lora else ()
        grads |= {n: torch.full(lora[n].shape, torch.nan) for n in names}  # type: ignore[index]
        lora_grads = [grads[n] for n in names] or None
        self.engine.backward(cache, dy, adapter, grads["input"], grads["weights"], lora_grads)
        return grads

    def reference(self, x: Inputs, lora: Lora | None = None, scaling: float = 1.0) -> np.ndarray:
        exact = None if lora is None else {n: t.double() for n, t in lora.items()}
        return self.exact(x.hidden.double(), x.ids, x.weights.double(), exact, scaling).numpy()


def doubled(expert: Expert) -> Expert:
    gate, up, down = expert
    return None if gate is None else gate.double(), up.double(), down.double()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits (NaN equals NaN of the same bits)."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool((a.contiguous().view(integers) == b.contiguous().view(integers)).all())
    )


def assert_same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    assert same(a, b), (
        f"{what}: not bitwise equal (largest difference {float((a.double() - b.double()).abs().max()):.3g})"
    )
