"""The table of public methods: one line per method string.

Tests, benchmarks and `ktmoe doctor` iterate this table, so what is listed is thereby tested.
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
    format: str
    """Packed weight format of the engine; see also `published`."""
    amx: bool = True
    """False: runs on the best level of the host that is not AMX."""
    published: str = ""
    """The kind of files ("int4", "fp8", "gguf") whose weights are computed with as they are. `format` is then only what
    bf16 tensors become: group_size and gguf_type may change it, and files bring their own."""

    def format_of_floats(self, group_size: int, zero_point: bool, gguf_type: str) -> str:
        """What weights in floats become: `format`, unless the parameters of `KTMoEWrapper` of these names change it."""
        if self.published == "int4":
            return f"int4_g{group_size}{'z' if zero_point else ''}"
        return gguf_type.lower() if self.published == "gguf" else self.format

    def computes_with(self, kind: str) -> bool:
        """True if weights of such files ("bf16" too) are used as they are. MXFP4 is a type of GGUF, in any file."""
        kind = "gguf" if kind == "mxfp4" else kind
        return self.published == kind or self.format == kind == "bf16"


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
    Method("AMXINT4_KGroup_SFT", "sft", "AMXSFTMoEWrapper", "int4_g32", published="int4"),
    Method("FP8_SFT", "sft", "AMXSFTMoEWrapper", "fp8", published="fp8"),
    Method("LLAMAFILE_SFT", "sft", "AMXSFTMoEWrapper", "q4_k", published="gguf"),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def methods_of(mode: str) -> list[Method]:
    """The rows of one mode, in table order."""
    return [m for m in _ROWS if m.mode == mode]


def method_for(kind: str, mode: str) -> str:
    """The method that computes with files of this kind ("bf16" too) as they are, for messages."""
    return next(m.name for m in methods_of(mode) if m.computes_with(kind))


def resolve(method: str, mode: str) -> Method:
    """The row of `method`, checked against `mode`.

    ValueError for an unknown mode, then for a method that the mode does not have.
    """
    if mode not in MODES:
        raise unknown_mode(mode)
    row = METHODS.get(method) if isinstance(method, str) else None
    if row is None or row.mode != mode:
        raise method_not_supported(method, mode, [m.name for m in methods_of(mode)])
    return row
