"""Training rows: what is read, what is refused by line, and where the loss is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktmoe.cli.console import UserError
from ktmoe.cli.plain_eval import IGNORE, collate
from ktmoe.cli.sft_data import encode_rows, read_rows, split_rows

GOOD = {"prompt": "a", "completion": "b"}


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def answers(example: dict[str, list[int]], tokenizer: Any) -> str:
    """The text that has a loss."""
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORE]))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{", "not JSON"),
        ("[1]", "got list, expected an object"),
        ({"text": "x"}, "has the keys ['text'], expected 'messages', or 'prompt' and 'completion'"),
        ({"prompt": "x"}, "expected 'messages', or 'prompt' and 'completion'"),
        ({"prompt": "x", "completion": 3}, "must both be strings, or both lists"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"messages": []}, "must be a list of messages that is not empty"),
        ({"messages": [{"role": "user"}]}, "message 0 needs 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is from 'user', expected 'assistant'"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: Any, text: str) -> None:
    file = write(tmp_path, GOOD, "", row)
    with pytest.raises(UserError) as error:
        read_rows(file)
    assert f"{file}:3: " in str(error.value)
    assert text in str(error.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*(\n.*)*and 4 more bad rows"):
        read_rows(write(tmp_path, *["{"] * 9))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="has no rows"):
        read_rows(write(tmp_path, "", " "))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        read_rows(tmp_path / "binary")


def test_loss_is_on_the_answers_alone(chat_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    turns = [("user", "What is 1?"), ("assistant", "It is 1."), ("user", "And 2?"), ("assistant", "It is 2.")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    listed = {"prompt": chat["messages"][:1], "completion": chat["messages"][1:2]}
    file = write(tmp_path, {"prompt": "What is 3?", "completion": "It is 3."}, chat, listed)
    examples, dropped = encode_rows(read_rows(file), tokenizer, 100, file)
    assert dropped == 0
    assert [answers(example, tokenizer) for example in examples] == [
        "It is 3.<|end|>", "It is 1.<|end|>It is 2.<|end|>", "It is 1.<|end|>",
    ]  # fmt: skip
    assert tokenizer.decode(examples[0]["input_ids"]) == "<|user|>What is 3?<|end|><|assistant|>It is 3.<|end|>"


def test_without_a_chat_template(chat_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    tokenizer.chat_template = None
    file = write(tmp_path, {"prompt": "1 + 1 =", "completion": " 2"})
    (example,), _ = encode_rows(read_rows(file), tokenizer, 100, file)
    assert tokenizer.decode(example["input_ids"]) == "1 + 1 = 2<|end|>"
    assert answers(example, tokenizer) == " 2<|end|>"
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    file = write(tmp_path, GOOD, chat)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the tokenizer has no chat template"):
        encode_rows(read_rows(file), tokenizer, 100, file)


def test_turns_that_a_template_rewrites_have_no_loss(chat_model: Path, tmp_path: Path) -> None:
    """Templates that strip the thinking of earlier turns: only the turn that stands as it was generated is trained."""
    tokenizer = load_tokenizer(chat_model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}(thinking){% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [("user", "What is 1?"), ("assistant", "It is 1."), ("user", "And 2?"), ("assistant", "It is 2.")]
    file = write(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    (example,), _ = encode_rows(read_rows(file), tokenizer, 200, file)
    assert answers(example, tokenizer) == "(thinking)It is 2.<|end|>"


def test_long_rows_are_cut_or_dropped(chat_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    short, long = {"prompt": "What is 3?", "completion": "It is 3."}, {"prompt": "x" * 99, "completion": "y"}
    file = write(tmp_path, short, long)
    examples, dropped = encode_rows(read_rows(file), tokenizer, 20, file)
    assert (len(examples), dropped) == (1, 1)
    file = write(tmp_path, long)
    with pytest.raises(UserError, match="raise --max-length"):
        encode_rows(read_rows(file), tokenizer, 20, file)


def test_split_is_the_same_each_time(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, *[GOOD] * 10))
    train, held_out = split_rows(rows, 0.2)
    assert [row.line for row in held_out] == [5, 10]
    assert len(train) == 8
    assert split_rows(rows, 0.0) == (rows, [])
    with pytest.raises(UserError, match="too few"):
        split_rows(rows[:3], 0.1)


def test_collate_pads_on_the_right() -> None:
    batch = collate([{"input_ids": [5, 6], "labels": [IGNORE, 6]}, {"input_ids": [7], "labels": [7]}], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6], [7, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
