"""The whole bench on a tiny shape: seconds, not a measurement."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import arguments, costs, limits, runner
from bench.peers import Launch
from bench.problem import SHAPES
from ktmoe.methods import methods_of

FAST = ["--seconds", "0.02", "--rounds", "2", "--threads", "1", "--read-bytes", str(1 << 22)]


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds of measuring them again."""
    kinds = {"fp32": ("Gop/s", 100), "int8": ("Gop/s", 200), "read": ("GB/s", 25)}
    found = [limits.Limit(f"some {kind}", kind, unit, rate, rate, rate) for kind, (unit, rate) in kinds.items()]
    monkeypatch.setattr(limits, "measure", lambda *_, **__: found)


def run(tmp_path: Path, *more: str) -> dict[str, object]:
    assert bench.main([*FAST, "--out", str(tmp_path), *more]) == 0
    data: dict[str, object] = json.loads((tmp_path / "bench.json").read_text())
    return data


def test_inference_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "--mode", "inference", "--cells", "T:1,T:20", "--peers", "torch:bf16,torch:fp32")
    ours = [f"ktmoe:{m.name}" for m in methods_of("inference")]
    assert data["left_out"] == []
    assert {(row["impl"], row["tokens"]) for row in data["cells"]} == {
        (name, tokens) for name in [*ours, "torch:bf16", "torch:fp32"] for tokens in (1, 20)
    }
    for row in data["cells"]:
        assert row["n"] == len(row["samples_ms"]) >= 2
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        # gaussian weights: the coarsest format here has 4 bits
        assert 0 < row["error"] < (1e-5 if row["impl"] == "torch:fp32" else 1e-2 if "BF16" in row["impl"] else 0.3)
        if row["impl"] in ours:
            floor = row["floor"]
            assert row["fraction"] == pytest.approx(floor["ms"] / row["ms"])
            assert floor["flops"] == 6 * row["tokens"] * 2 * 256 * 256
            assert row["fair_peer"].startswith("torch:")
        else:
            assert row["floor"] is None
    bf16 = next(row for row in data["cells"] if row["impl"] == "ktmoe:BF16" and row["tokens"] == 1)
    assert bf16["floor"]["bytes"] >= 2 * 3 * 256 * 256 * 2  # two experts of three bf16 matrices
    assert {x["kind"] for x in data["limits"]["before"]} >= {"fp32", "read"}
    assert set(data["limits"]["drift"]) == {x["name"] for x in data["limits"]["after"]}
    assert {row["impl"] for row in data["overhead"]} == {*ours, "torch:bf16"}
    assert all(row["us"] > 0 and row["after_idle_us"] > 0 for row in data["overhead"])
    assert {(row["shape"], row["impl"]) for row in data["wrapper"]} == {(s, n) for s in ("T", "TINY") for n in ours}
    image = (tmp_path / "roofline.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", image[16:24])) > 500
    table = capsys.readouterr().out
    assert "of floor" in table
    assert "T: hidden 256, inter 256, 8 experts, top 2" in table


@pytest.mark.usefixtures("known_limits")
def test_sft_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(tmp_path, "--mode", "sft", "--cells", "T:20", "--peers", "torch:bf16,torch:fp32")
    ours = [f"ktmoe:{m.name}" for m in methods_of("sft")]
    assert data["left_out"] == []
    assert {(row["impl"], row["pass"]) for row in data["cells"]} == {
        (name, pass_) for name in [*ours, "torch:bf16", "torch:fp32"] for pass_ in ("forward", "backward")
    }
    for row in data["cells"]:
        most = 1e-5 if row["impl"] == "torch:fp32" else 1e-2 if "bf16" in row["impl"].lower() else 0.3
        assert 0 < row["error"] < most
        if row["pass"] == "backward":
            assert 0 < row["lora_error"] < most
        else:
            assert row["lora_error"] is None
    floors = {(row["impl"], row["pass"]): row["floor"] for row in data["cells"] if row["impl"] in ours}
    assert all(floor["flops"] == 6 * 20 * 2 * 256 * 256 for floor in floors.values())
    peaks = [floors["ktmoe:AMXINT8_SFT", pass_]["peak"] for pass_ in ("forward", "backward")]
    assert peaks == ["some int8", "some fp32"]
    for name in ours:
        assert floors[name, "forward"]["bytes"] == floors[name, "backward"]["bytes"]
    assert {row["impl"] for row in data["memory"]} == {row["impl"] for row in data["cells"]}
    for row in data["memory"]:
        assert row["tokens"] == 20
        assert row["held"] + row["lora"] <= row["peak"] < row["held"] + (1 << 30)
        assert (row["packed"] > 0) == (row["impl"] in ours)
        assert row["held"] >= row["packed"]
    passes = ("forward", "backward", "backward into buffers")
    assert {(row["impl"], row["pass"], row["tokens"]) for row in data["wrapper"]} == {
        (name, pass_, 16) for name in ours for pass_ in passes
    }
    for row in data["wrapper"]:
        assert row["percent"] == pytest.approx(100 * (row["wrapper"] / row["direct"] - 1))
    assert "held / packed" in capsys.readouterr().out


