"""Experts in compressed-tensors' pack-quantized int4: layouts, group sizes, and what is refused."""

import os

import published_files as files
import pytest
import torch
from hostile_files import save_sharded

from ktmoe.errors import WeightFileError
from ktmoe.io.published import dequantize
from ktmoe.io.sources import open_source

EXPERTS, HIDDEN, INTER, LAYER = 3, 256, 128, 3
STACKS = (
    torch.zeros(EXPERTS, INTER, HIDDEN),
    torch.zeros(EXPERTS, INTER, HIDDEN),
    torch.zeros(EXPERTS, HIDDEN, INTER),
)
STEM = f"model.layers.{LAYER}.mlp.experts"


def ragged(hidden, inter):
    return (
        torch.zeros(EXPERTS, inter, hidden),
        torch.zeros(EXPERTS, inter, hidden),
        torch.zeros(EXPERTS, hidden, inter),
    )


def source(folder, hidden=HIDDEN, inter=INTER):
    return open_source(str(folder), LAYER, hidden, inter)


def checkpoint(folder, tensors, n_shards=3):
    tensors["model.embed_tokens.weight"] = torch.zeros(4, HIDDEN)
    return save_sharded(folder, {k: v.contiguous() for k, v in tensors.items()}, n_shards)


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_group_size(tmp_path, group, block) -> None:
    tensors, decoded = files.int4_tensors(STACKS, LAYER, group, block=block)
    other, _ = files.int4_tensors(STACKS, LAYER + 10, 32)
    with source(checkpoint(tmp_path, tensors | other)) as opened:
        assert (opened.kind, opened.n_experts, opened.formats) == ("int4", EXPERTS, (f"int4_g{group}",) * 2)
        for expert in range(EXPERTS):
            for matrix, stack in zip(opened.read(expert), decoded, strict=True):
                assert matrix.parts[0].dtype is torch.uint8
                assert matrix.parts[1].dtype is torch.bfloat16
                assert matrix.parts[1].shape == (matrix.shape[0], matrix.shape[1] // group)
                assert torch.equal(dequantize(matrix), stack[expert])


def test_the_bytes_are_those_of_the_file(tmp_path) -> None:
    tensors, _ = files.int4_tensors(STACKS, LAYER, 32)
    with source(checkpoint(tmp_path, dict(tensors))) as opened:
        gate = opened.read(1)[0]
    assert torch.equal(gate.parts[0].view(torch.int32), tensors[f"{STEM}.1.gate_proj.weight_packed"])
    assert torch.equal(gate.parts[1], tensors[f"{STEM}.1.gate_proj.weight_scale"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_against_the_package(tmp_path, group, symmetric) -> None:
    """The package quantises and packs; its own decompression says what the weights are."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    args = quantization.QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=group, symmetric=symmetric
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    g = torch.Generator().manual_seed(0)
    tensors, decoded = {}, {}
    for name, matrix, expert, projection in files.matrices(STACKS, LAYER):
        weight = torch.randn(matrix.shape, generator=g).bfloat16()
        groups = weight.view(weight.shape[0], -1, group)
        if symmetric:
            state = {"weight": weight, "weight_scale": groups.abs().amax(2) / 7}
        else:
            scale = (groups.amax(2) - groups.amin(2)) / 15
            zero = (-8 - groups.amin(2) / scale).round().clamp(-8, 7).to(torch.int8)
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        tensors |= {f"{name}.{key}": value for key, value in packed.items()}
        decoded[expert, projection] = compressor.decompress(dict(packed), scheme)["weight"]
    suffixes = {"packed", "scale", "shape"} | (set() if symmetric else {"zero_point"})
    assert {name.rsplit(".weight_")[-1] for name in tensors} == suffixes
    with source(checkpoint(tmp_path, tensors)) as opened:
        for expert in range(EXPERTS):
            for projection, matrix in zip(files.PROJECTIONS, opened.read(expert), strict=True):
                # The package multiplies in bf16.
                assert torch.equal(dequantize(matrix).bfloat16(), decoded[expert, projection].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_scale_dtypes(tmp_path, dtype) -> None:
    tensors, decoded = files.int4_tensors(STACKS, LAYER, 64, dtype)
    with source(checkpoint(tmp_path, tensors)) as opened:
        assert torch.equal(dequantize(opened.read(2)[1]), decoded[1][2])


def test_one_scale_a_row_becomes_groups_of_128(tmp_path) -> None:
    tensors, decoded = files.int4_tensors(STACKS, LAYER, 0)
    with source(checkpoint(tmp_path, tensors)) as opened:
        assert opened.formats == ("int4_g128", "int4_g128")
        gate, _, down = opened.read(0)
        assert gate.parts[1].shape == (INTER, 2)
        assert torch.equal(dequantize(gate), decoded[0][0])
        assert torch.equal(dequantize(down), decoded[2][0])


@pytest.mark.parametrize("inter", [40, 41, 130, 7])
@pytest.mark.parametrize("group", [32, 128])
def test_ragged_rows(tmp_path, group, inter) -> None:
    tensors, decoded = files.int4_tensors(ragged(72, inter), LAYER, group)
    with source(checkpoint(tmp_path, tensors), 72, inter) as opened:
        for matrix, stack in zip(opened.read(1), decoded, strict=True):
            n, k = matrix.shape
            size = int(matrix.format.split("_g")[1])
            assert matrix.parts[0].shape == (n, -(-k // size) * size // 2)
            assert matrix.parts[1].shape == (n, -(-k // size))
            assert torch.equal(dequantize(matrix), stack[1])
            whole = type(matrix)(matrix.format, matrix.parts, (n, matrix.parts[0].shape[1] * 2))
            assert (dequantize(whole)[:, k:] == 0).all()


@pytest.mark.parametrize("form", ["words", "bytes", "one a row"])
@pytest.mark.parametrize("inter", [128, 41])
def test_zero_points(tmp_path, inter, form) -> None:
    tensors, decoded = files.int4_tensors(
        ragged(72, inter), LAYER, 0 if form == "one a row" else 32, zeros="bytes" if form == "bytes" else "words"
    )
    with source(checkpoint(tmp_path, tensors), 72, inter) as opened:
        assert all(f.startswith("int4_g") and f.endswith("z") for f in opened.formats)
        for matrix, stack in zip(opened.read(1), decoded, strict=True):
            assert torch.equal(dequantize(matrix), stack[1])
            whole = type(matrix)(matrix.format, matrix.parts, (matrix.shape[0], matrix.parts[0].shape[1] * 2))
            assert (dequantize(whole)[:, matrix.shape[1] :] == 0).all()


def test_packed_as_bytes_and_without_shape(tmp_path) -> None:
    tensors, decoded = files.int4_tensors(STACKS, LAYER, 32, with_shape=False)
    tensors = {k: v.view(torch.uint8) if k.endswith("packed") else v for k, v in tensors.items()}
    with source(checkpoint(tmp_path, tensors)) as opened:
        assert torch.equal(dequantize(opened.read(0)[2]), decoded[2][0])


def drop(name):
    return lambda t: t.pop(f"{STEM}.{name}")


def put(name, tensor):
    return lambda t: t.update({f"{STEM}.{name}": tensor})


def put_zeros(of_expert_1):
    """Good zero points everywhere but in the gate of expert 1."""

    def edit(tensors):
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            n, columns = tensors[name].shape
            tensors[name.replace("scale", "zero_point")] = torch.zeros(n // 8, columns, dtype=torch.int32)
        tensors[f"{STEM}.1.gate_proj.weight_zero_point"] = of_expert_1

    return edit


BAD = {
    "no scale of the first": (drop("0.gate_proj.weight_scale"), "0.gate_proj.weight_packed': there is no weight_scale"),
    "no packed": (drop("1.up_proj.weight_packed"), "layer 3: expert 1 has no up weight"),
    "order": (
        put("0.gate_proj.weight_g_idx", torch.zeros(HIDDEN, dtype=torch.int32)),
        "0.gate_proj.weight_g_idx': an activation order",
    ),
    "groups of 16": (
        put("0.gate_proj.weight_scale", torch.ones(INTER, HIDDEN // 16)),
        r"0.gate_proj.weight_scale': got shape \[128, 16\], expected one scale for each row, or for each 32, 64 or 128",
    ),
    "scales in one dimension": (
        put("0.down_proj.weight_scale", torch.ones(HIDDEN)),
        r"got shape \[256\], expected one",
    ),
    "up in other groups": (
        lambda t: t.update({f"{STEM}.0.up_proj.weight_scale": torch.ones(INTER, HIDDEN // 64)}),
        "layer 3: gate has groups of 32 and up of 64 weights",
    ),
}
BAD_LATER = {
    "zero points of one matrix": (
        put("0.gate_proj.weight_zero_point", torch.zeros(INTER // 8, HIDDEN // 32, dtype=torch.int32)),
        "1.gate_proj.weight_packed': there is no weight_zero_point beside it",
    ),
    "zero points of another shape": (
        put_zeros(torch.zeros(INTER, HIDDEN // 32, dtype=torch.int32)),
        r"1.gate_proj.weight_zero_point': got shape \[128, 8\], expected \[16, 8\]",
    ),
    "zero points out of range": (
        put_zeros(torch.full((INTER, HIDDEN // 32), 8, dtype=torch.int8)),
        r"1.gate_proj.weight_zero_point': got a value outside -8..7",
    ),
    "no scale": (drop("2.up_proj.weight_scale"), "2.up_proj.weight_packed': there is no weight_scale beside it"),
    "one expert in other groups": (
        put("1.gate_proj.weight_scale", torch.ones(INTER, HIDDEN // 64)),
        r"1.gate_proj.weight_scale': got shape \[128, 4\], expected \[128, 8\]",
    ),
    "8 bits": (
        put("1.gate_proj.weight_packed", torch.zeros(INTER, HIDDEN // 4, dtype=torch.int32)),
        r"1.gate_proj.weight_packed': got shape \[128, 64\], expected \[128, 32\]",
    ),
    "floats": (
        put("1.gate_proj.weight_packed", torch.zeros(INTER, HIDDEN // 2)),
        "1.gate_proj.weight_packed': got dtype F32, expected I32, U8",
    ),
    "another shape": (
        put("1.gate_proj.weight_shape", torch.tensor([HIDDEN, INTER])),
        r"1.gate_proj.weight_shape': got \[256, 128\], expected \[128, 256\]",
    ),
    "scales that are integers": (
        put("1.gate_proj.weight_scale", torch.ones(INTER, HIDDEN // 32, dtype=torch.int32)),
        "1.gate_proj.weight_scale': got dtype I32, expected BF16, F16, F32",
    ),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_LATER])
def test_bad_checkpoints(tmp_path, case) -> None:
    edit, text = (BAD | BAD_LATER)[case]
    tensors, _ = files.int4_tensors(STACKS, LAYER, 32)
    edit(tensors)
    folder = checkpoint(tmp_path, tensors)
    fds = len(os.listdir("/proc/self/fd"))
    if case in BAD:
        with pytest.raises(WeightFileError, match=text):
            source(folder)
    else:
        with source(folder) as opened:
            if "of one matrix" not in case:
                opened.read(0)
            with pytest.raises(WeightFileError, match=text):
                opened.read(1), opened.read(2)
    assert len(os.listdir("/proc/self/fd")) == fds
