"""From the file to the result: RAWINT4, FP8 and LLAMAFILE against float64 on the weights that the files stand for."""

import gguf_files
import published_files
import pytest
import torch
import torch_oracle as ref
from hostile_files import save_sharded
from oracle.experts import layer_forward

from ktmoe.io.published import dequantize
from ktmoe.io.sources import open_source

LAYER = 3
# Weights of some formats are rounded to bf16 (2**-9 of a value), the output too; and an h that lies on a rounding tie
# can become another int8 number here than in the kernels.
TOLERANCE = 2.0**-6


def load(shape, method, path, **options):
    wrapper = ref.make(shape, method, weight_path=path, **options)
    wrapper.load_weights()
    return wrapper


def zeros(shape):
    return tuple(torch.zeros(w.shape) for w in ref.weights(shape))


def file_weights(shape, path):
    """float64 stacks of what the file stands for, by the readers that the tests of io check bit for bit."""
    with open_source(str(path), LAYER, shape.hidden, shape.inter) as source:
        experts = [source.read(e) for e in range(shape.experts)]
    return tuple(torch.stack([dequantize(m[p]).double() for m in experts]) for p in range(3))


def expected(wrapper, weights, hidden, ids, routing):
    """float64 on the weights of the file; activations are rounded where the kernels round them."""
    experts = list(zip(*weights, strict=True))
    return layer_forward(experts, hidden.double(), ids, routing.double(), rounding=ref.rounding(wrapper))


def check(shape, wrapper, weights, n_tokens=(1, 5, 40)) -> None:
    for got, want in zip(ref.dequantized(wrapper), weights, strict=True):
        assert ((got - want).abs() <= 2.0**-20 * want.abs().max()).all()  # packed without loss, up to fp32 products
    for n in n_tokens:
        inputs = ref.batch(shape, n)
        keep = {} if wrapper.mode == "inference" else {"save_for_backward": False}
        assert ref.row_error(wrapper.forward(*inputs, **keep), expected(wrapper, weights, *inputs)) <= TOLERANCE


GGUF_SHAPE = ref.Shape(experts=3, top_k=2, hidden=256, inter=512)
SMALL_BLOCKS = ref.Shape(experts=3, top_k=2, hidden=96, inter=160)


def gguf_checkpoint(folder, types, shape, tensors=gguf_files.layer_tensors, per_file=0):
    stacks = gguf_files.random_stacks(types, shape.experts, shape.hidden, shape.inter, seed=1)
    return gguf_files.write(folder / "m.gguf", tensors(stacks, LAYER), per_file)


@pytest.mark.parametrize("kind", gguf_files.TYPES)
def test_every_gguf_type(tmp_path, kind) -> None:
    path = gguf_checkpoint(tmp_path, (kind,) * 3, GGUF_SHAPE)
    for method in ("LLAMAFILE", "LLAMAFILE_SFT"):
        check(GGUF_SHAPE, load(GGUF_SHAPE, method, path), file_weights(GGUF_SHAPE, path))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "IQ4_NL", "MXFP4", "Q5_1", "F16", "BF16", "F32"])
def test_gguf_types_of_small_blocks_in_ragged_shapes(tmp_path, kind) -> None:
    path = gguf_checkpoint(tmp_path, (kind,) * 3, SMALL_BLOCKS)
    check(SMALL_BLOCKS, load(SMALL_BLOCKS, "LLAMAFILE", path), file_weights(SMALL_BLOCKS, path))


@pytest.mark.parametrize(
    "types",
    [
        ("Q4_K", "Q4_K", "Q6_K"),
        ("Q5_K", "Q5_K", "Q6_K"),
        ("Q6_K", "Q6_K", "Q8_0"),
        ("Q4_K", "Q6_K", "Q4_0"),
        ("Q4_K", "Q4_K", "BF16"),
        ("F16", "F16", "Q4_K"),
        ("IQ4_XS", "IQ4_XS", "IQ4_NL"),
        ("Q4_0", "F32", "Q2_K"),
    ],
)
def test_mixed_gguf_types(tmp_path, types) -> None:
    path = gguf_checkpoint(tmp_path, types, GGUF_SHAPE)
    check(GGUF_SHAPE, load(GGUF_SHAPE, "LLAMAFILE", path), file_weights(GGUF_SHAPE, path))


