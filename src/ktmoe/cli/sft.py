"""``ktmoe sft``: LoRA fine-tuning of a Hugging Face MoE model on the user's own rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktmoe.cli import console

if TYPE_CHECKING:
    from ktmoe.cli.plain_eval import Example
    from ktmoe.cli.sft_data import Row
    from ktmoe.cli.training import TrainSettings

HELP = (
    "Fine-tune a MoE model with LoRA on its experts and attention. The data are JSON lines with chat 'messages', or "
    "with 'prompt' and 'completion'; the loss is on the answers. The result is a plain PEFT adapter."
)


def sft(
    model: Annotated[str, typer.Option(help="Model folder, Hub id or GGUF file.")],
    data: Annotated[Path, typer.Option(help="Training rows (JSON lines).")],
    output: Annotated[Path, typer.Option(help="Where the adapter goes.")],
    method: Annotated[str, typer.Option(help="How the experts are held: a method that ends in _SFT.")] = "AMXBF16_SFT",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scaling is alpha/rank.")] = 32.0,
    attention: Annotated[bool, typer.Option(help="Train the attention as well.")] = True,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(min=0, help="Optimizer steps; wins over --epochs. 0: not set.")] = 0,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate (cosine schedule).")] = 2e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward.")] = 4,
    grad_accum: Annotated[int, typer.Option(min=1, help="Forwards per optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per row; longer rows are cut.")] = 1024,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out rows: loss before and after.")] = None,
    eval_fraction: Annotated[float, typer.Option(min=0.0, max=0.5, help="Hold out this share of --data.")] = 0.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, one more forward.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per physical core.")] = None,
    packed: Annotated[Path | None, typer.Option(help="Experts packed by ktmoe quantize.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file of the weights, if not --model itself.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the adapter and of the order of rows.")] = 0,
) -> None:
    """Trains, evaluates if there are held-out rows, and saves the adapter."""
    _check(method, eval_data, eval_fraction)
    from ktmoe.cli.training import TrainSettings

    settings = TrainSettings(
        method=method,
        rank=rank,
        alpha=alpha,
        attention=attention,
        epochs=epochs,
        max_steps=max_steps,
        lr=lr,
        batch_size=batch_size,
        grad_accum=grad_accum,
        gradient_checkpointing=gradient_checkpointing,
        threads=threads,
        packed=packed,
        seed=seed,
    )
    _run(model, gguf_file, data, output, settings, max_length, eval_data, eval_fraction)


def _check(method: str, eval_data: Path | None, eval_fraction: float) -> None:
    """What can be refused before anything is loaded."""
    from ktmoe.methods import METHODS, methods_of

    if eval_data is not None and eval_fraction:
        raise typer.BadParameter("give --eval-data or --eval-fraction, not both")
    trainable = [row.name for row in methods_of("sft")]
    if method not in METHODS:
        raise typer.BadParameter(f"unknown method {method!r}; methods that train: {', '.join(trainable)}")
    if METHODS[method].mode != "sft":
        raise typer.BadParameter(f"{method} is for inference only; methods that train: {', '.join(trainable)}")


def _run(
    model: str,
    gguf_file: str | None,
    data: Path,
    output: Path,
    settings: TrainSettings,
    max_length: int,
    eval_data: Path | None,
    eval_fraction: float,
) -> None:
    from ktmoe.cli import training
    from ktmoe.cli.plain_eval import mean_loss
    from ktmoe.cli.sft_data import read_rows, split_rows

    # Rows first: a typo in line 7 should not cost the minutes that a large model takes to load.
    rows = read_rows(data)
    rows, held_out = (rows, read_rows(eval_data)) if eval_data is not None else split_rows(rows, eval_fraction)
    tokenizer = training.load_tokenizer(model, gguf_file)
    examples = _encode(rows, tokenizer, max_length, data)
    held_out_examples = _encode(held_out, tokenizer, max_length, eval_data or data) if held_out else []
    began = time.monotonic()
    base = training.load_model(model, settings.method, settings.threads, settings.packed, gguf_file)
    console.out.print(f"{model}: experts held as {settings.method}, loaded in {time.monotonic() - began:.1f} s")
    peft_model = training.add_adapter(base, settings)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    console.out.print(f"{len(examples)} training rows, {trainable / 1e6:.2f} M trainable LoRA parameters")
    pad_id = tokenizer.pad_token_id
    before = mean_loss(peft_model, held_out_examples, pad_id) if held_out_examples else None
    result = training.train(peft_model, tokenizer, examples, settings, output)
    if before is not None:
        after = mean_loss(peft_model, held_out_examples, pad_id)
        console.out.print(f"held-out loss ({len(held_out_examples)} rows): {before:.4f} -> {after:.4f}")
    console.out.print(f"{result.tokens:,} tokens at {result.tok_per_s:,.0f} tok/s; adapter saved in {output}")


def _encode(rows: list[Row], tokenizer: Any, max_length: int, path: Path) -> list[Example]:
    from ktmoe.cli.sft_data import encode_rows

    examples, dropped = encode_rows(rows, tokenizer, max_length, path)
    if dropped:
        console.out.print(f"[yellow]{path}: {dropped} rows have no answer within {max_length} tokens; left out[/]")
    return examples
