"""The arithmetic behind the table: floors, peaks, touched experts, comparisons, what fits."""

from __future__ import annotations

import pytest

from bench import limits as machine
from bench.cells import Cell, compare, fitted, summary
from bench.floors import better_of, floor_of, peak_for
from bench.limits import Limit, NoCompilerError, compile_native, drift
from bench.problem import SHAPES, Shape, touched_experts
from bench.report import rows_of
from bench.runner import Outcome


def limit(name: str, kind: str, median: float) -> Limit:
    return Limit(name, kind, "G", median, median, median)


AMX = [
    limit("avx512 fma", "fp32", 400),
    limit("avx512 bf16", "bf16", 200),
    limit("amx bf16", "bf16", 6000),
    limit("avx512 vnni", "int8", 1500),
    limit("amx int8", "int8", 12000),
    limit("read a", "read", 20),
    limit("read b", "read", 25),
]
AVX2 = [limit("avx2 fma", "fp32", 200), limit("avx2 madd", "int8", 300), limit("read a", "read", 25)]


def test_compute_bound_floor_is_operations_over_peak() -> None:
    floor = floor_of(AMX, "BF16", flops=12e9, touched_bytes=25e6)  # 2 ms of products, 1 ms of reading
    assert (floor.bound, floor.peak) == ("compute", "amx bf16")
    assert floor.ms == pytest.approx(2)
    assert floor.intensity == pytest.approx(480)


def test_memory_bound_floor_is_bytes_over_the_best_bandwidth() -> None:
    floor = floor_of(AMX, "BF16", flops=6e9, touched_bytes=75e6)
    assert floor.bound == "memory"
    assert floor.ms == pytest.approx(3)


@pytest.mark.parametrize(
    ("method", "amx", "avx2"),
    [
        ("AMXINT8", "amx int8", "avx2 madd"),
        ("AMXINT4", "amx int8", "avx2 madd"),
        ("MOE_INT8", "avx512 vnni", "avx2 madd"),
        ("BF16", "amx bf16", "avx2 fma"),
        ("RAWINT4", "amx bf16", "avx2 fma"),
        ("FP8", "amx bf16", "avx2 fma"),
        ("AMXBF16_SFT", "amx bf16", "avx2 fma"),
        ("AMXINT8_SFT", "amx int8", "avx2 madd"),
        ("AMXINT4_SFT", "amx bf16", "avx2 fma"),
        ("AMXINT4_KGroup_SFT", "amx bf16", "avx2 fma"),
    ],
)
def test_peak_is_of_the_data_type_that_the_method_multiplies(method: str, amx: str, avx2: str) -> None:
    assert peak_for(AMX, method).name == amx
    assert peak_for(AVX2, method).name == avx2


def test_fp32_beats_a_slower_bf16_instruction() -> None:
    without_amx = [x for x in AMX if not x.name.startswith("amx")]
    assert peak_for(without_amx, "BF16").name == "avx512 fma"


def test_backward_of_an_int8_method_multiplies_bf16() -> None:
    assert peak_for(AMX, "AMXINT8_SFT").name == "amx int8"
    assert peak_for(AMX, "AMXINT8_SFT", backward=True).name == "amx bf16"


def test_a_missing_test_is_named() -> None:
    with pytest.raises(ValueError, match="no test of kind read"):
        floor_of(AVX2[:2], "BF16", 1, 1)


def test_the_better_of_two_measurements_counts_and_drift_shows() -> None:
    slower = [limit("avx2 fma", "fp32", 150), limit("avx2 madd", "int8", 330)]
    assert [x.median for x in better_of(AVX2, slower)] == [200, 330, 25]
    assert drift(AVX2, slower) == pytest.approx({"avx2 fma": -0.25, "avx2 madd": 0.1})


def test_the_bandwidth_beside_a_cell_is_that_of_its_floor() -> None:
    outcome = Outcome("inference", SHAPES["T"])
    outcome.loaded["ktmoe:BF16"] = {"error": 0.002, "packed_bytes": 1 << 20}
    outcome.samples = {("ktmoe:BF16", tokens, "forward"): [1e-3] for tokens in (1, 4)}
    outcome.reads = {1: [70.0, 40.0, 50.0]}
    rows = {row["tokens"]: row["floor"]["gbs"] for row in rows_of(outcome, AMX)}
    assert rows == {1: 50, 4: 25}, "the median of its own rounds; the best of the run where there are none"


def test_operations_and_touched_experts() -> None:
    shape = Shape("x", 64, 32, 16, 4)
    assert shape.flops(10) == 6 * 10 * 4 * 64 * 32
    assert touched_experts(shape, 1) == 4
    assert 4 < touched_experts(shape, 4) < 16
    assert touched_experts(shape, 1024) == 16


def test_a_large_shape_gets_as_many_experts_as_fit() -> None:
    s2, names = SHAPES["S2"], ["ktmoe:BF16", "torch:fp32"]
    each = s2.expert_weights * (2 + 2 + 4)  # the shared file and both implementations
    small = fitted(s2, names, int(9 * each / 0.7), None)
    assert (small.experts, small.full_experts) == (8, 256)
    assert "8 experts (reduced from 256)" in str(small)
    assert fitted(s2, names, 1 << 50, None).experts == 32
    assert fitted(s2, names, 1 << 50, 256) == s2
    assert fitted(SHAPES["S1"], names, 1, None) == SHAPES["S1"]


def test_summary_takes_median_and_percentiles() -> None:
    assert summary([x / 1000 for x in (3, 1, 2, 5, 4, 6, 7, 11, 9, 10, 8)]) == pytest.approx(
        {"ms": 6, "p10": 2, "p90": 10, "n": 11}
    )


def test_a_peer_is_compared_only_if_it_is_about_as_accurate() -> None:
    def row(impl: str, ms: float, error: float) -> dict[str, object]:
        return {"shape": "S1", "tokens": 1, "pass": "forward", "impl": impl, "ms": ms, "error": error}

    rows = [
        row("ktmoe:BF16", 4, 0.002),
        row("ktmoe:AMXINT8", 2, 0.02),
        row("torch:bf16", 8, 0.004),
        row("kt:Q4_K", 1, 0.1),
    ]
    compare(rows)
    assert (rows[0]["fair_peer"], rows[0]["fair_peer_ratio"]) == ("torch:bf16", 0.5)
    assert (rows[0]["peer"], rows[0]["peer_ratio"]) == ("kt:Q4_K", 4)
    assert (rows[1]["fair_peer"], rows[1]["fair_peer_ratio"]) == ("torch:bf16", 0.25)
    assert rows[2]["fair_peer"] is None


@pytest.mark.parametrize("text", ["S9:1", "S1", "S1:0", "S1:x"])
def test_a_wrong_cell_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"--cells: got '{text}'"):
        Cell.parse(text)


def test_no_compiler_is_a_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompilerError, match="'no-such-compiler' is not on the PATH; install g"):
        compile_native(machine.SOURCE)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NoCompilerError, match=r"false cannot compile limits\.cc"):
        compile_native(machine.SOURCE)
