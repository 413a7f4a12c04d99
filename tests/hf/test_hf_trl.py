"""TRL's SFTTrainer with a model that ktmoe loads, as in the documentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hf.tiny_models import make_checkpoint

pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


def test_stock_sft_trainer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """SFTTrainer loads the model itself, from a path and a KTMoEConfig; its checkpoints resume."""
    from datasets import Dataset

    from ktmoe.cli.demo_model import train_tokenizer
    from ktmoe.hf import KTMoEConfig, ktmoe_layers, lora_config

    texts = [f"{a} plus {b} is {a + b}" for a in range(8) for b in range(8)]
    tokenizer = train_tokenizer(texts, 300)
    folder = make_checkpoint("qwen3_moe", tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        model_init_kwargs={"quantization_config": KTMoEConfig("AMXBF16_SFT"), "dtype": "bfloat16"},
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )

    def trainer() -> trl.SFTTrainer:
        dataset = Dataset.from_dict({"text": texts})
        return trl.SFTTrainer(
            str(folder), args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora_config(r=4)
        )

    first = trainer()
    assert len(list(ktmoe_layers(first.model))) == 2
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry][-1] == pytest.approx(losses[-1])
