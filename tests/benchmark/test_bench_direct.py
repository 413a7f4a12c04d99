"""The direct calls that the wrapper is compared with compute the same as the wrapper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.impls.ours import Direct, Ktmoe
from bench.problem import SHAPES, Problem, save_problem

OPTIONS = {"layers": 1, "threads": 1, "max_tokens": 16}


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    save_problem(tmp_path, SHAPES["TINY"], sft=False)
    return Problem(tmp_path, SHAPES["TINY"])


def test_inference(problem: Problem) -> None:
    ours = Ktmoe("AMXINT8", problem, sft=False, **OPTIONS)
    batch = problem.batch(5, seed=1)
    assert torch.equal(ours.direct().forward(0, *batch), ours.forward(0, *batch))


@pytest.mark.parametrize("buffers", [False, True])
def test_training(problem: Problem, buffers: bool) -> None:
    ours = Ktmoe("AMXINT8_SFT", problem, sft=True, **OPTIONS)
    ours.set_lora(problem.lora())
    if buffers:
        ours.give_buffers()
    batch = problem.batch(5, seed=1)
    direct: Direct = ours.direct()
    grad = torch.randn(5, problem.shape.hidden).bfloat16()
    assert torch.equal(direct.forward(0, *batch), ours.forward(0, *batch))
    got, want = direct.backward(grad), ours.backward(grad)
    assert torch.equal(got.x, want.x)
    assert len(got.lora) == len(want.lora) == 6
    for mine, theirs in zip(got.lora, want.lora, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.count_nonzero()
