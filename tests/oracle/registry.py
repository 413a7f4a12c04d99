"""What the engine has registered: a new format or level is tested as soon as it is there."""

import os

import pytest

from ktmoe import _ext

from .experts import ACTIVATIONS

_forced = os.environ.get("KTMOE_ISA", "")
ISAS: list[str] = [_forced] if _forced else list(_ext.test_isa_levels())
# Formats whose stored tiles are multiplied as they are run the whole grid of kernel tests; the others (UNPACKED) are
# made into those in cache, and have tests of the step that is their own.
FORMATS: list[str] = [f for f in _ext.formats() if _ext.testing.direct(f) == f]
UNPACKED: list[str] = [f for f in _ext.formats() if f not in FORMATS]
# A layer sees a format through its kernels alone: one of each kind.
LAYER_FORMATS: list[str] = [*FORMATS, "int4", "q6_k"]
SLOW_ISAS = frozenset({"portable", "emulated-amx"})

each_isa = pytest.mark.parametrize("isa", ISAS)
each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=list(ACTIVATIONS))
each_format = pytest.mark.parametrize("fmt", FORMATS)
each_layer_format = pytest.mark.parametrize("fmt", LAYER_FORMATS)


def activations(fmt: str) -> str:
    """What a layer of this format multiplies with: "bf16" or "int8"."""
    return str(_ext.testing.direct(fmt))


def span_rows(fmt: str, isa: str) -> int:
    """Up to so many rows of an expert the kernels multiply levels with activations in int8, one scale for each 32 k.

    AMX then goes on in bf16; the portable level is slow at multiplying signed bytes.
    """
    if fmt == "fp8" or not _ext.testing.published(fmt):
        return 0
    if isa.endswith("amx"):
        return 16
    return 4 if isa == "portable" and fmt in ("q8_0", "iq4_nl") else 10**9


# Integer products: exact sums, equal bits on every level.
SCALED = [f for f in FORMATS if activations(f) == "int8"]
LAYER_SCALED = [f for f in LAYER_FORMATS if activations(f) == "int8"]
BLOCK_ROWS = {isa: int(_ext.testing.block_rows(isa)) for isa in {*ISAS, "portable"}}
