"""Where the limits of this process's control groups are written."""

from __future__ import annotations

from pathlib import Path


def unified(root: Path) -> list[Path]:
    """cgroup v2: the folder of this process's group and those above it. root: where proc and sys are.

    In a container the group may be named from outside, and only the top is there: names that lead out are left out.
    """
    lines = read(root / "proc/self/cgroup").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    return upwards(root / "sys/fs/cgroup", own)


def upwards(mount: Path, path: str) -> list[Path]:
    """The folder of a group, and those above it up to the mount."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def read(path: Path) -> str:
    """What a small file says; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
