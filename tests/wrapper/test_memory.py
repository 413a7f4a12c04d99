"""The memory pre-flight: control groups, and a load that is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import pytest
import torch_oracle as ref

from ktmoe import memory

GIB = 2**30
MEMINFO = "MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\nSwapFree: 1048576 kB\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 9 * GIB),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "123"}, 9 * GIB),
        ({"sys/fs/cgroup/memory.max": str(4 * GIB), "sys/fs/cgroup/memory.current": str(GIB)}, 3 * GIB),
        (
            {
                "sys/fs/cgroup/memory.max": str(4 * GIB),
                "sys/fs/cgroup/memory.current": str(3 * GIB),
                "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\nactive_file 5",
            },
            3 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": str(2 * GIB),
                "sys/fs/cgroup/a/memory.current": "0",
                "sys/fs/cgroup/a/b/memory.max": str(5 * GIB),
                "sys/fs/cgroup/a/b/memory.current": "0",
            },
            2 * GIB,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
            },
            0,
        ),
    ],
)
def test_available(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    found = memory.available_bytes(system(tmp_path, {"proc/meminfo": MEMINFO, **files}))
    assert found is not None
    assert found[0] == expected


def test_unknown_system(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path) is None


def test_this_system() -> None:
    found = memory.available_bytes()
    assert found is not None
    assert found[0] > 0


def test_a_load_that_cannot_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ref.Shape()
    wrapper = ref.loaded(shape, "BF16")
    inputs = ref.batch(shape, 3)
    before = wrapper.forward(*inputs)
    monkeypatch.setattr(memory, "available_bytes", lambda: (50_000, "free memory of the machine"))
    wrapper.load_weights_from_tensors(*ref.weights(shape))  # takes the place of what is held
    other = ref.make(shape, "BF16")
    monkeypatch.setattr(type(other), "load_expert", lambda *_: pytest.fail("work was done"))
    with pytest.raises(MemoryError, match=r"layer 3: 5 experts in bf16: need 0\.00 GiB, have 0\.00 GiB \(free memory"):
        other.load_weights_from_tensors(*ref.weights(shape))
    assert (wrapper.forward(*inputs) == before).all()


def test_what_is_needed_follows_the_formats_that_will_be_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GGUF file may be larger than what the method makes of tensors."""
    shape = ref.Shape(experts=8, hidden=256, inter=256)
    stacks = gguf_files.random_stacks(("BF16",) * 3, shape.experts, shape.hidden, shape.inter)
    gguf_files.write(tmp_path / "m.gguf", gguf_files.layer_tensors(stacks, 3))
    wrapper = ref.make(shape, "LLAMAFILE", weight_path=tmp_path, layer_idx=3)
    quantised = wrapper.layer.expert_bytes * shape.experts
    room = quantised + 3 * 2 * 3 * shape.hidden * shape.inter
    assert room < 2 * 3 * shape.hidden * shape.inter * shape.experts
    monkeypatch.setattr(memory, "available_bytes", lambda: (room, "free memory of the machine"))
    with pytest.raises(MemoryError, match="8 experts in bf16"):
        wrapper.load_weights()
