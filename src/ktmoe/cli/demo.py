"""``ktmoe demo``: the whole path on a small model: pretrain, fine-tune on the CPU, compare, check in plain PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktmoe.cli import console

if TYPE_CHECKING:
    from ktmoe.cli.demo_data import Doc, Pair
    from ktmoe.cli.demo_model import ModelSettings
    from ktmoe.cli.demo_report import Outcome
    from ktmoe.cli.plain_eval import Example
    from ktmoe.cli.training import TrainSettings

HELP = (
    "Make a small Qwen3-MoE model from the standard library's documentation, fine-tune it with its experts in ktmoe, "
    "and check the adapter in plain transformers and PEFT. Under six minutes on two cores."
)
_CLEARLY = 0.05  # nats per token
_TOLERANCE = 0.01
_SAMPLES = 4


def demo(
    output: Annotated[Path, typer.Option(help="Where data, adapter and loss curve go.")] = Path("ktmoe-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and few steps: seconds, not minutes.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per physical core.")] = None,
) -> None:
    """Runs the five steps. Exit code 1 if the loss does not fall or plain PEFT disagrees."""
    from transformers.utils import logging

    from ktmoe.cli.training import use_threads

    logging.disable_progress_bar()
    use_threads(threads)
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    model_settings, train_settings = _settings(quick, threads)

    _step(1, "A small Qwen3-MoE checkpoint, pretrained in plain transformers")
    from ktmoe.cli.demo_data import collect_docs, question_answers

    docs = collect_docs()[:: 8 if quick else 1]
    model_folder = _base_model(model_settings, docs, quick)

    _step(2, "Questions and answers from the standard library")
    train_pairs, held_out = question_answers(docs)
    _write_rows(output / "train.jsonl", train_pairs)
    _write_rows(output / "heldout.jsonl", held_out)
    console.out.print(f"  {len(train_pairs)} pairs for training, {len(held_out)} held out")

    _step(3, f"Fine-tuning with LoRA, experts held as {train_settings.method}")
    outcome, examples, samples = _fine_tune(model_folder, output, held_out, train_settings)

    _step(4, "Before and after")
    _report(outcome, samples, len(held_out), output)

    _step(5, "The same adapter in plain transformers and PEFT, without ktmoe")
    _check_in_plain_peft(model_folder, output, examples, outcome.loss_after)

    console.out.print(f"\n[bold green]Done[/] in {time.monotonic() - began:.0f} s. Try it:")
    question = samples[0].question
    console.out.print(f'  ktmoe generate --model {model_folder} --adapter {output / "adapter"} --prompt "{question}"')


def _settings(quick: bool, threads: int | None) -> tuple[ModelSettings, TrainSettings]:
    from ktmoe.cli.demo_model import QUICK, ModelSettings
    from ktmoe.cli.training import TrainSettings

    if quick:
        return QUICK, TrainSettings(rank=8, alpha=16, max_steps=40, lr=1e-2, batch_size=8, threads=threads)
    return ModelSettings(), TrainSettings(
        rank=16, alpha=32, epochs=1, lr=4e-3, batch_size=16, threads=threads, seconds=100.0
    )


def _step(number: int, title: str) -> None:
    console.out.print(f"\n[bold]{number}/5  {title}[/]")


def _base_model(settings: ModelSettings, docs: Sequence[Doc], quick: bool) -> Path:
    from ktmoe.cli.demo_data import training_text
    from ktmoe.cli.demo_model import cached_model
    from ktmoe.cli.progress import PretrainingProgress

    texts = training_text(docs, with_topics=not quick)
    console.out.print(f"  {len(texts):,} documentation texts, {sum(map(len, texts)) / 1e6:.1f} MB")
    with PretrainingProgress() as progress:
        folder, cached = cached_model(settings, texts, progress)
    console.out.print(f"  {'cached' if cached else 'saved'} in {folder}")
    return folder


def _write_rows(file: Path, pairs: Sequence[Pair]) -> None:
    rows = (
        {"messages": [{"role": "user", "content": p.question}, {"role": "assistant", "content": p.answer}]}
        for p in pairs
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _fine_tune(
    model_folder: Path, output: Path, held_out: Sequence[Pair], settings: TrainSettings
) -> tuple[Outcome, list[Example], list[Pair]]:
    """(outcome, the held-out examples as tokens, the held-out pairs whose answers are shown)."""
    from ktmoe.cli import training
    from ktmoe.cli.demo_report import Outcome, answer
    from ktmoe.cli.plain_eval import mean_loss
    from ktmoe.cli.sft_data import encode_rows, read_rows

    tokenizer = training.load_tokenizer(str(model_folder))
    rows = {name: read_rows(output / f"{name}.jsonl") for name in ("train", "heldout")}
    train_examples, _ = encode_rows(rows["train"], tokenizer, 256, output / "train.jsonl")
    examples, _ = encode_rows(rows["heldout"], tokenizer, 256, output / "heldout.jsonl")
    model = training.add_adapter(training.load_model(str(model_folder), settings.method, settings.threads), settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.out.print(f"  {trainable / 1e6:.2f} M LoRA parameters on experts and attention, stock PEFT and Trainer")
    samples = sorted(held_out, key=lambda pair: len(pair.answer))[:: max(1, len(held_out) // _SAMPLES)][:_SAMPLES]

    outcome = Outcome(loss_before=mean_loss(model, examples, tokenizer.pad_token_id))
    outcome.answers_before = [answer(model, tokenizer, pair.question) for pair in samples]
    result = training.train(model, tokenizer, train_examples, settings, output / "adapter")
    outcome.loss_after = mean_loss(model, examples, tokenizer.pad_token_id)
    outcome.answers_after = [answer(model, tokenizer, pair.question) for pair in samples]
    outcome.losses, outcome.tokens, outcome.tok_per_s = result.losses, result.tokens, result.tok_per_s
    return outcome, examples, samples


def _report(outcome: Outcome, samples: Sequence[Pair], held_out: int, output: Path) -> None:
    from ktmoe.cli.demo_report import plot_losses, show_answers, show_losses

    show_losses(outcome, held_out)
    show_answers(samples, outcome)
    plot_losses(outcome, output / "loss.png")
    console.out.print(f"\n  trained on {outcome.tokens:,} tokens at {outcome.tok_per_s:,.0f} tokens/s")
    console.out.print(f"  loss curve {output / 'loss.png'}, adapter {output / 'adapter'}")
    if not outcome.loss_after < outcome.loss_before - _CLEARLY:
        raise console.UserError("the held-out loss did not fall clearly; something is wrong with the training")


def _check_in_plain_peft(model_folder: Path, output: Path, examples: Sequence[Example], expected: float) -> None:
    """Runs plain_eval.py in a process that never imports ktmoe. UserError if the losses differ by over 1 %."""
    tokens_file = (output / "heldout-tokens.json").resolve()
    tokens_file.write_text(json.dumps(list(examples)), encoding="utf-8")
    # From stdin, so that the folder of this package is not on the child's path.
    source = (Path(__file__).parent / "plain_eval.py").read_text(encoding="utf-8")
    command = [sys.executable, "-", str(model_folder), str((output / "adapter").resolve()), str(tokens_file)]
    child = subprocess.run(command, input=source, capture_output=True, text=True, cwd=output, check=False)
    if child.returncode != 0:
        raise console.UserError(f"plain transformers and PEFT could not use the adapter:\n{child.stderr[-2000:]}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if answer["ktmoe_imported"]:
        raise console.UserError("the plain process has imported ktmoe; the comparison means nothing")
    difference = abs(answer["loss"] - expected) / expected
    console.out.print(f"  held-out loss {answer['loss']:.4f}, in ktmoe {expected:.4f}: {difference:.2%} apart")
    if not difference <= _TOLERANCE:
        raise console.UserError(f"plain PEFT and ktmoe differ by {difference:.2%}, more than {_TOLERANCE:.0%}")
