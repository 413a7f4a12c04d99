"""`python -m bench engine` on tiny shapes: seconds, not a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import arguments, impls, probes
from bench.attention import Attention
from bench.engine import KINDS, LAYERS, POLICIES, contestants
from bench.peers import Launch
from bench.problem import SHAPES, Problem, save_problem

FAST = ["--seconds", "0.02", "--threads", "2"]
US = ("forward_us", "submit_us", "first_us", "following_us")
MS = ("together_ms", "attention_ms", "experts_ms", "none_ms", "some_ms", "accelerator_ms")


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert bench.main(["engine", "--shape", "T", *FAST, "--peers", "none", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "engine.json").read_text())
    rows = data["engine"]
    assert (data["modes"], data["left_out"]) == (["engine"], [])
    assert {(row["probe"], row["shape"]) for row in rows} == {
        *(("submit", "TINY"), ("wake", "TINY"), ("submit", "T"), ("wake", "T")),
        *(("idle", "T"), ("attention", "T"), ("deferral", "T")),
    }
    assert {row["impl"].partition("?")[0] for row in rows} == {"ktmoe:BF16"}
    assert all(row[key] > 0 for row in rows for key in (*US, *MS) if key in row)
    assert {row["way"] for row in rows if row["probe"] == "wake"} == set(probes.WAYS)
    by_policy = {row["policy"]: row for row in rows if row["probe"] == "attention"}
    assert set(by_policy) == set(POLICIES)
    assert all(row["torch_threads"] == 2 and row["n"] >= 2 for row in by_policy.values())
    (deferral,) = (row for row in rows if row["probe"] == "deferral")
    assert deferral["impl"].endswith("max_deferred_experts_per_token=1")
    assert deferral["none_ms"] >= LAYERS * deferral["accelerator_ms"]
    (idle,) = (row for row in rows if row["probe"] == "idle")
    assert idle["percent"] == pytest.approx(100 * idle["cpu_s"] / idle["wall_s"])
    table = capsys.readouterr().out
    for title in ("submit and sync beside forward", "after 10 ms", "CPU time", "penalty", "simulated accelerator"):
        assert title in table


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    save_problem(tmp_path, SHAPES["T"], sft=False)
    return Problem(tmp_path, SHAPES["T"])


def ktmoe(problem: Problem, variant: str, layers: int) -> impls.Trainable:
    return impls.make(f"ktmoe:{variant}", problem, layers=layers, threads=1, max_tokens=16, sft=False)


def test_both_ways_compute_the_same(problem: Problem) -> None:
    impl = ktmoe(problem, "BF16", 1)
    forward, submit = (way(impl, 0, problem.batch(4, 5)) for way in probes.WAYS.values())
    assert torch.equal(forward, submit)


def test_defer_switches_deferral_on_and_off(problem: Problem) -> None:
    impl = ktmoe(problem, "BF16?max_deferred_experts_per_token=1", 2)
    batch = problem.batch(1, 5)
    results = {}
    for count in (0, 1):
        impl.defer(count)  # type: ignore[attr-defined]
        results[count] = [probes.WAYS["submit"](impl, layer, batch) for layer in range(2)]
    assert torch.equal(*results[0])
    assert not torch.equal(results[1][0], results[0][0])  # one of two experts is missing,
    sums = [sum(y.double() for y in results[count]) for count in (0, 1)]
    # and comes one layer later: three terms are rounded to bf16 (2^-9 of each) instead of two
    assert torch.allclose(sums[1], sums[0], rtol=0, atol=float(sums[0].abs().max()) * 3 * 2**-8)


@pytest.mark.parametrize("hidden", [64, 256, 2048])
def test_attention_is_that_of_grouped_queries(hidden: int) -> None:
    attend = Attention(hidden, 0)
    x = torch.randn(1, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    heads = attend.kv_heads * attend.group
    assert heads == max(1, hidden // 64)
    queries = (x.double() @ attend.into.double().T)[:, : heads * 128].view(heads, 128)
    keys, values = (t[0].double().repeat_interleave(attend.group, 0) for t in (attend.keys, attend.values))
    weights = torch.softmax((keys @ queries[..., None])[..., 0] / 128**0.5, -1)
    want = (weights[:, None] @ values).reshape(1, -1) @ attend.out.double().T
    error = (attend(x).double() - want).norm() / want.norm()
    assert error < 2**-8  # the result is rounded to bf16


def test_kt_kernel_is_measured_with_and_without_help() -> None:
    found = {"ktmoe": Launch(), "kt": Launch("py", {"LD_PRELOAD": "x"})}
    assert [(c.name, c.launch.env, c.note) for c in contestants(["ktmoe:BF16", "kt:BF16"], found)] == [
        ("ktmoe:BF16", {}, ""),
        ("kt:BF16", {"LD_PRELOAD": "x"}, "helped to sleep"),
        ("kt:BF16", {}, ""),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "torch:bf16"], "--peers: got 'torch:bf16', expected variants of kt"),
        (["--mode", "sft"], "engine: got mode sft, expected inference"),
    ],
)
def test_what_has_no_queue_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parse("", ["engine", *options])
    assert message in capsys.readouterr().err


def test_kinds_are_those_of_the_probe(problem: Problem) -> None:
    impl = ktmoe(problem, "BF16", 1)
    got = probes.beside_attention(impl, lambda: (0, problem.batch(1, 5)), 0.0)  # type: ignore[arg-type]
    assert set(got["rounds"]) == set(KINDS)
