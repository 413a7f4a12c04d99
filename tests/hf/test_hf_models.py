"""Models with ktmoe's experts against the same models in plain transformers, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.tiny_models import FAMILIES, HIDDEN, INTER, make_checkpoint, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from ktmoe.base import BaseMoEWrapper
from ktmoe.hf import KTMoEConfig, UnsupportedExpertsError, from_pretrained, ktmoe_layers
from ktmoe.hf.checkpoint import CheckpointFiles
from ktmoe.io.published import PublishedExpert

Checkpoint = Callable[[str], Path]

BF16_ROUNDOFF = 2.0**-8


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def token_errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of every token's logits, sorted."""
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten().sort().values


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_plain_transformers(checkpoint: Checkpoint, routing: Any, family: str) -> None:
    """Two bf16 models that round in a different order differ by a few roundings per layer, for every token."""
    ids = tokens(3, 32)
    with routing.record():
        expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint(family)), ids)
    model = from_pretrained(checkpoint(family), method="AMXBF16_SFT")
    with routing.replay():
        errors = token_errors(logits(model, ids), expected)
    assert errors.median() < 4 * BF16_ROUNDOFF
    assert errors.max() < 8 * BF16_ROUNDOFF


def test_free_routing(checkpoint: Checkpoint) -> None:
    """With routers of their own, all but the few undecided tokens agree."""
    ids = tokens(3, 32)
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe")), ids)
    errors = token_errors(logits(from_pretrained(checkpoint("qwen3_moe")), ids), expected)
    assert errors[int(0.9 * len(errors))] < 8 * BF16_ROUNDOFF


@pytest.mark.parametrize(
    ("method", "roundoff"),
    [("BF16", 2.0**-8), ("AMXINT8", 2.0**-7), ("MOE_INT8", 2.0**-7), ("AMXINT8_SFT", 2.0**-7)],
)
def test_every_method(checkpoint: Checkpoint, routing: Any, method: str, roundoff: float) -> None:
    ids = tokens(3, 32)
    with routing.record():
        expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe")), ids)
    model = from_pretrained(checkpoint("qwen3_moe"), method=method)
    with routing.replay():
        errors = token_errors(logits(model, ids), expected)
    assert errors.median() < 4 * roundoff
    assert errors.max() < 8 * roundoff


def test_stock_from_pretrained_with_config(checkpoint: Checkpoint) -> None:
    folder, ids = checkpoint("qwen3_moe"), tokens()
    config = KTMoEConfig("AMXBF16_SFT", cpuinfer_threads=2)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    ours = from_pretrained(folder, cpuinfer_threads=2)
    assert torch.equal(logits(stock, ids), logits(ours, ids))
    assert stock.config.quantization_config.to_dict()["method"] == "AMXBF16_SFT"


