"""The header of a GGUF file: what is read, and what is refused."""

import os
import pathlib
import resource
import struct
import tempfile
import time

import gguf
import gguf_files as files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktmoe.errors import WeightFileError
from ktmoe.io import gguf_header
from ktmoe.io.gguf_header import read_header

F32 = 0


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_agrees_with_the_official_reader(tmp_path, alignment) -> None:
    tensors = {}
    for seed, kind in enumerate(files.TYPES):
        tensors |= files.layer_tensors(files.random_stacks((kind, "Q8_0", "F32"), 2, 256, 256, seed), seed)
    path = files.write(tmp_path / "all.gguf", tensors, alignment=alignment)
    header = read_header(str(path))
    official = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert set(header.tensors) == set(official) == set(tensors)
    for name, entry in header.tensors.items():
        want = official[name]
        assert entry.type == want.tensor_type.name
        assert entry.shape == tuple(int(n) for n in reversed(want.shape))
        assert (entry.offset, entry.nbytes) == (want.data_offset, want.n_bytes)
    assert read_header(str(path)) is header  # remembered
    path.write_bytes(path.read_bytes() + b"\0")
    assert read_header(str(path)) is not header


def test_all_value_types_are_walked_over(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "kv.gguf", "x")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(name, 7)
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 2.5)
    writer.add_bool("bool", True)
    writer.add_array("ints", [1, 2, 3])
    writer.add_array("floats", [1.0, 2.0])
    writer.add_array("bools", [True, False, True])
    writer.add_array("strings", ["a", "", "ccc" * 1000])
    writer.add_tensor("t", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(str(tmp_path / "kv.gguf")).tensors["t"].shape == (2, 3)


def test_a_header_longer_than_the_window(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gguf_header, "_WINDOW", 7)
    stacks = files.random_stacks(("Q8_0",) * 3, 2, 32, 32)
    path = files.write(tmp_path / "small.gguf", files.layer_tensors(stacks, 0))
    assert len(read_header(str(path)).tensors) == 3


def test_an_unknown_type_harms_only_its_own_tensor(tmp_path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(files.raw([], [files.tensor(b"a", (32,), 250, 0), files.tensor(b"b", (8,), F32, 0)], b"\0" * 32))
    tensors = read_header(str(path)).tensors
    assert (tensors["a"].type, tensors["a"].nbytes) == ("type 250", -1)
    assert tensors["b"].nbytes == 32


GOOD = files.tensor(b"a", (8,), F32, 0)
DATA = b"\0" * 32
STRINGS = struct.pack("<IQ", 8, 2**40)
BAD = {
    "empty": (b"", "magic: got 0 bytes"),
    "another format": (b"PK\x03\x04" + DATA, "not a GGUF file"),
    "only magic": (b"GGUF", "version: got 0 bytes"),
    "version 1": (files.raw([], [GOOD], DATA, version=1), "got GGUF version 1, expected 2 or 3"),
    "version 9": (files.raw([], [GOOD], DATA, version=9), "got GGUF version 9"),
    "big-endian": (files.raw([], [GOOD], DATA, version=3 << 24), "big-endian"),
    "2^63 tensors": (files.raw([], [GOOD], DATA, n_tensors=2**63), "number of tensors: got 9223372036854775808"),
    "a million tensors": (files.raw([], [GOOD], DATA, n_tensors=10**6), "tensor"),
    "2^64-1 keys": (files.raw([], [GOOD], DATA, n_keys=2**64 - 1), "number of keys: got 18446744073709551615"),
    "60000 keys that are not there": (files.raw([], [GOOD], DATA, n_keys=60_000), "key"),
    "endless key": (files.raw([struct.pack("<Q", 2**63)]), "length of name of key 0: got 9223372036854775808"),
    "key that is not UTF-8": (files.raw([files.key(b"\xff", 4, b"\0" * 4)]), "name of key 0: not UTF-8"),
    "value type 13": (files.raw([files.key(b"k", 13, b"\0" * 8)], [GOOD], DATA), "key 'k': got value type 13"),
    "array of arrays": (
        files.raw([files.key(b"k", 9, struct.pack("<IQ", 9, 1))], [GOOD], DATA),
        "key 'k': got an array",
    ),
    "2^60 numbers": (files.raw([files.key(b"k", 9, struct.pack("<IQ", 4, 2**60))]), "key 'k': got"),
    "2^64 bytes of numbers": (files.raw([files.key(b"k", 9, struct.pack("<IQ", 12, 2**61))]), "key 'k': got"),
    "2^40 strings": (files.raw([files.key(b"k", 9, STRINGS)]), "key 'k': got 1099511627776 strings, expected at most"),
    "a million missing strings": (files.raw([files.key(b"k", 9, struct.pack("<IQ", 8, 10**6))]), "key 'k'"),
    "endless string": (files.raw([files.key(b"k", 8, struct.pack("<Q", 2**62))]), "length of key 'k': got"),
    "alignment 0": (
        files.raw([files.key(b"general.alignment", 4, b"\0" * 4)], [GOOD], DATA),
        "general.alignment: got 0",
    ),
    "alignment 3": (
        files.raw([files.key(b"general.alignment", 4, struct.pack("<I", 3))], [GOOD], DATA),
        "general.alignment: got 3, expected a power of two",
    ),
    "alignment 2^31": (
        files.raw([files.key(b"general.alignment", 4, struct.pack("<I", 2**31))], [GOOD], DATA),
        "general.alignment: got 2147483648",
    ),
    "alignment in words": (
        files.raw([files.key(b"general.alignment", 8, files.string(b"32"))], [GOOD], DATA),
        "type 8",
    ),
    "alignment twice": (
        files.raw([files.key(b"general.alignment", 4, struct.pack("<I", 32))] * 2, [GOOD], DATA),
        "'general.alignment' occurs twice",
    ),
    "tensor twice": (files.raw([], [GOOD, GOOD], DATA), "tensor 'a' occurs twice"),
    "tensor on tensor": (
        files.raw([], [GOOD, files.tensor(b"b", (8,), F32, 0)], DATA),
        "tensor 'b' lies on tensor 'a'",
    ),
    "five dimensions": (files.raw([], [files.tensor(b"a", (1,) * 5, F32, 0)], DATA), "'a': dimensions: got 5"),
    "2^32 dimensions": (
        files.raw([], [files.tensor(b"a", (8,), F32, 0, dims=2**32 - 1)], DATA),
        "dimensions: got 42949",
    ),
    "beyond the file": (files.raw([], [files.tensor(b"a", (9,), F32, 0)], DATA), "'a': got bytes 0..36 of the data"),
    "offset beyond the file": (
        files.raw([], [files.tensor(b"a", (8,), F32, 2**63)], DATA),
        "tensor 'a': got bytes 92233",
    ),
    "sizes that overflow": (files.raw([], [files.tensor(b"a", (2**40, 2**40), F32, 0)], DATA), "tensor 'a': got bytes"),
    "sizes that overflow to 0": (files.raw([], [files.tensor(b"a", (2**32, 2**32), F32, 0)], DATA), "tensor 'a': got"),
    "half a block": (
        files.raw([], [files.tensor(b"a", (16,), 8, 0)], DATA),
        "rows of 16 weights, expected a multiple of 32",
    ),
    "name of 2000 characters": (
        files.raw([], [files.tensor(b"n" * 2000, (8,), F32, 0)], DATA),
        "name of tensor 0: got 2000",
    ),
}


def refused(path) -> str:
    """The message, after a look at memory and open files."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightFileError) as caught:
        read_header(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert len(os.listdir("/proc/self/fd")) == fds
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_headers_are_refused_at_once(tmp_path, case) -> None:
    content, text = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    message = refused(path)
    assert "bad.gguf: " in message
    assert text in message


def test_a_header_of_empty_strings_in_a_large_file(tmp_path, monkeypatch) -> None:
    """The lengths are zeros, so any hole of a sparse file is an array of strings."""
    monkeypatch.setattr(gguf_header, "MAX_GGUF_HEADER_BYTES", 10_000)
    path = tmp_path / "sparse.gguf"
    path.write_bytes(files.raw([files.key(b"k", 9, struct.pack("<IQ", 8, 1_000_000))]))
    os.truncate(path, 2**34)
    assert "the header is longer than 10000 bytes" in refused(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_not_a_file(tmp_path, make) -> None:
    make(tmp_path / "x.gguf")
    assert "not a regular file" in refused(tmp_path / "x.gguf")


def test_no_file(tmp_path) -> None:
    assert "No such file" in refused(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def small() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        stacks = files.random_stacks(("Q4_0", "Q8_0", "F32"), 2, 32, 32)
        return files.write(pathlib.Path(folder) / "s.gguf", files.layer_tensors(stacks, 0)).read_bytes()


def test_every_truncation_is_refused(tmp_path, small) -> None:
    path = tmp_path / "short.gguf"
    for size in [*range(0, 400, 3), *range(400, len(small) - 32, 97)]:  # the writer pads the last tensor
        path.write_bytes(small[:size])
        with pytest.raises(WeightFileError, match=r"short\.gguf"):
            read_header(str(path))


@given(st.data())
def test_flipped_bytes_are_an_error_or_a_header_within_the_file(tmp_path, small, data) -> None:
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(small) - 1)) % 12_000  # metadata and table come first
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    os.utime(path, ns=(time.time_ns(),) * 2)
    try:
        header = read_header(str(path))
    except WeightFileError:
        return
    for entry in header.tensors.values():
        assert entry.nbytes == -1 or 0 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
