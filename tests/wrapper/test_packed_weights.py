"""Layers on mapped files: cpu_save, folders of packed layers, and files that do not fit."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_oracle as ref
from hostile_files import per_expert, save_sharded

from ktmoe import _ext
from ktmoe.base import BaseMoEWrapper
from ktmoe.errors import WeightFileError
from ktmoe.io.experts import ExpertSource
from ktmoe.io.fingerprint import folder_fingerprint
from ktmoe.io.packed_dir import PackedIndex, write_packed_index
from ktmoe.io.packed_file import layer_file, open_packed
from ktmoe.io.packed_verify import verify_packed
from ktmoe.io.published import plain_expert
from ktmoe.packing import pack_layer

SHAPE = ref.Shape()
LAYER = 3  # of ref.make
Params = dict[str, Any]
METHODS = [*ref.INFERENCE, *ref.SFT]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return save_sharded(tmp_path / "model", per_expert(ref.weights(SHAPE, seed=LAYER), LAYER))


def run(wrapper: BaseMoEWrapper) -> torch.Tensor:
    return wrapper.forward(*ref.batch(SHAPE, 5), *([False] if wrapper.mode == "sft" else []))


def pack(folder: Path, method: str, layer: int = LAYER, source: str = "s", **index: object) -> Path:
    """A folder of one packed layer."""
    fields: dict[str, object] = {"method": method, "layout_version": _ext.LAYOUT_VERSION, "source": source}
    write_packed_index(str(folder), PackedIndex(**(fields | index)))  # type: ignore[arg-type]
    wrapper = ref.make(SHAPE, method, layer_idx=layer)
    gate, up, down = ref.weights(SHAPE, seed=LAYER)
    info = wrapper.packed_info(SHAPE.experts, source)
    pack_layer(wrapper.packer(), lambda e: plain_expert(gate[e], up[e], down[e]), info, str(folder / layer_file(layer)))
    return folder


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertSource, "read", lambda *_: pytest.fail("a source weight was read"))
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", lambda *_: pytest.fail("an expert was packed"))


# --- cpu_save -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_cpu_save_is_mapped_the_next_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    expected = run(ref.loaded(SHAPE, method, seed=LAYER))
    seen: list[int] = []
    first = ref.make(SHAPE, method, weight_path=checkpoint, cpu_save=True)
    first.load_weights(progress=seen.append)
    assert seen == [2 * 3 * SHAPE.hidden * SHAPE.inter] * SHAPE.experts
    assert torch.equal(run(first), expected)
    assert verify_packed(checkpoint / f"ktmoe-{method}" / layer_file(LAYER)).method == method
    no_reading(monkeypatch)
    for cpu_save in (False, True):
        second = ref.make(SHAPE, method, weight_path=checkpoint, cpu_save=cpu_save)
        second.load_weights()
        assert torch.equal(run(second), expected)


def test_cpu_save_of_tensors(tmp_path: Path) -> None:
    """Also where there is no checkpoint at all, and again with other weights."""
    for seed in (1, 2):
        ref.make(SHAPE, "BF16", weight_path=tmp_path, cpu_save=True).load_weights_from_tensors(
            *ref.weights(SHAPE, seed)
        )
        wrapper = ref.make(SHAPE, "BF16", weight_path=tmp_path)
        wrapper.load_weights()
        assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, "BF16", seed=seed)))


def test_cpu_save_follows_the_source(checkpoint: Path, tmp_path: Path) -> None:
    """A changed checkpoint is read, not what was kept of the old one."""
    ref.make(SHAPE, "BF16", weight_path=checkpoint, cpu_save=True).load_weights()
    save_sharded(checkpoint, per_expert(ref.weights(SHAPE, seed=9), LAYER))
    expected = run(ref.loaded(SHAPE, "BF16", seed=9))
    for cpu_save in (False, True, False):
        wrapper = ref.make(SHAPE, "BF16", weight_path=checkpoint, cpu_save=cpu_save)
        wrapper.load_weights()
        assert torch.equal(run(wrapper), expected)


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("RAWINT4", {"group_size": 32}, {"group_size": 64}),
        ("AMXINT4_KGroup_SFT", {"zero_point": True}, {}),
        ("LLAMAFILE", {"gguf_type": "Q8_0"}, {"gguf_type": "Q4_0"}),
    ],
    ids=str,
)
def test_cpu_save_follows_the_parameters(checkpoint: Path, method: str, first: Params, second: Params) -> None:
    """What was kept in another format is not what these parameters ask for."""
    ref.make(SHAPE, method, weight_path=checkpoint, cpu_save=True, **first).load_weights()
    expected = run(ref.loaded(SHAPE, method, seed=LAYER, **second))
    for cpu_save in (False, True, False):
        wrapper = ref.make(SHAPE, method, weight_path=checkpoint, cpu_save=cpu_save, **second)
        wrapper.load_weights()
        assert torch.equal(run(wrapper), expected)


def test_cpu_save_of_tensors_alone_is_used_whatever_the_parameters(tmp_path: Path) -> None:
    kept = ref.make(SHAPE, "LLAMAFILE", weight_path=tmp_path, cpu_save=True, gguf_type="Q8_0")
    kept.load_weights_from_tensors(*ref.weights(SHAPE))
    wrapper = ref.make(SHAPE, "LLAMAFILE", weight_path=tmp_path)
    wrapper.load_weights()
    assert torch.equal(run(wrapper), run(kept))


def test_cpu_save_is_used_where_the_files_cannot_be_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GGUF files without the package gguf."""
    kept = ref.make(SHAPE, "LLAMAFILE", weight_path=checkpoint, cpu_save=True, gguf_type="Q8_0")
    kept.load_weights()

    def refuse(_: BaseMoEWrapper) -> None:
        raise ImportError("gguf")

    monkeypatch.setattr(BaseMoEWrapper, "_open_source", refuse)
    wrapper = ref.make(SHAPE, "LLAMAFILE", weight_path=checkpoint)
    wrapper.load_weights()
    assert torch.equal(run(wrapper), run(kept))


