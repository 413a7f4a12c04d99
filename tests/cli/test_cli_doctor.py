"""`ktmoe doctor`: on this machine, with a broken torch, and under a CPU quota."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ktmoe.cli import checks
from ktmoe.cli.__main__ import app
from ktmoe.cpu_share import cgroup_cpus
from ktmoe.methods import METHODS

DOCTOR = "from ktmoe.cli.__main__ import main; import sys; sys.argv = ['ktmoe', 'doctor', '--json']; main()"


def run_doctor(prelude: str = "", **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """(exit code, rows by check) of a doctor in a process of its own."""
    command = [sys.executable, "-c", prelude + DOCTOR]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=False)
    assert not child.stderr, child.stderr
    return child.returncode, {row["check"]: row for row in json.loads(child.stdout)}


def test_report_on_this_machine() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "Ready." in result.output
    rows = {row.check: row for row in checks.run_checks()}
    for method in METHODS.values():
        assert f"forward/{method.format}/" in rows[f"method {method.name}"].found
        assert ("backward" in rows[f"method {method.name}"].found) == (method.mode == "sft")
    assert {"cpu", "amx permission", "isa in use", "cores", "memory", "torch", "peft"} <= rows.keys()


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


def test_works_without_torch() -> None:
    """A torch that cannot be imported is a row with a fix; all that does not need it is still there."""
    code, rows = run_doctor(WITHOUT_TORCH)
    assert code == 1
    assert rows["torch import"]["verdict"] == "error"
    assert rows["torch import"]["fix"]
    assert "forward/bf16/" in rows["method AMXBF16_SFT"]["found"]
    assert [name for name, row in rows.items() if row["verdict"] == "error"] == ["torch import"]


def test_lowered_and_unknown_isa() -> None:
    _, rows = run_doctor(WITHOUT_TORCH, KTMOE_ISA="portable")
    assert "portable" in rows["isa in use"]["found"]
    assert rows["isa in use"]["verdict"] == "warn"
    assert rows["method BF16"]["found"].endswith("/portable")
    code, rows = run_doctor(WITHOUT_TORCH, KTMOE_ISA="sse9")
    assert code == 1
    assert "sse9" in rows["isa in use"]["found"]
    assert rows["isa in use"]["verdict"] == "error"
    assert "method BF16" not in rows


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cgroup_cpus(tmp_path) == quota


def test_a_check_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no such machine")

    monkeypatch.setattr(checks, "_memory", broken)
    broken.__name__ = "_memory"
    rows = {row.check: row for row in checks.run_checks()}
    assert rows["memory"].verdict == "error"
    assert "no such machine" in rows["memory"].found
