"""LoRA adapters that an inference layer carries: several by name, one chosen per call."""

import gc
import weakref

import pytest
import torch
import torch_oracle as ref
from torch_oracle import in_child

SHAPE = ref.Shape()
ALPHA = 0.75 * SHAPE.rank


def tensors(seed=0, dtype=torch.float32):
    return [t.detach().clone() for t in ref.lora(SHAPE, dtype, seed).tensors]


def expected(wrapper, inputs, own, scaling=0.75):
    lora = ref.LoraTensors(*own, scaling=scaling, rank=own[2].shape[1])
    return ref.forward(wrapper, *inputs, lora)


@pytest.mark.parametrize("isa", ref.ISAS)
@pytest.mark.parametrize("method", ref.INFERENCE)
def test_a_trained_layer_answers_at_once(monkeypatch, method, isa) -> None:
    """The forward with an adapter is that of training, bit for bit, and right."""
    monkeypatch.setenv("KTMOE_ISA", isa)
    wrapper, own = ref.loaded(SHAPE, method), tensors()
    inputs = ref.batch(SHAPE, 19)
    wrapper.add_adapter("tuned", *own, lora_alpha=ALPHA)
    got = wrapper.forward(*inputs)
    assert ref.row_error(got, expected(wrapper, inputs, own)) <= ref.forward_tolerance(wrapper)
    wrapper.submit_forward(*inputs)
    assert torch.equal(wrapper.sync_forward(), got)
    if method == "BF16":
        trained = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=ALPHA)
        trained.init_lora_weights(*own)
        assert torch.equal(got, trained.forward_sft(*inputs))


def test_one_is_chosen_per_call() -> None:
    wrapper, plain = ref.loaded(SHAPE, "BF16"), ref.loaded(SHAPE, "BF16")
    inputs = ref.batch(SHAPE, 5)
    base = plain.forward(*inputs)
    assert wrapper.adapters == ()
    assert wrapper.active_adapter is None
    wide = [t.repeat_interleave(2, 1 if i % 2 == 0 else 2) for i, t in enumerate(tensors(1))]  # another rank
    wrapper.add_adapter("a", *tensors(0), lora_alpha=ALPHA)
    wrapper.add_adapter("b", *wide, lora_alpha=2 * ALPHA)
    assert wrapper.adapters == ("a", "b")
    assert wrapper.active_adapter == "a"
    out = {"a": wrapper.forward(*inputs), "b": wrapper.forward(*inputs, adapter="b")}
    for name, own in (("a", tensors(0)), ("b", wide)):
        assert ref.row_error(out[name], expected(wrapper, inputs, own)) <= ref.forward_tolerance(wrapper)
    assert torch.equal(wrapper.forward(*inputs, adapter=None), base)
    wrapper.set_adapter("b")
    assert torch.equal(wrapper.forward(*inputs), out["b"])
    wrapper.set_adapter(None)
    assert torch.equal(wrapper.forward(*inputs), base)
    for name in ("a", None, "b", "a"):
        wrapper.submit_forward(*inputs, adapter=name)
    for name in ("a", None, "b", "a"):
        assert torch.equal(wrapper.sync_forward(), base if name is None else out[name])
    wrapper.set_adapter("b")
    wrapper.delete_adapter("b")
    assert wrapper.active_adapter is None
    assert torch.equal(wrapper.forward(*inputs), base)
    assert torch.equal(wrapper.forward(*inputs, adapter="a"), out["a"])


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    wrapper, own = ref.loaded(SHAPE, "BF16"), tensors()
    inputs = ref.batch(SHAPE, 5)
    wrapper.add_adapter("r", *own, lora_alpha=0.75, use_rslora=True)
    want = expected(wrapper, inputs, own, 0.75 / SHAPE.rank**0.5)
    assert ref.row_error(wrapper.forward(*inputs), want) <= ref.forward_tolerance(wrapper)