def test_cpu_save_with_a_damaged_file(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    ref.make(SHAPE, "BF16", weight_path=checkpoint, cpu_save=True).load_weights()
    kept = checkpoint / "ktmoe-BF16" / layer_file(LAYER)
    kept.write_bytes(kept.read_bytes()[:5000])
    wrapper = ref.make(SHAPE, "BF16", weight_path=checkpoint)
    wrapper.load_weights()
    assert str(kept) in caplog.text
    assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, "BF16", seed=LAYER)))


def test_cpu_save_keeps_all_experts_whatever_is_on_the_gpu(checkpoint: Path) -> None:
    mapping, mask = torch.tensor([4, 4, 0, 1, 2]), torch.tensor([False, True, False, False, True])
    options = {"weight_path": checkpoint, "gpu_experts_mask": mask}
    saved = ref.make(SHAPE, "AMXINT8", cpu_save=True, **options)
    saved.load_weights(mapping)
    assert saved.layer.packed_bytes == 3 * saved.layer.expert_bytes
    mapped = ref.make(SHAPE, "AMXINT8", **options)
    mapped.load_weights(mapping)
    want = ref.make(SHAPE, "AMXINT8", gpu_experts_mask=mask)
    want.load_weights_from_tensors(*ref.weights(SHAPE, seed=LAYER), mapping)
    assert torch.equal(run(saved), run(want))
    assert torch.equal(run(mapped), run(want))
    whole = ref.make(SHAPE, "AMXINT8", weight_path=checkpoint)
    whole.load_weights()
    assert torch.equal(run(whole), run(ref.loaded(SHAPE, "AMXINT8", seed=LAYER)))


