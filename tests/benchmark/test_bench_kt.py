"""What of the kt-kernel adapter can be checked where the package is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import impls
from bench.impls.kt import _mxfp4
from bench.problem import SHAPES, Problem, save_problem

OPTIONS = {"layers": 1, "threads": 1, "max_tokens": 16}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    save_problem(tmp_path, SHAPES["TINY"], sft=False)
    return Problem(tmp_path, SHAPES["TINY"])


@pytest.mark.parametrize(
    ("name", "sft", "missing"),
    [("kt:AMXBF16_SFT", True, "AMXBF16_SFT_MOE"), ("kt:BF16", False, "AMXBF16_MOE or AVX2BF16_MOE")],
)
def test_a_class_that_the_cpu_has_not_is_named(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, name: str, sft: bool, missing: str
) -> None:
    nothing = SimpleNamespace(kt_kernel_ext=SimpleNamespace(moe=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "kt_kernel", nothing)
    with pytest.raises(RuntimeError, match=f"kt-kernel has no {missing} on this CPU"):
        impls.make(name, problem, sft=sft, **OPTIONS)


@pytest.mark.parametrize("name", ["llamacpp:Q4_K", "nobody:x"])
def test_a_family_that_does_not_train_is_named(problem: Problem, name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}', expected one of the families ktmoe, torch, kt"):
        impls.make(name, problem, sft=True, **OPTIONS)


def test_every_named_peer_has_a_class() -> None:
    for mode, names in impls.PEERS.items():
        for name in names:
            family, _, variant = name.partition(":")
            made = impls.class_of(name, sft=mode == "sft")
            if family == "kt":
                assert variant in made.classes  # type: ignore[attr-defined]


def test_mxfp4_is_the_nearest_value_of_its_grid() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    packed, scales = _mxfp4(w)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    assert packed.shape == (8, 32)
    assert torch.equal(scales.float(), scales.float().log2().round().exp2())
    scaled = w.float().unflatten(1, (2, 32)) / scales.float()[..., None]
    assert scaled.abs().max() < 8
    distance = (scaled[..., None] - E2M1).abs().amin(-1)
    assert torch.equal((scaled - E2M1[codes].unflatten(1, (2, 32))).abs(), distance)
