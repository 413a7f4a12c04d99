"""Experts in MXFP4, against transformers' own decoder, and what is refused."""

import pytest
import torch
from hostile_files import save_sharded

from ktmoe import KTMoEWrapper
from ktmoe.errors import WeightFileError
from ktmoe.io.mxfp4 import decode
from ktmoe.io.sources import open_source

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
        assert (source.kind, source.n_experts, source.formats) == ("bf16", EXPERTS, ("bf16", "bf16"))
        for e in range(EXPERTS):
            expert = source.read_expert(e)
            got = [m.parts[0] for m in expert.matrices if m is not None]
            want = gate_up[e, :hidden, 0::2].T, gate_up[e, :hidden, 1::2].T, down[e, :inter].T
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
            bias = files[f"{STEM}.gate_up_proj_bias"][e].float()
            assert torch.equal(expert.biases["gate_bias"], bias[0::2])
            assert torch.equal(expert.biases["up_bias"], bias[1::2])
            assert torch.equal(expert.biases["down_bias"], files[f"{STEM}.down_proj_bias"][e].float())


def test_every_code_and_scale_is_exact_in_bf16() -> None:
    """All but the powers that no fp32 has: there the largest codes are infinite, and 255 is NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat_interleave(16, 1)
    for scale in range(255):
        values = decode(codes, torch.full((1, 256), scale, dtype=torch.uint8))
        assert torch.equal(values, values.bfloat16().float())
        assert scale > 252 or values.isfinite().all()
    assert decode(codes[:, :1], torch.tensor([[255]], dtype=torch.uint8)).isnan().all()
    one = torch.tensor([0x21] + [0] * 15, dtype=torch.uint8).view(1, 1, 16)  # 0.5, then 1
    assert decode(one, torch.tensor([[128]], dtype=torch.uint8))[0, :3].tolist() == [1.0, 2.0, 0.0]


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
            assert torch.equal(got.parts[0], want.parts[0])


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
