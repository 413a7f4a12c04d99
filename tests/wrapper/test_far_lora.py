"""LoRA parameters, and activations, on another device: the engine keeps a mirror, results and gradients come back."""

import pytest
import torch
import torch_oracle as ref
from far_tensors import FarDevice, FarTensor, near

from ktmoe.autograd import LoraTensors, moe_forward

SHAPE = ref.Shape()
ALPHA = 0.75 * SHAPE.rank


def grad(n_tokens):
    return torch.randn(n_tokens, SHAPE.hidden, generator=torch.Generator().manual_seed(3000)).bfloat16()


def test_the_fake_device_is_one() -> None:
    with FarDevice():
        far = torch.ones(3).to("lazy")
        assert isinstance(far, FarTensor)
        assert (far.device.type, far.is_cpu) == ("lazy", False)
        assert not isinstance(far.to("cpu"), FarTensor)
        assert torch.equal((far + 1).to("cpu"), torch.full((3,), 2.0))


def test_stateful_training() -> None:
    own = [t.detach().clone() for t in ref.lora(SHAPE).tensors]
    plain = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=ALPHA)
    plain.init_lora_weights(*own)
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=ALPHA)
    inputs = ref.batch(SHAPE, 9)
    with FarDevice():
        far = [FarTensor(t.clone()) for t in own]
        buffers = [FarTensor(torch.zeros(t.shape)) for t in own]
        wrapper.init_lora_weights(*far, *buffers)
        for _ in range(2):  # the second time with changed values
            assert torch.equal(wrapper.forward_sft(*inputs), plain.forward_sft(*inputs))
            (dx, got), (want_dx, want) = wrapper.backward(grad(9)), plain.backward(grad(9))
            assert torch.equal(dx, want_dx)
            for buffer, name in zip(buffers, want, strict=True):
                assert got[name].device.type == "lazy"
                assert torch.equal(near(got[name]), want[name])
                assert torch.equal(near(buffer), want[name])
            for here, there in zip(own, far, strict=True):
                here.mul_(-0.5)
                there.mul_(-0.5)


def test_stateful_training_with_far_activations() -> None:
    plain, wrapper = (ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=ALPHA) for _ in range(2))
    for w in (plain, wrapper):
        w.init_lora_weights(*(t.detach().clone() for t in ref.lora(SHAPE).tensors))
    inputs = ref.batch(SHAPE, 9)
    want = plain.forward_sft(*inputs)
    with FarDevice():
        got = wrapper.forward_sft(*map(FarTensor, inputs))
        assert isinstance(got, FarTensor)
        assert torch.equal(near(got), want)
        assert torch.equal(near(wrapper.forward_sft(*map(FarTensor, inputs), save_for_backward=False)), want)
        dx, grads = wrapper.backward(FarTensor(grad(9)))
    want_dx, want_grads = plain.backward(grad(9))
    assert torch.equal(near(dx), want_dx)
    assert torch.equal(near(grads.grad_topk_weights), want_grads.grad_topk_weights)
    assert isinstance(grads.grad_topk_weights, FarTensor)
    assert all(torch.equal(grads[name], g) and not isinstance(grads[name], FarTensor) for name, g in want_grads.items())


def test_the_mirror_is_renewed_only_by_changes() -> None:
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=ALPHA)
    far = [FarTensor(t.detach().clone()) for t in ref.lora(SHAPE).tensors]
    wrapper.init_lora_weights(*far)
    for _ in range(3):
        wrapper.forward_sft(*ref.batch(SHAPE, 2), save_for_backward=False)
    assert wrapper._own_mirror.packs == 1
    far[3].add_(1.0)
    wrapper.forward_sft(*ref.batch(SHAPE, 2), save_for_backward=False)
    assert wrapper._own_mirror.packs == 2


@pytest.mark.parametrize("far_inputs", [False, True])
def test_functional_training(far_inputs) -> None:
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT")
    hidden, ids, weights = ref.batch(SHAPE, 9)
    lora = ref.lora(SHAPE)

    def run(make):
        own = [make(t.detach().clone()).requires_grad_() for t in lora.tensors]
        place = make if far_inputs else torch.clone
        x, i, w = place(hidden.clone()).requires_grad_(), place(ids.clone()), place(weights.clone()).requires_grad_()
        out = moe_forward(wrapper, x, i, w, LoraTensors(*own, scaling=0.75, rank=SHAPE.rank))
        return out, torch.autograd.grad(out, [x, w, *own], place(grad(9)))

    with FarDevice():
        want_out, want = run(torch.clone)
        out, grads = run(FarTensor)
    assert isinstance(out, FarTensor) == far_inputs
    assert torch.equal(near(out), want_out)
    for n, (g, w) in enumerate(zip(grads, want, strict=True)):
        assert isinstance(g, FarTensor) == (far_inputs or n >= 2)
        assert torch.equal(near(g), w)
