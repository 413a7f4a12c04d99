"""Whole tensors out of GGUF files, against the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

import gguf_files as made

from ktmoe.errors import WeightFileError
from ktmoe.io import gguf_tensors
from ktmoe.io.gguf_tensors import GgufTensors


@pytest.mark.parametrize("kind", made.TYPES)
def test_every_type(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of two rows, the last of them of one."""
    monkeypatch.setattr(gguf_tensors, "_CHUNK_WEIGHTS", 512)
    rows = made.random_rows(kind, (7, 256), np.random.default_rng(0))
    path = made.write(tmp_path / "m.gguf", {"output.weight": (kind, rows)})
    with GgufTensors(str(path)) as tensors:
        assert tensors.architecture == "qwen3moe"
        assert tensors.shapes == {"output.weight": (7, 256)}
        wide = tensors.read("output.weight", torch.float32)
        narrow = tensors.read("output.weight", torch.bfloat16)
    expected = torch.from_numpy(made.decode(kind, rows).astype(np.float32))
    # The package multiplies and adds in fp32, in places in another order.
    assert torch.allclose(wide, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
    assert narrow.dtype == (torch.float32 if kind == "F32" else torch.bfloat16)
    assert torch.allclose(narrow.float(), expected, rtol=2.0**-8, atol=1e-7)


def test_experts_are_left_out_and_other_ranks_keep_their_shape(tmp_path: Path) -> None:
    stacks = made.random_stacks(("Q8_0", "Q8_0", "Q8_0"), 2, 32, 32)
    rng = np.random.default_rng(0)
    shapes = {"blk.0.attn_k_b.weight": (3, 5, 32), "output_norm.weight": (32,), "blk.0.ffn_gate.weight": (4, 32)}
    others = {name: ("F16", made.random_rows("F16", shape, rng)) for name, shape in shapes.items()}
    tensors = made.layer_tensors(stacks, 0) | made.old_tensors(stacks, 1) | others
    path = made.write(tmp_path / "m.gguf", tensors, per_file=2)
    with GgufTensors(str(path)) as found:
        assert len(found.files) > 1
        assert found.shapes == shapes
        for name, shape in shapes.items():
            assert torch.equal(
                found.read(name, torch.float16), torch.from_numpy(others[name][1].view(np.float16)).view(shape)
            )


def test_bad_files(tmp_path: Path) -> None:
    entry = made.tensor(b"output.weight", (32, 2), 99, 0)
    path = tmp_path / "m.gguf"
    path.write_bytes(made.raw(tensors=[entry], data=b"\0" * 64))
    with (
        GgufTensors(str(path)) as tensors,
        pytest.raises(WeightFileError, match=r"'output.weight': got type 99, which"),
    ):
        tensors.read("output.weight", torch.float32)
    with pytest.raises(WeightFileError, match="gone.gguf: cannot be opened"):
        GgufTensors(str(tmp_path / "gone.gguf"))
    rows = ("F16", made.random_rows("F16", (2, 32), np.random.default_rng(0)))
    first = made.write(tmp_path / "n.gguf", {"a": rows, "b": rows}, per_file=1)
    second = Path(str(first).replace("00001-of", "00002-of"))
    second.write_bytes(second.read_bytes().replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"))
    with pytest.raises(WeightFileError, match=r"00002-of-00002.gguf: tensor 'a' is in .*00001-of-00002.gguf too"):
        GgufTensors(str(first))


def test_file_that_shrinks(tmp_path: Path) -> None:
    rows = made.random_rows("F16", (64, 256), np.random.default_rng(0))
    path = made.write(tmp_path / "m.gguf", {"a": ("F16", rows)})
    with GgufTensors(str(path)) as tensors:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1000)
        with pytest.raises(WeightFileError, match=r"'a': got [0-9]+ bytes, expected 32768: the file is"):
            tensors.read("a", torch.float32)
