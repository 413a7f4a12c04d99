"""One LoRA fine-tuning with the stock Trainer: what `ktmoe sft` and `ktmoe demo` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ktmoe.cli.console import UserError
from ktmoe.cli.plain_eval import Example, collate
from ktmoe.cli.progress import TimeLimit, TrainingProgress
from ktmoe.hf import ThroughputCallback, fast_bf16, from_pretrained, lora_config
from ktmoe.hf.gguf_model import GgufModel


@dataclass(frozen=True)
class TrainSettings:
    """What a fine-tuning is asked for. `max_steps` = 0 means: as many as `epochs` takes."""

    method: str = "AMXBF16_SFT"
    rank: int = 16
    alpha: float = 32.0
    attention: bool = True
    epochs: float = 1.0
    max_steps: int = 0
    lr: float = 2e-4
    batch_size: int = 4
    grad_accum: int = 1
    gradient_checkpointing: bool = False
    threads: int | None = None
    packed: Path | None = None
    seed: int = 0
    seconds: float = 0.0
    """Stop after about that long; 0: no limit."""


@dataclass
class TrainResult:
    """What came out: the loss of each logged step as (step, loss), and the speed."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def load_model(
    path: str, method: str, threads: int | None = None, packed: Path | None = None, gguf_file: str | None = None
) -> Any:
    """The model with its experts in ktmoe; what is not an expert is in the dtype that torch is fast in here.

    packed: a folder that `ktmoe quantize` has made of it, or None. gguf_file: as in `from_pretrained`.
    """
    use_threads(threads)
    dtype = "auto" if fast_bf16() else torch.float32
    return from_pretrained(
        path, method=method, gguf_file=gguf_file, cpuinfer_threads=threads, dtype=dtype, packed=packed
    )


def use_threads(threads: int | None) -> None:
    """Limits torch's own threads as well; None leaves them alone."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_tokenizer(path: str, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model, with a padding token. UserError for a folder or file that does not exist."""
    from transformers import AutoTokenizer

    if path.startswith(("/", ".", "~")) and not Path(path).exists():
        raise UserError(f"there is no model folder or GGUF file {path}")
    model = GgufModel.find(path, gguf_file)
    if model is None and Path(path).is_file():
        raise UserError(f"{path} is a file, expected a model folder, GGUF file or Hub id")
    tokenizer = AutoTokenizer.from_pretrained(path) if model is None else model.tokenizer()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_adapter(model: Any, settings: TrainSettings) -> Any:
    """`model` with a fresh LoRA adapter on its experts (and its attention)."""
    from peft import get_peft_model

    torch.manual_seed(settings.seed)
    return get_peft_model(model, lora_config(settings.rank, settings.alpha, settings.attention))


def train(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: TrainSettings, output: Path
) -> TrainResult:
    """Trains the adapter of `model` in place and saves it, with the tokenizer, as a plain PEFT adapter in `output`."""
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    meter = ThroughputCallback()
    progress = TrainingProgress(meter)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, output),
        train_dataset=list(examples),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[meter, progress, TimeLimit(settings.seconds)],
    )
    trainer.remove_callback(PrinterCallback)
    with progress:
        trainer.train()
    model.save_pretrained(str(output))
    tokenizer.save_pretrained(str(output))
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return TrainResult(losses, meter.tokens, meter.seconds)


def _arguments(settings: TrainSettings, output: Path) -> Any:
    from transformers import TrainingArguments

    # The option was renamed; both names mean the same.
    names = TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        use_cpu=True,
        seed=settings.seed,
        **{checkpointing: settings.gradient_checkpointing},
    )
