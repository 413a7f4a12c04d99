"""What the engine is handed by RAWINT4, FP8 and LLAMAFILE. The engine's layer is a fake that only remembers."""

import gguf_files
import published_files
import pytest
import torch
import torch_oracle as ref
from hostile_files import per_expert, save_sharded
from torch.utils.dlpack import from_dlpack

from ktmoe import _ext
from ktmoe.errors import WeightFileError
from ktmoe.io.published import PublishedMatrix, dequantize, quantize

SHAPE = ref.Shape(hidden=256, inter=128)
LAYER = 3
ZEROS = tuple(torch.zeros(w.shape) for w in ref.weights(SHAPE))


class FakeLayer:
    """Remembers its formats and what was loaded."""

    expert_bytes = packed_bytes = 0

    def __init__(self, pool, n_experts, top_k, hidden, inter, format, *others, down_format, check_finite) -> None:
        self.formats = (format, down_format)
        self.format, self.down_format = self.formats
        self.shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
        self.n_experts = n_experts
        self.experts = {}

    def share_gpu_mask(self, mask) -> None:
        assert len(mask) == self.n_experts

    def load_expert(self, expert, *tensors) -> None:
        parts = [(from_dlpack(t).clone(),) for t in tensors]
        self.experts[expert] = [PublishedMatrix("bf16", p, s) for p, s in zip(parts, self.shapes, strict=True)]

    def load_expert_raw(self, expert, *matrices) -> None:
        formats = (self.formats[0], *self.formats)
        parts = [tuple(from_dlpack(part).clone() for part in m) for m in matrices]
        self.experts[expert] = [PublishedMatrix(*m) for m in zip(formats, parts, self.shapes, strict=True)]

    def unload(self) -> None:
        self.experts.clear()

    @property
    def loaded(self) -> bool:
        return len(self.experts) == self.n_experts


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch) -> None:
    monkeypatch.setattr(_ext, "MoeLayer", FakeLayer)


def stacks(wrapper):
    """fp32 weights of all experts that the engine was handed."""
    experts = [wrapper.layer.experts[e] for e in range(SHAPE.experts)]
    return tuple(torch.stack([dequantize(m[p]) for m in experts]) for p in range(3))


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


RULES = [
    ("RAWINT4", {}, "int4_g32"),
    ("RAWINT4", {"group_size": 64}, "int4_g64"),
    ("RAWINT4", {"group_size": 128}, "int4_g128"),
    ("RAWINT4", {"group_size": 64, "zero_point": True}, "int4_g64z"),
    ("AMXINT4_KGroup_SFT", {"group_size": 128}, "int4_g128"),
    ("AMXINT4_KGroup_SFT", {"zero_point": True}, "int4_g32z"),
    ("FP8", {}, "fp8"),
    ("FP8_SFT", {}, "fp8"),
    ("LLAMAFILE", {}, "q4_k"),
    ("LLAMAFILE_SFT", {"gguf_type": "Q8_0"}, "q8_0"),
    ("LLAMAFILE", {"gguf_type": "Q8_0"}, "q8_0"),
    ("LLAMAFILE", {"gguf_type": "Q4_0"}, "q4_0"),
    ("LLAMAFILE", {"gguf_type": "MXFP4"}, "mxfp4"),
]


@pytest.mark.parametrize(("method", "options", "format"), RULES)
def test_bf16_tensors_are_quantised_by_the_rule_of_the_method(method, options, format) -> None:
    wrapper = ref.loaded(SHAPE, method, **options)
    assert wrapper.loaded
    assert wrapper.layer.formats == (format, format)
    want = tuple(torch.stack([dequantize(quantize(w, format)) for w in stack]) for stack in ref.weights(SHAPE))
    assert_same(stacks(wrapper), want)


