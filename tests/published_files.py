"""Makers of safetensors checkpoints with quantised experts: compressed-tensors int4 and FP8."""

from __future__ import annotations

import torch
from torch import Tensor

PROJECTIONS = ("gate", "up", "down")
Stacks = tuple[Tensor, Tensor, Tensor]


def matrices(stacks: Stacks, layer: int, block: str = "mlp", prefix: str = "model."):
    """(name without ".weight", matrix, expert, projection) of every matrix."""
    names = ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    for e in range(stacks[0].shape[0]):
        for name, projection, stack in zip(names, PROJECTIONS, stacks, strict=True):
            yield f"{prefix}layers.{layer}.{block}.experts.{e}.{name}", stack[e], e, projection


def pack_int4(codes: Tensor) -> Tensor:
    """int32 [n, ceil(k/8)] from codes -8..7 [n, k]: eight in a word, the first lowest, 8 added to each; 0 behind k."""
    n, k = codes.shape
    words = torch.zeros(n, -(-k // 8) * 8, dtype=torch.int64)
    words[:, :k] = codes.long() + 8
    words = (words.view(n, -1, 8) << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int4_codes(stacks: Stacks, seed: int = 0) -> list[list[Tensor]]:
    """Random codes of each projection and expert."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(-8, 8, m.shape, generator=g) for m in stack] for stack in stacks]


def int4_tensors(
    stacks: Stacks,
    layer: int,
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    block: str = "mlp",
    with_shape: bool = True,
    zeros: str = "",
) -> tuple[dict[str, Tensor], Stacks]:
    """A pack-quantized checkpoint of the given shapes with random codes and scales (group 0: one a row), and the fp32
    weights that it stands for. zeros: "words" or "bytes": with zero points in that form."""
    g = torch.Generator().manual_seed(layer)
    tensors, decoded = {}, [torch.zeros(s.shape) for s in stacks]
    codes = int4_codes(stacks, layer)
    for name, matrix, e, projection in matrices(stacks, layer, block):
        n, k = matrix.shape
        p = PROJECTIONS.index(projection)
        size = group or k
        scales = ((torch.rand(n, -(-k // size), generator=g) + 0.5) / 5 / k**0.5).to(dtype)
        tensors[f"{name}.weight_packed"] = pack_int4(codes[p][e])
        tensors[f"{name}.weight_scale"] = scales
        if with_shape:
            tensors[f"{name}.weight_shape"] = torch.tensor([n, k])
        zero = torch.zeros(scales.shape)
        if zeros:
            zero = torch.randint(-8, 8, scales.shape, generator=g)
            tensors[f"{name}.weight_zero_point"] = (
                pack_int4(zero.T).T.contiguous() if zeros == "words" else zero.to(torch.int8)
            )
        levels = codes[p][e] - zero.repeat_interleave(size, 1)[:, :k]
        decoded[p][e] = levels * scales.bfloat16().float().repeat_interleave(size, 1)[:, :k]
    return tensors, (decoded[0], decoded[1], decoded[2])


def fp8_codes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random e4m3fn numbers, none NaN."""
    return (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


FP8_FORMS = ("blocks", "rows", "rows 1-D", "one", "one 1-D")


def fp8_scales(form: str, n: int, k: int, generator: torch.Generator) -> Tensor:
    """fp32 scales of one of the `FP8_FORMS`."""
    shape = {
        "blocks": (-(-n // 128), -(-k // 128)),
        "rows": (n, 1),
        "rows 1-D": (n,),
        "one": (),
        "one 1-D": (1,),
    }[form]
    return (torch.rand(shape, generator=generator) + 0.5) / 100 / k**0.5


def fp8_expand(scales: Tensor, form: str, n: int, k: int) -> Tensor:
    """fp32 [n, k]."""
    if form == "blocks":
        return scales.float().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return scales.float().reshape(-1, 1).expand(n, k)


def fp8_tensors(
    stacks: Stacks,
    layer: int,
    form: str,
    suffix: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float32,
    block: str = "mlp",
) -> tuple[dict[str, Tensor], Stacks]:
    """An FP8 checkpoint of the given shapes with random weights, and the fp32 weights that it stands for."""
    g = torch.Generator().manual_seed(layer)
    tensors, decoded = {}, [torch.zeros(s.shape) for s in stacks]
    for name, matrix, e, projection in matrices(stacks, layer, block):
        n, k = matrix.shape
        codes = fp8_codes((n, k), g)
        scales = fp8_scales(form, n, k, g).to(dtype)
        tensors[f"{name}.weight"], tensors[f"{name}.{suffix}"] = codes, scales
        decoded[PROJECTIONS.index(projection)][e] = codes.float() * fp8_expand(scales, form, n, k)
    return tensors, (decoded[0], decoded[1], decoded[2])


def fp8_fused_tensors(stacks: Stacks, layer: int) -> tuple[dict[str, Tensor], Stacks]:
    """The stacks of transformers' own FP8 experts, in blocks."""
    g = torch.Generator().manual_seed(layer)
    gate, _, down = stacks
    experts, n = gate.shape[0], gate.shape[1]
    stem = f"model.layers.{layer}.mlp.experts."
    tensors, decoded = {}, []
    for name, shape in (
        ("gate_up_proj", (experts, 2 * gate.shape[1], gate.shape[2])),
        ("down_proj", tuple(down.shape)),
    ):
        codes = fp8_codes(shape, g)
        scales = torch.stack([fp8_scales("blocks", shape[1], shape[2], g) for _ in range(experts)])
        tensors[stem + name], tensors[f"{stem}{name}_scale_inv"] = codes, scales
        expanded = torch.stack([fp8_expand(s, "blocks", shape[1], shape[2]) for s in scales])
        decoded.append(codes.float() * expanded)
    return tensors, (decoded[0][:, :n], decoded[0][:, n:], decoded[1])
