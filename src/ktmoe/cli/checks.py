"""What `ktmoe doctor` looks at. Works without torch: only the engine, the kernel's files and package metadata are read.

Every check is one function that yields rows; a check that fails to run becomes a row of its own.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

OK, INFO, WARN, ERROR = "ok", "info", "warn", "error"

_PACKAGES = {
    "torch": "needed by everything but doctor: pip install torch",
    "numpy": "pip install numpy",
    "safetensors": "pip install safetensors",
    "transformers": "for Hugging Face models: pip install 'ktmoe[hf]'",
    "peft": "for LoRA: pip install 'ktmoe[train]'",
    "accelerate": "for training: pip install 'ktmoe[train]'",
    "trl": "optional: pip install 'ktmoe[train]'",
}
_REQUIRED = ("torch", "numpy", "safetensors")
_CONFLICTS = {
    "kt-kernel": "answers to the same class name; keep them in separate environments",
    "ktransformers": "brings forks of transformers, peft and accelerate; use a separate environment",
    "transformers-kt": "replaces transformers; pip uninstall transformers-kt, then reinstall transformers",
    "accelerate-kt": "replaces accelerate; pip uninstall accelerate-kt, then reinstall accelerate",
    "peft-kt": "replaces peft; pip uninstall peft-kt, then reinstall peft",
    "trl-kt": "replaces trl; pip uninstall trl-kt, then reinstall trl",
    "unsloth": "patches the same PEFT layer as soon as it is imported; do not import both in one process",
}


@dataclass(frozen=True)
class Row:
    """One line of the report. verdict: "ok", "info", "warn" or "error"; `fix` says what to do about the last two."""

    check: str
    found: str
    verdict: str
    fix: str = ""


def run_checks() -> list[Row]:
    """All rows, in the order in which they are shown."""
    rows: list[Row] = []
    for check in (_python, _engine, _methods, _cores, _memory, _cache, _packages, _torch, _conflicts):
        rows.extend(_guarded(check))
    return rows


def _guarded(check: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from check()
    except Exception as error:  # a broken machine is what doctor is for: one row, not the end of the report
        name = check.__name__.strip("_")
        yield Row(name, f"{type(error).__name__}: {error}", ERROR, "please report this as a bug")


def _python() -> Iterator[Row]:
    yield Row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", OK)


def _ext() -> Any:
    return importlib.import_module("ktmoe._ext")


def _engine() -> Iterator[Row]:
    """The CPU, its ISA levels, AMX permission. Without the extension nothing else can work."""
    try:
        ext = _ext()
    except ImportError as error:
        yield Row("engine", f"cannot be loaded: {error}", ERROR, "reinstall: pip install --force-reinstall ktmoe")
        return
    report = ext.cpu_report()
    yield Row("cpu", str(report["model"]), OK)
    for level in report["isa_levels"]:
        found = "supported" if level["supported"] else str(level["why"] or "not supported")
        yield Row(f"isa {level['name']}", found, OK if level["supported"] else INFO)
    permission = str(report["amx_permission"])
    denied = permission.startswith("denied")
    fix = "the kernel or container forbids AMX; ktmoe uses the next level" if denied else ""
    yield Row("amx permission", permission, WARN if denied else (OK if permission == "granted" else INFO), fix)
    yield _active_isa(ext)


def _active_isa(ext: Any) -> Row:
    wanted = os.environ.get("KTMOE_ISA")
    try:
        active = str(ext.active_isa())
    except RuntimeError as error:
        return Row("isa in use", f"KTMOE_ISA={wanted}: {error}", ERROR, f"unset it, or one of {ext.isa_levels()}")
    if wanted and active != ext.isa_levels()[0]:
        return Row("isa in use", f"{active} (KTMOE_ISA={wanted})", WARN, "unset KTMOE_ISA for full speed")
    if active == "portable":
        return Row("isa in use", active, WARN, "works, but slowly: this CPU has no AVX2")
    return Row("isa in use", active, OK)


def _methods() -> Iterator[Row]:
    """Which kernels each method runs here."""
    from ktmoe.methods import METHODS

    try:
        ext = _ext()
        active, levels = ext.active_isa(), ext.isa_levels()
    except (ImportError, RuntimeError):
        return  # `_engine` has said so
    without_amx = active if "amx" not in active else next(level for level in levels if "amx" not in level)
    for method in METHODS.values():
        isa = active if method.amx else without_amx
        ops = ("decode", "forward", "backward") if method.mode == "sft" else ("decode", "forward")
        kernels = ", ".join(ext.kernel_name(op, method.format, isa) for op in ops)
        yield Row(f"method {method.name}", kernels, OK)


def _cores() -> Iterator[Row]:
    from ktmoe.cpu_share import cgroup_cpus

    total, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    fix = "taskset or the container hides the others" if usable < total else ""
    yield Row("cores", f"{usable} of {total} logical CPUs usable", WARN if usable < total else OK, fix)
    quota = cgroup_cpus()
    if quota is None:
        yield Row("cpu quota", "none", OK)
    elif quota < usable:
        threads = max(1, int(quota))
        yield Row("cpu quota", f"{quota:g} CPUs", WARN, f"set threads to {threads}: more would be stopped and wait")
    else:
        yield Row("cpu quota", f"{quota:g} CPUs", OK)


def _memory() -> Iterator[Row]:
    fields = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    fix = "little memory is free: experts take 2 (bf16) or 1 (int8) bytes per weight" if free < 4 else ""
    yield Row("memory", f"{free:.1f} of {total:.1f} GiB free", WARN if fix else OK, fix)
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _read(Path("/sys/fs/cgroup") / file)
        if limit.isdigit() and int(limit) / 2**30 < total:
            yield Row("memory limit", f"{int(limit) / 2**30:.1f} GiB (control group)", INFO)
            return


def _cache() -> Iterator[Row]:
    from ktmoe import cache

    folder = cache.packed_root()
    if folder is None:
        yield Row("cache", "off (KTMOE_CACHE)", INFO)
        return
    entries = cache.entries()
    size = sum(entry.nbytes for entry in entries) / 2**30
    yield Row(
        "cache", f"{size:.2f} GiB, {len(entries)} model(s), in {folder}", OK, "ktmoe cache clear" if size > 1 else ""
    )


def _packages() -> Iterator[Row]:
    for name, fix in {"ktmoe": "runs from a source tree", **_PACKAGES}.items():
        found = _installed(name)
        if found is not None:
            yield Row(name, found, OK)
        else:
            yield Row(name, "not installed", ERROR if name in _REQUIRED else INFO, fix)


def _torch() -> Iterator[Row]:
    """Whether torch can be imported at all, and what it can do on this CPU."""
    if _installed("torch") is None:
        return
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a torch that does not fit the machine fails in many ways (OSError, ImportError, ...)
        yield Row("torch import", f"{type(error).__name__}: {error}", ERROR, "reinstall torch")
        return
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is not None and supported():
        yield Row("torch bf16", "fast on this CPU", OK)
    else:
        yield Row("torch bf16", "slow on this CPU", INFO, "ktmoe's command line keeps the rest of a model in fp32")


def _conflicts() -> Iterator[Row]:
    found = [(name, version) for name in _CONFLICTS if (version := _installed(name)) is not None]
    for name, version in found:
        yield Row(f"conflict: {name}", version, WARN, _CONFLICTS[name])
    if not found:
        yield Row("conflicting packages", "none", OK)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
