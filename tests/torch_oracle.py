"""A slow, readable MoE layer in float64 torch, and small layers to compare with it.

The oracle computes on the weights that the kernels use (`MoeLayer.dequantize_expert`), so it measures the kernels and
not the weight format. Being plain torch, it has gradients for everything.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from oracle.experts import Rounding
from oracle.registry import span_rows
from torch import Tensor
from torch.nn.functional import silu

from ktmoe import _ext
from ktmoe.base import BaseMoEWrapper
from ktmoe.lora import LoraTensors, lora_shapes
from ktmoe.methods import METHODS
from ktmoe.wrapper import KTMoEWrapper

INFERENCE = [m.name for m in METHODS.values() if m.mode == "inference"]
SFT = [m.name for m in METHODS.values() if m.mode == "sft"]
ISAS = _ext.test_isa_levels()

# bf16 keeps 8 bits: half an ulp is 2**-9 of the value. h and the output are rounded: a row errs by less than 2**-7.
# Block formats other than fp8 also round activations to int8 (see span_rows), one scale per 32: half a step is 2**-8 of
# the largest, before each of two products.


def int8_products(wrapper: BaseMoEWrapper) -> bool:
    """Whether the layer rounds its activations to int8."""
    return str(_ext.testing.direct(wrapper.layer.format)) == "int8"


def rounding(wrapper: BaseMoEWrapper) -> Rounding:
    """How the layer rounds its activations."""
    layer = wrapper.layer
    spans = (span_rows(f, layer.isa) for f in (layer.format, layer.down_format))
    return Rounding("int8" if int8_products(wrapper) else "bf16", (), *spans)


def forward_tolerance(wrapper: BaseMoEWrapper) -> float:
    layer = wrapper.layer
    return 2.0**-5 if any(span_rows(f, layer.isa) for f in (layer.format, layer.down_format)) else 2.0**-7


def gradient_tolerance(wrapper: BaseMoEWrapper) -> float:
    """Published weights see one more rounding, to bf16, on the way back."""
    published = _ext.testing.published(wrapper.layer.format)
    return 2e-2 if int8_products(wrapper) or published else 1e-2


@dataclass
class Shape:
    """Ragged on purpose: no dimension is a multiple of a tile."""

    experts: int = 5
    top_k: int = 2
    hidden: int = 72
    inter: int = 40
    rank: int = 3
    extra: dict[str, object] = field(default_factory=dict)


def weights(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up [E, I, H], down [E, H, I] in bf16, scaled so that the activations are of order 1."""
    g = torch.Generator().manual_seed(seed)

    def make(n: int, k: int) -> Tensor:
        return (torch.randn(shape.experts, n, k, generator=g) / k**0.5).bfloat16()

    return make(shape.inter, shape.hidden), make(shape.inter, shape.hidden), make(shape.hidden, shape.inter)


