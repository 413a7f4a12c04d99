"""load_weights from a folder: layouts, dtypes, maps, and everything that can be wrong with a checkpoint."""

import json
import os

import pytest
import torch
import torch_oracle as ref
from hostile_files import fused, per_expert, save_sharded
from safetensors.torch import load_file, save_file

from ktmoe.errors import WeightFileError

SHAPE = ref.Shape()
LAYER = 3  # of ref.make
METHODS = [*ref.INFERENCE, *ref.SFT]
LAYOUTS = {
    "per expert": lambda w, layer: per_expert(w, layer),
    "mixtral": lambda w, layer: per_expert(w, layer, block="block_sparse_moe"),
    "fused": lambda w, layer: fused(w, layer),
    "no prefix": lambda w, layer: per_expert(w, layer, prefix=""),
    "long prefix": lambda w, layer: fused(w, layer, prefix="model.language_model."),
    "no block": lambda w, layer: {k.replace(".mlp.", "."): v for k, v in per_expert(w, layer).items()},
    "fused with .weight": lambda w, layer: {f"{k}.weight": v for k, v in fused(w, layer).items()},
}


def checkpoint(folder, layout="per expert", dtype=torch.bfloat16, layers=(0, 2, 3, 13, 33)):
    """Every layer has other weights; there are other tensors too."""
    tensors = {
        "model.embed_tokens.weight": torch.zeros(4, SHAPE.hidden),
        f"model.layers.{LAYER}.mlp.gate.weight": torch.zeros(SHAPE.experts, SHAPE.hidden),
        f"model.layers.{LAYER}.mlp.shared_experts.gate_proj.weight": torch.zeros(2, SHAPE.hidden),
        f"model.layers.{LAYER}.mlp.shared_expert.down_proj.weight": torch.zeros(2, SHAPE.hidden),
    }
    for layer in layers:
        stacks = tuple(t.to(dtype) for t in ref.weights(SHAPE, seed=layer))
        tensors |= LAYOUTS[layout](stacks, layer)
    return save_sharded(folder, tensors)


def run(wrapper):
    return wrapper.forward(*ref.batch(SHAPE, 5), *([False] if wrapper.mode == "sft" else []))


def edit(folder, change):
    """Rewrites the tensors of the folder into one file."""
    tensors = {}
    for name in list(os.listdir(folder)):
        if name.endswith(".safetensors"):
            tensors |= load_file(folder / name)
        os.unlink(folder / name)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_layouts(tmp_path, method, layout) -> None:
    wrapper = ref.make(SHAPE, method, weight_path=checkpoint(tmp_path, layout))
    wrapper.load_weights()
    assert wrapper.loaded
    assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, method, seed=LAYER)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["per expert", "fused"])
def test_source_dtypes(tmp_path, layout, dtype) -> None:
    wrapper = ref.make(SHAPE, "BF16", weight_path=str(checkpoint(tmp_path, layout, dtype)))
    wrapper.load_weights()
    assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, "BF16", seed=LAYER)))


@pytest.mark.parametrize("layout", ["per expert", "fused"])
def test_map_and_gpu_experts(tmp_path, layout) -> None:
    folder = checkpoint(tmp_path, layout)
    mapping = torch.tensor([4, 4, 0, 1, 2])
    mask = torch.tensor([False, True, False, False, True])
    wrapper = ref.make(SHAPE, "BF16", weight_path=folder, gpu_experts_mask=mask)
    wrapper.load_weights(mapping)
    want = ref.make(SHAPE, "BF16", gpu_experts_mask=mask)
    want.load_weights_from_tensors(*ref.weights(SHAPE, seed=LAYER), mapping)
    assert torch.equal(run(wrapper), run(want))


def test_experts_on_the_gpu_are_not_read(tmp_path) -> None:
    folder = checkpoint(tmp_path)
    edit(
        folder,
        lambda t: t.update({f"model.layers.3.mlp.experts.0.{p}_proj.weight": torch.zeros(1) for p in ("gate", "up")}),
    )
    ref.make(SHAPE, "BF16", weight_path=folder, num_gpu_experts=1).load_weights()
    with pytest.raises(WeightFileError, match="experts.0.gate_proj"):
        ref.make(SHAPE, "BF16", weight_path=folder).load_weights()


def test_more_slots_than_logical_experts(tmp_path) -> None:
    folder = checkpoint(tmp_path)
    wide = ref.Shape(experts=8)
    wrapper = ref.make(wide, "BF16", weight_path=folder)
    with pytest.raises(WeightFileError, match="got 5 experts, expected num_experts=8"):
        wrapper.load_weights()
    mapping = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    wrapper.load_weights(mapping)
    want = ref.make(wide, "BF16")
    want.load_weights_from_tensors(*ref.weights(SHAPE, seed=LAYER), mapping)
    inputs = ref.batch(wide, 5)
    assert torch.equal(wrapper.forward(*inputs), want.forward(*inputs))
    with pytest.raises(ValueError, match=r"physical_to_logical_map\[7\]: got 5, expected 0..4"):
        wrapper.load_weights(torch.tensor([0, 1, 2, 3, 4, 0, 0, 5]))


def test_one_expert_in_memory_at_a_time(tmp_path, monkeypatch) -> None:
    """Also from a fused file: its stacks are never read as a whole."""
    from ktmoe.io.safetensors_file import SafetensorsFile

    sizes = []
    original = SafetensorsFile.read

    def read(self, name, shape, *rest):
        tensor = original(self, name, shape, *rest)
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", read)
    ref.make(SHAPE, "BF16", weight_path=checkpoint(tmp_path, "fused")).load_weights()
    assert sizes == [4 * SHAPE.hidden * SHAPE.inter, 2 * SHAPE.hidden * SHAPE.inter] * SHAPE.experts


