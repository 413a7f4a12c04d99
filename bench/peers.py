"""Which other implementations this machine has, and how a process of each family is started."""

from __future__ import annotations

import ctypes.util
import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field

from bench import impls
from bench.impls import ggml, kt

_FIND = "import importlib.util as u; s = u.find_spec({name!r}); print(s.submodule_search_locations[0] if s else '')"


@dataclass(frozen=True)
class Launch:
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)


def _package(python: str, name: str) -> str:
    """The folder of a package in an interpreter, "" if it is not installed there."""
    if python == sys.executable:
        spec = importlib.util.find_spec(name)
        return str((spec.submodule_search_locations or [""])[0]) if spec else ""
    run = subprocess.run([python, "-c", _FIND.format(name=name)], capture_output=True, text=True)
    return run.stdout.strip()


def launches(pythons: dict[str, str]) -> dict[str, Launch]:
    """The families that can be started. `pythons`: family -> interpreter, this one where none is given.

    llama.cpp's libraries are looked for in that interpreter's llama_cpp package, then in the system.
    """
    found = {"ktmoe": Launch(), "torch": Launch(pythons.get("torch", sys.executable))}
    python = pythons.get("kt", sys.executable)
    if _package(python, "kt_kernel"):
        found["kt"] = Launch(python, kt.environment())
    package = _package(pythons.get("llamacpp", sys.executable), "llama_cpp")
    if package:
        found["llamacpp"] = Launch(env={ggml.FOLDER: f"{package}/lib"})
    elif ctypes.util.find_library("ggml-base") and ctypes.util.find_library("ggml-cpu"):
        found["llamacpp"] = Launch()
    return found


def choose(wanted: str, mode: str, found: dict[str, Launch]) -> list[str]:
    """`wanted`: "auto" (all of the mode that were found), "none", or names and families separated by commas.

    ValueError for a name whose family was not found.
    """
    if wanted == "none":
        return []
    known = [name for name in impls.PEERS[mode] if impls.family_of(name) in found]
    if wanted == "auto":
        return known
    chosen: list[str] = []
    for name in wanted.split(","):
        if impls.family_of(name) not in found or name.startswith("ktmoe"):
            raise ValueError(f"--peers: got {name!r}, found here: {', '.join(sorted(set(found) - {'ktmoe'}))}")
        chosen += [name] if ":" in name else [n for n in known if impls.family_of(n) == name]
    return chosen