def batch(shape: Shape, n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden bf16, ids int64 without repetition, weights fp32."""
    g = torch.Generator().manual_seed(1000 + seed)
    hidden = torch.randn(n_tokens, shape.hidden, generator=g).bfloat16()
    ids = torch.rand(n_tokens, shape.experts, generator=g).argsort(1)[:, : shape.top_k].contiguous()
    return hidden, ids, torch.rand(n_tokens, shape.top_k, generator=g) + 0.1


def lora(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, scaling: float = 0.75) -> LoraTensors:
    """Random A and B, large enough that the LoRA term is about a third of the output; leaves with a gradient."""
    g = torch.Generator().manual_seed(2000 + seed)
    shapes = lora_shapes(shape.experts, shape.hidden, shape.inter, shape.rank)
    tensors = [(torch.randn(s, generator=g) * (0.7 / s[2] ** 0.5)).to(dtype).requires_grad_() for s in shapes]
    return LoraTensors(*tensors, scaling=scaling, rank=shape.rank)


def make(shape: Shape, row: str, **options: object) -> BaseMoEWrapper:
    """A wrapper of method `row` with one thread, not loaded; options replace arguments of KTMoEWrapper."""
    arguments: dict[str, object] = {
        "layer_idx": 3,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.inter,
        "num_gpu_experts": 0,
        "cpuinfer_threads": 1,
        "threadpool_count": 1,
        "weight_path": "",
        "chunked_prefill_size": 512,
        "method": row,
        "mode": METHODS[row].mode,
        **shape.extra,
        **options,
    }
    if METHODS[row].mode == "sft":
        arguments.setdefault("lora_rank", shape.rank)
    return KTMoEWrapper(**arguments)  # type: ignore[arg-type]


def loaded(shape: Shape, method: str, seed: int = 0, **options: object) -> BaseMoEWrapper:
    """A wrapper with random weights."""
    wrapper = make(shape, method, **options)
    wrapper.load_weights_from_tensors(*weights(shape, seed))
    return wrapper


def dequantized(wrapper: BaseMoEWrapper) -> tuple[Tensor, Tensor, Tensor]:
    """The weights that the kernels use, float64; zeros for experts on the GPU."""
    e, h, i = wrapper.num_experts, wrapper.hidden_size, wrapper.moe_intermediate_size
    stacks = torch.zeros(e, i, h), torch.zeros(e, i, h), torch.zeros(e, h, i)
    for expert in range(e):
        if not wrapper.gpu_experts_mask[expert]:
            wrapper.layer.dequantize_expert(expert, *(s[expert] for s in stacks))
    return stacks[0].double(), stacks[1].double(), stacks[2].double()


def bf16(x: Tensor) -> Tensor:
    """Rounded to bf16; the gradient passes straight through."""
    return x.double() + (x.detach().bfloat16().double() - x.detach().double())


def int8_rows(x: Tensor) -> Tensor:
    """What is left of each row after dynamic int8 quantisation; the gradient passes straight through.

    Rounded to bf16 and scaled in fp32 as the kernels do it: values such as half of the largest lie on a rounding tie.
    """
    rows = x.detach().bfloat16().float()
    scale = (rows.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-30)
    return x + ((rows * (1 / scale)).round().double() * scale.double() - x.detach())


def forward(
    wrapper: BaseMoEWrapper,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    adapter: LoraTensors | None = None,
    *,
    for_gradients: bool = False,
) -> Tensor:
    """The layer in float64: inputs of any float type, output float64 [n_tokens, hidden].

    Activations are rounded where the engine rounds them. for_gradients: an int8 layer takes the gradient of the routing
    weights from h before its quantisation, so the down projection here does the same.
    """
    gate, up, down = dequantized(wrapper)
    int8 = int8_products(wrapper)
    x = hidden.double()
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for slot, e in enumerate(ids[t].tolist()):
            if e in (-1, wrapper.num_experts) or wrapper.gpu_experts_mask[e]:
                continue
            row = int8_rows(x[t]) if int8 else x[t]
            g, u = gate[e] @ row, up[e] @ row
            if adapter is not None:
                g = g + _lora_term(adapter.gate_a[e], adapter.gate_b[e], x[t], adapter.scaling)
                u = u + _lora_term(adapter.up_a[e], adapter.up_b[e], x[t], adapter.scaling)
            h = silu(g) * u
            if int8 and not for_gradients:  # each part of the layer has a scale of its own
                rounded = torch.cat([int8_rows(h[first : first + n]) for first, n in wrapper.layer.parts])
            else:
                rounded = h
            y = down[e] @ rounded
            if adapter is not None:
                y = y + _lora_term(adapter.down_a[e], adapter.down_b[e], h, adapter.scaling)
            total = total + weights[t, slot].double() * y
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


def _lora_term(a: Tensor, b: Tensor, x: Tensor, scaling: float) -> Tensor:
    return bf16(b) @ bf16(scaling * (bf16(a) @ x))


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-300))


def row_error(got: Tensor, want: Tensor) -> float:
    """The worst relative L2 distance of a row."""
    got, want = got.detach().double(), want.detach().double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-300)).max())


def cosine(got: Tensor, want: Tensor) -> float:
    """Cosine of the angle between two tensors."""
    return float(
        torch.nn.functional.cosine_similarity(got.detach().double().flatten(), want.detach().double().flatten(), 0)
    )


def in_child(body: Callable[[], object]) -> int:
    """Runs `body` in a forked child: 0 = it returned, 1 = it raised, 124 = it hung."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124
