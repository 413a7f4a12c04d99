"""Experts back out of a layer: bit for bit what went in, and plain floats of any dtype on any device."""

import gguf_files
import numpy as np
import pytest
import torch
import torch_oracle as ref
from far_tensors import FarTensor, near
from oracle.layers import make_pool
from oracle.published import PUBLISHED, arrays

from ktmoe import _ext
from ktmoe.export import export_expert
from ktmoe.io.published import dequantize

METHODS = [*ref.INFERENCE, *ref.SFT]
SHAPES = [(64, 96), (100, 70), (513, 300)]


@pytest.mark.parametrize("fmt", PUBLISHED)
@pytest.mark.parametrize(("hidden", "inter"), SHAPES)
def test_published_bytes_come_back(fmt: str, hidden: int, inter: int) -> None:
    layer = _ext.MoeLayer(make_pool(), 1, 1, hidden, inter, fmt)
    rng = np.random.default_rng(hidden)
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    parts = [arrays(PUBLISHED[fmt].random(rng, n, k, 1.0)) for n, k in shapes]
    layer.load_expert_raw(0, *parts)
    for matrix, want, (n, k) in zip(export_expert(layer, 0, hidden, inter, True).matrices, parts, shapes, strict=True):
        assert matrix.format == fmt
        assert matrix.shape == (n, k)
        for got, original in zip(matrix.parts, want, strict=True):
            original = torch.as_tensor(original)
            assert (got.dtype, got.shape) == (original.dtype, original.shape)
            assert torch.equal(got.view(torch.uint8), original.contiguous().view(torch.uint8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [ref.Shape(), ref.Shape(extra={"activation": "relu2"})], ids=["gated", "relu2"])
def test_own_form_is_what_the_kernels_use(method: str, shape: ref.Shape) -> None:
    if method.startswith("LLAMAFILE"):
        pytest.importorskip("gguf")
    wrapper = ref.make(shape, method)
    gate, up, down = ref.weights(shape)
    wrapper.load_weights_from_tensors(gate if wrapper.gated else None, up, down)
    want = [torch.zeros(w.shape[1:]) for w in (gate, up, down)]
    for expert in (0, shape.experts - 1):
        wrapper.layer.dequantize_expert(expert, want[0] if wrapper.gated else None, *want[1:])
        for matrix, exact in zip(wrapper.expert_weights(expert).matrices, want, strict=True):
            if matrix is None:
                assert not wrapper.gated
                continue
            # fp32 products of the same numbers; K-quants are summed in another order.
            torch.testing.assert_close(
                dequantize(matrix), exact, rtol=2.0**-20, atol=2.0**-20 * float(exact.abs().max())
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "AMXINT4", "RAWINT4", "FP8", "LLAMAFILE"])
def test_copies_of_any_dtype(method: str, dtype: torch.dtype) -> None:
    wrapper = ref.loaded(ref.Shape(), method)
    exact = [w[2] for w in ref.dequantized(wrapper)]
    targets = [torch.full(w.shape, torch.nan, dtype=dtype) for w in exact]
    wrapper.copy_expert_weights_to(2, *targets)
    for got, want in zip(targets, exact, strict=True):
        assert (got.double() - want).abs().max() <= 2.0**-8 * want.abs().max()


def test_copies_to_another_device() -> None:
    wrapper = ref.loaded(ref.Shape(), "AMXINT8")
    here = [torch.zeros(40, 72), torch.zeros(40, 72), torch.zeros(72, 40)]
    wrapper.copy_expert_weights_to(1, *here)
    there = [FarTensor(torch.zeros(t.shape)) for t in here]
    wrapper.copy_expert_weights_to(1, *there)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, near(b))


def test_mixed_gguf_types(tmp_path) -> None:
    shape = ref.Shape(experts=3, hidden=256, inter=512)
    stacks = gguf_files.random_stacks(("Q4_K", "Q4_K", "Q6_K"), 3, 256, 512, seed=1)
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.layer_tensors(stacks, 3))
    wrapper = ref.make(shape, "LLAMAFILE", weight_path=path)
    wrapper.load_weights()
    assert [m.format for m in wrapper.expert_weights(0).matrices] == ["q4_k", "q4_k", "q6_k"]


def test_errors_before_anything_is_written() -> None:
    wrapper = ref.loaded(ref.Shape(), "BF16", num_gpu_experts=1)
    good = [torch.zeros(40, 72), torch.zeros(40, 72), torch.zeros(72, 40)]
    for arguments, error, text in (
        ((1, *good[:2], good[0]), ValueError, r"^down: got shape \(40, 72\), expected \(72, 40\)"),
        ((1, None, *good[1:]), TypeError, "^gate: got None, expected a floating point"),
        ((1, good[0].int(), *good[1:]), TypeError, "^gate: got Tensor, expected a floating point"),
        ((0, *good), ValueError, r"expert: got 0, expected one that is loaded"),
        ((5, *good), ValueError, "expert"),
    ):
        with pytest.raises(error, match=text):
            wrapper.copy_expert_weights_to(*arguments)
        assert all((t == 0).all() for t in good)
    with pytest.raises(ValueError, match="expert: got 0, expected one that is loaded"):
        ref.make(ref.Shape(), "BF16").expert_weights(0)
