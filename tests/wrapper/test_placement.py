"""Which experts go to the GPU."""

import pytest
import torch
import torch_oracle as ref

import ktmoe
from ktmoe import generate_gpu_experts_masks


def test_the_most_used_of_all_layers() -> None:
    freq = torch.tensor([[5, 1, 9], [2, 9, 0]])
    want = {0: [], 1: [(0, 2)], 2: [(0, 2), (1, 1)], 3: [(0, 2), (1, 1), (0, 0)]}
    for n, chosen in want.items():
        mask = generate_gpu_experts_masks(freq, n)
        assert mask.dtype is torch.bool
        assert {tuple(i) for i in mask.nonzero().tolist()} == set(chosen)
    assert generate_gpu_experts_masks(freq, 6).all()
    assert torch.equal(generate_gpu_experts_masks(freq.float() / 7, 3), generate_gpu_experts_masks(freq, 3))


def test_ties_go_to_the_first() -> None:
    mask = generate_gpu_experts_masks(torch.ones(3, 4), 5)
    assert mask.flatten().tolist() == [True] * 5 + [False] * 7


def test_a_row_is_the_mask_of_a_layer() -> None:
    mask = ktmoe.generate_gpu_experts_masks(torch.tensor([[3, 0, 7, 1, 5]]), 2)[0]
    wrapper = ref.loaded(ref.Shape(), "BF16", gpu_experts_mask=mask)
    assert wrapper.num_gpu_experts == 2
    assert wrapper.gpu_experts_mask.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("freq", "n", "error", "text"),
    [
        (torch.ones(3), 1, ValueError, "freq: got shape"),
        (torch.ones(2, 2, dtype=torch.bool), 1, TypeError, "freq: got dtype"),
        (torch.tensor([[1.0, float("nan")]]), 1, ValueError, "freq: got a number"),
        (torch.tensor([[1, -1]]), 1, ValueError, "freq: got a number"),
        (torch.ones(2, 2), 5, ValueError, "n: got 5, expected 0..4"),
        (torch.ones(2, 2), -1, ValueError, "n: got -1"),
        (torch.ones(2, 2), True, TypeError, "n: got a bool"),
        (torch.ones(2, 2), 1.5, TypeError, "'float'"),
    ],
)
def test_errors(freq, n, error, text) -> None:
    with pytest.raises(error, match=text):
        generate_gpu_experts_masks(freq, n)


# --- the mask is shared --------------------------------------------------------------------------------------------
def without(inputs, mask):
    """The routing with masked experts taken out."""
    hidden, ids, weights = inputs
    return hidden, torch.where(mask[ids], -1, ids), weights


@pytest.mark.parametrize("method", ["BF16", "AMXINT4"])
def test_changes_in_place_count_from_the_next_forward_on(method) -> None:
    shape = ref.Shape()
    mask = torch.zeros(shape.experts, dtype=torch.bool)
    wrapper, plain = ref.loaded(shape, method, gpu_experts_mask=mask), ref.loaded(shape, method)
    inputs = ref.batch(shape, 30)
    assert wrapper.gpu_experts_mask.data_ptr() == mask.data_ptr()
    assert torch.equal(wrapper.forward(*inputs), plain.forward(*inputs))
    for chosen in ([1, 3], [0], [], [0, 1, 2, 3, 4], [2]):
        mask.zero_()
        mask[chosen] = True
        assert wrapper.num_gpu_experts == len(chosen)
        assert torch.equal(wrapper.forward(*inputs), plain.forward(*without(inputs, mask)))
        wrapper.submit_forward(*inputs)
        assert torch.equal(wrapper.sync_forward(), plain.forward(*without(inputs, mask)))


def test_training_uses_the_mask_of_its_forward() -> None:
    shape = ref.Shape()
    mask = torch.zeros(shape.experts, dtype=torch.bool)
    wrapper, plain = (ref.loaded(shape, "AMXBF16_SFT", gpu_experts_mask=m) for m in (mask, None))
    for w in (wrapper, plain):
        w.init_lora_weights(*(t.detach() for t in ref.lora(shape).tensors))
    inputs = ref.batch(shape, 20)
    mask[2] = True
    out = wrapper.forward_sft(*inputs)
    assert torch.equal(out, plain.forward_sft(*without(inputs, mask)))
    kept = mask.clone()
    mask.zero_()
    (dx, got), (want_dx, want) = wrapper.backward(out), plain.backward(out)
    assert torch.equal(dx, want_dx)
    assert all(torch.equal(got[name], g) for name, g in want.items())
    assert (got["grad_down_lora_b"][kept] == 0).all()


def test_an_expert_without_memory_can_not_come_back() -> None:
    shape = ref.Shape()
    mask = torch.tensor([True, False, False, False, False])
    wrapper, plain = ref.loaded(shape, "BF16", gpu_experts_mask=mask), ref.loaded(shape, "BF16")
    inputs = ref.batch(shape, 30)
    assert torch.equal(wrapper.forward(*inputs), plain.forward(*without(inputs, mask)))
    mask[0] = False
    with pytest.raises(RuntimeError, match="expert 0: the mask says that it is not on the GPU"):
        wrapper.forward(*inputs)
    elsewhere = (inputs[0], torch.full_like(inputs[1], 3), inputs[2])
    assert torch.equal(wrapper.forward(*elsewhere), plain.forward(*elsewhere))
    mask[0] = True
    assert torch.equal(wrapper.forward(*inputs), plain.forward(*without(inputs, mask)))
