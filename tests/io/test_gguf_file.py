"""The experts of a layer in GGUF files: layouts, types, splits, and what is refused."""

import os
import shutil

import gguf
import gguf_files as files
import numpy as np
import pytest
import torch

from ktmoe.errors import WeightFileError
from ktmoe.io import gguf_types, index_json
from ktmoe.io.gguf_file import GgufSource, is_gguf
from ktmoe.io.published import dequantize, quantize

E, HIDDEN, INTER, LAYER = 3, 256, 512, 3
NATIVE = {
    "Q4_0": "q4_0",
    "Q8_0": "q8_0",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "IQ4_NL": "iq4_nl",
    "MXFP4": "mxfp4",
}
OTHER = [t for t in files.TYPES if t not in (*NATIVE, "F32", "F16", "BF16")]
LAYOUTS = {"stacks": files.layer_tensors, "fused": files.fused_tensors, "old": files.old_tensors}


def source(path) -> GgufSource:
    return GgufSource(str(path), LAYER, HIDDEN, INTER)


def checkpoint(folder, types, layout="stacks", name="model.gguf", per_file=0):
    """Two layers with other weights each, and other tensors. Returns (path, stacks of LAYER)."""
    tensors = {"token_embd.weight": ("F32", files.random_rows("F32", (4, HIDDEN), np.random.default_rng(9)))}
    for layer in (LAYER, LAYER + 30):
        tensors |= LAYOUTS[layout](files.random_stacks(types, E, HIDDEN, INTER, seed=layer), layer)
        tensors[f"blk.{layer}.ffn_gate_shexp.weight"] = ("F32", np.zeros((2, HIDDEN), np.float32).view(np.uint8))
        tensors[f"blk.{layer}.ffn_norm.weight"] = ("F32", np.zeros(HIDDEN, np.float32).view(np.uint8))
    return files.write(folder / name, tensors, per_file), files.random_stacks(types, E, HIDDEN, INTER, seed=LAYER)


def decoded(stack, expert):
    kind, rows = stack
    return torch.from_numpy(files.decode(kind, rows[expert]).copy())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", NATIVE)
def test_native_types_byte_by_byte(tmp_path, kind, layout) -> None:
    path, stacks = checkpoint(tmp_path, (kind,) * 3, layout)
    with source(path) as opened:
        assert (opened.kind, opened.n_experts, opened.formats) == ("gguf", E, (NATIVE[kind],) * 2)
        for expert in range(E):
            matrices = opened.read(expert)
            assert [m.shape for m in matrices] == [(INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)]
            for matrix, (_, rows), stack in zip(matrices, stacks, stacks, strict=True):
                assert matrix.format == NATIVE[kind]
                assert np.array_equal(matrix.parts[0].numpy(), rows[expert])
                assert torch.equal(dequantize(matrix), decoded(stack, expert))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_become_bf16(tmp_path, kind, layout) -> None:
    path, stacks = checkpoint(tmp_path, (kind,) * 3, layout)
    with source(path) as opened:
        assert opened.formats == ("bf16", "bf16")
        for matrix, stack in zip(opened.read(1), stacks, strict=True):
            assert matrix.parts[0].dtype is torch.bfloat16
            assert torch.equal(matrix.parts[0], decoded(stack, 1).bfloat16())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("layout", ["stacks", "fused"])
def test_biases(tmp_path, layout, kind) -> None:
    stacks = files.random_stacks(("Q8_0",) * 3, E, HIDDEN, INTER)
    tensors = LAYOUTS[layout](stacks, LAYER)
    rng = np.random.default_rng(1)
    roles = {"gate": INTER, "up": INTER} if layout == "stacks" else {"gate_up": 2 * INTER}
    roles["down"] = HIDDEN
    made = {role: files.random_rows(kind, (E, n), rng) for role, n in roles.items()}
    tensors |= {f"blk.{LAYER}.ffn_{role}_exps.bias": (kind, rows) for role, rows in made.items()}
    values = {role: torch.from_numpy(files.decode(kind, rows).copy()) for role, rows in made.items()}
    if layout == "fused":
        values["gate"], values["up"] = values.pop("gate_up").chunk(2, 1)
    with source(files.write(tmp_path / "m.gguf", tensors)) as opened:
        for e in range(E):
            got = opened.biases(e)
            assert got.keys() == {"gate_bias", "up_bias", "down_bias"}
            assert all(torch.equal(bias, values[name.removesuffix("_bias")][e]) for name, bias in got.items())


