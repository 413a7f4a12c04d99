"""Instructions above the x86-64 baseline appear only in functions of their own level: any CPU can load the library."""

import re
import shutil
import subprocess

import pytest

from ktmoe import _ext

ABOVE_BASELINE = re.compile(r"\b(?:v[a-z0-9]+|tile[a-z0-9]+|tdp[a-z0-9]+|ldtilecfg)\s.*%(?:[xyzt]mm)|\btilerelease\b")
BASELINE_NAMES = re.compile(r"^(?:verr|verw)")
LEVEL = re.compile(r"ktmoe(?:::|\d+|[A-Z])*?(?:::)?(avx2|avxvnni|avx512bf16|avx512vnni|avx512|amx)::")


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_wide_instructions_stay_in_their_level():
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _ext.__file__], capture_output=True, text=True, check=True
    ).stdout
    function, offenders, levels = "", set(), set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif ABOVE_BASELINE.search(line) and not BASELINE_NAMES.search(line):
            level = LEVEL.search(function)
            if level:
                levels.add(level.group(1))
            else:
                offenders.add(function)
    assert not offenders, f"wide instructions outside their level: {sorted(offenders)[:10]}"
    wide = {"avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"}
    assert wide <= levels, "the check saw no wide code: it checks nothing"
