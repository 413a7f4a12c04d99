"""Imports point one way only. Run by `make lint`; prints each violation and exits 1 if there is one."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# C++: a folder may include itself and these.
CPP = {
    "base": set(),
    "runtime": {"base"},
    "format": {"base"},
    "kernels": {"base", "format"},
    "moe": {"base", "format", "kernels", "runtime"},
    "serve": {"base", "format", "kernels", "runtime", "moe"},
    "bindings": {"base", "format", "kernels", "runtime", "moe", "serve"},
}
# Python: a module of a level may import lower levels and its own.
LEVELS = [
    {"control_group"},
    {"errors", "cache", "cpu_share", "large", "memory"},
    {"config", "methods", "placement", "topology"},
    {"streams"},
    {"capsule", "runtime", "io", "deferred", "staging"},
    {"lora", "base_weights", "packing"},
    {"packed_weights"},
    {"export"},
    {"base"},
    {"adapters", "inference", "stream_forward", "sft", "autograd", "train"},
    {"wrapper"},
    {"hf"},
    {"cli"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
HEAVY = {
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "huggingface_hub",
    "typer",
    "rich",
    "matplotlib",
}


def cpp_violations() -> list[str]:
    found = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cc", ".inc"}:
            continue
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for included in re.findall(r'^\s*#include "(\w+)/', path.read_text(), re.M):
            if included != folder and included not in CPP[folder]:
                found.append(f"{path.relative_to(ROOT)}: {folder} must not include {included}")
        if folder != "bindings" and re.search(r"#include <(Python\.h|nanobind)", path.read_text()):
            found.append(f"{path.relative_to(ROOT)}: only bindings may know Python")
    return found


def imported(tree: ast.AST, package: list[str]) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "ktmoe" else [module]
    return names


def python_violations() -> list[str]:
    found = []
    for path in sorted((ROOT / "src" / "ktmoe").rglob("*.py")):
        parts = path.relative_to(ROOT / "src" / "ktmoe").with_suffix("").parts
        if parts == ("__init__",):
            continue
        top = parts[0]
        if top not in LEVEL_OF:
            found.append(f"{path.relative_to(ROOT)}: '{top}' has no level in tools/check_layers.py")
            continue
        for name in imported(ast.parse(path.read_text()), ["ktmoe", *parts[:-1]]):
            first, *rest = name.split(".")
            if first in HEAVY and top not in {"hf", "cli"}:
                found.append(f"{path.relative_to(ROOT)}: {first} may be imported under hf/ and cli/ only")
            if first == "ktmoe" and rest and LEVEL_OF.get(rest[0], -1) > LEVEL_OF[top]:
                found.append(f"{path.relative_to(ROOT)}: {top} must not import {rest[0]}")
    return found


if __name__ == "__main__":
    violations = cpp_violations() + python_violations()
    print("\n".join(violations) or "layers: every import points down")
    sys.exit(bool(violations))
