"""The loss of a model on held-out tokens, in plain transformers and PEFT.

The demo runs this file as a program in a process of its own, which never imports ktmoe: arguments are the model
folder, the adapter folder and a JSON file of examples; the answer is one line of JSON. `ktmoe.cli` imports its two
functions, so both sides measure the same thing.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

IGNORE = -100  # the label that transformers' losses leave out

Example = dict[str, list[int]]
"""``input_ids`` and ``labels``, lists of the same length; labels are IGNORE where no loss is wanted."""


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads on the right to the longest example: ``input_ids``, ``labels``, ``attention_mask``, each [batch, length]."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([example[key] + [value] * (length - len(example[key])) for example in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples])
    return {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", IGNORE), "attention_mask": mask}


def mean_loss(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int = 16) -> float:
    """Mean cross entropy over all answer tokens of `examples`. Leaves the model in eval mode."""
    model.eval()
    total, count = 0.0, 0
    # Neighbours of similar length waste little on padding.
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad_id)
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
                )
            )
            count += int((targets != IGNORE).sum())
    return total / count if count else math.nan


def main(model_folder: str, adapter_folder: str, examples_file: str) -> None:
    """Prints ``{"loss": ..., "ktmoe_imported": ...}``."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with open(examples_file, encoding="utf-8") as file:
        examples = json.load(file)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder)
    loss = mean_loss(model, examples, base.config.pad_token_id or 0)
    imported = any(name.split(".")[0] == "ktmoe" for name in sys.modules)
    print(json.dumps({"loss": loss, "ktmoe_imported": imported}))  # noqa: T201  (a program of its own)


if __name__ == "__main__":
    main(*sys.argv[1:])
