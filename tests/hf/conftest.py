"""Tiny checkpoints, made once per test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from hf.tiny_models import make_checkpoint
from transformers.utils import logging


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(family) -> folder of the family's tiny random model."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


class Routing:
    """Gives two models the same expert choices.

    A token whose router is undecided within a rounding error takes another expert in another implementation, which
    says nothing about either of them. What the model under `record` chooses is used by those under `replay`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._topk = torch.topk
        self._choices: list[torch.Tensor] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        self._choices.clear()

        def topk(scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = self._topk(scores, *args, **kwargs)
            self._choices.append(result.indices)
            return result

        with self._monkeypatch.context() as patch:
            patch.setattr(torch, "topk", topk)
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        left = iter(self._choices)

        def topk(scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            choice = next(left)
            return torch.return_types.topk((scores.gather(-1, choice), choice))

        with self._monkeypatch.context() as patch:
            patch.setattr(torch, "topk", topk)
            yield
        assert next(left, None) is None


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> Routing:
    return Routing(monkeypatch)
