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
