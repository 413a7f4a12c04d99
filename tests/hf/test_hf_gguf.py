"""Models out of GGUF files alone, against the checkpoints that they were made of and transformers' own reading."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

from hf.gguf_checkpoint import interleaved_apart, llama_tensors, qwen3_keys, split_latent, write_model
from hf.test_hf_models import BF16_ROUNDOFF, logits, token_errors
from hf.tiny_models import HIDDEN, VOCAB, make_checkpoint, tokens
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ktmoe.cli.demo_model import train_tokenizer
from ktmoe.cli.training import load_tokenizer
from ktmoe.errors import WeightFileError
from ktmoe.hf import from_pretrained, ktmoe_layers, lora_config
from ktmoe.packed_weights import formats_of

INTER = 64
"""Whole blocks of 32, which GGUF needs."""
MIXED = {"_exps": "Q8_0", r"attn_q\.|token_embd": "Q4_0", r"attn_k\.": "F16"}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint whose experts fit GGUF's blocks."""
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3"), moe_intermediate_size=INTER)


def write_qwen3(qwen3: Path, path: Path, tensors: dict[str, Tensor] | None = None, **how: Any) -> Path:
    config = AutoConfig.from_pretrained(qwen3)
    keys = qwen3_keys(config) | {"vocab_size": VOCAB} | how.pop("keys", {})
    return write_model(path, "qwen3moe", llama_tensors(qwen3) if tensors is None else tensors, keys, **how)


def agree(routing: Any, expected: nn.Module, model: nn.Module, roundoff: float = BF16_ROUNDOFF) -> None:
    ids = tokens(3, 32)
    with routing.record():
        want = logits(expected, ids)
    with routing.replay():
        errors = token_errors(logits(model, ids), want)
    assert errors.median() < 4 * roundoff
    assert errors.max() < 8 * roundoff


