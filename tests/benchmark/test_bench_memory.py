"""Memory of a process, as the benchmark reads it.

Pages come from `mmap`: the allocator may answer with memory that earlier tests have touched.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from bench import memory

MIB = 1 << 20
SLACK = 4 * MIB
"""What else the interpreter may take or give back meanwhile."""


def touched(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    return block


def test_resident_counts_pages_that_were_touched() -> None:
    before = memory.resident()
    block = touched(64 * MIB)
    assert 64 * MIB - SLACK < memory.resident() - before < 64 * MIB + SLACK
    block.close()
    assert memory.resident() - before < SLACK


def test_the_peak_is_since_it_was_forgotten() -> None:
    before = memory.resident()
    touched(96 * MIB).close()
    assert memory.peak() - before > 96 * MIB - SLACK
    memory.forget_peak()
    assert memory.peak() - memory.resident() < SLACK
    touched(48 * MIB).close()
    assert 48 * MIB - SLACK < memory.peak() - before < 48 * MIB + SLACK


def test_dropped_pages_of_a_file_count_no_more_and_come_back(tmp_path: Path) -> None:
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=64 * MIB, dtype=torch.uint8)
    before = memory.resident()
    mapped.fill_(7)
    assert memory.resident() - before > 64 * MIB - SLACK
    memory.drop_pages([mapped])
    assert memory.resident() - before < SLACK
    assert int(mapped[12345]) == 7
