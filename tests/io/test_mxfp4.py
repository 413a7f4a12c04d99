"""Experts in MXFP4, against transformers' own decoder, and what is refused."""

import pytest
import torch
from hostile_files import save_sharded

from ktmoe import KTMoEWrapper
from ktmoe.errors import WeightFileError
from ktmoe.io.published import PublishedExpert, PublishedMatrix, dequantize, quantize
from ktmoe.io.sources import open_source
from ktmoe.methods import METHODS

EXPERTS, LAYER = 3, 1
SHAPES = [(64, 32), (96, 160), (72, 40)]  # hidden, inter; the last with blocks that are not full
STEM = f"model.layers.{LAYER}.mlp.experts"


def tensors(hidden: int, inter: int, biases: bool = True) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(hidden)
    made = {}
    for stack, n, k in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
        shape = (EXPERTS, n, -(-k // 32))
        made[f"{STEM}.{stack}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        made[f"{STEM}.{stack}_scales"] = torch.randint(115, 130, shape, dtype=torch.uint8, generator=random)
        if biases:
            made[f"{STEM}.{stack}_bias"] = torch.randn(EXPERTS, n, generator=random).bfloat16()
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_as_transformers_decodes(tmp_path, shape) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    hidden, inter = shape
    files = tensors(hidden, inter)
    gate_up, down = (
        mxfp4.convert_moe_packed_tensors(files[f"{STEM}.{s}_blocks"], files[f"{STEM}.{s}_scales"])
        for s in ("gate_up_proj", "down_proj")
    )  # bf16 [E, k, n]
    with open_source(str(save_sharded(tmp_path, files)), LAYER, hidden, inter) as source:
        assert (source.kind, source.n_experts, source.formats) == ("mxfp4", EXPERTS, ("mxfp4", "mxfp4"))
        for e in range(EXPERTS):
            expert = source.read_expert(e)
            got = [dequantize(m) for m in expert.matrices if m is not None]
            want = gate_up[e, :hidden, 0::2].T, gate_up[e, :hidden, 1::2].T, down[e, :inter].T
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b.float())
            bias = files[f"{STEM}.gate_up_proj_bias"][e].float()
            assert torch.equal(expert.biases["gate_bias"], bias[0::2])
            assert torch.equal(expert.biases["up_bias"], bias[1::2])
            assert torch.equal(expert.biases["down_bias"], files[f"{STEM}.down_proj_bias"][e].float())


def rows(scale: int) -> torch.Tensor:
    """Every byte of codes under one scale: uint8 [16, 17]."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    return torch.cat((torch.full((16, 1), scale, dtype=torch.uint8), codes), 1)


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 26, 127, 252, 253, 255])
def test_every_code_and_scale(scale) -> None:
    """Exact in bf16 and as gguf says, but for what overflows: there the largest codes are infinite, and 255 is NaN."""
    gguf = pytest.importorskip("gguf")
    matrix = PublishedMatrix("mxfp4", (rows(scale),), (16, 32))
    values = dequantize(matrix)
    assert torch.equal(values.bfloat16().float(), values) or scale == 255
    if scale <= 252:
        want = gguf.quants.dequantize(rows(scale).numpy(), gguf.GGMLQuantizationType.MXFP4)
        assert torch.equal(values, torch.from_numpy(want.copy()))
    elif scale == 255:
        assert values.isnan().all()


def test_quantised_as_gguf_does() -> None:
    gguf = pytest.importorskip("gguf")
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 320, generator=g) * torch.exp2(torch.randint(-20, 20, (64, 1), generator=g).float())
    weights[0] = 0
    weights[1] = torch.arange(320) % 33 / 4 - 4  # halfway between two levels
    weights[2, :32] *= 2.0**-100
    weights = weights.bfloat16().float()
    want = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(quantize(weights, "mxfp4").parts[0], torch.from_numpy(want.view("uint8").copy()))
    weights[3, 40] = torch.inf
    assert quantize(weights, "mxfp4").parts[0][3, 17] == 255


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 26, 127, 252])
def test_the_engine_keeps_every_scale(scale) -> None:
    """All but the smallest: 2^-127 is no normal number and counts as zero."""
    layer = KTMoEWrapper(0, 1, 1, 32, 32, 0, 1, 1, "", 64, method="LLAMAFILE", mode="inference", gguf_type="MXFP4")
    half = torch.cat((rows(scale), rows(scale)))
    matrix = PublishedMatrix("mxfp4", (half,), (32, 32))
    layer.put_expert(0, PublishedExpert((matrix, matrix, matrix), {}))
    values = torch.empty(32, 32), torch.empty(32, 32), torch.empty(32, 32)
    layer.layer.dequantize_expert(0, *(v.numpy() for v in values))
    want = dequantize(matrix) if scale else torch.zeros(32, 32)
    assert all(torch.equal(v, want) for v in values)
    for kept in layer.expert_weights(0).matrices:
        assert torch.equal(kept.parts[0], half)  # bit for bit


@pytest.mark.parametrize("scale", [253, 255])
def test_scales_that_overflow_are_refused(scale) -> None:
    layer = KTMoEWrapper(0, 1, 1, 32, 32, 0, 1, 1, "", 64, method="LLAMAFILE", mode="inference", gguf_type="MXFP4")
    matrix = PublishedMatrix("mxfp4", (torch.cat((rows(scale), rows(scale))),), (32, 32))
    with pytest.raises(ValueError, match="not finite or out of range"):
        layer.put_expert(0, PublishedExpert((matrix, matrix, matrix), {}))


def test_only_methods_of_gguf_take_it_as_it_is(tmp_path) -> None:
    folder = str(save_sharded(tmp_path, tensors(64, 32)))
    for method, fits in (("LLAMAFILE", "mxfp4"), ("AMXINT8", "int8"), ("LLAMAFILE_SFT", "mxfp4"), ("FP8", None)):
        mode = METHODS[method].mode
        layer = KTMoEWrapper(LAYER, EXPERTS, 2, 64, 32, 0, 1, 1, folder, 64, method=method, mode=mode)
        if fits:
            layer.load_weights()
            assert layer.layer.format == fits
        else:
            with pytest.raises(WeightFileError, match="holds mxfp4 experts.*FP8 does not read; method LLAMAFILE does"):
                layer.load_weights()


def test_a_layer_loads(tmp_path) -> None:
    hidden, inter = 64, 32
    folder = save_sharded(tmp_path, tensors(hidden, inter))
    layer = KTMoEWrapper(
        LAYER, EXPERTS, 2, hidden, inter, 0, 1, 1, str(folder), 64,
        method="BF16", mode="inference", swiglu_limit=7.0, swiglu_alpha=1.702,
    )  # fmt: skip
    layer.load_weights()
    with open_source(str(folder), LAYER, hidden, inter) as source:
        for got, want in zip(layer.expert_weights(2).matrices, source.read(2), strict=True):
            assert torch.equal(got.parts[0].float(), dequantize(want))


@pytest.mark.parametrize("lost", ["gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_scales", "down_proj_bias"])
def test_what_is_missing_is_named(tmp_path, lost) -> None:
    files = tensors(64, 32)
    del files[f"{STEM}.{lost}"]
    with pytest.raises(WeightFileError, match=rf"layer {LAYER}: MXFP4 experts have no {lost}"):
        open_source(str(save_sharded(tmp_path, files)), LAYER, 64, 32)


def test_floats_do_not_belong_beside_blocks(tmp_path) -> None:
    files = tensors(64, 32, biases=False) | {f"{STEM}.down_proj": torch.zeros(EXPERTS, 32, 64)}
    with pytest.raises(WeightFileError, match="down_proj, which does not belong"):
        open_source(str(save_sharded(tmp_path, files)), LAYER, 64, 32)


def test_wrong_shapes_are_named(tmp_path) -> None:
    folder = save_sharded(tmp_path, tensors(64, 32))
    with (
        open_source(str(folder), LAYER, 128, 32) as source,
        pytest.raises(WeightFileError, match=r"_blocks': got shape \[3, 64, 2, 16\], expected \[3, 64, 4, 16\]"),
    ):
        source.read(0)
