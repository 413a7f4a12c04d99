"""LoRA through stock PEFT: gradients, files, switching, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.tiny_models import FAMILIES, tokens
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ktmoe.hf import ThroughputCallback, from_pretrained, ktmoe_layers, lora_config

Checkpoint = Callable[[str], Path]


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def randomize_lora(model: nn.Module, seed: int = 7) -> None:
    """PEFT starts with B = 0; with a random B every factor has a gradient and the adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(0.05 * torch.randn(param.shape, generator=generator))


def copy_lora(source: nn.Module, target: nn.Module) -> None:
    values = {name: p for name, p in source.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, param in target.named_parameters():
            if "lora_" in name:
                param.copy_(values.pop(name))
    assert not values


def lora_grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name and p.grad is not None}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def packs(model: nn.Module) -> list[int]:
    """How often each layer has packed an adapter."""
    return [layer.backend.mirror.packs for layer in ktmoe_layers(model)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_dense_peft(checkpoint: Checkpoint, routing: Any, family: str) -> None:
    """What is not an expert runs in fp32: two bf16 models differ more in their attention than in their experts."""
    ids = tokens(4, 32)
    torch.manual_seed(3)  # PEFT draws every A: one run in many has a gradient so small that bf16's noise shows
    ours = get_peft_model(from_pretrained(checkpoint(family), dtype=torch.float32), lora_config(r=4, alpha=8))
    randomize_lora(ours)
    plain = get_peft_model(dense(checkpoint(family)).float(), lora_config(r=4, alpha=8))
    copy_lora(ours, plain)
    with routing.record():
        expected_loss = plain(input_ids=ids, labels=ids).loss
        expected_loss.backward()
    with routing.replay():
        loss = ours(input_ids=ids, labels=ids).loss
        loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-2)
    got, expected = lora_grads(ours), lora_grads(plain)
    assert got.keys() == expected.keys()
    assert all(grad.dtype == torch.float32 for grad in got.values())
    for name in got:
        cosine = nn.functional.cosine_similarity(got[name].flatten(), expected[name].flatten(), dim=0)
        assert float(cosine) >= 0.999, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(checkpoint: Checkpoint, use_reentrant: bool) -> None:
    ids = tokens()
    model = get_peft_model(from_pretrained(checkpoint("qwen3_moe")), lora_config(r=4))
    randomize_lora(model)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: grad.clone() for name, grad in lora_grads(model).items()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(input_ids=ids, labels=ids).loss.backward()
    got = lora_grads(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_adapter_file_opens_everywhere(checkpoint: Checkpoint, routing: Any, tmp_path: Path) -> None:
    """Saved by stock PEFT; the same file gives the same bits in ktmoe and the same numbers in plain transformers."""
    folder, ids = checkpoint("qwen3_moe"), tokens()
    model = get_peft_model(from_pretrained(folder), lora_config(r=4))
    randomize_lora(model)
    model.eval()
    with routing.record():
        trained = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {
        "adapter_model.safetensors", "adapter_config.json", "README.md",
    }  # fmt: skip
    again = PeftModel.from_pretrained(from_pretrained(folder), tmp_path)
    assert torch.equal(logits(again, ids), trained)

    with routing.replay():
        plain = logits(PeftModel.from_pretrained(dense(folder), tmp_path), ids)
    with routing.replay():
        base = logits(dense(folder), ids)
    assert relative(trained, base) > 0.1
    assert relative(trained, plain) < 8 * 2.0**-8
    direction = nn.functional.cosine_similarity((trained - base).flatten(), (plain - base).flatten(), dim=0)
    assert float(direction) > 0.99


@pytest.mark.parametrize("method", ["AMXBF16_SFT", "AMXINT4"])
def test_disable_and_switch_adapters(checkpoint: Checkpoint, method: str) -> None:
    folder, ids = checkpoint("olmoe"), tokens()
    base = from_pretrained(folder, method=method)
    expected = logits(base, ids)
    model = get_peft_model(base, lora_config(r=4))
    assert torch.equal(logits(model, ids), expected)  # B = 0
    randomize_lora(model)
    first = logits(model, ids)
    assert not torch.equal(first, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    model.add_adapter("second", lora_config(r=2))
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), expected)
    before = packs(model)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), expected)
    assert packs(model) == before, "adapters that take turns are not packed again"


def test_several_active_adapters_add_up(checkpoint: Checkpoint, routing: Any) -> None:
    """As in PEFT, whatever their ranks and scalings are."""
    folder, ids = checkpoint("qwen3_moe"), tokens()
    configs = {
        "default": lora_config(r=4, alpha=8),
        "second": lora_config(r=2, alpha=6, rank_pattern={"down_proj": 3}),
        "third": lora_config(r=3, alpha=6),
    }
    models = from_pretrained(folder, dtype=torch.float32), dense(folder).float()
    ours, plain = (get_peft_model(model, configs["default"]) for model in models)
    for model in (ours, plain):
        for name in ("second", "third"):
            model.add_adapter(name, configs[name])
        model.base_model.set_adapter(list(configs))
    randomize_lora(ours)
    copy_lora(ours, plain)
    with routing.record():
        plain(input_ids=ids, labels=ids).loss.backward()
        expected = logits(plain, ids)
    with routing.replay():
        ours(input_ids=ids, labels=ids).loss.backward()
        got = logits(ours, ids)
    assert relative(got, expected) < 8 * 2.0**-8
    grads, expected_grads = lora_grads(ours), lora_grads(plain)
    assert grads.keys() == expected_grads.keys()
    assert {name for name in configs if any(f".{name}." in grad for grad in grads)} == set(configs)
    for name in grads:
        assert relative(grads[name], expected_grads[name]) < 2e-2, name
    alone = []
    for name in configs:
        ours.set_adapter(name)
        alone.append(logits(ours, ids))
    assert all(not torch.equal(one, got) for one in alone)