def test_cpu_save_without_a_place(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^weight_path: got '', expected a folder"):
        ref.make(SHAPE, "BF16", cpu_save=True).load_weights_from_tensors(*ref.weights(SHAPE))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    wrapper = ref.make(SHAPE, "BF16", weight_path=checkpoint, cpu_save=True)
    with pytest.raises(OSError, match="No space left"):
        wrapper.load_weights()
    assert not wrapper.loaded
    assert not list((checkpoint / "ktmoe-BF16").glob("ktmoe-layer*"))


# --- folders of packed layers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", METHODS)
@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
def test_methods_with_the_same_formats_share_files(tmp_path: Path, method: str, other: str) -> None:
    wrapper = ref.make(SHAPE, other, weight_path=pack(tmp_path, method))
    same = ref.make(SHAPE, method).layer.format == wrapper.layer.format
    if same:
        wrapper.load_weights()
        assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, other, seed=LAYER)))
    else:
        with pytest.raises(WeightFileError, match=rf"{layer_file(LAYER)}: method: got {method} .*, expected {other}"):
            wrapper.load_weights()
        assert not wrapper.loaded


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hidden_size": 104}, "hidden: got 72, expected 104"),
        ({"moe_intermediate_size": 41}, "inter: got 40, expected 41"),
        ({"num_experts": 6}, "got 5 experts, expected num_experts=6"),
        ({"layer_idx": 4}, r"holds no packed layer 4 \(there are: 3\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, options: dict[str, int], text: str) -> None:
    wrapper = ref.make(SHAPE, "BF16", weight_path=pack(tmp_path, "BF16"), **options)
    with pytest.raises(WeightFileError, match=f"{re.escape(str(tmp_path))}.*{text}"):
        wrapper.load_weights()
    assert not wrapper.loaded


def test_a_file_under_the_name_of_another_layer(tmp_path: Path) -> None:
    pack(tmp_path, "BF16")
    os.rename(tmp_path / layer_file(LAYER), tmp_path / layer_file(4))
    with pytest.raises(WeightFileError, match="layer: got 3, expected 4"):
        ref.make(SHAPE, "BF16", weight_path=tmp_path, layer_idx=4).load_weights()


def test_another_layout_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = _ext.LAYOUT_VERSION
    pack(tmp_path, "BF16")
    monkeypatch.setattr(_ext, "LAYOUT_VERSION", version + 1)
    with pytest.raises(WeightFileError, match=f"layout_version: got {version}, expected {version + 1}"):
        ref.make(SHAPE, "BF16", weight_path=tmp_path).load_weights()


@pytest.mark.parametrize("index", [{"source": "t"}, {"method": "AMXINT8"}, {"layout_version": 99}])
def test_a_file_from_another_folder(tmp_path: Path, index: dict[str, object]) -> None:
    pack(tmp_path, "BF16", source="s")
    fields = {"method": "BF16", "layout_version": _ext.LAYOUT_VERSION, "source": "s"} | index
    write_packed_index(str(tmp_path), PackedIndex(**fields))  # type: ignore[arg-type]
    with pytest.raises(
        WeightFileError, match=rf"{layer_file(LAYER)}: {next(iter(index))}: got .*, but ktmoe-packed.js"
    ):
        ref.make(SHAPE, "BF16", weight_path=tmp_path).load_weights()


def test_an_unfinished_folder(tmp_path: Path) -> None:
    pack(tmp_path, "BF16", layers=(LAYER, 7))
    with pytest.raises(WeightFileError, match=r"00007.safetensors: missing: packing was not finished. Run `ktmoe qua"):
        ref.make(SHAPE, "BF16", weight_path=tmp_path, layer_idx=7).load_weights()


BAD_INDEX = {
    "no JSON": (b"{", "not valid JSON"),
    "a list": (b"[]", "got a JSON list, expected an object"),
    "not ours": (b'{"ktmoe_packed": 2}', "'ktmoe_packed': got 2, expected 1"),
    "no method": (b'{"ktmoe_packed": 1, "layout_version": 1}', "'method': got None, expected a text"),
    "bad layers": (b'{"ktmoe_packed": 1, "layers": [1, -1]}', "'layers': got"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index(tmp_path: Path, case: str) -> None:
    data, text = BAD_INDEX[case]
    (tmp_path / "ktmoe-packed.json").write_bytes(data)
    with pytest.raises(WeightFileError, match=rf"ktmoe-packed\.json: {text}"):
        ref.make(SHAPE, "BF16", weight_path=tmp_path).load_weights()


def test_a_load_that_fails_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    wrapper = ref.make(SHAPE, "BF16", weight_path=pack(tmp_path, "BF16"))
    wrapper.load_weights()
    before = run(wrapper)
    (tmp_path / layer_file(LAYER)).unlink()
    with pytest.raises(WeightFileError):
        wrapper.load_weights()
    assert torch.equal(run(wrapper), before)
    with pytest.raises(ValueError, match=r"physical_to_logical_map\[4\]: got 5, expected 0..4"):
        ref.make(SHAPE, "BF16", weight_path=pack(tmp_path, "BF16")).load_weights(torch.tensor([0, 1, 2, 3, 5]))


# --- what the bytes depend on ---------------------------------------------------------------------------------------
PACK_HERE = """
import sys
sys.path.insert(0, {tests!r})
import torch_oracle as ref
wrapper = ref.make(ref.Shape(), {method!r}, weight_path={source!r}, cpu_save=True, cpuinfer_threads={threads})
wrapper.load_weights()
print(wrapper.layer.isa)
"""


@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
def test_bytes_do_not_depend_on_isa_and_threads(checkpoint: Path, method: str) -> None:
    path = checkpoint / f"ktmoe-{method}" / layer_file(LAYER)
    images = {}
    for isa, threads in ((_ext.isa_levels()[0], 2), ("portable", 1), ("portable", 3)):
        code = PACK_HERE.format(
            tests=str(Path(__file__).parents[1]), method=method, source=str(checkpoint), threads=threads
        )
        child = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"KTMOE_ISA": isa},
        )
        assert child.stdout.strip() == isa
        images[isa, threads] = path.read_bytes()
        path.unlink()
    assert len(set(images.values())) == 1


SHARE = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch_oracle as ref
shape = ref.Shape(experts=8, top_k=8, hidden=512, inter=256)
wrapper = ref.make(shape, "BF16", weight_path={folder!r})
wrapper.load_weights()
wrapper.forward(*ref.batch(shape, 4))
print("ready", flush=True)
sys.stdin.readline()
fields = {{}}
for line in open("/proc/self/smaps"):
    words = line.split()
    if not words[0].endswith(":"):
        ours = line.rstrip().endswith("ktmoe-layer-00003.safetensors")
    elif ours and words[-1] == "kB":
        fields[words[0][:-1]] = fields.get(words[0][:-1], 0) + int(words[1])
print(fields["Rss"], fields["Shared_Clean"] + fields["Shared_Dirty"], fields["Private_Dirty"])
"""


def test_processes_share_the_memory(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, experts=8, top_k=8, hidden=512, inter=256)
    saved = ref.make(shape, "BF16", weight_path=tmp_path, cpu_save=True)
    saved.load_weights_from_tensors(*ref.weights(shape))
    size = open_packed(tmp_path / "ktmoe-BF16" / layer_file(LAYER)).experts.nbytes / 1024
    del saved
    code = SHARE.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    assert children[0].stdin is not None
    out, _ = children[0].communicate("\n")
    rss, shared, private_dirty = map(int, out.split())
    children[1].communicate("\n")
    assert rss >= 0.9 * size
    assert shared == rss
    assert private_dirty == 0


# --- fingerprints ---------------------------------------------------------------------------------------------------
def test_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = folder_fingerprint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("not a weight")
    (tmp_path / "ktmoe-BF16").mkdir()
    assert folder_fingerprint(str(tmp_path)) == folder_fingerprint(str(tmp_path / "model.safetensors")) == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    second = folder_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    third = folder_fingerprint(str(tmp_path))
    (tmp_path / "more.safetensors").write_bytes(b"")
    assert len({first, second, third, folder_fingerprint(str(tmp_path))}) == 4


def test_fingerprint_of_a_content_addressed_store(tmp_path: Path) -> None:
    """Links into blobs, as in the Hugging Face cache: the same blob downloaded again is the same source."""
    for name in ("blobs", "snapshots/abc"):
        (tmp_path / name).mkdir(parents=True)
    link = tmp_path / "snapshots" / "abc" / "model.safetensors"
    prints = []
    for digest, time in (("aaaa", 1), ("aaaa", 2), ("bbbb", 2)):
        blob = tmp_path / "blobs" / digest
        blob.write_bytes(b"1234")
        os.utime(blob, ns=(time, time))
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / ".." / "blobs" / digest)
        prints.append(folder_fingerprint(str(link.parent)))
    assert prints[0] == prints[1] != prints[2]


def test_a_reload_lets_go_of_the_old_mapping(tmp_path: Path) -> None:
    wrapper = ref.make(SHAPE, "BF16", weight_path=pack(tmp_path, "BF16"))

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    for _ in range(3):
        wrapper.load_weights()
        assert mappings() == 1
    del wrapper
    assert mappings() == 0