def test_heads_with_layers_of_their_own(tmp_path) -> None:
    folder = checkpoint(tmp_path)
    edit(folder, lambda t: t.update(per_expert(ref.weights(SHAPE, 77), LAYER, prefix="mtp.")))
    wrapper = ref.make(SHAPE, "BF16", weight_path=folder)
    wrapper.load_weights()
    assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, "BF16", seed=LAYER)))
    edit(folder, lambda t: t.update(per_expert(ref.weights(SHAPE, 77), LAYER, prefix="vision.")))
    with pytest.raises(WeightFileError, match="layer 3 is there more than once: model.layers.3.mlp.experts, vision"):
        wrapper.load_weights()


E = "model.layers.3.mlp.experts"


def rename(old, new):
    def change(t):
        t[new] = t.pop(old)

    return change


def drop(*names):
    def change(t):
        for n in names:
            t.pop(n)

    return change


def put(name, tensor):
    return lambda t: t.update({name: tensor})


BAD = {
    "a tensor is missing": ("per expert", drop(f"{E}.2.up_proj.weight"), "layer 3: expert 2 has no up weight"),
    "an expert is missing": (
        "per expert",
        drop(*(f"{E}.1.{p}_proj.weight" for p in ("gate", "up", "down"))),
        "layer 3: expert 1 has no gate weight",
    ),
    "a number out of this world": (
        "per expert",
        rename(f"{E}.4.up_proj.weight", f"{E}.999999.up_proj.weight"),
        "expert 4 has no up weight",
    ),
    "the same expert twice": (
        "per expert",
        put(f"{E}.04.up_proj.weight", torch.zeros(1)),
        "claim the same weight",
    ),
    "two names for one role": ("per expert", put(f"{E}.4.w3.weight", torch.zeros(1)), "claim the same weight"),
    "wrong shape": (
        "per expert",
        put(f"{E}.4.down_proj.weight", torch.zeros(SHAPE.inter, SHAPE.hidden)),
        r"model.safetensors: tensor 'model.layers.3.mlp.experts.4.down_proj.weight': got shape \[40, 72\]",
    ),
    "quantised": (
        "per expert",
        put(f"{E}.0.gate_proj.weight", torch.zeros(SHAPE.inter, SHAPE.hidden, dtype=torch.float8_e4m3fn)),
        "got dtype F8_E4M3, expected BF16, F16, F32",
    ),
    "packed": (
        "per expert",
        lambda t: [rename(k, k + "_packed")(t) for k in list(t) if k.startswith(E)],
        "0.gate_proj.weight_packed': there is no weight_scale beside it",
    ),
    "packed in another way": (
        "per expert",
        lambda t: [rename(k, k.replace(".weight", ".qweight"))(t) for k in list(t) if k.startswith(E)],
        r"layer 3 has experts, but not as plain weights \(for example 'model.layers.3.mlp.experts.",
    ),
    "no experts": (
        "per expert",
        lambda t: [t.pop(k) for k in list(t) if k.startswith(E)],
        "no experts of layer 3 found",
    ),
    "fused without down": ("fused", drop(f"{E}.down_proj"), "layer 3: fused experts have no down_proj"),
    "fused without gate_up": ("fused", drop(f"{E}.gate_up_proj"), "layer 3: fused experts have no gate_up_proj"),
    "fused of two dimensions": ("fused", put(f"{E}.down_proj", torch.zeros(4, 4)), "expected 3 dimensions"),
    "fused, transposed": (
        "fused",
        put(f"{E}.gate_up_proj", torch.zeros(SHAPE.experts, SHAPE.hidden, 2 * SHAPE.inter)),
        r"gate_up_proj': got shape \[5, 72, 80\], expected \[5, 80, 72\]",
    ),
    "fused, other numbers of experts": (
        "fused",
        put(f"{E}.gate_up_proj", torch.zeros(4, 2 * SHAPE.inter, SHAPE.hidden)),
        r"gate_up_proj': got shape \[4, 80, 72\], expected \[5, 80, 72\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path, case) -> None:
    layout, change, text = BAD[case]
    folder = checkpoint(tmp_path, layout)
    edit(folder, change)
    wrapper = ref.make(SHAPE, "BF16", weight_path=folder)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightFileError, match=text):
        wrapper.load_weights()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert not wrapper.loaded
    with pytest.raises(RuntimeError, match="^Weights not loaded"):
        run(wrapper)


def test_a_load_that_fails_half_way_leaves_nothing(tmp_path) -> None:
    folder = checkpoint(tmp_path)
    wrapper = ref.make(SHAPE, "BF16", weight_path=folder)
    wrapper.load_weights()
    assert wrapper.loaded
    victim = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][f"{E}.3.up_proj.weight"]
    os.unlink(folder / victim)
    with pytest.raises(WeightFileError, match=victim):
        wrapper.load_weights()
    assert not wrapper.loaded
    with pytest.raises(RuntimeError, match="^Weights not loaded"):
        run(wrapper)


def test_no_path() -> None:
    with pytest.raises(ValueError, match="^weight_path: got an empty path"):
        ref.make(SHAPE, "BF16").load_weights()
    with pytest.raises(WeightFileError, match="/no/such/folder"):
        ref.make(SHAPE, "BF16", weight_path="/no/such/folder").load_weights()