@pytest.mark.usefixtures("known_limits")
def test_without_a_mode_one_run_has_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--cells", "T:4", "--methods", "BF16,AMXBF16_SFT", "--peers", "none", "--cells-only")
    data = run(tmp_path, *more)
    assert data["modes"] == ["inference", "sft"]
    assert [(row["mode"], row["impl"], row["pass"]) for row in data["cells"]] == [
        ("inference", "ktmoe:BF16", "forward"),
        ("sft", "ktmoe:AMXBF16_SFT", "forward"),
        ("sft", "ktmoe:AMXBF16_SFT", "backward"),
    ]
    assert [shape["mode"] for shape in data["shapes"]] == ["inference", "sft"]
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert table.count("T: hidden 256, inter 256, 8 experts, top 2") == 2
    assert "LoRA error" in table


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        ([], ["inference", "sft"]),
        (["--quick"], ["inference", "sft"]),
        (["--mode", "sft"], ["sft"]),
        (["--methods", "BF16,NOSUCH"], ["inference"]),
        (["--methods", "AMXINT8_SFT"], ["sft"]),
        (["--mode", "sft", "--methods", "BF16"], ["sft"]),
    ],
)
def test_modes_are_those_asked_for(options: list[str], modes: list[str]) -> None:
    plans = arguments.parse("", [*options, "--peers", "none"]).plans
    assert [plan.mode for plan in plans] == modes
    assert all(plan.ours and plan.cells for plan in plans)


def test_default_cells_of_training() -> None:
    (plan,) = arguments.parse("", ["--mode", "sft"]).plans
    assert plan.ours == [f"ktmoe:{m.name}" for m in methods_of("sft")]
    assert {(cell.shape, cell.tokens) for cell in plan.cells} == {
        (s, t) for s in ("S1", "S2") for t in (256, 1024, 4096)
    }
    assert {"torch:bf16", "torch:fp32"} <= set(plan.peers)


def test_without_a_compiler_there_are_no_floors_but_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise limits.NoCompilerError("no C++ compiler")

    monkeypatch.setattr(limits, "measure", none)
    data = run(tmp_path, "--cells", "T:1", "--methods", "BF16", "--peers", "none", "--cells-only")
    assert [row["floor"] for row in data["cells"]] == [None]
    assert not (tmp_path / "roofline.png").exists()
    assert "there are no floors: no C++ compiler" in capsys.readouterr().err


@pytest.mark.usefixtures("known_limits")
@pytest.mark.usefixtures("known_limits")
def test_cells_that_would_begin_too_late_are_left_out(tmp_path: Path) -> None:
    options = ["--mode", "inference", "--cells", "T:1,T:4", "--methods", "BF16", "--peers", "none", "--cells-only"]
    with pytest.raises(SystemExit):
        run(tmp_path, *options, "--within", "soon")
    assert bench.main([*FAST, "--out", str(tmp_path), *options, "--within", "0"]) == 1
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["cells"] == []
    assert [(row["tokens"], row["why"]) for row in data["left_out"]] == [(n, "the time was up") for n in (1, 4)]


def test_what_fails_is_left_out_and_said(tmp_path: Path) -> None:
    data = run(tmp_path, "--cells", "T:1", "--methods", "BF16,NOSUCH", "--peers", "none", "--cells-only")
    assert [row["impl"] for row in data["cells"]] == ["ktmoe:BF16"]
    (gone,) = data["left_out"]
    assert gone["impl"] == "ktmoe:NOSUCH"
    assert "Method NOSUCH not supported in inference mode" in gone["why"]


def test_a_size_that_would_take_too_long_is_left_out() -> None:
    worker = runner.Worker("ktmoe:BF16", Launch(), 60)
    try:
        assert worker.expects(1 << 20) == 0  # nothing to judge by yet
        worker.fastest_s, worker.tokens = 2.0, 1024
        outcome = runner.Outcome("inference", SHAPES["T"])
        runner.time_cell({worker.name: worker}, outcome, 4096, runner.Pace(max_call_s=6), None)
        assert outcome.left_out[0]["why"] == "a call may take 8 s"
        assert not outcome.samples
    finally:
        worker.close()


def test_one_call_of_a_size_that_takes_too_long_is_enough() -> None:
    shape = SHAPES["TINY"]
    outcome, pace = runner.Outcome("sft", shape), runner.Pace(threads=1, rounds=3, seconds=0.2, max_call_s=1e-9)
    with (
        runner.problem_files(shape, sft=True) as folder,
        runner.running(outcome, folder, ["ktmoe:AMXBF16_SFT"], {"ktmoe": Launch()}, pace, 16) as workers,
    ):
        runner.time_cell(workers, outcome, 16, pace, None)
        assert [len(samples) for samples in outcome.samples.values()] == [1, 1]
        runner.time_cell(workers, outcome, 32, pace, None)
        costs.measure_memory(outcome, folder, {"ktmoe": Launch()}, pace)
    assert {tokens for _, tokens, _ in outcome.samples} == {16}
    assert [row["tokens"] for row in outcome.left_out] == [32]
    assert outcome.memory == []


def test_a_dead_process_is_an_error_not_a_hang() -> None:
    worker = runner.Worker("ktmoe:BF16", Launch(), 60)
    worker.process.kill()
    with pytest.raises(runner.WorkerError, match="process ended with status -9"):
        worker.ask("check")
    worker.close()
    worker = runner.Worker("ktmoe:BF16", Launch(), 0.0)
    with pytest.raises(runner.WorkerError, match="no answer to 'check' for 0 s"):
        worker.ask("check")
    worker.close()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--cells", "S9:1"], "--cells: got 'S9:1'"),
        (["--peers", "nobody:bf16"], "--peers: got 'nobody:bf16'"),
        (["--shape", "S1", "--tokens", "0"], "--cells: got 'S1:0'"),
    ],
)
def test_wrong_options_are_named(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(option)
    assert message in capsys.readouterr().err