@pytest.mark.parametrize("layout", ["stacks", "old"])
def test_without_a_gate(tmp_path, layout) -> None:
    path, stacks = checkpoint(tmp_path, ("Q4_K", "Q4_K", "Q8_0"), layout)
    with pytest.raises(WeightFileError, match=r"ffn_gate\S* is a gate, but the layer has experts without one"):
        GgufSource(str(path), LAYER, HIDDEN, INTER, gated=False)
    tensors = {n: t for n, t in LAYOUTS[layout](stacks, LAYER).items() if "gate" not in n}
    with GgufSource(str(files.write(tmp_path / "n.gguf", tensors)), LAYER, HIDDEN, INTER, gated=False) as opened:
        assert (opened.n_experts, opened.formats) == (E, ("q4_k", "q8_0"))
        for e in range(E):
            gate, up, down = opened.read(e)
            assert gate is None
            assert torch.equal(dequantize(up), decoded(stacks[1], e))
            assert torch.equal(dequantize(down), decoded(stacks[2], e))


@pytest.mark.parametrize("kind", OTHER)
def test_other_types_become_q8_0(tmp_path, kind) -> None:
    path, stacks = checkpoint(tmp_path, (kind,) * 3)
    with source(path) as opened:
        assert opened.formats == ("q8_0", "q8_0")
        for matrix, stack in zip(opened.read(2), stacks, strict=True):
            weights = decoded(stack, 2)
            assert np.array_equal(
                matrix.parts[0].numpy(), gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q8_0)
            )
            assert matrix.shape == tuple(weights.shape)
            # Half a step of 1/127 of the largest of 32, whose fp16 scale has 11 bits, and 2**-24 as its smallest step.
            largest = weights.view(-1, 32).abs().amax(1).repeat_interleave(32).view_as(weights)
            assert ((dequantize(matrix) - weights).abs() <= largest * (0.5 / 127 + 2.0**-11) + 127 * 2.0**-25).all()


MIXED = [
    (("Q4_K", "Q4_K", "Q6_K"), ("q4_k", "q6_k")),
    (("Q4_K", "Q6_K", "Q8_0"), ("q8_0", "q8_0")),
    (("Q4_K", "Q5_0", "Q4_K"), ("q8_0", "q4_k")),
    (("F16", "Q4_K", "IQ4_NL"), ("bf16", "iq4_nl")),
    (("F16", "F32", "Q5_1"), ("bf16", "q8_0")),
    (("IQ4_XS", "IQ4_XS", "F16"), ("q8_0", "bf16")),
]


@pytest.mark.parametrize("layout", ["stacks", "old"])
@pytest.mark.parametrize(("types", "formats"), MIXED)
def test_mixed_types(tmp_path, types, formats, layout) -> None:
    path, stacks = checkpoint(tmp_path, types, layout)
    with source(path) as opened:
        assert opened.formats == formats
        for matrix, stack, format in zip(opened.read(0), stacks, (formats[0], *formats), strict=True):
            assert matrix.format == format
            if NATIVE.get(stack[0]) == format:
                assert np.array_equal(matrix.parts[0].numpy(), stack[1][0])
            else:
                want = quantize(decoded(stack, 0), format)
                assert torch.equal(matrix.parts[0], want.parts[0])


