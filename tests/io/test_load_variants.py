"""load_weights of experts with biases and without a gate: as in GPT-OSS and Nemotron-H, and what does not fit."""

from collections.abc import Callable
from pathlib import Path

import gguf_files
import published_files
import pytest
import torch
import torch_oracle as ref
from hostile_files import fused, per_expert, save_sharded

from ktmoe.errors import WeightFileError

SHAPE = ref.Shape()
LAYER = 3  # of ref.make
E = f"model.layers.{LAYER}.mlp.experts"
Tensors = dict[str, torch.Tensor]
GATE, UP, DOWN = ref.weights(SHAPE)


def biases(shape: ref.Shape = SHAPE) -> Tensors:
    g = torch.Generator().manual_seed(5)
    sizes = {"gate_bias": shape.inter, "up_bias": shape.inter, "down_bias": shape.hidden}
    return {name: torch.randn(shape.experts, n, generator=g).bfloat16() for name, n in sizes.items()}


def gpt_oss() -> Tensors:
    """Transposed; gate and up alternate in the last dimension."""
    b = biases()
    return {
        f"{E}.gate_up_proj": torch.stack((GATE, UP), dim=2).flatten(1, 2).transpose(1, 2).contiguous(),
        f"{E}.gate_up_proj_bias": torch.stack((b["gate_bias"], b["up_bias"]), dim=2).flatten(1),
        f"{E}.down_proj": DOWN.transpose(1, 2).contiguous(),
        f"{E}.down_proj_bias": b["down_bias"],
    }


def separate() -> Tensors:
    return per_expert((GATE, UP, DOWN), LAYER) | {
        f"{E}.{e}.{name.removesuffix('_bias')}_proj.bias": b[e].clone()
        for name, b in biases().items()
        for e in range(SHAPE.experts)
    }


def loaded_from(tmp_path: Path, tensors: Tensors, method: str = "BF16", **options: object) -> object:
    wrapper = ref.make(SHAPE, method, weight_path=save_sharded(tmp_path, tensors), **options)
    wrapper.load_weights()
    return wrapper


def run(wrapper: object) -> torch.Tensor:
    return wrapper.forward(*ref.batch(SHAPE, 5), *([False] if wrapper.mode == "sft" else []))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [*ref.INFERENCE, *ref.SFT])
@pytest.mark.parametrize("layout", [gpt_oss, separate])
def test_biases(tmp_path: Path, method: str, layout: Callable[[], Tensors]) -> None:
    options = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    want = ref.make(SHAPE, method, **options)
    want.load_weights_from_tensors(GATE, UP, DOWN, **biases())
    got = run(loaded_from(tmp_path, layout(), method, **options))
    assert torch.equal(got, run(want))
    want.load_weights_from_tensors(GATE, UP, DOWN)
    assert not torch.equal(got, run(want))


def test_dimensions_that_all_agree(tmp_path: Path) -> None:
    """hidden = inter, as in GPT-OSS itself: the layout shows in the names alone."""
    square = ref.Shape(hidden=40, inter=40)
    gate, up, down = ref.weights(square)
    zeros = torch.zeros(square.experts, 80)
    tensors = {
        f"{E}.gate_up_proj": torch.stack((gate, up), dim=2).flatten(1, 2).transpose(1, 2).contiguous(),
        f"{E}.gate_up_proj_bias": zeros,
        f"{E}.down_proj": down.transpose(1, 2).contiguous(),
        f"{E}.down_proj_bias": zeros[:, :40].contiguous(),
    }
    wrapper = ref.make(square, "BF16", weight_path=save_sharded(tmp_path, tensors))
    wrapper.load_weights()
    inputs = ref.batch(square, 5)
    assert torch.equal(wrapper.forward(*inputs), ref.loaded(square, "BF16").forward(*inputs))


def fused_ungated() -> Tensors:
    return {f"{E}.up_proj": UP, f"{E}.down_proj": DOWN}


def separate_ungated() -> Tensors:
    tensors = per_expert((GATE, UP, DOWN), LAYER, prefix="backbone.", block="mixer")
    return {name: t for name, t in tensors.items() if "gate" not in name}


@pytest.mark.parametrize("method", [*ref.INFERENCE, *ref.SFT])
@pytest.mark.parametrize("layout", [fused_ungated, separate_ungated])
def test_without_a_gate(tmp_path: Path, method: str, layout: Callable[[], Tensors]) -> None:
    want = ref.make(SHAPE, method, activation="relu2")
    want.load_weights_from_tensors(None, UP, DOWN)
    assert torch.equal(run(loaded_from(tmp_path, layout(), method, activation="relu2")), run(want))


