"""The README: its layer snippet runs, and both languages show the same code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def snippet(page: str, heading: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text[text.index(f"## {heading}\n") :]
    found = re.search(r"```python\n(.*?)```", section, re.S)
    assert found, heading
    return found.group(1)


def test_one_layer() -> None:
    names: dict[str, object] = {}
    exec(snippet("README.md", "One layer"), names)
    y = names["y"]
    assert tuple(y.shape) == (5, 256)
    assert y.isfinite().all()


@pytest.mark.parametrize("heading", ["Generate", "Fine-tune"])
def test_both_languages_show_the_same_code(heading: str) -> None:
    chinese = {"Generate": "生成", "Fine-tune": "微调"}[heading]

    def code(text: str) -> list[str]:
        return [line.split("  #")[0].rstrip() for line in text.splitlines()]

    assert code(snippet("README.md", heading)) == code(snippet("README.zh.md", chinese))
