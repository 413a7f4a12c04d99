"""The demo's text: what the Python standard library says about itself.

The docstrings are read from the source files without importing them; the few modules written in C that are asked for
their docstrings are ones every interpreter has loaded already. Everything is sorted, so the same Python gives the same
text and the same split.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
_BUILTIN_MODULES = ("builtins", "itertools", "math", "sys", "time")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]'\"`])\.(?=\s|$)")
_CUT_SHORT = (" ie.", " i.e.", " e.g.", " eg.")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Doc:
    """One documented thing: kind is "module", "class" or "function", `name` is dotted."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A question about one thing and the first sentence of its documentation."""

    name: str
    question: str
    answer: str


def collect_docs() -> list[Doc]:
    """All public docstrings of the standard library, sorted by name, each text once."""
    docs = {doc.name: doc for doc in (*_source_docs(), *_builtin_docs())}
    seen: set[str] = set()
    unique = []
    for name in sorted(docs):
        if docs[name].text not in seen:
            seen.add(docs[name].text)
            unique.append(docs[name])
    return unique


def _source_docs() -> Iterator[Doc]:
    for file, module in _source_files(Path(sysconfig.get_paths()["stdlib"]), ""):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        yield from _tree_docs(tree, module)


def _source_files(folder: Path, package: str) -> Iterator[tuple[Path, str]]:
    """(file, dotted name) of the public modules in a folder and its packages."""
    for entry in sorted(folder.iterdir()):
        name = entry.stem
        if name == "__init__" and package:
            yield entry, package
        elif name.startswith("_") or name in _SKIP:
            continue
        elif entry.suffix == ".py":
            yield entry, f"{package}.{name}" if package else name
        elif (entry / "__init__.py").exists():
            yield from _source_files(entry, f"{package}.{entry.name}" if package else entry.name)


def _tree_docs(tree: ast.Module, module: str) -> Iterator[Doc]:
    yield from _doc("module", module, ast.get_docstring(tree))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _doc("class", f"{module}.{node.name}", ast.get_docstring(node))
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _doc("function", f"{module}.{node.name}.{member.name}", ast.get_docstring(member))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _doc("function", f"{module}.{node.name}", ast.get_docstring(node))


def _builtin_docs() -> Iterator[Doc]:
    for module_name in _BUILTIN_MODULES:
        module = __import__(module_name)
        for name, value in sorted(vars(module).items()):
            if inspect.isclass(value):
                yield from _doc("class", f"{module_name}.{name}", inspect.getdoc(value))
                for member, function in sorted(vars(value).items()):
                    if callable(function):
                        yield from _doc("function", f"{module_name}.{name}.{member}", inspect.getdoc(function))
            elif callable(value):
                yield from _doc("function", f"{module_name}.{name}", inspect.getdoc(value))


def _doc(kind: str, name: str, text: str | None) -> Iterator[Doc]:
    private = any(part.startswith("_") for part in name.split("."))
    if text and not private and text.isascii():
        yield Doc(kind, name.removeprefix("builtins."), text.strip())


def topic_texts() -> list[str]:
    """The reference texts that ``help("topics")`` shows; empty where Python was packaged without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def training_text(docs: Sequence[Doc], with_topics: bool = True) -> list[str]:
    """What the demo model is pretrained on: every docstring under its name, and the reference texts in pieces."""
    texts = [f"{doc.name}\n\n{doc.text}" for doc in docs]
    for topic in topic_texts() if with_topics else ():
        texts.extend(piece.strip() for piece in topic.split("\n\n\n") if len(piece.strip()) > 80)
    return texts


def question_answers(docs: Sequence[Doc]) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs. What is held out is decided by a hash of the name; no answer is in both parts."""
    pairs = [pair for pair in map(_pair, docs) if pair is not None]
    train = [pair for pair in pairs if not _is_held_out(pair.name)]
    known = {pair.answer for pair in train}
    held_out = [pair for pair in pairs if _is_held_out(pair.name) and pair.answer not in known]
    return train, held_out


def _pair(doc: Doc) -> Pair | None:
    answer = _summary(doc.text)
    looks_like_code = "(" in answer.split(" ")[0] or "->" in answer
    if not 20 <= len(answer) <= 200 or looks_like_code or answer.endswith(_CUT_SHORT):
        return None
    questions = {
        "module": f"What is the module {doc.name} for?",
        "class": f"What is {doc.name}?",
        "function": f"What does {doc.name} do?",
    }
    return Pair(doc.name, questions[doc.kind], answer)


def _summary(text: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return _SENTENCE_END.split(paragraph, maxsplit=1)[0].rstrip(".") + "."


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 256 * HELD_OUT_SHARE
