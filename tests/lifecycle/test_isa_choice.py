"""KTMOE_ISA lowers the level, never raises it above the host, and says what can be chosen."""

import os
import subprocess
import sys

import pytest

from ktmoe import _ext

ALL = ["amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "portable"]
UNFORCED = [level["name"] for level in _ext.cpu_report()["isa_levels"] if level["supported"]]


def active(value: str) -> subprocess.CompletedProcess:
    code = "from ktmoe import _ext; print(_ext.active_isa())"
    environment = os.environ | {"KTMOE_ISA": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


def test_levels_are_ordered() -> None:
    """Best first; avx512bf16 comes behind avx512vnni where its products are slower than those of fp32."""
    levels = list(_ext.isa_levels())
    order = list(ALL)
    if not _ext.cpu_report()["features"]["fast_avx512bf16"]:
        order[1:3] = order[2:0:-1]
    assert levels == [name for name in order if name in levels]
    assert levels[-1] == "portable"
    assert set(levels) < set(_ext.test_isa_levels())


def test_the_report_explains_every_level() -> None:
    report = _ext.cpu_report()
    assert [level["name"] for level in report["isa_levels"]] == ALL
    for level in report["isa_levels"]:
        assert bool(level["why"]) != level["supported"], level
        assert (level["name"] in _ext.isa_levels()) == level["supported"]
    assert report["affinity_cpus"] == len(os.sched_getaffinity(0))
    assert isinstance(report["model"], str)


@pytest.mark.parametrize("level", UNFORCED)
def test_a_level_of_the_host_is_taken(level: str) -> None:
    assert active(level).stdout.strip() == level


def test_empty_means_the_best() -> None:
    assert active("").stdout.strip() == _ext.isa_levels()[0]


def test_an_unknown_level_lists_the_choices() -> None:
    result = active("sse9")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: [isa] unknown level: got 'sse9', expected one of")
    assert all(level in last for level in UNFORCED)


@pytest.mark.parametrize("level", [name for name in ALL if name not in UNFORCED])
def test_a_level_above_the_host_is_refused(level: str) -> None:
    result = active(level)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"RuntimeError: [isa] '{level}' is above this host (no ")
    assert "choose one of " + _ext.isa_levels()[0] in last


@pytest.mark.parametrize("level", ALL)
def test_a_layer_of_a_level(level: str) -> None:
    pool = _ext.ThreadPool([1], [0])
    if level in UNFORCED:
        assert _ext.MoeLayer(pool, 1, 1, 8, 8, "bf16", level).isa == level
    else:
        with pytest.raises(RuntimeError, match="above this host"):
            _ext.MoeLayer(pool, 1, 1, 8, 8, "bf16", level)


def test_kernel_names() -> None:
    for fmt in _ext.formats():
        for isa in _ext.isa_levels():
            for op in ("forward", "backward"):
                assert _ext.kernel_name(op, fmt, isa) == f"{op}/{fmt}/{isa}"
    with pytest.raises(ValueError, match="op: got 'sideways'"):
        _ext.kernel_name("sideways", "bf16", "portable")