# --- quantised files ------------------------------------------------------------------------------------------------
def quantised(kind: str, folder: Path, gated: bool, biased: bool) -> tuple[Path, ref.Shape, tuple[torch.Tensor, ...]]:
    """A file of random experts, its shape, and the floats that it stands for."""
    shape = ref.Shape(hidden=64, inter=96)
    stacks = tuple(torch.zeros_like(w) for w in ref.weights(shape))
    if kind == "int4":
        tensors, values = published_files.int4_tensors(stacks, LAYER, 32)
    elif kind == "fp8":
        tensors, values = published_files.fp8_tensors(stacks, LAYER, "blocks")
    else:
        made = gguf_files.random_stacks(("Q8_0",) * 3, shape.experts, shape.hidden, shape.inter)
        content = gguf_files.layer_tensors(made, LAYER)
        if biased:
            rows = {role.removesuffix("_bias"): b.float().numpy().view("uint8") for role, b in biases(shape).items()}
            content |= {f"blk.{LAYER}.ffn_{role}_exps.bias": ("F32", b) for role, b in rows.items()}
        content = {name: t for name, t in content.items() if gated or "gate" not in name}
        values = tuple(torch.from_numpy(gguf_files.decode(*stack).copy()) for stack in made)
        return gguf_files.write(folder / "model.gguf", content), shape, values
    if biased:
        tensors |= {f"{E}.{e}.{name[:-5]}_proj.bias": b[e] for name, b in biases(shape).items() for e in range(len(b))}
    kept = {name: t.contiguous() for name, t in tensors.items() if gated or "gate" not in name}
    return save_sharded(folder, kept), shape, values


@pytest.mark.parametrize("method", ["native", "BF16"])
@pytest.mark.parametrize("biased", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(("kind", "native"), [("int4", "RAWINT4"), ("fp8", "FP8_SFT"), ("gguf", "LLAMAFILE")])
def test_quantised_experts_of_every_shape(
    tmp_path: Path, kind: str, native: str, gated: bool, biased: bool, method: str
) -> None:
    """A file gives what tensors of its values and biases give, bit for bit with BF16."""
    path, shape, (gate, up, down) = quantised(kind, tmp_path, gated, biased)
    options = {"activation": "silu" if gated else "relu2"}
    wrapper = ref.make(shape, native if method == "native" else method, weight_path=str(path), **options)
    wrapper.load_weights()
    own = {name: b for name, b in biases(shape).items() if biased and (gated or "gate" not in name)}
    want = ref.make(shape, "BF16", **options)
    want.load_weights_from_tensors(gate.bfloat16() if gated else None, up.bfloat16(), down.bfloat16(), **own)
    inputs = ref.batch(shape, 5)
    expected = want.forward(*inputs)
    got = wrapper.forward(*inputs, *([False] if wrapper.mode == "sft" else []))
    if method == "BF16":
        assert torch.equal(got, expected)
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_fused_fp8_without_a_gate(tmp_path: Path) -> None:
    shape = ref.Shape(hidden=64, inter=96)
    g = torch.Generator().manual_seed(3)
    made = {}
    for name, n, k in (("up_proj", shape.inter, shape.hidden), ("down_proj", shape.hidden, shape.inter)):
        made[f"{E}.{name}"] = published_files.fp8_codes((shape.experts, n, k), g)
        made[f"{E}.{name}_scale_inv"] = torch.rand(shape.experts, 1, 1, generator=g) / 1000 + 0.001
    wrapper = ref.make(shape, "BF16", weight_path=save_sharded(tmp_path, made), activation="relu2")
    wrapper.load_weights()
    want = ref.make(shape, "BF16", activation="relu2")
    up, down = ((made[f"{E}.{n}"].float() * made[f"{E}.{n}_scale_inv"]).bfloat16() for n in ("up_proj", "down_proj"))
    want.load_weights_from_tensors(None, up, down)
    inputs = ref.batch(shape, 5)
    assert torch.equal(wrapper.forward(*inputs), want.forward(*inputs))


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: t for name, t in tensors.items() if name not in names}


BAD: dict[str, tuple[Callable[[], Tensors], str, str]] = {
    "a gate too many": (lambda: per_expert((GATE, UP, DOWN), LAYER), "relu2", "is a gate, but the layer has experts"),
    "fused with a gate": (
        lambda: fused((GATE, UP, DOWN), LAYER),
        "relu2",
        "gate_up_proj, which does not belong beside",
    ),
    "no gate": (separate_ungated, "silu", "layer 3: expert 0 has no gate weight"),
    "fused without a gate": (fused_ungated, "silu", "fused experts have no gate_up_proj"),
    "one bias missing": (
        lambda: without(separate(), f"{E}.2.up_proj.bias"),
        "silu",
        "layer 3: expert 2 has no up bias",
    ),
    "fused, one bias missing": (
        lambda: without(gpt_oss(), f"{E}.down_proj_bias"),
        "silu",
        "fused experts have no down_proj_bias",
    ),
    "biases alone": (
        lambda: {n: t for n, t in separate().items() if n.endswith(".bias")},
        "silu",
        "expert 0 has no gate weight",
    ),
    "a bias of another size": (
        lambda: separate() | {f"{E}.1.down_proj.bias": torch.zeros(3)},
        "silu",
        r"experts.1.down_proj.bias': got shape \[3\], expected \[72\]",
    ),
    "not transposed": (
        lambda: gpt_oss() | {f"{E}.gate_up_proj": torch.cat((GATE, UP), 1)},
        "silu",
        r"gate_up_proj': got shape \[5, 80, 72\], expected \[5, 72, 80\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path: Path, case: str) -> None:
    make, activation, text = BAD[case]
    wrapper = ref.make(SHAPE, "BF16", weight_path=save_sharded(tmp_path, make()), activation=activation)
    with pytest.raises(WeightFileError, match=text):
        wrapper.load_weights()
    assert not wrapper.loaded