@pytest.mark.parametrize("layout", [gguf_files.fused_tensors, gguf_files.old_tensors])
def test_gguf_layouts(tmp_path, layout) -> None:
    path = gguf_checkpoint(tmp_path, ("Q4_K", "Q4_K", "Q6_K"), GGUF_SHAPE, layout)
    check(GGUF_SHAPE, load(GGUF_SHAPE, "LLAMAFILE", path), file_weights(GGUF_SHAPE, path))


def test_split_gguf(tmp_path) -> None:
    path = gguf_checkpoint(tmp_path, ("Q4_K", "Q4_K", "Q6_K"), GGUF_SHAPE, per_file=2)
    check(GGUF_SHAPE, load(GGUF_SHAPE, "LLAMAFILE", path), file_weights(GGUF_SHAPE, path))


INT4_SHAPES = [ref.Shape(experts=3, hidden=256, inter=128), ref.Shape(experts=3, hidden=72, inter=40)]


@pytest.mark.parametrize("shape", INT4_SHAPES, ids=lambda s: f"{s.hidden}x{s.inter}")
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("zero", ["", "words", "bytes"])
def test_int4_groups(tmp_path, zero, group, shape) -> None:
    tensors, weights = published_files.int4_tensors(zeros(shape), LAYER, group, zeros=zero)
    path = save_sharded(tmp_path, tensors)
    for method in ("RAWINT4", "AMXINT4_KGroup_SFT"):
        wrapper = load(shape, method, path)
        assert wrapper.layer.format == f"int4_g{group or 128}{'z' if zero else ''}"
        check(shape, wrapper, tuple(w.double() for w in weights))


FP8_SHAPES = [
    ref.Shape(experts=3, hidden=256, inter=128),
    ref.Shape(experts=3, hidden=72, inter=40),
    ref.Shape(experts=3, hidden=200, inter=257),
]


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=lambda s: f"{s.hidden}x{s.inter}")
@pytest.mark.parametrize("form", [*published_files.FP8_FORMS, "fused"])
def test_fp8(tmp_path, form, shape) -> None:
    if form == "fused":
        tensors, weights = published_files.fp8_fused_tensors(zeros(shape), LAYER)
    else:
        tensors, weights = published_files.fp8_tensors(zeros(shape), LAYER, form)
    path = save_sharded(tmp_path, tensors)
    for method in ("FP8", "FP8_SFT"):
        check(shape, load(shape, method, path), tuple(w.double() for w in weights))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("RAWINT4", {"group_size": 32}),
        ("RAWINT4", {"group_size": 64}),
        ("RAWINT4", {"group_size": 128}),
        ("RAWINT4", {"group_size": 32, "zero_point": True}),
        ("AMXINT4_KGroup_SFT", {"group_size": 64, "zero_point": True}),
        ("AMXINT4_KGroup_SFT", {"group_size": 128, "zero_point": True}),
        ("FP8", {}),
        ("LLAMAFILE", {"gguf_type": "Q4_K"}),
        ("LLAMAFILE", {"gguf_type": "Q8_0"}),
        ("LLAMAFILE", {"gguf_type": "Q4_0"}),
        ("LLAMAFILE", {"gguf_type": "MXFP4"}),
    ],
)
@pytest.mark.parametrize("shape", [ref.Shape(), ref.Shape(hidden=512, inter=256)], ids=["ragged", "whole"])
def test_quantised_from_tensors(shape, method, options) -> None:
    from ktmoe.io.published import quantize

    wrapper = ref.loaded(shape, method, **options)
    format = wrapper.layer.format
    weights = tuple(
        torch.stack([dequantize(quantize(w, format)).double() for w in stack]) for stack in ref.weights(shape)
    )
    check(shape, wrapper, weights)


@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "MOE_INT8"])
@pytest.mark.parametrize("kind", ["int4", "fp8", "gguf"])
def test_other_methods_on_published_files(tmp_path, kind, method) -> None:
    shape = GGUF_SHAPE
    if kind == "gguf":
        path = gguf_checkpoint(tmp_path, ("Q4_K", "Q4_K", "Q6_K"), shape)
    elif kind == "int4":
        path = save_sharded(tmp_path, published_files.int4_tensors(zeros(shape), LAYER, 32)[0])
    else:
        path = save_sharded(tmp_path, published_files.fp8_tensors(zeros(shape), LAYER, "blocks")[0])
    wrapper = load(shape, method, path)
    plain = ref.make(shape, method)
    plain.load_weights_from_tensors(*(w.bfloat16() for w in file_weights(shape, path)))
    inputs = ref.batch(shape, 9)
    assert torch.equal(wrapper.forward(*inputs), plain.forward(*inputs))