def test_old_files_may_change_the_type_between_experts(tmp_path) -> None:
    tensors = files.old_tensors(files.random_stacks(("Q4_K",) * 3, E, HIDDEN, INTER), LAYER)
    other = files.old_tensors(files.random_stacks(("Q6_K",) * 3, E, HIDDEN, INTER), LAYER)
    name = f"blk.{LAYER}.ffn_down.2.weight"
    tensors[name] = other[name]
    with source(files.write(tmp_path / "m.gguf", tensors)) as opened:
        assert opened.formats == ("q4_k", "q8_0")
        want = torch.from_numpy(files.decode("Q6_K", other[name][1]).copy())
        assert torch.equal(opened.read(2)[2].parts[0], quantize(want, "q8_0").parts[0])


@pytest.mark.parametrize("by", ["first file", "third file", "folder"])
def test_split_files(tmp_path, by) -> None:
    first, stacks = checkpoint(tmp_path, ("Q4_K", "Q4_K", "Q6_K"), per_file=2)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 3
    path = {"first file": first, "third file": parts[2], "folder": tmp_path}[by]
    with source(path) as opened:
        for expert in range(E):
            for matrix, (_, rows) in zip(opened.read(expert), stacks, strict=True):
                assert np.array_equal(matrix.parts[0].numpy(), rows[expert])


def test_a_folder_with_one_file_and_a_projector(tmp_path) -> None:
    _, stacks = checkpoint(tmp_path, ("Q8_0",) * 3)
    shutil.copy(tmp_path / "model.gguf", tmp_path / "mmproj-f16.gguf")
    (tmp_path / "config.json").write_text("{}")
    with source(tmp_path) as opened:
        assert np.array_equal(opened.read(0)[0].parts[0].numpy(), stacks[0][1][0])


def test_what_counts_as_gguf(tmp_path) -> None:
    path, _ = checkpoint(tmp_path, ("Q8_0",) * 3)
    blob = tmp_path / "sha256-0123"
    shutil.copy(path, blob)
    (tmp_path / "x.bin").write_bytes(b"other")
    assert is_gguf(str(path))
    assert is_gguf(str(blob))
    assert is_gguf(str(tmp_path))
    assert is_gguf("/no/such/file.gguf")
    assert not is_gguf(str(tmp_path / "x.bin"))
    assert not is_gguf("/no/such/folder")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_gguf(str(tmp_path))
    assert is_gguf(str(tmp_path), prefer=True)
    with source(blob) as opened:
        assert opened.n_experts == E


def test_one_expert_in_memory_at_a_time(tmp_path, monkeypatch) -> None:
    path, stacks = checkpoint(tmp_path, ("Q4_K", "Q4_K", "Q6_K"))
    sizes = []
    original = os.preadv

    def preadv(descriptor, buffers, offset):
        sizes.append(sum(len(b) for b in buffers))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with source(path) as opened:
        assert sizes == []
        opened.read(1)
        assert sizes == [rows[1].nbytes for _, rows in stacks]


def test_short_reads_are_continued(tmp_path, monkeypatch) -> None:
    path, stacks = checkpoint(tmp_path, ("Q8_0",) * 3)
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: original(fd, [buffers[0][:1000]], at))
    with source(path) as opened:
        assert np.array_equal(opened.read(1)[2].parts[0].numpy(), stacks[2][1][1])


def change(**edits):
    """Renames (value is a name) or drops (None) or replaces tensors of LAYER, by the last part of their names."""

    def apply(tensors):
        for name, value in edits.items():
            full = f"blk.{LAYER}.{name.replace('__', '.')}.weight"
            old = tensors.pop(full, None)
            if isinstance(value, str):
                tensors[value] = old
            elif value is not None:
                tensors[full] = value
        return tensors

    return apply


def zeros(kind, *shape):
    return kind, files.random_rows(kind, shape, np.random.default_rng(0))


