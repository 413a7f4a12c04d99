"""The cache of packed experts behind `from_pretrained`: what is read at the second start, and what can go wrong."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.tiny_models import LAYERS, make_checkpoint, tokens

from ktmoe import _ext, cache
from ktmoe.base import BaseMoEWrapper
from ktmoe.hf import KTMoEConfig, cached, from_pretrained, ktmoe_layers
from ktmoe.hf.checkpoint import CheckpointFiles
from ktmoe.io.packed_verify import verify_packed

EXPERTS = 8  # of qwen3_moe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path / "model")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, which does not exist yet."""
    monkeypatch.setenv("KTMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The expert tensors that are read from the checkpoint."""
    names: list[str] = []
    read = CheckpointFiles.read
    monkeypatch.setattr(
        CheckpointFiles, "read", lambda self, key, *args: (names.append(key), read(self, key, *args))[1]
    )
    return names


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def files(store: Path) -> list[Path]:
    return sorted((store / "packed").glob("*/ktmoe-layer-*"))


def mapped(model: Any) -> bool:
    """True if no layer holds experts of its own."""
    own = [layer.backend.layer.packed_bytes for layer in ktmoe_layers(model)]
    lines = Path("/proc/self/maps").read_text().count("ktmoe-layer-")
    return bool(own) and lines >= len(own)


def test_what_floats_become_is_kept_apart(folder: Path, store: Path, reads: list[str]) -> None:
    """Q4_K and Q8_0 of one model do not take each other's place."""
    kinds = {"q8_0": {"gguf_type": "Q8_0"}, "q4_k": {}}
    for _ in range(2):
        for kind, options in kinds.items():
            model = from_pretrained(folder, "LLAMAFILE", **options)
            assert {layer.backend.layer.format for layer in ktmoe_layers(model)} == {kind}
    assert len(reads) == LAYERS * EXPERTS * 3 * len(kinds)
    assert [entry.path.name.partition("-LLAMAFILE")[2] for entry in cache.entries()] == ["", "-q8_0"]
    model = from_pretrained(folder, "AMXINT4_KGroup_SFT", group_size=64, zero_point=True, cache=False)
    assert {layer.backend.layer.format for layer in ktmoe_layers(model)} == {"int4_g64z"}


@pytest.mark.parametrize("method", ["BF16", "AMXINT8_SFT"])
def test_the_second_start_reads_no_experts(folder: Path, store: Path, reads: list[str], method: str) -> None:
    expected = logits(from_pretrained(folder, method, cache=False))
    assert not store.exists()
    reads.clear()
    first = logits(from_pretrained(folder, method))
    assert len(reads) == LAYERS * EXPERTS * 3
    assert [verify_packed(file).method for file in files(store)] == [method] * LAYERS
    reads.clear()
    second = from_pretrained(folder, method)
    assert not reads
    assert mapped(second)
    assert torch.equal(logits(second), expected)
    assert torch.equal(first, expected)
    assert [entry.path.name for entry in cache.entries()] == [files(store)[0].parent.name]


def test_nothing_is_packed_the_second_time(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained(folder)
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", lambda *_: pytest.fail("an expert was packed"))
    from_pretrained(folder)


@pytest.mark.parametrize("off", ["environment", "argument", "config"])
def test_off(folder: Path, store: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    from transformers import AutoModelForCausalLM

    if off == "environment":
        monkeypatch.setenv("KTMOE_CACHE", "off")
    for _ in range(2):
        reads.clear()
        if off == "config":
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=KTMoEConfig("BF16", cache=False))
        else:
            from_pretrained(folder, **({"cache": False} if off == "argument" else {}))
        assert len(reads) == LAYERS * EXPERTS * 3
    assert not store.exists()


def test_an_interrupted_start_is_continued(
    folder: Path, store: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = BaseMoEWrapper.put_expert
    count = 0

    def interrupted(self: BaseMoEWrapper, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == EXPERTS + 3:
            raise KeyboardInterrupt
        load(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BaseMoEWrapper, "put_expert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            from_pretrained(folder)
    assert [file.name for file in files(store)] == ["ktmoe-layer-00000.safetensors"]
    reads.clear()
    from_pretrained(folder)
    assert len(reads) == EXPERTS * 3


def change_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(folder / "model.safetensors")


def change_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("qwen3_moe", folder, seed=5)


def change_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "LAYOUT_VERSION", _ext.LAYOUT_VERSION + 1)


@pytest.mark.parametrize("change", [change_time, change_weights, change_layout])
def test_what_does_not_fit_any_more_is_replaced(
    folder: Path, store: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    from_pretrained(folder)
    before = files(store)
    change(folder, monkeypatch)
    expected = logits(from_pretrained(folder, cache=False))
    for read_again in (True, False):
        reads.clear()
        assert torch.equal(logits(from_pretrained(folder)), expected)
        assert bool(reads) == read_again
    assert files(store) == before


def test_a_damaged_file_is_replaced(folder: Path, store: Path, reads: list[str]) -> None:
    expected = logits(from_pretrained(folder))
    file = files(store)[1]
    file.write_bytes(file.read_bytes()[:-1])
    reads.clear()
    assert torch.equal(logits(from_pretrained(folder)), expected)
    assert len(reads) == EXPERTS * 3
    verify_packed(file)


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["disk full", "disk full later", "too small", "read-only", "not a folder"])
def test_a_cache_that_cannot_be_written_is_one_warning(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    expected = logits(from_pretrained(folder, cache=False))
    if trouble == "disk full":
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif trouble == "disk full later":
        monkeypatch.setattr(os, "pwrite", full)
    elif trouble == "too small":
        monkeypatch.setattr(cached.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    elif trouble == "read-only":  # chmod does not stop root
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    else:
        store.write_text("")
    with caplog.at_level(logging.WARNING, logger="ktmoe"):
        model = from_pretrained(folder)
    assert torch.equal(logits(model), expected)
    warnings = [record.getMessage() for record in caplog.records if "packed experts are not kept" in record.message]
    assert len(warnings) == 1
    assert "KTMOE_CACHE=off" in warnings[0]
    assert not list(store.glob("packed/*/ktmoe*"))


def test_errors_of_the_checkpoint_are_not_the_cache_s(folder: Path, store: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight': got shape \[3, 3\]"):
        from_pretrained(folder)
    assert not list(store.glob("packed/*/*.part"))


def test_the_snapshot_of_a_hub_model(tmp_path: Path, store: Path, reads: list[str]) -> None:
    """Found again although its blob was downloaded again; another revision is another entry."""
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
        make_checkpoint("qwen3_moe", snapshot, seed)
        blob = tmp_path / "hub" / "models--org--tiny" / "blobs" / commit
        blob.parent.mkdir(exist_ok=True)
        os.rename(snapshot / "model.safetensors", blob)
        (snapshot / "model.safetensors").symlink_to(blob)
        from_pretrained(snapshot)
    assert [entry.path.name for entry in cache.entries()] == [
        "org--tiny@aaaaaaaaaaaa-AMXBF16_SFT",
        "org--tiny@bbbbbbbbbbbb-AMXBF16_SFT",
    ]
    os.utime(tmp_path / "hub" / "models--org--tiny" / "blobs" / ("a" * 40))
    reads.clear()
    from_pretrained(tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40))
    assert not reads


def test_memory_is_checked_before_the_work(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmoe import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: (1000, "limit of the control group"))
    with pytest.raises(MemoryError, match="2 layers of experts: need .* have .*limit of the control group"):
        from_pretrained(folder)
    assert not reads


def test_a_folder_made_by_quantize(
    folder: Path, tmp_path: Path, store: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from ktmoe.cli.packed_model import PackedModel

    expected = logits(from_pretrained(folder, "AMXINT8", cache=False))
    job = PackedModel(str(folder), tmp_path / "packed", "AMXINT8")
    job.prepare()
    job.run()
    reads.clear()
    with caplog.at_level(logging.WARNING, logger="ktmoe"):
        model = from_pretrained(folder, "MOE_INT8", packed=tmp_path / "packed")
        assert "other files" not in caplog.text
        shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
        from_pretrained(tmp_path / "copy", "AMXINT8", packed=str(tmp_path / "packed"))
    assert "was packed from other files" in caplog.text
    assert torch.equal(logits(model), expected)
    assert not reads
    assert not store.exists()
    with pytest.raises(ValueError, match=r"method: got AMXINT8 \(int8\), expected BF16"):
        from_pretrained(folder, "BF16", packed=tmp_path / "packed")
    (tmp_path / "packed" / "ktmoe-layer-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="packing was not finished"):
        from_pretrained(folder, "AMXINT8", packed=tmp_path / "packed")
