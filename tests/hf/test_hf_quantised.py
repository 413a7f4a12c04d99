"""Checkpoints that are quantised already: FP8, compressed-tensors int4, MXFP4."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.test_hf_models import BF16_ROUNDOFF, logits, token_errors
from hf.tiny_models import make_checkpoint, tokens
from published_files import FP8_FORMS, fp8_expand, fp8_scales, pack_int4
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from ktmoe.hf import from_pretrained, ktmoe_layers, lora_config
from ktmoe.hf.experts_on_disk import QuantisedExperts
from ktmoe.hf.quantised import floats_beside_experts, take_quantization
from ktmoe.hf.structure import find_experts

GROUP = 32
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
    "ignore": ["lm_head"],
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def is_quantised(name: str, weight: torch.Tensor, config: dict[str, Any]) -> bool:
    """Linear layers; the package compressed-tensors wants whole groups beside the experts."""
    whole = weight.shape[-1] % GROUP == 0 or config is FP8 or ".experts." in name
    return re.search(r"_proj|\.w[123]\.", name) is not None and weight.dim() == 2 and whole


def fp8(weight: torch.Tensor, form: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of an FP8 weight by their suffix, and the floats that they stand for."""
    n, k = weight.shape
    scales = fp8_scales(form, n, k, torch.Generator().manual_seed(n))
    wide = fp8_expand(scales, form, n, k)
    codes = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scales}, codes.float() * wide


def int4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a pack-quantized weight by their suffix, and the floats that they stand for."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    scales = (groups.abs().amax(2) / 7).bfloat16()
    wide = scales.float().repeat_interleave(GROUP, 1)[:, :k]
    codes = (weight.float() / wide).round().clamp(-8, 7)
    packed = {".weight_packed": pack_int4(codes), ".weight_scale": scales, ".weight_shape": torch.tensor([n, k])}
    return packed, codes * wide


def quantised(folder: Path, family: str, config: dict[str, Any]) -> tuple[Path, Path]:
    """Two folders: a checkpoint quantised as `config` says, and its twin in the floats that it stands for."""
    quantised, twin = folder / "quantised", folder / "twin"
    make_checkpoint(family, quantised)
    make_checkpoint(family, twin)
    tensors: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, weight in load_file(quantised / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if not is_quantised(name, weight, config):
            parts, value = {name.removeprefix(stem): weight}, weight
        else:
            parts, value = fp8(weight, "blocks") if config is FP8 else int4(weight)
        tensors |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
        floats[name] = value.bfloat16()
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})
    save_file(floats, twin / "model.safetensors", {"format": "pt"})
    add_config(quantised, config)
    return quantised, twin


def add_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("config", [FP8, INT4], ids=["fp8", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_same_bits_as_its_floats(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """A method that holds bf16 makes no difference between a quantised checkpoint and what it stands for."""
    folder, twin = quantised(tmp_path, family, config)
    ids = tokens(3, 32)
    model = from_pretrained(folder, "BF16")
    assert torch.equal(logits(model, ids), logits(from_pretrained(twin, "BF16"), ids))
    assert not hasattr(model.config, "quantization_config") or model.config.quantization_config.method == "BF16"


@pytest.mark.parametrize(
    ("config", "methods"),
    [(FP8, ("FP8", "FP8_SFT", "AMXINT8")), (INT4, ("RAWINT4", "AMXINT4_KGroup_SFT", "AMXINT8"))],
    ids=["fp8", "int4"],
)
def test_methods_of_its_kind(tmp_path: Path, routing: Any, config: dict[str, Any], methods: tuple[str, ...]) -> None:
    """They compute with the published bytes: as near to the floats as a bf16 model is, int8 a bit farther."""
    folder, twin = quantised(tmp_path, "qwen3_moe", config)
    ids = tokens(3, 32)
    with routing.record():
        expected = logits(AutoModelForCausalLM.from_pretrained(twin), ids)
    for method in methods:
        model = from_pretrained(folder, method)
        with routing.replay():
            errors = token_errors(logits(model, ids), expected)
        assert errors.median() < 8 * BF16_ROUNDOFF, method
        formats = {layer.backend.layer.format for layer in ktmoe_layers(model)}
        assert formats == {{"AMXINT8": "int8"}.get(method, "fp8" if config is FP8 else "int4_g32")}


@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "LLAMAFILE", "LLAMAFILE_SFT"])
def test_mxfp4_as_transformers_reads_it(tmp_path: Path, routing: Any, method: str) -> None:
    folder = make_checkpoint("gpt_oss", tmp_path, intermediate_size=64)
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, k, n = tensors.pop(name).shape
        shape = (experts, n, k // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        tensors[f"{name}_scales"] = torch.randint(119, 123, shape, dtype=torch.uint8, generator=random)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    add_config(folder, MXFP4)
    ids = tokens(3, 32)
    with routing.record():
        expected = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    with routing.replay():
        errors = token_errors(logits(from_pretrained(folder, method), ids), expected)
    assert errors.median() < 4 * (2.0**-7 if method == "AMXINT8" else BF16_ROUNDOFF)


@pytest.mark.parametrize("config", [FP8, INT4], ids=["fp8", "int4"])
def test_nothing_is_said_about_the_experts(tmp_path: Path, caplog: Any, config: dict[str, Any]) -> None:
    """Neither their tensors nor their scales are unexpected to the loader, and nothing is missing."""
    folder, _ = quantised(tmp_path, "qwen3_moe", config)
    model, found = from_pretrained(folder, "BF16", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", FP8_FORMS)
@pytest.mark.parametrize("shape", [(200, 72), (576, 130)])
def test_fp8_beside_experts(form: str, shape: tuple[int, int]) -> None:
    """Blocks at the edge are as wide as what is left, whatever the number of blocks divides."""
    (converter,) = floats_beside_experts(None, FP8)
    (operation,) = converter.operations
    parts, value = fp8(torch.randn(shape), form)
    module = torch.nn.Linear(shape[1], shape[0], dtype=torch.float32)
    model = torch.nn.ModuleDict({"q_proj": module})
    inputs = {name.removeprefix("."): [part] for name, part in parts.items()}
    (result,) = operation.convert(inputs, full_layer_name="q_proj.weight", model=model).values()
    assert torch.equal(result, value)


def test_fp8_scales_that_do_not_fit() -> None:
    (converter,) = floats_beside_experts(None, FP8)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(256, 256)})
    parts, _ = fp8(torch.randn(256, 256), "blocks")
    inputs = {"weight": [parts[".weight"]], "weight_scale_inv": [torch.ones(3, 2)]}
    with pytest.raises(ValueError, match=r"scales of shape \[3, 2\], which do not fit a matrix \[256, 256\]"):
        converter.operations[0].convert(inputs, full_layer_name="q_proj.weight", model=model)


def test_fp8_without_scales() -> None:
    """A loader that took the codes for numbers would be wrong by orders of magnitude, without a word."""
    (converter,) = floats_beside_experts(None, FP8)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(256, 256)})
    (operation,) = converter.operations
    codes = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"q_proj\.weight: got FP8 without scales"):
        operation.convert({"weight": [codes]}, full_layer_name="q_proj.weight", model=model)
    plain = torch.randn(256, 256).bfloat16()
    (result,) = operation.convert({"weight": [plain]}, full_layer_name="q_proj.weight", model=model).values()
    assert torch.equal(result, plain.float())


