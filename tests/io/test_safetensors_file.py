"""One safetensors file: what is read, and what is refused."""

import os
import resource
import struct
import time

import pytest
import torch
from hostile_files import entry, write_raw
from safetensors.torch import save_file

from ktmoe.errors import WeightFileError
from ktmoe.io import safetensors_file
from ktmoe.io.safetensors_file import SafetensorsFile


@pytest.fixture
def good(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "bf16": torch.randn(3, 5, 7).bfloat16(),
        "f16": torch.randn(4, 6).half(),
        "f32": torch.randn(2, 2),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
        "int": torch.arange(5),
    }
    path = tmp_path / "good.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


def test_reads_what_was_saved(good) -> None:
    path, tensors = good
    with SafetensorsFile(str(path)) as file:
        assert set(file.entries) == set(tensors)
        for name in ("bf16", "f16", "f32", "empty", "scalar"):
            got = file.read(name, tuple(tensors[name].shape))
            assert got.dtype is tensors[name].dtype
            assert torch.equal(got, tensors[name])
        for index in range(3):
            part = file.read("bf16", (3, 5, 7), index)
            assert torch.equal(part, tensors["bf16"][index])
            assert part.untyped_storage().nbytes() == 5 * 7 * 2
        file.close()
        file.close()


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("absent", (1,), "tensor 'absent' is missing"),
        ("bf16", (3, 5, 8), r"tensor 'bf16': got shape \[3, 5, 7\], expected \[3, 5, 8\]"),
        ("bf16", (3, 35), "tensor 'bf16': got shape"),
        ("int", (5,), "tensor 'int': got dtype I64, expected BF16, F16, F32"),
    ],
)
def test_what_does_not_fit_is_named(good, name, shape, text) -> None:
    with SafetensorsFile(str(good[0])) as file, pytest.raises(WeightFileError, match=f"good.safetensors: {text}"):
        file.read(name, shape)


F32 = entry([1], 0, 4)
BAD = {
    "empty file": b"",
    "short prefix": b"\x01\0\0",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header beyond the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "not JSON": (b"nonsense!", b""),
    "not an object": (b"[]", b""),
    "nested 10000 deep": (b'{"a":' * 10_000, b""),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "unknown dtype": ({"a": entry([1], 0, 4, "F33")}, b"\0" * 4),
    "shape larger than data": ({"a": entry([2], 0, 4)}, b"\0" * 4),
    "shape overflows 64 bits": ({"a": entry([2**62, 2**62], 0, 4)}, b"\0" * 4),
    "negative shape": ({"a": entry([-1], 0, 4)}, b"\0" * 4),
    "negative offset": ({"a": entry([1], -4, 0)}, b"\0" * 4),
    "end before begin": ({"a": entry([1], 4, 0)}, b"\0" * 4),
    "end beyond the file": ({"a": entry([4], 0, 16)}, b"\0" * 4),
    "terabytes declared": ({"a": entry([2**38], 0, 2**40)}, b"\0" * 4),
    "overlap": ({"a": F32, "b": F32}, b"\0" * 4),
    "gap": ({"a": F32, "b": entry([1], 8, 12)}, b"\0" * 12),
    "data behind the last tensor": ({"a": F32}, b"\0" * 8),
    "data without tensors": ({}, b"\0" * 8),
    "duplicate name": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "name of 2000 characters": ({"n" * 2000: F32}, b"\0" * 4),
    "float offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.5]}}, b"\0" * 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, b"\0" * 4),
    "text for a shape": ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, b"\0" * 4),
    "metadata that is a list": ({"__metadata__": [1], "a": F32}, b"\0" * 4),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
    "zip": b"PK\x03\x04" + b"\0" * 40,
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_at_once(tmp_path, case) -> None:
    path = tmp_path / "bad.safetensors"
    content = BAD[case]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_raw(path, *content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fds = len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    with pytest.raises(WeightFileError, match=r"bad\.safetensors: "):
        SafetensorsFile(str(path))
    assert time.perf_counter() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert len(os.listdir("/proc/self/fd")) == fds


def test_every_truncation_is_refused(good) -> None:
    path, _ = good
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(WeightFileError):
            SafetensorsFile(str(path))


def test_a_file_that_shrinks_while_it_is_open(good) -> None:
    path, _ = good
    with SafetensorsFile(str(path)) as file:
        os.truncate(path, file.entries["bf16"].offset + 10)
        with pytest.raises(WeightFileError, match=r"tensor 'bf16': got 10 bytes, expected 210: the file is truncated"):
            file.read("bf16", (3, 5, 7))


def test_a_file_that_is_replaced_while_it_is_open(good, tmp_path) -> None:
    path, tensors = good
    with SafetensorsFile(str(path)) as file:
        os.replace(write_raw(tmp_path / "other", {}), path)
        assert torch.equal(file.read("bf16", (3, 5, 7)), tensors["bf16"])


@pytest.mark.parametrize(
    "field",
    [
        None,
        7,
        {},
        {"dtype": "F32", "shape": [1], "data_offsets": [4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["a", 4]},
    ],
)
def test_a_header_that_changes_after_the_official_verdict(monkeypatch, tmp_path, field) -> None:
    monkeypatch.setattr(safetensors_file, "safe_open", lambda *a, **k: None)
    path = write_raw(tmp_path / "changed.safetensors", {"a": field}, b"\0" * 4)
    with pytest.raises(WeightFileError, match="tensor 'a': "):
        SafetensorsFile(str(path))


def test_a_size_that_changes_after_the_official_verdict(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(safetensors_file, "safe_open", lambda *a, **k: None)
    path = write_raw(tmp_path / "changed.safetensors", {"a": entry([3], 0, 8)}, b"\0" * 8)
    with SafetensorsFile(str(path)) as file, pytest.raises(WeightFileError, match="got 8 bytes, expected 12"):
        file.read("a", (3,))


def test_limit_of_tensors(monkeypatch, good) -> None:
    monkeypatch.setattr(safetensors_file, "MAX_TENSORS", 3)
    with pytest.raises(WeightFileError, match="got 6 tensors, expected at most 3"):
        SafetensorsFile(str(good[0]))
