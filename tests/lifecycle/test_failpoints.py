"""Memory that runs out at the n-th allocation, n = 1, 2, ... until it does not: MemoryError, and nothing half done."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_oracle as ref

from ktmoe import _ext

SHAPE = ref.Shape(hidden=512, inter=1024, rank=16)  # large enough for buffers of their own everywhere


@pytest.fixture(autouse=True)
def no_failure_left_behind() -> Iterator[None]:
    yield
    _ext.testing.fail_allocation(0)


def until_success(act: Callable[[], object], after_failure: Callable[[], object]) -> int:
    """How many allocations `act` makes that can fail."""
    for n in range(1, 200):
        _ext.testing.fail_allocation(n)
        try:
            act()
        except MemoryError:
            _ext.testing.fail_allocation(0)
            after_failure()
        else:
            assert _ext.testing.fail_allocation(0) > 0, "an allocation failed and nobody heard of it"
            return n - 1
    raise AssertionError("it never succeeds")


def new_layer(fmt: str, threads: int = 2) -> "_ext.MoeLayer":
    """On a pool of its own, whose scratch is still empty."""
    pool = _ext.ThreadPool([threads], [0])
    layer = _ext.MoeLayer(pool, SHAPE.experts, SHAPE.top_k, SHAPE.hidden, SHAPE.inter, fmt)
    for e, (gate, up, down) in enumerate(zip(*ref.weights(SHAPE), strict=True)):
        layer.load_expert(e, gate, up, down)
    return layer


@pytest.mark.parametrize("method", ["BF16", "AMXINT4", "RAWINT4"])
def test_loading(method: str) -> None:
    inputs = ref.batch(SHAPE, 3)
    want = ref.loaded(SHAPE, method).forward(*inputs)
    wrapper = ref.make(SHAPE, method)
    tensors = ref.weights(SHAPE)

    def not_loaded() -> None:
        assert not wrapper.loaded
        with pytest.raises(RuntimeError, match="^Weights not loaded"):
            wrapper.forward(*inputs)

    assert until_success(lambda: wrapper.load_weights_from_tensors(*tensors), not_loaded) >= 1
    assert torch.equal(wrapper.forward(*inputs), want)


def test_loading_again_loses_the_old_weights_but_not_the_layer() -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    _ext.testing.fail_allocation(1)
    with pytest.raises(MemoryError):
        wrapper.load_weights_from_tensors(*ref.weights(SHAPE, seed=1))
    assert not wrapper.loaded
    wrapper.load_weights_from_tensors(*ref.weights(SHAPE, seed=1))
    inputs = ref.batch(SHAPE, 3)
    assert torch.equal(wrapper.forward(*inputs), ref.loaded(SHAPE, "BF16", seed=1).forward(*inputs))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 300])
def test_forward(tokens: int, threads: int) -> None:
    layer = new_layer("int8", threads)
    hidden, ids, weights = ref.batch(SHAPE, tokens)
    out = torch.full_like(hidden, torch.nan)
    assert until_success(lambda: layer.forward(hidden, ids, weights, out), lambda: None) >= 2
    assert torch.equal(out, ref.loaded(SHAPE, "AMXINT8").forward(hidden, ids, weights))


def test_a_training_step() -> None:
    """Gradients after failures at every allocation of forward and of backward are those without."""
    layer, lora = new_layer("bf16"), [t.detach() for t in ref.lora(SHAPE).tensors]
    adapters: list[_ext.LoraAdapter] = []

    def new_adapter() -> None:
        adapter = _ext.LoraAdapter(SHAPE.experts, SHAPE.hidden, SHAPE.inter, SHAPE.rank, 1.0)
        adapter.update(_ext.ThreadPool([2], [0]), *lora)
        adapters.append(adapter)

    assert until_success(new_adapter, adapters.clear) >= 2
    hidden, ids, weights = ref.batch(SHAPE, 100)
    out = torch.empty_like(hidden)
    caches: list[_ext.ForwardCache] = []

    def forward() -> None:
        caches.append(layer.forward_train(hidden, ids, weights, out, adapters[0]))

    assert until_success(forward, lambda: None) >= 4
    assert len(caches) == 1
    grads = [torch.full(t.shape, torch.nan) for t in lora]
    dx, dw = torch.full(hidden.shape, torch.nan), torch.full(weights.shape, torch.nan)

    def backward() -> None:
        layer.backward(caches[0], out, adapters[0], dx, dw, grads)

    assert until_success(backward, lambda: None) >= 1
    first = [t.clone() for t in (dx, dw, *grads)]
    forward()
    layer.backward(caches[1], out, adapters[0], dx, dw, grads)
    for a, b in zip(first, (dx, dw, *grads), strict=True):
        assert torch.equal(a, b)


def test_a_wrapper_keeps_its_waiting_forward() -> None:
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT", max_cache_depth=2)
    wrapper.init_lora_weights(*(t.detach() for t in ref.lora(SHAPE).tensors))
    inputs = ref.batch(SHAPE, 20)
    out = wrapper.forward_sft(*inputs)
    _ext.testing.fail_allocation(1)
    with pytest.raises(MemoryError):
        wrapper.forward_sft(*inputs)
    _ext.testing.fail_allocation(0)
    want, _ = wrapper.backward(out)
    with pytest.raises(RuntimeError, match="^No forward cache"):
        wrapper.backward(out)
    wrapper.forward_sft(*inputs)
    assert torch.equal(wrapper.backward(out)[0], want)
