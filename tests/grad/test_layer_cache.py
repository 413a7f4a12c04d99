"""What a ForwardCache promises: it owns its copies, serves several backwards, and knows its layer and its adapter."""

import pytest
import torch
from oracle.experts import LORA_NAMES
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import each_isa, each_layer_format


@each_isa
@each_layer_format
def test_a_cache_may_be_used_twice_and_owns_its_copies(isa: str, fmt: str) -> None:
    shape = Shape(4, 2, 64, 48)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 20), grad_out(20, 64)
    _, cache = layer.train(x, adapter)
    assert cache.n_tokens == 20
    assert cache.nbytes > 20 * 64 * 2
    first = layer.backward(cache, dy, adapter, lora)
    for t in (x.hidden, x.ids, x.weights):
        t.zero_()
    layer.forward(make_inputs(shape, 33, seed=8), adapter)
    for name, again in layer.backward(cache, dy, adapter, lora).items():
        assert_same(again, first[name], name)


@each_isa
@each_layer_format
def test_outputs_may_be_left_out(isa: str, fmt: str) -> None:
    """Each output alone has the bits that it has with all others; grad_in in bf16 is the fp32 one rounded once."""
    shape = Shape(4, 2, 70, 40)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 20), grad_out(20, 70)
    _, cache = layer.train(x, adapter)
    want = layer.backward(cache, dy, adapter, lora)
    narrow = torch.full((20, 70), torch.nan, dtype=torch.bfloat16)
    layer.engine.backward(cache, dy, adapter, narrow, None, None)
    assert_same(narrow, want["input"].bfloat16(), "bf16 input gradient")
    weights = torch.full((20, 2), torch.nan)
    layer.engine.backward(cache, dy, adapter, None, weights, None)
    assert_same(weights, want["weights"], "weights")
    six = [torch.full(lora[n].shape, torch.nan) for n in LORA_NAMES]
    layer.engine.backward(cache, dy, adapter, None, None, six)
    for name, got in zip(LORA_NAMES, six, strict=True):
        assert_same(got, want[name], name)


@each_isa
@each_layer_format
def test_strided_rows_of_grad_out(isa: str, fmt: str) -> None:
    shape = Shape(4, 2, 70, 40)
    layer, lora = Layer(shape, fmt, isa), make_lora(shape, 4)
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 20), grad_out(20, 70)
    _, cache = layer.train(x, adapter)
    wide = torch.full((20, 150), torch.nan, dtype=torch.bfloat16)
    wide[:, 40:110] = dy
    got = layer.backward(cache, wide[:, 40:110], adapter, lora)
    for name, want in layer.backward(cache, dy, adapter, lora).items():
        assert_same(got[name], want, name)


def test_lora_updated_after_the_forward() -> None:
    shape = Shape(4, 2, 64, 48)
    layer, lora = Layer(shape, "bf16", ""), make_lora(shape, 4)
    adapter = layer.adapter(lora)
    _, cache = layer.train(make_inputs(shape, 5), adapter)
    before = adapter.version
    adapter.update(layer.pool, *(lora[n] for n in LORA_NAMES))
    assert adapter.version != before
    with pytest.raises(RuntimeError, match="^LoRA weights changed between forward and backward"):
        layer.backward(cache, grad_out(5, 64), adapter, lora)


def test_another_adapter_than_the_forward_had() -> None:
    """Its version number may be the same; its weights are not."""
    shape = Shape(4, 2, 64, 48)
    layer = Layer(shape, "bf16", "")
    used, other = layer.adapter(make_lora(shape, 4)), layer.adapter(make_lora(shape, 4, seed=1))
    _, cache = layer.train(make_inputs(shape, 5), used)
    with pytest.raises((RuntimeError, ValueError)):
        layer.backward(cache, grad_out(5, 64), other)


def test_a_cache_of_a_layer_that_is_gone() -> None:
    """A new layer may lie at the same address; it must not take the old one's cache for its own."""
    small, large = Shape(4, 2, 64, 48), Shape(4, 2, 128, 48)
    pool = Layer(small, "bf16", "").pool
    for _ in range(20):
        old = Layer(small, "bf16", "", pool=pool)
        _, cache = old.train(make_inputs(small, 5))
        del old
        new = Layer(large, "bf16", "", pool=pool)
        with pytest.raises(ValueError, match="cache: got one of another layer"):
            new.backward(cache, grad_out(5, 128))


@pytest.mark.parametrize("rank", [0, 4, 16, 64])
@pytest.mark.parametrize(("hidden", "inter", "top_k"), [(256, 128, 4), (100, 70, 2)])
def test_size_is_that_of_x_gate_and_up(hidden: int, inter: int, top_k: int, rank: int) -> None:
    """2 hidden + 4 top_k inter bytes a token, padded to whole panels, and little more: 6 rank and 20 bytes a row."""
    shape = Shape(8, top_k, hidden, inter)
    layer = Layer(shape, "bf16", "")
    adapter = layer.adapter(make_lora(shape, rank)) if rank else None

    def up(n: int, step: int) -> int:
        return -(-n // step) * step

    for tokens in (1, 17, 60):
        _, cache = layer.train(make_inputs(shape, tokens), adapter)
        row = 4 * up(inter, 16) + 2 * up(2 * rank, 32) + 2 * up(rank, 32) + 20
        assert cache.nbytes <= tokens * (2 * hidden + top_k * row)
        assert cache.nbytes >= tokens * (2 * hidden + 4 * top_k * inter)
