"""Packed files: what is written, what is refused before it is used, and what only the checksums find."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ktmoe.errors import WeightFileError
from ktmoe.io.packed_file import PackedInfo, layer_file, open_packed, read_info
from ktmoe.io.packed_verify import verify_packed
from ktmoe.io.packed_writer import PackedWriter, write_file

N, ROW = 3, 8192
INFO = PackedInfo("BF16", "bf16", "bf16", 1, 7, N, 24, 16, ROW, "f" * 32)
ROWS = np.random.default_rng(0).integers(0, 256, (N, ROW), dtype=np.uint8)
BIASES = {
    "gate_bias": np.arange(N * 16, dtype=np.float32).reshape(N, 16),
    "down_bias": np.arange(N * 24, dtype=np.float32).reshape(N, 24),
}


def write(path: Path, info: PackedInfo = INFO, biases: bool = False) -> Path:
    with PackedWriter(str(path), info, list(BIASES) if biases else ()) as writer:
        writer.reserve()
        for expert in (2, 0, 1):  # in any order
            writer.put(expert, ROWS[expert], {k: v[expert] for k, v in BIASES.items()} if biases else None)
        writer.commit()
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write(tmp_path / layer_file(7))


@pytest.mark.parametrize("biases", [False, True])
def test_round_trip(tmp_path: Path, biases: bool) -> None:
    path = write(tmp_path / "a.safetensors", biases=biases)
    layer = open_packed(path)
    assert layer.info == INFO == read_info(path) == verify_packed(path)
    assert np.array_equal(layer.experts, ROWS)
    assert not layer.experts.flags.writeable
    assert layer.experts.ctypes.data % 4096 == 0
    assert layer.biases.keys() == (BIASES.keys() if biases else set())
    assert all(np.array_equal(layer.biases[name], BIASES[name]) for name in layer.biases)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_it_is_a_safetensors_file(packed: Path) -> None:
    """Anybody can read it, and check it with sha256sum."""
    tensors = load_file(packed)
    assert np.array_equal(tensors["experts"], ROWS)
    assert [bytes(row) for row in tensors["checksums"][:N]] == [hashlib.sha256(row).digest() for row in ROWS]


def test_a_mapping_outlives_the_file(packed: Path) -> None:
    """Replacing or deleting it does not disturb who has it mapped."""
    layer = open_packed(packed)
    write(packed, dataclasses.replace(INFO, source="another"))
    packed.unlink()
    assert np.array_equal(layer.experts, ROWS)


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: dict[str, object], data: bytes, align: int = 4096) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(PackedInfo)])
@pytest.mark.parametrize("value", ["edited", None, "-1", "99999999999999999999", "x" * 300])
def test_edited_metadata(packed: Path, name: str, value: str | None) -> None:
    header, data = header_of(packed)
    metadata = header["__metadata__"]
    assert isinstance(metadata, dict)
    if value == "edited":
        metadata[name] = "8" if metadata[name].isdecimal() else "int8"
    elif value is None:
        del metadata[name]
    else:
        metadata[name] = value
    rewrite(packed, header, data)
    with pytest.raises(WeightFileError, match=rf"^{packed}: "):
        open_packed(packed)
    with pytest.raises(WeightFileError, match=rf"^{packed}: "):
        verify_packed(packed)


def test_untouched_header_survives_the_editor(packed: Path) -> None:
    """So what the test above sees is the edit."""
    before = packed.read_bytes()
    rewrite(packed, *header_of(packed))
    assert packed.read_bytes() == before


def shape(header: dict[str, object]) -> None:
    header["experts"]["shape"] = [2 * N, ROW // 2]  # type: ignore[index]


def dtype(header: dict[str, object]) -> None:
    header["experts"]["dtype"] = "I8"  # type: ignore[index]


def rename(header: dict[str, object]) -> None:
    header["experts_"] = header.pop("experts")


def no_checksums(header: dict[str, object]) -> None:
    header["other"] = header.pop("checksums")


@pytest.mark.parametrize("change", [shape, dtype, rename, no_checksums])
def test_edited_header(packed: Path, change: Callable[[dict[str, object]], None]) -> None:
    header, data = header_of(packed)
    change(header)
    rewrite(packed, header, data)
    with pytest.raises(WeightFileError, match="the header is damaged or was edited"):
        open_packed(packed)


def test_data_that_do_not_begin_at_a_page(packed: Path) -> None:
    rewrite(packed, *header_of(packed), align=8)
    with pytest.raises(WeightFileError, match=rf"^{packed}: got \d+ bytes, which do not fit the metadata"):
        open_packed(packed)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 4096, 4097, 4096 + ROW, -32, -1])
def test_truncated(packed: Path, keep: int) -> None:
    data = packed.read_bytes()
    packed.write_bytes(data[:keep])
    with pytest.raises(WeightFileError, match=rf"^{packed}: "):
        open_packed(packed)


def test_longer_than_it_says(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes() + b"\0")
    with pytest.raises(WeightFileError, match=rf"^{packed}: "):
        open_packed(packed)


def test_not_ours(tmp_path: Path) -> None:
    save_file({"experts": ROWS}, tmp_path / "a.safetensors")
    with pytest.raises(WeightFileError, match="no packed experts"):
        open_packed(tmp_path / "a.safetensors")
    with pytest.raises(WeightFileError, match="cannot be opened"):
        open_packed(tmp_path / "b.safetensors")
    os.mkfifo(tmp_path / "c.safetensors")
    with pytest.raises(WeightFileError, match="not a regular file"):
        open_packed(tmp_path / "c.safetensors")


@pytest.mark.parametrize("experts", [0, 10**14])
def test_sizes_out_of_this_world(packed: Path, experts: int) -> None:
    header, data = header_of(packed)
    header["__metadata__"]["n_experts"] = str(experts)  # type: ignore[index]
    rewrite(packed, header, data)
    with pytest.raises(WeightFileError, match=rf"^{packed}: "):
        open_packed(packed)


@pytest.mark.parametrize("expert", range(N))
@pytest.mark.parametrize("place", [0, ROW - 1])
def test_a_flipped_bit_is_found_by_verify(packed: Path, expert: int, place: int) -> None:
    with packed.open("r+b") as file:
        file.seek(4096 + expert * ROW + place)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    open_packed(packed)  # no weight is read here
    with pytest.raises(WeightFileError, match=rf"^{packed}: expert {expert} is damaged"):
        verify_packed(packed)


def test_a_flipped_bit_in_a_bias_or_a_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "a", biases=True)
    data = path.read_bytes()
    gate_bias, checksums = 4096 + N * ROW, len(data) - (N + 1) * 32
    for offset, expert in ((gate_bias + 2 * 64, 2), (checksums + 32, 1)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(WeightFileError, match=f"expert {expert} is damaged"):
            verify_packed(path)


def test_progress_of_verify(packed: Path) -> None:
    seen: list[int] = []
    verify_packed(packed, seen.append)
    assert seen == [ROW] * N


# --- writing --------------------------------------------------------------------------------------------------------
def test_incomplete_is_never_visible(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with PackedWriter(str(path), INFO) as writer:
        writer.reserve()
        writer.put(0, ROWS[0])
        with pytest.raises(RuntimeError, match="2 experts were not written"):
            writer.commit()
        assert not path.exists()
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_until_the_new_one_is_complete(packed: Path) -> None:
    before = packed.read_bytes()
    with PackedWriter(str(packed), INFO) as writer:
        writer.reserve()
        writer.put(0, ROWS[1])
    assert packed.read_bytes() == before


@pytest.mark.parametrize("where", ["reserve", "put", "commit"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with PackedWriter(str(tmp_path / "a"), INFO) as writer:
        for step in ("reserve", "put", "commit"):
            if step == where:
                monkeypatch.setattr(os, "posix_fallocate" if step == "reserve" else "pwrite", full)
                with pytest.raises(OSError, match="No space"):
                    writer.reserve() if step == "reserve" else writer.put(0, ROWS[0]) if step == "put" else (
                        writer.commit()
                    )
                break
            if step == "reserve":
                writer.reserve()
            else:
                for expert in range(N):
                    writer.put(expert, ROWS[expert])
    assert not list(tmp_path.iterdir())


def test_two_writers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "a"
    order = []

    def second() -> None:
        write(path)
        order.append("second")

    with PackedWriter(str(path), INFO) as writer:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        for expert in range(N):
            writer.put(expert, ROWS[expert])
        order.append("first")
        inode = (tmp_path / "a.part").stat().st_ino
        writer.commit()
    thread.join()
    assert order == ["first", "second"]
    assert path.stat().st_ino != inode  # it did not write into the file that was finished
    assert verify_packed(path) == INFO


def test_what_a_killed_process_leaves_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    (tmp_path / "a.part").write_bytes(b"x" * 100_000)
    assert write(path).read_bytes() == write(tmp_path / "b").read_bytes()


def test_small_files_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_file(str(path), b"old")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_file(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_systems_that_can_do_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No locks, no reservation of space, no fsync of folders."""
    expected = write(tmp_path / "a").read_bytes()
    fsync = os.fsync

    def not_supported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", not_supported)
    monkeypatch.setattr(os, "posix_fallocate", not_supported)
    monkeypatch.setattr(os, "fsync", lambda fd: not_supported() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd))
    with PackedWriter(str(tmp_path / "b"), INFO) as writer:
        writer.put(0, ROWS[1])
        assert write(tmp_path / "b").read_bytes() == expected  # the other one at the same time, with a file of its own
    assert (tmp_path / "b").read_bytes() == expected
    assert write(tmp_path / "b").read_bytes() == expected
