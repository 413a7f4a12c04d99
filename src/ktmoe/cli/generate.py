"""``ktmoe generate``: text from a MoE model whose experts run on the CPU, with or without an adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ktmoe.cli import console

HELP = "Generate text. The prompt goes through the tokenizer's chat template if it has one."


def generate(
    model: Annotated[str, typer.Option(help="Model folder, Hub id or GGUF file.")],
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter folder.")] = None,
    method: Annotated[str, typer.Option(help="How the experts are held.")] = "BF16",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per physical core.")] = None,
    packed: Annotated[Path | None, typer.Option(help="Experts packed by ktmoe quantize.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file of the weights, if not --model itself.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Prints the answer as it is made; what it took goes to stderr."""
    from transformers import TextStreamer, set_seed

    from ktmoe.cli import training

    if adapter is not None and not (adapter / "adapter_config.json").exists():
        raise console.UserError(f"{adapter} is not a PEFT adapter (it has no adapter_config.json)")
    tokenizer = training.load_tokenizer(model, gguf_file)
    loaded = training.load_model(model, method, threads, packed, gguf_file)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    loaded.eval()
    inputs = encode_prompt(tokenizer, prompt)
    set_seed(seed)
    began = time.monotonic()
    output = loaded.generate(
        **inputs,
        **sampling(temperature),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    made, seconds = output.shape[1] - inputs["input_ids"].shape[1], time.monotonic() - began
    console.err.print(f"[dim]{made} tokens, {made / seconds:.1f} tok/s, experts held as {method}[/]")


def encode_prompt(tokenizer: Any, prompt: str) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` of one user turn, or of the plain text without a chat template."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments of ``generate``: greedy at 0, sampling above."""
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
