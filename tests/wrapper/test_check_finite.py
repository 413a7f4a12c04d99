"""check_finite=True: inputs that are not finite are errors with a place, where the default is a row of NaN."""

import pytest
import torch
import torch_oracle as ref

from ktmoe import autograd

SHAPE = ref.Shape()
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "AMXINT4"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_hidden_states(method: str, value: float) -> None:
    wrapper = ref.loaded(SHAPE, method, check_finite=True, chunked_prefill_size=4)
    batch = ref.batch(SHAPE, 9)
    want = ref.loaded(SHAPE, method, chunked_prefill_size=4).forward(*batch)
    assert torch.equal(wrapper.forward(*batch), want)
    broken = batch[0].clone()
    broken[7, SHAPE.hidden - 1] = value
    text = rf"hidden_states: got {value} at token 7, element {SHAPE.hidden - 1}, expected finite numbers"
    with pytest.raises(ValueError, match=text):
        wrapper.forward(broken, *batch[1:])
    wrapper.submit_forward(broken, *batch[1:])
    with pytest.raises(ValueError, match=text):
        wrapper.sync_forward()
    assert torch.equal(wrapper.forward(*batch), want)


def test_the_largest_finite_numbers_pass() -> None:
    wrapper = ref.loaded(SHAPE, "BF16", check_finite=True)
    hidden, ids, weights = ref.batch(SHAPE, 3)
    hidden[1] = torch.finfo(torch.bfloat16).max
    hidden[2] = torch.finfo(torch.bfloat16).tiny / 128  # subnormal
    wrapper.forward(hidden, ids, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_weights(dtype: torch.dtype) -> None:
    wrapper = ref.loaded(SHAPE, "BF16", check_finite=True)
    hidden, ids, weights = ref.batch(SHAPE, 5)
    weights[3, 1] = INF
    with pytest.raises(ValueError, match="weights: got inf at token 3, slot 1, expected finite numbers"):
        wrapper.forward(hidden, ids, weights.to(dtype))
    ids[3, 1] = -1  # its weight counts for nothing
    assert wrapper.forward(hidden, ids, weights.to(dtype)).isfinite().all()


def test_training() -> None:
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT", check_finite=True)
    wrapper.init_lora_weights(*ref.lora(SHAPE).tensors)
    hidden, ids, weights = ref.batch(SHAPE, 5)
    broken = hidden.clone()
    broken[4, 0] = NAN
    with pytest.raises(ValueError, match="hidden_states: got nan at token 4, element 0"):
        wrapper.forward_sft(broken, ids, weights)
    wrapper.forward_sft(hidden, ids, weights)
    grad = torch.ones_like(hidden)
    grad[2, 3] = -INF
    with pytest.raises(ValueError, match="grad_output: got -inf at token 2, element 3"):
        wrapper.backward(grad)
    wrapper.backward(torch.ones_like(hidden))  # the forward still waits


def test_autograd() -> None:
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT", check_finite=True)
    hidden, ids, weights = ref.batch(SHAPE, 5)
    hidden[0, 0] = NAN
    with pytest.raises(ValueError, match="hidden_states: got nan at token 0, element 0"):
        autograd.moe_forward(wrapper, hidden, ids, weights)
