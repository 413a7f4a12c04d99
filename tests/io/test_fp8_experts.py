"""Experts in 8-bit floats: every form of scales, fused stacks, and what is refused."""

import os

import published_files as files
import pytest
import torch
from hostile_files import save_sharded

from ktmoe.errors import WeightFileError
from ktmoe.io.published import dequantize
from ktmoe.io.sources import open_source

EXPERTS, LAYER = 3, 3
SHAPES = [(256, 128), (200, 72), (72, 40), (257, 129)]
STEM = f"model.layers.{LAYER}.mlp.experts"


def stacks(hidden, inter):
    return (
        torch.zeros(EXPERTS, inter, hidden),
        torch.zeros(EXPERTS, inter, hidden),
        torch.zeros(EXPERTS, hidden, inter),
    )


def source(folder, hidden, inter):
    return open_source(str(folder), LAYER, hidden, inter)


def check(opened, decoded) -> None:
    assert (opened.kind, opened.n_experts, opened.formats) == ("fp8", EXPERTS, ("fp8", "fp8"))
    for expert in range(EXPERTS):
        for matrix, stack in zip(opened.read(expert), decoded, strict=True):
            n, k = matrix.shape
            codes, scales = matrix.parts
            assert (codes.dtype, codes.shape) == (torch.uint8, (n, k))
            assert (scales.dtype, scales.shape) == (torch.float32, (n, -(-k // 128)))
            assert scales.is_contiguous()
            assert torch.equal(dequantize(matrix), stack[expert])


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", files.FP8_FORMS)
def test_every_form_of_scales(tmp_path, form, shape, suffix) -> None:
    tensors, decoded = files.fp8_tensors(stacks(*shape), LAYER, form, suffix)
    with source(save_sharded(tmp_path, tensors), *shape) as opened:
        check(opened, decoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["blocks", "rows"])
def test_other_scale_dtypes(tmp_path, form, dtype) -> None:
    tensors, decoded = files.fp8_tensors(stacks(200, 72), LAYER, form, dtype=dtype, block="block_sparse_moe")
    with source(save_sharded(tmp_path, tensors), 200, 72) as opened:
        check(opened, decoded)


def test_scales_that_are_powers_of_two(tmp_path) -> None:
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no such type to write")
    tensors, decoded = files.fp8_tensors(stacks(200, 72), LAYER, "blocks", dtype=torch.float8_e8m0fnu)
    with source(save_sharded(tmp_path, tensors), 200, 72) as opened:
        check(opened, decoded)


def test_the_bytes_are_those_of_the_file(tmp_path) -> None:
    tensors, _ = files.fp8_tensors(stacks(256, 128), LAYER, "blocks")
    with source(save_sharded(tmp_path, tensors), 256, 128) as opened:
        assert torch.equal(opened.read(1)[0].parts[0], tensors[f"{STEM}.1.gate_proj.weight"].view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_stacks(tmp_path, shape) -> None:
    tensors, decoded = files.fp8_fused_tensors(stacks(*shape), LAYER)
    with source(save_sharded(tmp_path, tensors), *shape) as opened:
        check(opened, decoded)


@pytest.mark.parametrize("halves", [(2, 1), (144, 1), ()])
def test_fused_with_few_scales(tmp_path, halves) -> None:
    """One scale for gate and one for up, one a row, or one an expert."""
    tensors, _ = files.fp8_fused_tensors(stacks(200, 72), LAYER)
    scales = torch.rand(EXPERTS, *halves) + 0.5
    tensors[f"{STEM}.gate_up_proj_scale_inv"] = scales
    codes = tensors[f"{STEM}.gate_up_proj"].float()
    with source(save_sharded(tmp_path, tensors), 200, 72) as opened:
        for expert in range(EXPERTS):
            gate, up, _ = opened.read(expert)
            if halves == (2, 1):
                factor = scales[expert].repeat_interleave(72, 0)
            else:
                factor = scales[expert].reshape(-1, 1).expand(144, 1)
            want = codes[expert] * factor
            assert torch.equal(dequantize(gate), want[:72])
            assert torch.equal(dequantize(up), want[72:])


def test_halves_of_narrow_experts(tmp_path) -> None:
    """Both halves fit one block of 128 rows, but each has scales of its own."""
    tensors, _ = files.fp8_fused_tensors(stacks(200, 40), LAYER)
    scales = torch.rand(EXPERTS, 2, 2) + 0.5
    tensors[f"{STEM}.gate_up_proj_scale_inv"] = scales
    codes = tensors[f"{STEM}.gate_up_proj"].float()
    with source(save_sharded(tmp_path, tensors), 200, 40) as opened:
        gate, up, _ = opened.read(2)
        factor = scales[2].repeat_interleave(40, 0).repeat_interleave(128, 1)[:, :200]
        assert torch.equal(torch.cat((dequantize(gate), dequantize(up))), codes[2] * factor)


def drop(name):
    return lambda t: t.pop(f"{STEM}.{name}")


def put(name, tensor):
    return lambda t: t.update({f"{STEM}.{name}": tensor})


BAD = {
    "a scale is missing": (drop("1.up_proj.weight_scale_inv"), "1.up_proj.weight': there are no scales beside it"),
    "blocks of 64": (
        put("1.gate_proj.weight_scale_inv", torch.ones(2, 4)),
        r"1.gate_proj.weight_scale_inv': got shape \[2, 4\], expected \[1, 2\] \(blocks of 128 x 128\), \[72, 1\]",
    ),
    "integers": (
        put("1.gate_proj.weight_scale_inv", torch.ones(1, 2, dtype=torch.int32)),
        "1.gate_proj.weight_scale_inv': got dtype I32, expected BF16, F16, F32, F8_E8M0",
    ),
    "bf16 among them": (
        put("1.gate_proj.weight", torch.ones(72, 200, dtype=torch.bfloat16)),
        "1.gate_proj.weight': got dtype BF16, expected F8_E4M3",
    ),
    "another shape": (
        put("1.gate_proj.weight", torch.ones(200, 72).to(torch.float8_e4m3fn)),
        r"1.gate_proj.weight': got shape \[200, 72\], expected \[72, 200\]",
    ),
    "a weight is missing": (drop("1.down_proj.weight"), "layer 3: expert 1 has no down weight"),
    "e5m2": (
        lambda t: t.update({k: v.float().to(torch.float8_e5m2) for k, v in t.items() if k.endswith(".weight")}),
        "got dtype F8_E5M2, expected BF16, F16, F32",
    ),
    "no scales at all": (
        lambda t: [t.pop(k) for k in list(t) if k.endswith("_inv")],
        "got dtype F8_E4M3, expected BF16, F16, F32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path, case) -> None:
    edit, text = BAD[case]
    tensors, _ = files.fp8_tensors(stacks(200, 72), LAYER, "blocks")
    edit(tensors)
    folder = save_sharded(tmp_path, tensors)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightFileError, match=text), source(folder, 200, 72) as opened:
        opened.read(0), opened.read(1)
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("down_proj_scale_inv", None, "down_proj': there are no scales beside it"),
        (
            "down_proj_scale_inv",
            torch.ones(EXPERTS, 3, 1),
            r"down_proj_scale_inv': got shape \[3, 3, 1\], expected \[2, 1\]",
        ),
        ("down_proj_scale_inv", torch.ones(EXPERTS + 1, 2, 1), r"got shape \[4, 2, 1\].*each for 3 experts"),
        ("gate_up_proj", torch.ones(EXPERTS, 72, 200).to(torch.float8_e4m3fn), r"got shape \[3, 72, 200\]"),
    ],
)
def test_bad_stacks(tmp_path, name, tensor, text) -> None:
    tensors, _ = files.fp8_fused_tensors(stacks(200, 72), LAYER)
    tensors.pop(f"{STEM}.{name}")
    if tensor is not None:
        tensors[f"{STEM}.{name}"] = tensor
    with pytest.raises(WeightFileError, match=text), source(save_sharded(tmp_path, tensors), 200, 72) as opened:
        opened.read(0)
