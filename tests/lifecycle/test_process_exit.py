"""A process that used the engine ends by itself: status 0, soon, silent, whatever the engine was doing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("exit_endings.py")
ENDINGS = [
    "nothing used",
    "pool parked",
    "queue idle",
    "queue still holds work",
    "queue gone, work left",
    "queue closed early",
    "results gone, work left",
    "daemon threads run forwards",
    "sys.exit while a thread works",
    "after an error in a worker",
]


@pytest.fixture(scope="module")
def results() -> list[dict]:
    run = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("ending", ENDINGS)
def test_clean_exit(results: list[dict], ending: str) -> None:
    runs = [r for r in results if r["name"] == ending]
    assert runs
    for run in runs:
        assert run["status"] == 0, run
        assert run["output"] == ""
        assert run["seconds"] < 5