def test_an_experts_module_without_a_layer_number(tmp_path: Path) -> None:
    (spec, *_) = find_experts(AutoModelForCausalLM.from_config(config_of(tmp_path)), config_of(tmp_path))
    with pytest.raises(ValueError, match=r"cannot tell which layer of the files model\.extra\.experts is"):
        QuantisedExperts(tmp_path).open(replace(spec, name="model.extra.experts"))


def config_of(folder: Path) -> Any:
    if not (folder / "config.json").exists():
        make_checkpoint("qwen3_moe", folder)
    return AutoConfig.from_pretrained(folder)


def test_a_config_object_that_says_its_kind_by_an_enumeration() -> None:
    from transformers import FineGrainedFP8Config, Qwen3MoeConfig

    config = Qwen3MoeConfig(quantization_config=FineGrainedFP8Config())
    found = take_quantization(config, "model")
    assert found is not None
    assert found["quant_method"] == "fp8"
    assert getattr(config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("config", "method"),
    [(FP8, "FP8_SFT"), (INT4, "AMXINT4_KGroup_SFT"), (FP8, "AMXINT8_SFT")],
    ids=["FP8_SFT", "KGroup", "INT8_SFT of fp8"],
)
def test_lora_learns(tmp_path: Path, config: dict[str, Any], method: str) -> None:
    from peft import get_peft_model

    folder, _ = quantised(tmp_path, "qwen3_moe", config)
    model = get_peft_model(from_pretrained(folder, method), lora_config(r=4, alpha=8, attention=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = tokens(2, 16), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    ("config", "method"),
    [(FP8, "FP8"), (INT4, "RAWINT4"), (INT4, "AMXINT4")],
    ids=["FP8", "RAWINT4", "AMXINT4 of int4"],
)
def test_packed_and_cached(tmp_path: Path, monkeypatch: Any, config: dict[str, Any], method: str) -> None:
    """`ktmoe quantize` packs what from_pretrained packs; the second start reads no expert."""
    from ktmoe.base import BaseMoEWrapper
    from ktmoe.cli.__main__ import app

    monkeypatch.setenv("KTMOE_CACHE", str(tmp_path / "cache"))
    folder, _ = quantised(tmp_path, "qwen3_moe", config)
    ids = tokens()
    expected = logits(from_pretrained(folder, method, cache=False), ids)
    result = CliRunner().invoke(app, ["quantize", str(folder), "-m", method, "-o", str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(from_pretrained(folder, method, packed=tmp_path / "packed"), ids), expected)
    assert torch.equal(logits(from_pretrained(folder, method), ids), expected)
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", lambda *_: pytest.fail("an expert was packed again"))
    assert torch.equal(logits(from_pretrained(folder, method), ids), expected)


def test_wrong_method_is_named(tmp_path: Path) -> None:
    folder, _ = quantised(tmp_path, "qwen3_moe", FP8)
    with pytest.raises(ValueError, match=r"the checkpoint, layer 0: holds fp8 experts.*RAWINT4.*method FP8 does"):
        from_pretrained(folder, "RAWINT4")


def test_missing_scale_is_named(tmp_path: Path) -> None:
    folder, _ = quantised(tmp_path, "qwen3_moe", FP8)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj\.weight': there are no scales beside it"):
        from_pretrained(folder, "FP8")


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    add_config(folder, {"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantised already .*'awq'.*reads fp8, compressed-tensors, mxfp4 and floats"):
        from_pretrained(folder)
