"""A folder of safetensors files."""

import json
import os

import pytest
import torch
from hostile_files import save_sharded
from safetensors.torch import save_file

from ktmoe.errors import WeightFileError
from ktmoe.io import safetensors_dir
from ktmoe.io.safetensors_dir import SafetensorsDir, shard_map

TENSORS = {f"t{i}": torch.full((2, 3), float(i)) for i in range(30)}


@pytest.fixture(params=["index", "one file", "no index"])
def folder(request, tmp_path):
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        save_sharded(tmp_path, TENSORS, 12)
        if request.param == "no index":
            os.unlink(tmp_path / "model.safetensors.index.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    return tmp_path


def test_reads_every_tensor_and_opens_few_files(folder) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with SafetensorsDir(str(folder)) as reader:
        assert len(os.listdir("/proc/self/fd")) == fds  # nothing is open before it is needed
        assert set(reader.shards) == set(TENSORS)
        for name, want in [*TENSORS.items(), *TENSORS.items()]:
            assert torch.equal(reader.read(name, (2, 3)), want)
            assert torch.equal(reader.read(name, (2, 3), 1), want[1])
            assert len(os.listdir("/proc/self/fd")) <= fds + 8
    assert len(os.listdir("/proc/self/fd")) == fds


def test_no_file_is_mapped(folder) -> None:
    with SafetensorsDir(str(folder)) as reader:
        kept = [reader.read(name, (2, 3)) for name in TENSORS]
        with open("/proc/self/maps", encoding="utf-8") as maps:
            assert str(folder) not in maps.read()
        assert len(kept) == 30


def test_the_map_is_remembered_until_the_folder_changes(folder) -> None:
    first = shard_map(str(folder))
    assert shard_map(str(folder)) is first
    for name in os.listdir(folder):
        if name.endswith((".safetensors", ".json")):
            os.utime(folder / name, ns=(1, 1))
    assert shard_map(str(folder)) is not first


def test_links_out_of_the_folder_are_followed(tmp_path) -> None:
    """The cache of the Hugging Face Hub is made of them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "abc")
    os.symlink("../blobs/abc", tmp_path / "snapshot" / "model.safetensors")
    with SafetensorsDir(str(tmp_path / "snapshot")) as reader:
        assert torch.equal(reader.read("t3", (2, 3)), TENSORS["t3"])


def test_missing_tensor_and_missing_shard(folder) -> None:
    with SafetensorsDir(str(folder)) as reader:
        with pytest.raises(WeightFileError, match="tensor 'absent' is missing"):
            reader.read("absent", (1,))
        for name in os.listdir(folder):
            if name.endswith(".safetensors"):
                os.unlink(folder / name)
        with pytest.raises(WeightFileError, match=r"\.safetensors: .*No such file.*needed for tensor 't5'"):
            reader.read("t5", (2, 3))


def test_an_index_that_names_the_wrong_file(tmp_path) -> None:
    save_sharded(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["t0"] = index["weight_map"]["t1"]
    path.write_text(json.dumps(index))
    with (
        SafetensorsDir(str(tmp_path)) as reader,
        pytest.raises(WeightFileError, match=r"00002-of-00003.*tensor 't0' is missing"),
    ):
        reader.read("t0", (2, 3))


def test_a_truncated_shard_names_file_and_tensor(tmp_path) -> None:
    save_sharded(tmp_path, TENSORS)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 5)
    with SafetensorsDir(str(tmp_path)) as reader:
        reader.read("t0", (2, 3))
        with pytest.raises(WeightFileError, match=r"00002-of-00003.*needed for tensor 't1'"):
            reader.read("t1", (2, 3))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickles_are_refused_with_advice(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(WeightFileError, match=rf"{name}.*may run code.*convert"):
        SafetensorsDir(str(tmp_path))


def test_no_folder_and_nothing_in_it(tmp_path) -> None:
    with pytest.raises(WeightFileError, match="holds no .safetensors file"):
        SafetensorsDir(str(tmp_path))
    with pytest.raises(WeightFileError, match="absent: cannot be read as a folder: No such file"):
        SafetensorsDir(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightFileError, match="Not a directory"):
        SafetensorsDir(str(tmp_path / "file"))
    os.symlink("nowhere", tmp_path / "model.safetensors")
    with pytest.raises(WeightFileError, match=r"model.safetensors: No such file"):
        SafetensorsDir(str(tmp_path))


def test_a_tensor_in_two_files(tmp_path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightFileError, match=r"'same' is in a.safetensors and again in b.safetensors"):
        SafetensorsDir(str(tmp_path))


def test_several_index_files(tmp_path) -> None:
    save_sharded(tmp_path, TENSORS)
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    with SafetensorsDir(str(tmp_path)) as reader:
        assert set(reader.shards) == set(TENSORS)
    os.rename(tmp_path / "model.safetensors.index.json", tmp_path / "other.safetensors.index.json")
    with pytest.raises(WeightFileError, match="several index files"):
        SafetensorsDir(str(tmp_path))


def test_limits(monkeypatch, tmp_path) -> None:
    for n in range(4):
        save_file({f"t{n}": torch.zeros(1)}, tmp_path / f"{n}.safetensors")
    for limit, value in (("MAX_SHARDS", 3), ("MAX_TENSORS", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_dir, limit, value)
            with pytest.raises(WeightFileError, match="3"):
                SafetensorsDir(str(tmp_path))
