"""`ktmoe quantize`, `verify` and `cache`: round trip, interruptions at every step, and faults that verify finds."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
import torch_oracle as ref
from hf.tiny_models import HIDDEN, INTER, make_checkpoint
from hostile_files import per_expert, save_sharded
from typer.testing import CliRunner

from ktmoe import packing
from ktmoe.cli import quantize as quantize_module
from ktmoe.cli.__main__ import app, main
from ktmoe.cli.packed_model import PackedModel
from ktmoe.io.packed_verify import verify_packed
from ktmoe.io.packed_writer import PackedWriter
from ktmoe.methods import METHODS

SHAPE = ref.Shape()
LAYERS = (1, 2)
CONFIG = {"hidden_size": SHAPE.hidden, "moe_intermediate_size": SHAPE.inter, "num_hidden_layers": 3}
STEPS = ("open", "ftruncate", "posix_fallocate", "pwrite", "fsync", "rename", "close")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Layer 0 is dense, layer 3 belongs to a multi-token-prediction head."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {"model.layers.0.mlp.gate_proj.weight": torch.zeros(4, SHAPE.hidden)}
    for layer in (*LAYERS, 3):
        tensors |= per_expert(ref.weights(SHAPE, seed=layer), layer)
    save_sharded(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def invoke(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a command says that ends with exit code 1."""
    monkeypatch.setattr(sys, "argv", ["ktmoe", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    return capsys.readouterr().err


def assert_same_layers(shape: ref.Shape, method: str, packed: Path, source: Path) -> None:
    """Layers from packed files compute the bits of those from their source."""
    for layer in LAYERS:
        mapped, read = (ref.make(shape, method, layer_idx=layer, weight_path=path) for path in (packed, source))
        mapped.load_weights()
        read.load_weights()
        inputs = (*ref.batch(shape, 5), *([False] if mapped.mode == "sft" else []))
        assert torch.equal(mapped.forward(*inputs), read.forward(*inputs))


def image(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("ktmoe-layer-*.safetensors")}


@pytest.mark.parametrize("method", list(METHODS))
def test_round_trip(model: Path, tmp_path: Path, method: str) -> None:
    """quantize -> verify -> load -> forward: the bits of a load from the checkpoint."""
    out = tmp_path / "packed"
    assert f"2 layers as {method} in {out}" in invoke("quantize", model, "--method", method, "-o", out)
    assert sorted(os.listdir(out)) == [
        "ktmoe-layer-00001.safetensors",
        "ktmoe-layer-00002.safetensors",
        "ktmoe-packed.json",
    ]
    text = invoke("verify", out)
    assert f"2 layers as {method}" in text
    assert "all checksums fit" in text
    assert f"The source, {model}, has not changed." in text
    assert_same_layers(SHAPE, method, out, model)


def test_a_model_made_by_transformers(tmp_path: Path) -> None:
    """Its config.json has the names that real models use."""
    for family in ("qwen3_moe", "mixtral", "deepseek_v3"):
        folder = make_checkpoint(family, tmp_path / family)
        invoke("quantize", folder, "-o", tmp_path / f"{family}-packed")
        info = verify_packed(next((tmp_path / f"{family}-packed").glob("ktmoe-layer-00001*")))
        assert (info.hidden, info.inter, info.method) == (HIDDEN, INTER, "AMXINT8")


@pytest.fixture
def gguf_model(tmp_path: Path) -> Path:
    """Layer 0 is dense, layer 3 belongs to a multi-token-prediction head; two files."""
    tensors: gguf_files.Tensors = {"blk.0.ffn_up.weight": gguf_files.random_stacks(("F16",) * 3, 1, 64, 32)[1]}
    for layer in (*LAYERS, 3):
        stacks = gguf_files.random_stacks(("Q4_K", "Q4_K", "Q6_K"), 5, 256, 512, seed=layer)
        tensors |= gguf_files.layer_tensors(stacks, layer)
    (tmp_path / "gguf").mkdir()
    return gguf_files.write(tmp_path / "gguf" / "m.gguf", tensors, 6, block_count=4, nextn_predict_layers=1)


@pytest.mark.parametrize("method", ["AMXINT4", "LLAMAFILE", "AMXINT8_SFT"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_gguf_files(gguf_model: Path, tmp_path: Path, method: str, whole_folder: bool) -> None:
    """They need no config.json: the tensors have the shapes."""
    source, out = gguf_model.parent if whole_folder else gguf_model, tmp_path / "packed"
    assert f"2 layers as {method}" in invoke("quantize", source, "-m", method, "-o", out)
    assert f"The source, {source}, has not changed." in invoke("verify", out)
    assert_same_layers(ref.Shape(hidden=256, inter=512, experts=5, top_k=2), method, out, source)


@pytest.mark.parametrize("names", ["old", "fused"])
def test_other_names_in_gguf_files(tmp_path: Path, names: str) -> None:
    stacks = gguf_files.random_stacks(("Q8_0",) * 3, 3, 64, 32)
    tensors = gguf_files.old_tensors(stacks, 0) if names == "old" else gguf_files.fused_tensors(stacks, 0)
    file = gguf_files.write(tmp_path / "m.gguf", tensors)
    invoke("quantize", file, "-o", tmp_path / "packed")
    info = verify_packed(next((tmp_path / "packed").glob("ktmoe-layer-*")))
    assert (info.hidden, info.inter, info.n_experts) == (64, 32, 3)


def test_gguf_files_that_quantize_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(tensors: gguf_files.Tensors) -> str:
        file = gguf_files.write(tmp_path / "m.gguf", tensors)
        return fails(monkeypatch, capsys, "quantize", file, "-o", tmp_path / "packed")

    small, large = (gguf_files.random_stacks(("Q8_0",) * 3, 2, hidden, 32) for hidden in (64, 96))
    first = gguf_files.layer_tensors(small, 0)
    assert "layer 1: got hidden, inter, gated = (96, 32, True), but (64, 32, True) in layer 0" in refused(
        first | gguf_files.layer_tensors(large, 1)
    )
    assert "no layer has experts" in refused({"blk.0.ffn_up.weight": first["blk.0.ffn_up_exps.weight"]})
    del first["blk.0.ffn_down_exps.weight"]
    assert "layer 0: there is no stack of down" in refused(first)
    missing = tmp_path / "none.gguf"
    assert f"{missing}: cannot be opened" in fails(monkeypatch, capsys, "quantize", missing, "-o", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("GGML")
    text = fails(monkeypatch, capsys, "quantize", tmp_path / "notes.txt", "-o", tmp_path / "out")
    assert "there is no model folder or GGUF file" in text
    assert not (tmp_path / "packed").exists()


def test_finished_layers_are_not_packed_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "packed"
    invoke("quantize", model, "-o", out)
    before = image(out)
    (out / "ktmoe-layer-00001.safetensors").write_bytes(before["ktmoe-layer-00001.safetensors"][:9000])
    packed: list[str] = []
    commit = PackedWriter.commit
    monkeypatch.setattr(PackedWriter, "commit", lambda self: (packed.append(self.path), commit(self)))
    for finished in (1, 2):
        assert f"{finished} of them were finished" in invoke("quantize", model, "-o", out)
    assert packed == [str(out / "ktmoe-layer-00001.safetensors")]  # the damaged one, once
    assert image(out) == before


def in_a_fork(work: Callable[[], None]) -> int:
    """The signal that ended `work` in a forked child; 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_any_step(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before a call that changes a file: no wrong file, and the next run ends with the same bytes."""
    whole = tmp_path / "whole"
    invoke("quantize", model, "-o", whole)
    expected = image(whole)
    steps = 0

    def quantize(out: Path) -> None:
        job = PackedModel(str(model), out, "AMXINT8", 1)
        job.prepare()
        job.run()

    def count_down(function: Any, left: list[int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def killed_at(step: int, out: Path) -> bool:
        def work() -> None:
            left = [step]
            for name in STEPS:
                setattr(os, name, count_down(getattr(os, name), left))
            quantize(out)

        return in_a_fork(work) == -signal.SIGKILL

    step = 1
    while killed_at(step, out := tmp_path / f"killed-{step}"):
        left = image(out)
        assert all(expected[name] == data for name, data in left.items()), step
        quantize(out)
        assert image(out) == expected, step
        assert not list(out.glob("*.part")), step
        steps += 1
        step += 1 + steps // 12  # every step at first, then some
    assert steps > 15


def test_ctrl_c(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "packed", []
    commit = PackedWriter.commit

    def interrupt(self: PackedWriter) -> None:
        calls.append(self.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        commit(self)

    with monkeypatch.context() as patch:
        patch.setattr(PackedWriter, "commit", interrupt)
        text = invoke("quantize", model, "-o", out, code=130)
    assert "Interrupted: 1 of 2 layers are finished. The same command goes on." in text
    assert sorted(os.listdir(out)) == ["ktmoe-layer-00001.safetensors", "ktmoe-packed.json"]
    invoke("quantize", model, "-o", out)
    invoke("verify", out)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("RAWINT4", {"group_size": 128, "zero_point": True}, "int4_g128z"),
        ("AMXINT4_KGroup_SFT", {"group_size": 64}, "int4_g64"),
        ("LLAMAFILE", {"gguf_type": "Q8_0"}, "q8_0"),
        ("LLAMAFILE_SFT", {}, "q4_k"),
    ],
    ids=str,
)
def test_what_floats_become(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: dict[str, Any],
    expected: str,
) -> None:
    out = tmp_path / "packed"
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    invoke("quantize", model, "-o", out, "-m", method, *flags)
    invoke("verify", out)
    wrapper = ref.make(SHAPE, method, weight_path=out, layer_idx=LAYERS[0])
    wrapper.load_weights()
    assert (wrapper.layer.format, wrapper.layer.down_format) == (expected, expected)
    direct = ref.loaded(SHAPE, method, seed=LAYERS[0], **options)
    batch = ref.batch(SHAPE, 5)
    rest = (False,) if wrapper.mode == "sft" else ()
    assert torch.equal(wrapper.forward(*batch, *rest), direct.forward(*batch, *rest))
    before = image(out)
    text = fails(
        monkeypatch, capsys, "quantize", model, "-o", out, "-m", method, "--group-size", 32, "--gguf-type", "Q4_0"
    )
    assert "as other options make it: choose another folder" in " ".join(text.split())
    assert image(out) == before


def test_options_that_do_not_exist(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value in (("--group-size", 48), ("--gguf-type", "Q9")):
        text = fails(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "packed", flag, value)
        assert f"got {value!r}, expected" in text
    assert not (tmp_path / "packed").exists()


def test_places_that_quantize_refuses(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    invoke("quantize", model, "-o", out)
    before = image(out)
    assert "another method (AMXINT8, not BF16)" in fails(
        monkeypatch, capsys, "quantize", model, "-o", out, "-m", "BF16"
    )
    os.utime(next(model.glob("*.safetensors")))
    assert "another source" in fails(monkeypatch, capsys, "quantize", model, "-o", out)
    assert image(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("")
    text = fails(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "full")
    assert "is not empty and holds no packed experts" in text
    assert "there is no model folder or GGUF file" in fails(
        monkeypatch, capsys, "quantize", tmp_path / "none", "-o", out
    )
    assert "Method FAST not supported" in fails(monkeypatch, capsys, "quantize", model, "-o", out, "-m", "FAST")
    (model / "config.json").write_text("{}")
    text = fails(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "new")
    assert f"{model}/config.json: got no positive number 'num_hidden_layers'" in text
    assert not (tmp_path / "new").exists()


def test_disk_that_is_too_small(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "GiB of disk space" in fails(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "packed")
    assert not image(tmp_path / "packed")


def test_verify_names_every_fault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    invoke("quantize", model, "-o", out)
    first, second = sorted(out.glob("ktmoe-layer-*"))
    data = bytearray(first.read_bytes())
    data[4096 + 3 * verify_packed(first).expert_bytes] ^= 1
    first.write_bytes(data)
    second.unlink()
    os.utime(next(model.glob("*.safetensors")))
    errors = fails(monkeypatch, capsys, "verify", out)
    assert f"Wrong: {first}: expert 3 is damaged" in errors
    assert f"Wrong: {second}: missing" in errors
    assert f"Wrong: {model}: the weight files are not those that were packed" in errors
    first.write_bytes(data[:5000])
    assert f"Wrong: {first}: " in fails(monkeypatch, capsys, "verify", out)
    assert "ktmoe-packed.json: cannot be opened" in fails(monkeypatch, capsys, "verify", tmp_path)


def test_verify_without_the_source(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    invoke("quantize", model, "-o", out)
    os.rename(model, tmp_path / "moved")
    assert f"The source, {model}, cannot be reached." in invoke("verify", out)
    invoke("quantize", tmp_path / "moved", "-o", out)  # the same files elsewhere


def test_verify_of_what_cpu_save_keeps(model: Path) -> None:
    ref.make(SHAPE, "BF16", layer_idx=1, weight_path=model, cpu_save=True).load_weights()
    text = invoke("verify", model / "ktmoe-BF16")
    assert "1 layers as BF16" in text
    assert "has not changed" in text


def test_hub_id(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[object] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((repo, revision))
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    invoke("quantize", "org/model", "--revision", "v1", "-o", tmp_path / "packed")
    assert asked == ["org/model", "v1"]
    assert len(image(tmp_path / "packed")) == 2


def test_cache_verb_and_doctor(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmoe import cache
    from ktmoe.cli import checks

    def doctor_row() -> str:
        return next(row.found for row in checks.run_checks() if row.check == "cache")

    assert "off" in invoke("cache")
    assert "off" in doctor_row()
    monkeypatch.setenv("KTMOE_CACHE", str(tmp_path / "cache"))
    assert "0.00 GiB, 0 model(s)" in doctor_row()
    folder = cache.entry_folder([model / "x.safetensors"], "BF16")
    assert folder is not None
    folder.mkdir(parents=True)
    with (folder / "ktmoe-layer-00001.safetensors").open("wb") as file:
        file.truncate(3 * 2**29)
    assert "1.50 GiB, 1 model(s)" in doctor_row()
    listing = invoke("cache", "list")
    assert folder.name in listing
    assert "1.50 GiB" in listing
    assert "Freed 1.50 GiB" in invoke("cache", "clear")
    assert not folder.exists()
    assert "0.00 GiB, 0 model(s)" in doctor_row()


def test_names_of_cache_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmoe import cache

    monkeypatch.setenv("KTMOE_CACHE", str(tmp_path))

    def name(path: str, method: str = "BF16") -> str:
        folder = cache.entry_folder([Path(path)], method)
        assert folder is not None
        assert folder.parent == tmp_path / "packed"
        return folder.name

    hub = "/home/u/.cache/huggingface/hub/models--Qwen--Qwen3-30B-A3B/snapshots"
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert name(f"{hub}/{commit}/model.safetensors") == "Qwen--Qwen3-30B-A3B@0123456789ab-BF16"
    names = {
        name(f"{hub}/{commit[::-1]}/model.safetensors"),
        name("/a/model/x.safetensors"),
        name("/b/model/x.safetensors"),
        name("/b/model/x.safetensors", "AMXINT8"),
        name("/c/my models: new/x.safetensors"),
    }
    assert len(names) == 5
    for value in ("off", "OFF", "0"):
        monkeypatch.setenv("KTMOE_CACHE", value)
        assert cache.root() is None
    monkeypatch.delenv("KTMOE_CACHE")
    monkeypatch.setenv("HOME", "/home/u")
    assert cache.root() == Path("/home/u/.cache/ktmoe")


def test_packing_needs_little_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert is packed at a time: the engine never holds a layer."""
    held: list[int] = []
    use = packing.read_ahead

    def spy(read: Any, items: Any, work: Any) -> None:
        packer = next(cell.cell_contents for cell in work.__closure__ if hasattr(cell.cell_contents, "layer"))

        def watched(item: Any, value: Any) -> None:
            work(item, value)
            held.append(packer.layer.packed_bytes // packer.layer.expert_bytes)

        use(read, items, watched)

    monkeypatch.setattr(packing, "read_ahead", spy)
    invoke("quantize", model, "-o", tmp_path / "packed")
    assert held == [1] * (len(LAYERS) * SHAPE.experts)


@pytest.mark.parametrize("family", ["nemotron_h", "gpt_oss"])
@pytest.mark.parametrize("method", ["AMXINT4", "BF16"])
def test_experts_without_a_gate_or_with_biases(tmp_path: Path, family: str, method: str) -> None:
    from hf.tiny_models import tokens

    from ktmoe.hf import from_pretrained

    folder, packed = make_checkpoint(family, tmp_path / "model"), tmp_path / "packed"
    invoke("quantize", folder, "-m", method, "-o", packed)
    invoke("verify", packed)
    with torch.no_grad():
        expected = from_pretrained(folder, method, cache=False)(tokens()).logits
        assert torch.equal(from_pretrained(folder, method, packed=packed)(tokens()).logits, expected)