def original(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_file_alone(qwen3: Path, tmp_path: Path, routing: Any) -> None:
    """transformers reads the same file its own way: everything to floats."""
    path = write_qwen3(qwen3, tmp_path / "m.gguf", types=MIXED)
    config = AutoConfig.from_pretrained(qwen3)  # transformers does not read moe_intermediate_size
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    model = from_pretrained(path, method="AMXBF16_SFT", dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    agree(routing, expected, model)


def test_experts_are_computed_as_published(qwen3: Path, tmp_path: Path, routing: Any) -> None:
    path = write_qwen3(qwen3, tmp_path / "m.gguf", types={"_exps": "Q8_0"})
    model = from_pretrained(path, method="LLAMAFILE", dtype=torch.float32)
    assert formats_of(next(ktmoe_layers(model)).backend.layer) == ("q8_0", "q8_0")
    agree(routing, original(qwen3), model, 2.0**-7)


def test_file_without_a_suffix(qwen3: Path, tmp_path: Path) -> None:
    """As in stores that are addressed by content: a GGUF file by its first bytes."""
    path = write_qwen3(qwen3, tmp_path / "m.gguf")
    blob = path.rename(tmp_path / "sha256-0123")
    assert torch.isfinite(logits(from_pretrained(blob, method="BF16"), tokens())).all()


def test_bf16_is_what_a_model_gets_that_says_nothing(qwen3: Path, tmp_path: Path) -> None:
    model = from_pretrained(write_qwen3(qwen3, tmp_path / "m.gguf"), method="BF16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_config_of_the_original_model(qwen3: Path, tmp_path: Path, routing: Any) -> None:
    """Split files elsewhere, a layer of multi-token prediction at the end; a quantization_config of other files."""
    tensors = llama_tensors(qwen3)
    tensors |= {name.replace("blk.1.", "blk.2."): t for name, t in tensors.items() if name.startswith("blk.1.")}
    first = write_qwen3(qwen3, tmp_path / "m.gguf", tensors, per_file=9)
    assert first.name == "m-00001-of-00005.gguf"
    config = AutoConfig.from_pretrained(qwen3)
    config.quantization_config = {"quant_method": "awq"}
    model = from_pretrained(qwen3, gguf_file=first, method="BF16", config=config, dtype=torch.float32)
    assert model.name_or_path == str(qwen3)
    agree(routing, original(qwen3), model)


def test_latent_attention(tmp_path: Path, routing: Any) -> None:
    """DeepSeek's kv_b_proj is in two parts; there are shared experts, a dense layer and the router's bias."""
    folder = make_checkpoint("deepseek_v3", tmp_path / "m", moe_intermediate_size=INTER, n_group=1, topk_group=1)
    tensors = split_latent(llama_tensors(folder), AutoConfig.from_pretrained(folder))
    assert {"blk.1.exp_probs_b.bias", "blk.0.attn_k_b.weight", "blk.0.ffn_up.weight"} <= tensors.keys()
    write_model(folder / "m.gguf", "deepseek2", tensors, types={"attn_k_b": "F16"})
    model = from_pretrained(folder, gguf_file="m.gguf", method="BF16", dtype=torch.float32)
    agree(routing, original(folder), model)


def test_biases_and_sinks(tmp_path: Path, routing: Any) -> None:
    folder = make_checkpoint("gpt_oss", tmp_path / "m", intermediate_size=INTER)
    tensors = interleaved_apart(llama_tensors(folder))
    tensors = {name.replace("ffn_norm", "post_attention_norm"): tensor for name, tensor in tensors.items()}
    assert {"blk.0.ffn_up_exps.bias", "blk.0.attn_sinks.weight", "blk.0.ffn_gate_inp.bias"} <= tensors.keys()
    write_model(folder / "m.gguf", "gpt-oss", tensors)
    model = from_pretrained(folder, gguf_file="m.gguf", method="BF16", dtype=torch.float32)
    agree(routing, original(folder), model)


def test_architecture_of_which_transformers_knows_the_conversions(tmp_path: Path, routing: Any) -> None:
    """Qwen3.5: norms plus one, -exp(A_log), a kernel without its middle dimension. As many heads of keys as of values,
    so that their order is the same."""
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    assert utils.is_gguf_arch_supported("qwen35moe")
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=INTER,
        shared_expert_intermediate_size=INTER,
        num_experts=6,
        num_experts_per_tok=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        rope_parameters=rope | {"mrope_interleaved": True},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    expected = Qwen3_5MoeForCausalLM(config).eval()
    with torch.no_grad():
        for param in expected.parameters():
            param.copy_(torch.randn_like(param) * (0.1 if param.dim() < 2 else param.shape[-1] ** -0.5))
    expected.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in llama_tensors(tmp_path).items():
        if name.endswith("ffn_norm.weight"):
            name = name.replace("ffn_norm", "post_attention_norm")
        if name.endswith("norm.weight") and "ssm" not in name:
            tensor = tensor + 1
        elif name.endswith("ssm_a"):
            tensor = -tensor.exp()
        elif "conv1d" in name:
            tensor = tensor.squeeze(1)
        if name.endswith("experts.gate_up_proj"):
            layer = name.removesuffix("mlp.experts.gate_up_proj")
            tensors[f"{layer}ffn_gate_exps.weight"], tensors[f"{layer}ffn_up_exps.weight"] = tensor.chunk(2, 1)
        else:
            tensors[name.replace("mlp.experts.down_proj", "ffn_down_exps.weight")] = tensor
    write_model(tmp_path / "m.gguf", "qwen35moe", tensors)
    model = from_pretrained(tmp_path, gguf_file="m.gguf", method="BF16", dtype=torch.float32)
    agree(routing, expected, model)
    del tensors["blk.1.ssm_a"]
    write_model(tmp_path / "less.gguf", "qwen35moe", tensors)
    with pytest.raises(WeightFileError, match=r"less.gguf: missing keys: model.layers.1.linear_attn.A_log"):
        from_pretrained(tmp_path, gguf_file="less.gguf", method="BF16")


def test_hub_repository(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository come the files of one model, and what is beside them; the revision is that of the caller."""
    shutil.copytree(qwen3, tmp_path / "repo")
    first = write_qwen3(qwen3, tmp_path / "repo" / "m.gguf", per_file=9)
    asked = []

    def snapshot_download(repo: str, **how: Any) -> str:
        asked.append((repo, how))
        return str(tmp_path / "repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = from_pretrained("some/repo", gguf_file=first.name, method="BF16", revision="abc")
    assert model.name_or_path == "some/repo"
    ((repo, how),) = asked
    assert (repo, how["revision"]) == ("some/repo", "abc")
    assert first.name.replace("00001-of", "*-of") in how["allow_patterns"]
    assert "*.safetensors" not in how["allow_patterns"]


def test_sizes_that_transformers_does_not_read(tmp_path: Path, routing: Any) -> None:
    """Shared experts, and a gate of theirs that is a vector there."""
    sizes = {"moe_intermediate_size": INTER, "shared_expert_intermediate_size": 96, "norm_topk_prob": False}
    folder = make_checkpoint("qwen2_moe", tmp_path / "m", **sizes)
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = config.hidden_size // config.num_attention_heads
    tensors = {n: t.squeeze(0) if "shexp" in n and "inp" in n else t for n, t in llama_tensors(folder).items()}
    keys = qwen3_keys(config) | {"vocab_size": VOCAB}
    model = from_pretrained(write_model(tmp_path / "m.gguf", "qwen2moe", tensors, keys), "BF16", dtype=torch.float32)
    agree(routing, original(folder), model)


def test_tied_embeddings(tmp_path: Path, routing: Any) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "m", moe_intermediate_size=INTER, tie_word_embeddings=True)
    path = write_qwen3(folder, tmp_path / "m.gguf")
    model = from_pretrained(path, method="BF16", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    agree(routing, original(folder), model)


def test_adapters_train(qwen3: Path, tmp_path: Path) -> None:
    path = write_qwen3(qwen3, tmp_path / "m.gguf", types={"_exps": "Q8_0"})
    model = from_pretrained(path, method="LLAMAFILE_SFT", dtype=torch.float32)
    tuned = get_peft_model(model, lora_config(r=4, alpha=8, attention=True))
    ids = tokens()
    tuned(ids, labels=ids).loss.backward()
    grads = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None for grad in grads)
    assert tuned.peft_config["default"].base_model_name_or_path == str(path)


def test_cache_tells_files_of_a_folder_apart(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routing: Any
) -> None:
    monkeypatch.setenv("KTMOE_CACHE", str(tmp_path / "cache"))
    tensors = llama_tensors(qwen3)
    doubled = {name: 2 * t if "_exps" in name else t for name, t in tensors.items()}
    one, two = (write_qwen3(qwen3, tmp_path / f"{n}.gguf", t) for n, t in (("one", tensors), ("two", doubled)))
    ids = tokens()
    first, second = (logits(from_pretrained(path, method="AMXINT8"), ids) for path in (one, two))
    assert not torch.equal(first, second)
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 2
    # Experts that come out of the cache are not read.
    monkeypatch.setattr("ktmoe.io.gguf_file.GgufSource.read", None)
    assert torch.equal(first, logits(from_pretrained(one, method="AMXINT8"), ids))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"output_norm.weight": None}, r"there is no tensor for model.norm.weight \(output_norm.weight\)"),
        ({"blk.1.attn_q.bias": torch.zeros(64)}, r"Qwen3MoeForCausalLM has no place for tensor 'blk.1.attn_q.bias'"),
        ({"blk.0.attn_q.weight": torch.zeros(64, 32)}, r"q_proj.weight: got shape \[64, 32\], expected \[64, 64\]"),
        ({"blk.0.ffn_up_exps.weight": None}, r"m.gguf, layer 0: there is no ffn_up_exps.weight"),
        (
            {"token_embd.weight": torch.zeros(300, 64)},
            r"embed_tokens.weight: got shape \[300, 64\], expected \[96",
        ),
    ],
)
def test_files_that_do_not_fit(qwen3: Path, tmp_path: Path, change: dict[str, Tensor | None], text: str) -> None:
    tensors = {name: t for name, t in (llama_tensors(qwen3) | change).items() if t is not None}
    with pytest.raises(WeightFileError, match=text):
        from_pretrained(write_qwen3(qwen3, tmp_path / "m.gguf", tensors), method="BF16")


def test_parts_of_latent_attention_that_do_not_fit(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path / "m", moe_intermediate_size=INTER)
    tensors = split_latent(llama_tensors(folder), AutoConfig.from_pretrained(folder))
    tensors["blk.1.attn_k_b.weight"] = tensors["blk.1.attn_k_b.weight"][:3]
    write_model(folder / "m.gguf", "deepseek2", tensors)
    text = r"got blk.1.attn_k_b.weight \[3, \d+, \d+\] and blk.1.attn_v_b.weight .*, expected parts of \[\d+, 16\]"
    with pytest.raises(WeightFileError, match=text):
        from_pretrained(folder, gguf_file="m.gguf", method="BF16")


def test_what_cannot_be_loaded(qwen3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    path = write_model(folder / "m.gguf", "llama", llama_tensors(qwen3), {"block_count": 2})
    with pytest.raises(NotImplementedError, match=r"architecture 'llama' cannot be loaded from GGUF alone.*qwen3moe"):
        from_pretrained(qwen3, gguf_file=path)
    with pytest.raises(WeightFileError, match=r"gguf_file: got 'n.gguf', but there is no such file, in .*/m or"):
        from_pretrained(folder, gguf_file="n.gguf")
    write_model(folder / "m.gguf", "deepseek2", llama_tensors(qwen3), {"block_count": 2})
    with pytest.raises(ValueError, match=r"m.gguf: transformers cannot make a config of it .*deepseek2.*gguf_file"):
        from_pretrained(folder)
    with pytest.raises(WeightFileError, match=r"gone.gguf: cannot be opened"):
        from_pretrained(tmp_path / "gone.gguf")


def test_tokenizer_of_the_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["to be or not to be"] * 3, 280)
    folder = make_checkpoint("qwen3_moe", tmp_path / "m", moe_intermediate_size=INTER, vocab_size=len(tokenizer))
    path = write_qwen3(folder, tmp_path / "m.gguf", tokenizer=tokenizer, keys={"vocab_size": len(tokenizer)})
    found = load_tokenizer(str(path))
    text = "to be<|end|> or not"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (found.eos_token, found.pad_token) == ("<|end|>", "<|pad|>")
    messages = [{"role": "user", "content": "to be"}]
    said = {"tokenize": False, "add_generation_prompt": True}
    assert found.apply_chat_template(messages, **said) == tokenizer.apply_chat_template(messages, **said)
    assert from_pretrained(path, method="BF16").generation_config.eos_token_id == tokenizer.eos_token_id
    shutil.copy(path, folder)
    tokenizer.save_pretrained(folder)
    assert type(load_tokenizer(str(folder), "m.gguf")) is type(tokenizer)