def test_changed_tensors_are_noticed_but_not_by_what_was_submitted() -> None:
    wrapper, own = ref.loaded(SHAPE, "BF16"), tensors()
    inputs = ref.batch(SHAPE, 5)
    wrapper.add_adapter("a", *own, lora_alpha=ALPHA)
    before = wrapper.forward(*inputs)
    wrapper.submit_forward(*inputs)
    for t in own:
        t.mul_(-2)
    after = wrapper.forward(*inputs)
    assert (after != before).any()
    assert torch.equal(wrapper.sync_forward(), before)
    assert ref.row_error(after, expected(wrapper, inputs, own)) <= ref.forward_tolerance(wrapper)


def test_adapters_that_take_turns_are_packed_once() -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    for name in ("a", "b"):
        wrapper.add_adapter(name, *tensors(ord(name)))
    inputs = ref.batch(SHAPE, 2)
    for _ in range(3):
        wrapper.forward(*inputs, adapter="a")
        wrapper.forward(*inputs, adapter="b")
    assert [mirror.packs for _, mirror in wrapper._adapters._adapters.values()] == [1, 1]


def test_errors_name_the_argument_and_change_nothing() -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    inputs = ref.batch(SHAPE, 2)
    wrapper.add_adapter("a", *tensors(), lora_alpha=ALPHA)
    before = wrapper.forward(*inputs)
    bad = tensors(3)
    bad[4] = bad[4][:, :, :-1]
    for call, error, text in (
        (lambda: wrapper.add_adapter("a", *bad), ValueError, "down_lora_a: got shape"),
        (lambda: wrapper.add_adapter("", *tensors()), TypeError, "name: got ''"),
        (lambda: wrapper.add_adapter("b", *tensors()[:2], None, *tensors()[3:]), ValueError, "up_lora_a: got NoneType"),
        (lambda: wrapper.add_adapter("b", *tensors(), lora_alpha=float("nan")), ValueError, "lora_alpha: got nan"),
        (lambda: wrapper.set_adapter("b"), ValueError, r"adapter: got 'b', expected one of those added \('a'\)"),
        (lambda: wrapper.delete_adapter("b"), ValueError, "adapter: got 'b'"),
        (lambda: wrapper.forward(*inputs, adapter="b"), ValueError, "adapter: got 'b'"),
        (lambda: wrapper.submit_forward(*inputs, adapter="b"), ValueError, "adapter: got 'b'"),
        (lambda: ref.loaded(SHAPE, "BF16").set_adapter("x"), ValueError, "none: call add_adapter"),
    ):
        with pytest.raises(error, match=f"^{text}" if text[0] != "n" else text):
            call()
        assert torch.equal(wrapper.forward(*inputs), before)
    with pytest.raises(RuntimeError, match=r"^add_adapter\(\) not available in SFT mode"):
        ref.loaded(SHAPE, "AMXBF16_SFT").add_adapter("a", *tensors())


def test_adapters_survive_fork() -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    inputs = ref.batch(SHAPE, 3)
    wrapper.add_adapter("a", *tensors())
    want = wrapper.forward(*inputs)

    def child() -> None:
        assert torch.equal(wrapper.forward(*inputs), want)
        wrapper.add_adapter("b", *tensors(4))
        wrapper.forward(*inputs, adapter="b")

    assert in_child(child) == 0


@pytest.mark.parametrize("method", ["BF16", "AMXBF16_SFT"])
def test_a_wrapper_is_freed_at_once(method) -> None:
    """Gigabytes must not wait for the garbage collector."""
    wrapper = ref.loaded(SHAPE, method)
    if wrapper.mode == "inference":
        wrapper.add_adapter("a", *tensors())
        wrapper.forward(*ref.batch(SHAPE, 3))
    else:
        wrapper.init_lora_weights(*tensors())
        wrapper.backward(wrapper.forward_sft(*ref.batch(SHAPE, 3)))
    gone = weakref.ref(wrapper)
    gc.disable()
    try:
        del wrapper
        assert gone() is None
    finally:
        gc.enable()
