"""Hostile index files."""

import json
import os

import pytest

from ktmoe.errors import WeightFileError
from ktmoe.io import index_json
from ktmoe.io.index_json import check_shard_name, parse_object, read_index


def test_a_good_index(tmp_path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}})
    )
    assert read_index(str(path)) == {"a": "x.safetensors", "b": "x.safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/x.safetensors",
        "../x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.safetensors\0",
        "x\0.safetensors",
        "x.txt",
        "",
        ".",
        "..",
        "x.safetensors/",
        None,
        7,
        ["x.safetensors"],
        {},
    ],
)
def test_shard_names_stay_in_the_folder(tmp_path, name) -> None:
    with pytest.raises(WeightFileError, match="shard name"):
        check_shard_name(name, "index")
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightFileError, match="index.json"):
        read_index(str(path))


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_with_advice(name) -> None:
    with pytest.raises(WeightFileError, match="may run code.*convert"):
        check_shard_name(name, "index")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"weight_map"',
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        '{"weight_map": {}, "weight_map": {}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"weight_map": ' + "9" * 10_000 + "}",
        b'{"weight_map": {"\xff": "x.safetensors"}}',
        json.dumps({"weight_map": {"n" * 1025: "x.safetensors"}}),
    ],
    ids=lambda t: repr(t)[:30],
)
def test_damaged_json(tmp_path, text) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeightFileError, match="index.json"):
        read_index(str(path))


def test_limits(tmp_path, monkeypatch) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(10)}}))
    assert len(read_index(str(path))) == 10
    for limit, value in (("MAX_INDEX_BYTES", 50), ("MAX_TENSORS", 9), ("MAX_SHARDS", 9)):
        with monkeypatch.context() as patch:
            patch.setattr(index_json, limit, value)
            with pytest.raises(WeightFileError, match="expected at most"):
                read_index(str(path))


def test_a_huge_index_is_refused_by_its_size(tmp_path) -> None:
    path = tmp_path / "index.json"
    with open(path, "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(WeightFileError, match="bytes, expected at most"):
        read_index(str(path))


def test_not_a_regular_file(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json", tmp_path / "absent.json", "/dev/zero", "a\0b"):
        with pytest.raises(WeightFileError):
            read_index(str(path))


def test_names_of_duplicates_are_told() -> None:
    with pytest.raises(WeightFileError, match="key 'b' occurs twice"):
        parse_object(b'{"a": 1, "b": 2, "b": 3}', "x")