@pytest.mark.parametrize(("method", "options", "format"), RULES)
def test_plain_checkpoints_and_streams_are_quantised_alike(tmp_path, method, options, format) -> None:
    save_sharded(tmp_path, per_expert(ref.weights(SHAPE), LAYER))
    wrapper = ref.make(SHAPE, method, weight_path=tmp_path, **options)
    wrapper.load_weights()
    want = stacks(ref.loaded(SHAPE, method, **options))
    assert_same(stacks(wrapper), want)
    streamed = ref.make(SHAPE, method, **options)
    for expert, weights in enumerate(zip(*ref.weights(SHAPE), strict=True)):
        streamed.load_expert(expert, *weights)
    assert_same(stacks(streamed), want)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rawint4_takes_the_groups_of_the_file(tmp_path, group) -> None:
    tensors, decoded = published_files.int4_tensors(ZEROS, LAYER, group)
    wrapper = ref.make(SHAPE, "RAWINT4", weight_path=save_sharded(tmp_path, tensors))
    before = wrapper.layer
    wrapper.load_weights()
    assert (wrapper.layer is before) == (group == 32)
    assert wrapper.layer.formats == (f"int4_g{group}",) * 2
    assert_same(stacks(wrapper), decoded)
    first = wrapper.layer.experts[0][0].parts[0]
    assert torch.equal(first.view(torch.int32), tensors["model.layers.3.mlp.experts.0.gate_proj.weight_packed"])


@pytest.mark.parametrize("form", published_files.FP8_FORMS)
def test_fp8(tmp_path, form) -> None:
    tensors, decoded = published_files.fp8_tensors(ZEROS, LAYER, form)
    wrapper = ref.make(SHAPE, "FP8", weight_path=save_sharded(tmp_path, tensors))
    wrapper.load_weights()
    assert_same(stacks(wrapper), decoded)


GGUF = [
    (("Q4_K", "Q4_K", "Q6_K"), ("q4_k", "q6_k")),
    (("Q8_0", "Q8_0", "Q8_0"), ("q8_0", "q8_0")),
    (("F16", "F16", "F16"), ("bf16", "bf16")),
    (("Q5_K", "Q5_K", "F16"), ("q5_k", "bf16")),
    (("IQ4_NL", "IQ4_NL", "Q5_0"), ("iq4_nl", "q8_0")),
]
WIDE = ref.Shape(hidden=256, inter=256)


def gguf_file(folder, types):
    made = gguf_files.random_stacks(types, WIDE.experts, WIDE.hidden, WIDE.inter)
    path = gguf_files.write(folder / "m.gguf", gguf_files.layer_tensors(made, LAYER))
    return path, tuple(torch.from_numpy(gguf_files.decode(*stack).copy()) for stack in made)


@pytest.mark.parametrize(("types", "formats"), GGUF)
def test_llamafile(tmp_path, types, formats) -> None:
    path, decoded = gguf_file(tmp_path, types)
    wrapper = ref.make(WIDE, "LLAMAFILE", weight_path=path)
    wrapper.load_weights()
    assert wrapper.layer.formats == formats
    for got, want, kind in zip(stacks(wrapper), decoded, types, strict=True):
        if kind in ("F16", "Q5_0"):  # rounded to bf16 or q8_0: the bounds are in the tests of those
            assert (got - want).norm() <= 0.01 * want.norm()
        else:
            assert torch.equal(got, want)


def test_llamafile_prefers_gguf_in_a_folder_that_has_both(tmp_path) -> None:
    path, decoded = gguf_file(tmp_path, ("Q8_0",) * 3)
    save_sharded(tmp_path, per_expert(ref.weights(WIDE), LAYER))
    wrapper = ref.make(WIDE, "LLAMAFILE", weight_path=path.parent)
    wrapper.load_weights()
    assert_same(stacks(wrapper), decoded)
    other = ref.make(WIDE, "BF16", weight_path=path.parent)
    other.load_weights()
    assert_same(stacks(other), tuple(w.float() for w in ref.weights(WIDE)))


@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "MOE_INT8", "AMXBF16_SFT", "AMXINT8_SFT"])
@pytest.mark.parametrize("kind", ["int4", "fp8", "gguf"])
def test_the_other_methods_read_them_as_bf16(tmp_path, kind, method) -> None:
    if kind == "gguf":
        path, decoded = gguf_file(tmp_path, ("Q4_K", "Q4_K", "Q6_K"))
    else:
        maker = {"int4": published_files.int4_tensors, "fp8": published_files.fp8_tensors}[kind]
        zeros = tuple(torch.zeros(w.shape) for w in ref.weights(WIDE))
        tensors, decoded = maker(zeros, LAYER, {"int4": 64, "fp8": "blocks"}[kind])
        path = save_sharded(tmp_path, tensors)
    wrapper = ref.make(WIDE, method, weight_path=path)
    wrapper.load_weights()
    assert wrapper.layer.formats == (ref.METHODS[method].format,) * 2
    assert_same(stacks(wrapper), tuple(w.bfloat16().float() for w in decoded))


