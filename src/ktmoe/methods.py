"""The table of public methods: one line per method string.

Tests, benchmarks and `ktmoe doctor` iterate this table, so what is listed as implemented is thereby tested.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import method_not_supported, unknown_mode

MODES = ("inference", "sft")


@dataclass(frozen=True, slots=True)
class Method:
    """What one method string means."""

    name: str
    mode: str
    """"inference" or "sft"."""
    backend: str
    """Name of the wrapper class that serves it."""
    format: str | None
    """Packed weight format of the engine; None where the engine has none for it yet. See also `published`."""
    implemented: bool = True
    amx: bool = True
    """False: runs on the best level of the host that is not AMX."""
    published: str = ""
    """The kind of files ("int4", "fp8", "gguf") whose weights are computed with as they are. `format` is then only what
    bf16 tensors become: group_size and gguf_type may change it, and files bring their own."""


_ROWS = (
    Method("AMXINT4", "inference", "AMXMoEWrapper", "int4"),
    Method("AMXINT8", "inference", "AMXMoEWrapper", "int8"),
    Method("RAWINT4", "inference", "NativeMoEWrapper", "int4_g32", published="int4"),
    Method("FP8", "inference", "NativeMoEWrapper", "fp8", published="fp8"),
    Method("BF16", "inference", "NativeMoEWrapper", "bf16"),
    Method("LLAMAFILE", "inference", "LlamafileMoEWrapper", "q4_k", published="gguf"),
    Method("MOE_INT4", "inference", "GeneralMoEWrapper", "int4", amx=False),
    Method("MOE_INT8", "inference", "GeneralMoEWrapper", "int8", amx=False),
    Method("AMXBF16_SFT", "sft", "AMXSFTMoEWrapper", "bf16"),
    Method("AMXINT8_SFT", "sft", "AMXSFTMoEWrapper", "int8"),
    Method("AMXINT4_SFT", "sft", "AMXSFTMoEWrapper", "int4"),
    Method("AMXINT4_KGroup_SFT", "sft", "AMXSFTMoEWrapper", None, implemented=False),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def methods_of(mode: str, *, implemented_only: bool = False) -> list[Method]:
    """The rows of one mode, in table order."""
    return [m for m in _ROWS if m.mode == mode and (m.implemented or not implemented_only)]


def method_for(kind: str) -> str:
    """The method that computes with files of this kind as they are, for messages."""
    return next((m.name for m in _ROWS if m.published == kind), "BF16")


def resolve(method: str, mode: str) -> Method:
    """The row of `method`, checked against `mode`.

    ValueError for an unknown mode, then for a method that the mode does not have; NotImplementedError for a method
    that is known but not built yet.
    """
    if mode not in MODES:
        raise unknown_mode(mode)
    row = METHODS.get(method) if isinstance(method, str) else None
    if row is None or row.mode != mode:
        raise method_not_supported(method, mode, [m.name for m in methods_of(mode)])
    if not row.implemented or row.format is None:
        ready = ", ".join(m.name for m in methods_of(mode, implemented_only=True))
        raise NotImplementedError(f"Method {method} is not implemented yet. Implemented in {mode} mode: {ready}")
    return row
