"""Training rows: reading JSON lines and turning them into tokens with the loss on the answers alone.

Two kinds of rows, one JSON object per line, which may be mixed:
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
A prompt with its completion is one user turn and one assistant turn if the tokenizer has a chat template, and plain
text otherwise. Everything that is wrong with a file is reported at once, by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmoe.cli.console import UserError
from ktmoe.cli.plain_eval import IGNORE, Example

_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Row:
    """One conversation. `messages` ends in an assistant turn; `plain` rows may be used without a chat template."""

    line: int
    messages: tuple[dict[str, str], ...]
    plain: bool = False


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON lines file; blank lines are skipped.

    UserError naming the lines that are wrong, or saying that the file is missing, empty or not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(number, line))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = len(problems) - _SHOWN_ERRORS
        raise UserError("\n".join(problems[:_SHOWN_ERRORS]) + (f"\n... and {more} more bad rows" if more > 0 else ""))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _parse(number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, expected an object")
    if "messages" in value:
        messages = _messages(value["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"the last message is from '{messages[-1]['role']}', expected 'assistant'")
        return Row(number, messages)
    if "prompt" in value and "completion" in value:
        return _prompt_row(number, value["prompt"], value["completion"])
    raise ValueError(f"has the keys {sorted(value)}, expected 'messages', or 'prompt' and 'completion'")


def _prompt_row(number: int, prompt: Any, completion: Any) -> Row:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError("'completion' is empty")
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        return Row(number, turns, plain=True)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion], "prompt and completion")
        if messages[-1]["role"] != "assistant":
            raise ValueError("'completion' does not end in an assistant message")
        return Row(number, messages)
    raise ValueError("'prompt' and 'completion' must both be strings, or both lists of messages")


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{where}' must be a list of messages that is not empty")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"message {position} needs 'role' and 'content', both strings")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def encode_rows(rows: Iterable[Row], tokenizer: Any, max_length: int, path: Path) -> tuple[list[Example], int]:
    """(examples, number of rows dropped because nothing of an answer was left within `max_length` tokens)."""
    examples: list[Example] = []
    dropped = 0
    for row in rows:
        example = _encode(row, tokenizer, path)
        example = {key: values[:max_length] for key, values in example.items()}
        # The first token has no predecessor, so a label there is never used.
        if any(label != IGNORE for label in example["labels"][1:]):
            examples.append(example)
        else:
            dropped += 1
    if not examples:
        raise UserError(f"{path}: no answer begins within {max_length} tokens; raise --max-length")
    return examples, dropped


def _encode(row: Row, tokenizer: Any, path: Path) -> Example:
    if getattr(tokenizer, "chat_template", None):
        return _encode_chat(row, tokenizer, path)
    if not row.plain:
        raise UserError(
            f"{path}:{row.line}: the tokenizer has no chat template, so 'messages' cannot be rendered; "
            "use 'prompt' and 'completion' rows"
        )
    prompt, answer = (message["content"] for message in row.messages)
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    answer_ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        answer_ids.append(tokenizer.eos_token_id)
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORE] * len(prompt_ids) + answer_ids}


def _encode_chat(row: Row, tokenizer: Any, path: Path) -> Example:
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed for chats")
    messages = list(row.messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = _answer_spans(messages, text, tokenizer)
    if not spans:
        raise UserError(f"{path}:{row.line}: the chat template does not show where the answer begins")
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(begin <= start and end <= stop for begin, stop in spans) and end > start else IGNORE
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _answer_spans(messages: Sequence[dict[str, str]], text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Character ranges of the assistant turns in `text`: their content and what the template ends a turn with.

    A template may write an earlier turn differently once another one follows (some drop its thinking); such a turn
    gets no loss, and the last one always has its own.
    """
    spans = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:position], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: position + 1], tokenize=False)
            if text.startswith(before) and text.startswith(after) and len(after) > len(before):
                spans.append((len(before), len(after)))
    return spans


def split_rows(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(training, evaluation) rows: every n-th row is held out, so that the split is the same each time."""
    if fraction <= 0:
        return rows, []
    every = max(2, round(1 / fraction))
    held_out = rows[every - 1 :: every]
    if not held_out:
        raise UserError(f"{len(rows)} rows are too few to hold out {fraction:.0%} of them")
    return [row for position, row in enumerate(rows) if (position + 1) % every], held_out
