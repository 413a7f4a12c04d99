"""The demo's model: a small, real Qwen3-MoE checkpoint, pretrained here by plain transformers.

Nothing in this file knows ktmoe. What comes out is an ordinary Hugging Face folder (config, tokenizer with a chat
template, bf16 safetensors with one key per expert), kept in a cache for the next run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ktmoe import cache

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_FORMAT = 2  # raise it when the meaning of the settings changes: old cache entries are then left alone


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides what the pretrained model is. `seconds` bounds the training loop on slow machines."""

    vocab: int = 4096
    hidden: int = 192
    layers: int = 4
    experts: int = 16
    top_k: int = 2
    inter: int = 128
    head_dim: int = 32
    batch: int = 4
    length: int = 128
    steps: int = 1000
    lr: float = 3e-3
    seconds: float = 85.0
    seed: int = 0


QUICK = ModelSettings(vocab=1024, hidden=64, layers=2, experts=8, inter=48, batch=8, length=64, steps=80, seconds=15.0)

Progress = Callable[[float, float], None]
"""Called with the share that is done (0..1) and the loss."""


def cached_model(settings: ModelSettings, texts: Sequence[str], progress: Progress) -> tuple[Path, bool]:
    """The folder of the model for these settings and texts, and whether it was there already."""
    folder = cache_folder() / _fingerprint(settings, texts)
    if (folder / "config.json").exists():
        return folder, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _make(settings, texts, scratch, progress)
        try:
            scratch.rename(folder)
        except OSError:
            # Another run was faster; its folder holds the same model.
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder, False


def cache_folder() -> Path:
    """Where demo models are kept: in ktmoe's cache, or among the temporary files if that is off."""
    return (cache.root() or Path(tempfile.gettempdir()) / "ktmoe") / "demo"


def _fingerprint(settings: ModelSettings, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, asdict(settings), CHAT_TEMPLATE], sort_keys=True).encode())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _make(settings: ModelSettings, texts: Sequence[str], folder: Path, progress: Progress) -> None:
    from transformers import Qwen3MoeForCausalLM

    tokenizer = train_tokenizer(texts, settings.vocab)
    stream = torch.tensor(
        [token for ids in tokenizer(list(texts))["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    )
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM(_model_config(settings, tokenizer))
    pretrain(model, stream, settings, progress)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Sequence[str], vocab: int) -> Any:
    """A byte-level BPE tokenizer of `vocab` entries trained on `texts`, with the demo's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _model_config(settings: ModelSettings, tokenizer: Any) -> Any:
    from transformers import Qwen3MoeConfig

    heads = settings.hidden // settings.head_dim
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=settings.head_dim,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        moe_intermediate_size=settings.inter,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        # A wider start than usual learns faster when there are only some hundred steps.
        initializer_range=0.06,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )


def pretrain(model: Any, stream: torch.Tensor, settings: ModelSettings, progress: Progress) -> None:
    """Next-token training on the token `stream` [n] with AdamW and a cosine schedule.

    The schedule follows the number of steps or the clock, whichever is ahead, so that a slow machine ends in time with
    a learning rate that has come down all the same.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    began, loss = time.monotonic(), math.nan
    for step in range(settings.steps):
        done = max(step / settings.steps, (time.monotonic() - began) / settings.seconds)
        if done >= 1:
            break
        warmup = min(1.0, (step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        starts = torch.randint(0, len(stream) - settings.length, (settings.batch,), generator=generator)
        ids = torch.stack([stream[start : start + settings.length] for start in starts.tolist()])
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(result.loss.detach())
        progress(done, loss)
    progress(1.0, loss)
    model.config.output_router_logits = False
    model.eval()
