"""docs/serving.md: its snippet runs, and the numbers in it are those of the code."""

import re
from pathlib import Path

from ktmoe import runtime

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_snippet_runs(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "_engines", {})
    found = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert found
    names: dict[str, object] = {}
    exec(found.group(1), names)
    assert names["x"].isfinite().all()
    assert names["layers"][0].cpu_infer.closed


def test_the_bound() -> None:
    assert f"`CPUInfer.queue_capacity`, {runtime.QUEUE_CAPACITY}, forwards" in PAGE
    assert f"at exit, with {runtime._EXIT_TIMEOUT_S:.0f} s" in PAGE
