"""Refuses what makes numbers wrong or code unsafe without anyone noticing. Run by `make lint`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Compiler flags: fast-math breaks NaN handling; -march and per-file -m flags leak instructions into code for any CPU.
FLAGS = re.compile(r"-ffast-math|-Ofast|-funsafe-math|-march=|-mavx|-mamx|-mfma")
# Loading a pickle runs code from the file.
PICKLE = re.compile(r"\btorch\.load\(|^\s*(?:import|from) pickle\b", re.M)
# The engine is silent and never ends the process.
NOISE = re.compile(r"\b(?:printf|std::cout|std::cerr|abort|std::terminate|exit)\s*[(<]")


def matches(pattern: re.Pattern[str], paths: list[Path], why: str) -> list[str]:
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = re.split(r"(?://|#) ", line)[0]
            if pattern.search(code):
                found.append(f"{path.relative_to(ROOT)}:{number}: {why}: {line.strip()}")
    return found


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


if __name__ == "__main__":
    violations = (
        matches(FLAGS, files("CMakeLists.txt", "pyproject.toml", "csrc/**/*.h", "csrc/**/*.cc"), "forbidden flag")
        + matches(PICKLE, files("src/**/*.py"), "pickle runs code from a file")
        + matches(NOISE, files("csrc/**/*.h", "csrc/**/*.cc"), "the engine neither prints nor exits")
    )
    print("\n".join(violations) or "flags: nothing forbidden")
    sys.exit(bool(violations))
