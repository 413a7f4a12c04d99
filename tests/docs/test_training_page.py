"""docs/training.md names functions and files; all of them exist."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`((?:csrc|src|tests)/[^`]+)`", PAGE)))
FUNCTIONS = sorted(set(re.findall(r"`([\w:.]+)\(\)`", PAGE)))


@cache
def sources() -> list[str]:
    """The text of each file of the engine and of the Python package."""
    kinds = {".h", ".cc", ".py"}
    files = [f for folder in ("csrc", "src") for f in (ROOT / folder).rglob("*") if f.suffix in kinds]
    return [f.read_text(encoding="utf-8") for f in files]


def test_the_page_names_something() -> None:
    assert len(FILES) >= 5
    assert len(FUNCTIONS) >= 20


@pytest.mark.parametrize("path", FILES)
def test_file_exists(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_exists(function: str) -> None:
    """`Class::name` and `Class.name` need a file that speaks of both."""
    owner, name = re.fullmatch(r"(?:(\w+)(?:::|\.))?(\w+)", function).groups()
    assert any(re.search(rf"\b{name}\(", s) and re.search(rf"\b{owner or ''}\b", s) for s in sources())