BAD = {
    "no gate": ("stacks", change(ffn_gate_exps=None), "there is no ffn_gate_exps.weight"),
    "no down": ("stacks", change(ffn_down_exps=None), "there is no ffn_down_exps.weight"),
    "no experts": (
        "stacks",
        change(ffn_gate_exps=None, ffn_up_exps=None, ffn_down_exps=None),
        "layer 3: no experts",
    ),
    "other shape": (
        "stacks",
        change(ffn_up_exps=zeros("Q8_0", E, INTER, 2 * HIDDEN)),
        r"m.gguf: tensor 'blk.3.ffn_up_exps.weight': got shape \[3, 512, 512\], expected \[3, 512, 256\]",
    ),
    "other number of experts": (
        "stacks",
        change(ffn_up_exps=zeros("Q8_0", E + 1, INTER, HIDDEN)),
        r"ffn_up_exps.weight': got shape \[4, 512, 256\], expected \[3, 512, 256\]",
    ),
    "two dimensions": (
        "stacks",
        change(ffn_down_exps=zeros("Q8_0", HIDDEN, INTER)),
        r"ffn_down_exps.weight': got shape \[256, 512\], expected \[experts, hidden, inter\]",
    ),
    "integers": (
        "stacks",
        change(ffn_down_exps=("I8", np.zeros((E, HIDDEN, INTER), np.uint8))),
        "ffn_down_exps.weight': got I8, which the package gguf cannot decode",
    ),
    "bias of another size": (
        "stacks",
        lambda t: t | {"blk.3.ffn_up_exps.bias": zeros("F32", E, HIDDEN)},
        r"ffn_up_exps.bias': got shape \[3, 256\], expected \[3, 512\]",
    ),
    "quantised bias": (
        "stacks",
        lambda t: t | {"blk.3.ffn_up_exps.bias": zeros("Q8_0", E, INTER)},
        "ffn_up_exps.bias': got Q8_0, expected one of F32, F16, BF16",
    ),
    "bias of a single expert": (
        "old",
        lambda t: t | {"blk.3.ffn_up.0.bias": zeros("F32", INTER)},
        "ffn_up.0.bias': a bias like this",
    ),
    "scale": ("stacks", lambda t: t | {"blk.3.ffn_up_exps.scale": zeros("F32", E)}, "ffn_up_exps.scale': a scale like"),
    "fused without down": ("fused", change(ffn_down_exps=None), "there is no ffn_down_exps.weight"),
    "fused of another size": (
        "fused",
        change(ffn_gate_up_exps=zeros("Q8_0", E, INTER, HIDDEN)),
        r"ffn_gate_up_exps.weight': got shape \[3, 512, 256\], expected \[3, 1024, 256\]",
    ),
    "old without one": ("old", change(ffn_up__1=None), "layer 3: expert 1 has no up weight"),
    "old with a number out of this world": (
        "old",
        change(ffn_up__2="blk.3.ffn_up.999999.weight"),
        "expert 2 has no up weight",
    ),
    "old of another shape": (
        "old",
        change(ffn_down__0=zeros("Q8_0", INTER, HIDDEN)),
        r"'blk.3.ffn_down.0.weight': got shape \[512, 256\], expected \[256, 512\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_layers(tmp_path, case) -> None:
    layout, edit, text = BAD[case]
    tensors = LAYOUTS[layout](files.random_stacks(("Q8_0",) * 3, E, HIDDEN, INTER), LAYER)
    tensors["blk.0.attn_q.weight"] = zeros("F32", 4, 4)
    path = files.write(tmp_path / "m.gguf", edit(tensors))
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightFileError, match=text):
        source(path)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_type_of_the_future(tmp_path) -> None:
    head = [
        files.tensor(f"blk.3.ffn_{p}_exps.weight".encode(), (k, n, E), 250, 0)
        for p, n, k in (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER))
    ]
    (tmp_path / "m.gguf").write_bytes(files.raw([], head, b"\0" * 64))
    with pytest.raises(
        WeightFileError, match=r"ffn_gate_exps.weight': got type 250, which the package gguf does not know"
    ):
        source(tmp_path / "m.gguf")


