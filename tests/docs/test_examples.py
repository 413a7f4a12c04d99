"""The examples run as a user would run them, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch_oracle as ref

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("method", ref.SFT)
def test_train_layer_learns(method: str) -> None:
    """A hundred steps make the held-out loss at least ten times smaller."""
    command = [sys.executable, str(EXAMPLES / "train_layer.py"), "--method", method, "--steps", "100"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 0, child.stderr
    found = re.search(rf"^{method}: held-out loss ([\d.]+) -> ([\d.]+)", child.stdout, re.M)
    assert found, child.stdout
    before, after = map(float, found.groups())
    assert after < before / 10