@pytest.mark.parametrize("method", ["AMXBF16_SFT", "AMXINT8"])
def test_torch_compile(checkpoint: Checkpoint, method: str) -> None:
    """Its graphs end before the experts, and go on behind them."""
    ids = tokens()
    model = from_pretrained(checkpoint("qwen3_moe"), method)
    if method == "AMXBF16_SFT":
        model = get_peft_model(model, lora_config(r=4))
        randomize_lora(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled, ids), logits(model, ids))
    if method == "AMXBF16_SFT":
        model(input_ids=ids, labels=ids).loss.backward()
        expected = {name: grad.clone() for name, grad in lora_grads(model).items()}
        model.zero_grad()
        compiled(input_ids=ids, labels=ids).loss.backward()
        got = lora_grads(model)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    torch.compiler.reset()


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "both"])
def test_what_does_not_change_is_packed_once(checkpoint: Checkpoint, target: str, no_grad: Any) -> None:
    """Also where matrices have to be made for the engine: of an adapter with fewer targets, of two adapters."""

    def forward() -> torch.Tensor:
        with no_grad():
            return model(input_ids=tokens()).logits

    only = {} if target == "both" else {"target_parameters": [f"experts.{target}"]}
    model = get_peft_model(from_pretrained(checkpoint("qwen3_moe"), "BF16"), lora_config(r=4, **only))
    if target == "both":
        model.add_adapter("second", lora_config(r=2))
        model.base_model.set_adapter(["default", "second"])
    randomize_lora(model)
    first = forward()
    before = packs(model)
    assert torch.equal(forward(), first)
    assert packs(model) == before
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name and "experts" in name:
                param.mul_(2)
    assert not torch.equal(forward(), first)
    assert packs(model) == [count + 1 for count in before]


@pytest.mark.parametrize(
    "overrides",
    [
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 12}},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
        {"use_rslora": True},
    ],
    ids=["rank_pattern", "gate_up only", "down only", "rslora"],
)
def test_unequal_factors(checkpoint: Checkpoint, routing: Any, overrides: dict[str, Any]) -> None:
    folder, ids = checkpoint("mixtral"), tokens()
    ours = get_peft_model(from_pretrained(folder), lora_config(r=4, alpha=8, **overrides))
    if "rank_pattern" in overrides:
        assert {wrapper.r["default"] for wrapper in _wrappers(ours)} == {2, 4}
        assert {wrapper.scaling["default"] for wrapper in _wrappers(ours)} == {2, 6}
    randomize_lora(ours)
    plain = get_peft_model(dense(folder), lora_config(r=4, alpha=8, **overrides))
    copy_lora(ours, plain)
    with routing.record():
        plain(input_ids=ids, labels=ids).loss.backward()
    with routing.replay():
        ours(input_ids=ids, labels=ids).loss.backward()
    got, expected = lora_grads(ours), lora_grads(plain)
    assert got.keys() == expected.keys()
    for name in got:
        cosine = nn.functional.cosine_similarity(got[name].flatten(), expected[name].flatten(), dim=0)
        assert float(cosine) >= 0.999, name


def test_lora_on_plain_models_is_untouched(checkpoint: Checkpoint, routing: Any) -> None:
    """The bridge acts on ktmoe's experts alone: PEFT's own way on dense experts still trains and merges."""
    from_pretrained(checkpoint("qwen3_moe"))
    ids = tokens()
    plain = get_peft_model(dense(checkpoint("qwen3_moe")), lora_config(r=4))
    randomize_lora(plain)
    with routing.record():
        expected = logits(plain, ids)
    with routing.replay():
        assert relative(logits(plain.merge_and_unload(), ids), expected) < 0.05


def test_merge_is_refused_and_leaves_the_model_alone(checkpoint: Checkpoint) -> None:
    model = get_peft_model(from_pretrained(checkpoint("qwen3_moe")), lora_config(r=4))
    randomize_lora(model)
    ids = tokens()
    before = logits(model, ids)
    for merge in (model.merge_and_unload, model.merge_adapter, next(_wrappers(model)).merge):
        with pytest.raises(RuntimeError, match=r"experts are packed \(AMXBF16_SFT\).*Merge in plain transformers"):
            merge()
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model.unload(), ids), logits(from_pretrained(checkpoint("qwen3_moe")), ids))


def _wrappers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if type(module).__name__ == "ParamWrapper")


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 is not possible on experts"):
        lora_config(lora_dropout=0.1)


def test_training_an_inference_method_names_the_one_to_use(checkpoint: Checkpoint) -> None:
    ids = tokens()
    model = get_peft_model(from_pretrained(checkpoint("qwen3_moe"), method="AMXINT8"), lora_config(r=4))
    randomize_lora(model)
    assert torch.isfinite(logits(model, ids)).all()  # adapters run with inference methods
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match=r"AMXINT8 is for inference only.*method='AMXINT8_SFT'"):
        loss.backward()


def test_stock_trainer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Five steps of the stock Trainer: the loss falls, tokens are counted, and what is saved is an adapter."""
    model = get_peft_model(from_pretrained(checkpoint("qwen3_moe")), lora_config(r=4))
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 16)] * 10
    meter = ThroughputCallback()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=True,
        include_num_input_tokens_seen="all",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[meter])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert meter.tokens == 5 * 4 * 16
    assert meter.average > 0
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(from_pretrained(checkpoint("qwen3_moe")), tmp_path / "adapter")
    model.eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