def test_no_experts_at_all(tmp_path) -> None:
    head = [
        files.tensor(f"blk.3.ffn_{p}_exps.weight".encode(), (k, n, 0), 8, 0)
        for p, n, k in (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER))
    ]
    (tmp_path / "m.gguf").write_bytes(files.raw([], head, b"\0" * 64))
    with pytest.raises(WeightFileError, match=r"ffn_down_exps.weight': got shape \[0, 256, 512\]"):
        source(tmp_path / "m.gguf")


def test_splits_that_do_not_fit(tmp_path) -> None:
    first, _ = checkpoint(tmp_path, ("Q8_0",) * 3, per_file=3)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 4
    spare = parts[2].read_bytes()

    parts[2].unlink()
    with pytest.raises(WeightFileError, match=r"model-00003-of-00004.gguf: is missing \(1 of the 4 files"):
        source(first)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(
        WeightFileError, match="00003-of-00004.gguf: says it is number 1 of 4 files, expected number 2 of 4"
    ):
        source(first)
    parts[2].write_bytes(spare)
    (tmp_path / "lonely").mkdir()
    shutil.copy(first, tmp_path / "lonely" / "renamed.gguf")
    with pytest.raises(WeightFileError, match=r"renamed.gguf: is one of 4 files, but not named like \*-00001-of-00004"):
        source(tmp_path / "lonely")
    shutil.copy(first, tmp_path / "lonely" / "x-00001-of-99999.gguf")
    with pytest.raises(WeightFileError, match="got 99999 files by its name"):
        source(tmp_path / "lonely" / "x-00001-of-99999.gguf")


def test_the_same_tensor_in_two_files(tmp_path) -> None:
    tensors = files.layer_tensors(files.random_stacks(("Q8_0",) * 3, E, HIDDEN, INTER), LAYER)
    for number in (1, 2):
        files.write(tmp_path / f"m-0000{number}-of-00002.gguf", tensors)
    with pytest.raises(
        WeightFileError, match=r"m-00002-of-00002.gguf: tensor 'blk.3.ffn_\w+_exps.weight' is in .*00001"
    ):
        source(tmp_path)


def test_several_models_in_a_folder(tmp_path) -> None:
    for name in ("a.gguf", "b.gguf"):
        checkpoint(tmp_path, ("Q8_0",) * 3, name=name)
    with pytest.raises(WeightFileError, match=r"got several models \(a.gguf, b.gguf\), expected one"):
        source(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(WeightFileError, match="got no .gguf file"):
        source(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path) -> None:
    path, _ = checkpoint(tmp_path, ("Q8_0",) * 3)
    with source(path) as opened:
        opened.read(0)
        os.truncate(path, 4096 * 4)
        with pytest.raises(
            WeightFileError, match=r"model.gguf: tensor 'blk.3.ffn_\w+_exps.weight': got \d+ bytes, expected"
        ):
            opened.read(2)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path) -> None:
    path, stacks = checkpoint(tmp_path, ("Q8_0",) * 3)
    checkpoint(tmp_path, ("Q4_0",) * 3, name="other.gguf")
    with source(path) as opened:
        os.replace(tmp_path / "other.gguf", path)
        assert np.array_equal(opened.read(1)[0].parts[0].numpy(), stacks[0][1][1])  # the open file is still the old one
    with source(path) as opened:
        assert opened.formats == ("q4_0", "q4_0")


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch) -> None:
    path, _ = checkpoint(tmp_path, ("Q8_0",) * 3)
    checkpoint(tmp_path, ("Q4_0",) * 3, name="other.gguf")
    original = index_json.open_regular

    def open_regular(file):
        os.replace(tmp_path / "other.gguf", file)
        return original(file)

    monkeypatch.setattr("ktmoe.io.gguf_files.open_regular", open_regular)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightFileError, match="changed while it was opened"):
        source(path)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_without_the_package(monkeypatch, tmp_path) -> None:
    path, _ = checkpoint(tmp_path, ("Q8_0",) * 3)

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(gguf_types.importlib, "import_module", missing)
    os.utime(path, ns=(1, 1))  # its header is remembered otherwise
    with pytest.raises(ImportError, match=r'pip install "ktmoe\[gguf\]"'):
        source(path)