def test_fused_stacks_on_disk(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint that stores the stacks under the module's own names loads to the same bits."""
    from safetensors.torch import save_file

    dense = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"))
    dense.config.save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in dense.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    ids = tokens()
    assert torch.equal(logits(from_pretrained(tmp_path), ids), logits(from_pretrained(checkpoint("qwen3_moe")), ids))


def test_shards_and_fp32(tmp_path: Path) -> None:
    """Experts of one layer may lie in several shards; an fp32 model keeps fp32 around bf16 experts."""
    folder = make_checkpoint("mixtral", tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    sharded = from_pretrained(tmp_path / "many")
    ids = tokens()
    assert sharded.lm_head.weight.dtype == torch.float32
    assert token_errors(logits(sharded, ids), logits(model, ids)).median() < 4 * BF16_ROUNDOFF


def test_generate(checkpoint: Checkpoint) -> None:
    """Greedy decoding with a cache gives what decoding without one gives."""
    model = from_pretrained(checkpoint("qwen3_moe"))
    prompt = tokens(2, 8)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert out.shape == (2, 14)
    step_by_step = prompt
    for _ in range(6):
        scores = logits(model, step_by_step)[:, -1]
        step_by_step = torch.cat([step_by_step, scores.argmax(-1, keepdim=True)], dim=1)
    assert (out == step_by_step).float().mean() > 0.9


def test_experts_are_streamed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than two experts in bf16: no stack is read or built, and experts arrive one by one."""
    seen: list[tuple[int, int]] = []
    reads: list[tuple[int, ...]] = []
    read, load = CheckpointFiles.read, BaseMoEWrapper.put_expert

    def spy_read(self: CheckpointFiles, key: str, *args: Any) -> torch.Tensor:
        tensor = read(self, key, *args)
        reads.append(tuple(tensor.shape))
        return tensor

    def spy_load(self: BaseMoEWrapper, expert: int, weights: PublishedExpert) -> None:
        assert [m.shape for m in weights.matrices] == [(INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)]
        assert all(m.parts[0].dtype == torch.bfloat16 for m in weights.matrices)
        assert 3 * (len(seen) + 1) <= len(reads) <= 3 * (len(seen) + 2)  # the next one is being read
        seen.append((self.layer_idx, expert))
        load(self, expert, weights)

    monkeypatch.setattr(CheckpointFiles, "read", spy_read)
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", spy_load)
    model = from_pretrained(checkpoint("qwen3_moe"))
    assert seen == [(layer, expert) for layer in range(2) for expert in range(8)]
    assert all(len(shape) == 2 for shape in reads)
    assert not any(p.dim() == 3 for p in model.parameters())
    assert not any("experts" in name for name in model.state_dict())
    storages = [
        stack.untyped_storage().nbytes() for e in ktmoe_layers(model) for stack in (e.gate_up_proj, e.down_proj)
    ]
    assert storages == [2] * 4


def test_missing_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks up of expert 5 of model\.layers\.1\.mlp\.experts"):
        from_pretrained(folder)


def test_surplus_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(INTER, HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is expert 8, but model\.layers\.1\.mlp\.experts has 8 experts"):
        from_pretrained(folder)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.down_proj.weight"] = torch.zeros(HIDDEN, INTER + 1, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.2\.down_proj\.weight': got shape \[64, 49\], expected \[64, 48\]"):
        from_pretrained(folder)


def test_unsupported_experts_are_refused(tmp_path: Path) -> None:
    """GELU is not its tanh approximation."""
    folder = make_checkpoint("qwen3_moe", tmp_path, hidden_act="gelu")
    with pytest.raises(
        UnsupportedExpertsError, match=r"Qwen3MoeExperts.*none that ktmoe knows \(act_fn GELUActivation"
    ):
        from_pretrained(folder)


def test_missing_bias_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("gpt_oss", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.gate_up_proj_bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks gate_bias of expert 0 of model\.layers\.1\.mlp\.experts"):
        from_pretrained(folder)


@pytest.mark.parametrize("method", ["AMXINT8", "MOE_INT8"])
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "gemma4"])
def test_activations_with_int8(checkpoint: Checkpoint, routing: Any, family: str, method: str) -> None:
    ids = tokens(3, 32)
    with routing.record():
        expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint(family)), ids)
    with routing.replay():
        errors = token_errors(logits(from_pretrained(checkpoint(family), method=method), ids), expected)
    assert errors.median() < 4 * 2.0**-7
    assert errors.max() < 8 * 2.0**-7


def test_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts modules"):
        from_pretrained(tmp_path)


def test_method_errors(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="Unknown method: 'AMXINT9'"):
        KTMoEConfig("AMXINT9")
    with pytest.raises(ValueError, match="cpuinfer_threads must be at least 1"):
        KTMoEConfig(cpuinfer_threads=0)
    with pytest.raises(TypeError, match="threads"):
        KTMoEConfig(threads=3)
    with pytest.raises(ValueError, match="choose the format with method"):
        from_pretrained(checkpoint("qwen3_moe"), quantization_config=KTMoEConfig())


def test_moving_and_copying_leave_experts_alone(checkpoint: Checkpoint) -> None:
    import copy
    import pickle

    model = from_pretrained(checkpoint("qwen3_moe"))
    ids = tokens()
    before = logits(model, ids)
    clone = copy.deepcopy(model)
    assert all(a.backend is b.backend for a, b in zip(ktmoe_layers(model), ktmoe_layers(clone), strict=True))
    assert torch.equal(logits(clone, ids), before)
    assert torch.isfinite(logits(nn.Module.float(clone), ids)).all()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained("unused")
    with pytest.raises(TypeError, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(model)


def test_names_at_the_top() -> None:
    import ktmoe
    import ktmoe.hf

    assert ktmoe.from_pretrained is ktmoe.hf.from_pretrained
    assert ktmoe.KTMoEConfig is KTMoEConfig
    assert ktmoe.lora_config is ktmoe.hf.lora_config
