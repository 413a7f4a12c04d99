"""select_deferred_experts against a literal transcription of its definition."""

import pytest
import torch
import torch_oracle as ref
from hypothesis import given
from hypothesis import strategies as st

from ktmoe.deferred import select_deferred_experts


def literal(ids, scores, protected_k):
    """Python loops over lists."""
    if protected_k <= 0:
        return [[-1] * len(row) for row in ids], ids
    protected = set()
    for row, score in zip(ids, scores, strict=True):
        best = sorted((j for j, e in enumerate(row) if e >= 0), key=lambda j: -score[j])[:protected_k]
        protected |= {row[j] for j in best}
    now = [[e if e in protected else -1 for e in row] for row in ids]
    later = [[-1 if e in protected else e for e in row] for row in ids]
    return now, later


@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(-1, 6))
def test_definition(data, n_tokens, top_k, protected_k) -> None:
    ids = [data.draw(st.lists(st.integers(-1, 7), min_size=top_k, max_size=top_k)) for _ in range(n_tokens)]
    order = data.draw(st.permutations(range(n_tokens * top_k)))  # no ties: their order is not defined
    scores = torch.tensor(order, dtype=torch.float32).view(n_tokens, top_k)
    tensor = torch.tensor(ids)
    now, later = select_deferred_experts(tensor, scores, protected_k)
    want_now, want_later = literal(ids, scores.tolist(), min(protected_k, top_k))
    assert (now.tolist(), later.tolist()) == (want_now, want_later)
    assert tensor.tolist() == ids
    assert torch.equal(torch.maximum(now, later), tensor)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_expert_that_one_token_protects_is_immediate_for_all(dtype) -> None:
    ids = torch.tensor([[0, 1], [1, 2]], dtype=dtype)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    now, later = select_deferred_experts(ids, scores, 1)
    assert now.tolist() == [[0, 1], [1, -1]]
    assert later.tolist() == [[-1, -1], [-1, 2]]
    assert now.dtype is later.dtype is dtype


def test_method_of_the_wrapper() -> None:
    wrapper = ref.make(ref.Shape(), "BF16")
    now, later = wrapper.select_deferred_experts(torch.tensor([[0, 1]]), torch.tensor([[0.1, 0.9]]), 1)
    assert (now.tolist(), later.tolist()) == ([[-1, 1]], [[0, -1]])


@pytest.mark.parametrize(
    ("ids", "scores", "error"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 2), TypeError),
        (torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2), TypeError),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), TypeError),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3), ValueError),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), ValueError),
    ],
)
def test_bad_arguments(ids, scores, error) -> None:
    with pytest.raises(error, match="got"):
        select_deferred_experts(ids, scores, 1)
