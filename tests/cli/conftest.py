"""A tiny chat model with a real tokenizer, for the commands that need a model folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

ROWS = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(6) for b in range(4)]


@pytest.fixture(scope="session", autouse=True)
def _plain_output() -> None:
    """Error boxes of a known width, without colours."""
    os.environ.update(COLUMNS="200", NO_COLOR="1", TERM="dumb")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen3-MoE with a byte-level tokenizer and a chat template."""
    from hf.tiny_models import make_checkpoint

    from ktmoe.cli.demo_model import train_tokenizer

    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = train_tokenizer([f"{question} {answer}" for question, answer in ROWS], 320)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    make_checkpoint("qwen3_moe", folder, vocab_size=len(tokenizer), **ids)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Both kinds of rows in one file, and a blank line."""
    lines = []
    for number, (question, answer) in enumerate(ROWS):
        if number % 2:
            lines.append({"prompt": question, "completion": answer})
        else:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append({"messages": turns})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return file