@pytest.mark.parametrize(
    ("method", "kind", "hint"),
    [
        ("RAWINT4", "fp8", "holds fp8 experts, which method RAWINT4 does not read; method FP8 does"),
        ("FP8", "int4", "holds int4 experts, which method FP8 does not read; method RAWINT4 does"),
        ("LLAMAFILE", "fp8", "holds fp8 experts, which method LLAMAFILE does not read; method FP8 does"),
        ("AMXINT4_KGroup_SFT", "fp8", "AMXINT4_KGroup_SFT does not read; method FP8_SFT does"),
        ("FP8", "gguf", "holds gguf experts, which method FP8 does not read; method LLAMAFILE does"),
    ],
)
def test_files_of_another_method(tmp_path, method, kind, hint) -> None:
    zeros = tuple(torch.zeros(w.shape) for w in ref.weights(WIDE))
    if kind == "gguf":
        path = gguf_file(tmp_path, ("Q8_0",) * 3)[0]
    elif kind == "fp8":
        path = save_sharded(tmp_path, published_files.fp8_tensors(zeros, LAYER, "rows")[0])
    else:
        path = save_sharded(tmp_path, published_files.int4_tensors(zeros, LAYER, 32)[0])
    wrapper = ref.loaded(WIDE, method, weight_path=path)
    before = wrapper.layer
    with pytest.raises(WeightFileError, match=hint):
        wrapper.load_weights()
    assert wrapper.layer is before
    assert wrapper.loaded  # nothing was changed


def test_a_source_that_does_not_open_changes_nothing(tmp_path) -> None:
    path, _ = gguf_file(tmp_path, ("Q4_0",) * 3)
    wrapper = ref.loaded(WIDE, "LLAMAFILE", weight_path=path)
    before = wrapper.layer
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightFileError, match=r"m\.gguf"):
        wrapper.load_weights()
    assert wrapper.layer is before
    assert wrapper.loaded


def test_a_source_that_breaks_later_leaves_nothing(tmp_path) -> None:
    tensors, _ = published_files.int4_tensors(ZEROS, LAYER, 128)
    tensors["model.layers.3.mlp.experts.4.down_proj.weight_packed"] = torch.zeros(1, 1, dtype=torch.int32)
    wrapper = ref.loaded(SHAPE, "RAWINT4", weight_path=save_sharded(tmp_path, tensors))
    with pytest.raises(WeightFileError, match="experts.4.down_proj"):
        wrapper.load_weights()
    assert not wrapper.loaded
    assert wrapper.layer.experts == {}


def test_tensors_after_a_file_have_the_own_format_again(tmp_path) -> None:
    path, _ = gguf_file(tmp_path, ("Q4_0", "Q4_0", "Q6_K"))
    wrapper = ref.make(WIDE, "LLAMAFILE", weight_path=path)
    wrapper.load_weights()
    assert wrapper.layer.formats == ("q4_0", "q6_k")
    with pytest.raises(NotImplementedError, match="cannot be quantised to q6_k"):
        wrapper.load_expert(0, *(w[0] for w in ref.weights(WIDE)))
    wrapper.load_weights_from_tensors(*ref.weights(WIDE))
    assert wrapper.layer.formats == ("q4_k", "q4_k")
    wrapper.load_weights()
    assert wrapper.layer.formats == ("q4_0", "q6_k")


def test_maps_and_gpu_experts(tmp_path) -> None:
    tensors, decoded = published_files.fp8_tensors(ZEROS, LAYER, "blocks")
    mapping = torch.tensor([4, 4, 0, 1, 2])
    wrapper = ref.make(SHAPE, "FP8", weight_path=save_sharded(tmp_path, tensors), num_gpu_experts=2)
    wrapper.load_weights(mapping)
    assert sorted(wrapper.layer.experts) == [2, 3, 4]
    for slot in (2, 3, 4):
        for matrix, stack in zip(wrapper.layer.experts[slot], decoded, strict=True):
            assert torch.equal(dequantize(matrix), stack[mapping[slot]])
