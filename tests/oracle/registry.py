"""What the engine has registered: a new format or level is tested as soon as it is there."""

import os

import pytest

from ktmoe import _ext

from .experts import ACTIVATIONS
from .formats import ORACLES

_forced = os.environ.get("KTMOE_ISA", "")
ISAS: list[str] = [_forced] if _forced else list(_ext.test_isa_levels())
FORMATS: list[str] = list(_ext.formats())
SLOW_ISAS = frozenset({"portable", "emulated-amx"})

each_isa = pytest.mark.parametrize("isa", ISAS)
each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=list(ACTIVATIONS))
each_format = pytest.mark.parametrize("fmt", FORMATS)
each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=list(ACTIVATIONS))
# Integer formats: exact sums, equal bits on every level.
SCALED = [f for f in FORMATS if f in ORACLES and ORACLES[f].activations == "int8"]
BLOCK_ROWS = {isa: int(_ext.testing.block_rows(isa)) for isa in {*ISAS, "portable"}}
