"""Large tensors in huge pages behave as any other, and their memory is used again."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ktmoe import large

BIG = (3, 1 << 20)  # floats: 12 MiB


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gc.collect()
    large.forget()
    yield
    large.forget()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5), (7,), (3, 5, 7), (1 << 20,), BIG, (5, 511, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype(shape, dtype) -> None:
    tensor = large.empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous(), tensor.is_cpu) == (shape, dtype, True, True)
    tensor.fill_(3.0)
    assert (tensor == 3).all()
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = tensor
    parameter.grad.add_(1.0)
    assert (parameter.grad.clone() == 4).all()


def resident() -> int:
    """kB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def test_memory_goes_with_the_tensor(monkeypatch) -> None:
    monkeypatch.setattr(large, "MOST_KEPT", 0)
    before = resident()
    tensor = large.empty((64 << 20,), torch.float32).fill_(1.0)
    part = tensor[10:20]
    assert resident() - before > 250_000
    del tensor
    gc.collect()
    assert (part == 1).all(), "a view keeps its memory"
    assert resident() - before > 250_000
    del part
    assert resident() - before < 20_000


def test_memory_is_used_again_and_never_twice() -> None:
    first = large.empty(BIG, torch.float32).fill_(1.0)
    where = first.data_ptr()
    second = large.empty(BIG, torch.float32).fill_(2.0)
    assert second.data_ptr() != where
    view = first.view(-1)[5:]
    del first
    third = large.empty(BIG, torch.float32).fill_(3.0)
    assert third.data_ptr() != where, "a view still has it"
    assert (view == 1).all()
    del view
    again = large.empty(BIG, torch.float32)
    assert again.data_ptr() == where
    assert large.empty((1 << 21,), torch.float32).data_ptr() != where
    assert (second == 2).all()
    assert (third == 3).all()


def test_no_more_is_kept_than_the_bound(monkeypatch) -> None:
    monkeypatch.setattr(large, "MOST_KEPT", 30 << 20)
    tensors = [large.empty(BIG, torch.float32).fill_(1.0) for _ in range(5)]
    del tensors
    assert large.kept_bytes() == 24 << 20
    large.forget()
    assert large.kept_bytes() == 0


def test_threads() -> None:
    """Tensors of one thread are never another's."""
    problems = []

    def work(number: int) -> None:
        for _ in range(60):
            tensor = large.empty((1 << 20,), torch.float32).fill_(number)
            other = large.empty((1 << 20,), torch.float32).fill_(-number)
            if not ((tensor == number).all() and (other == -number).all()):
                problems.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems
    kept = [m for same in large._kept.values() for m in same]
    assert len(kept) == len({id(m) for m in kept}) <= 12  # a new tensor is there before its name lets go of the old


def test_under_the_meta_device() -> None:
    with torch.device("meta"):
        assert large.empty((4 << 20,), torch.float32).is_cpu
        assert large.empty((4,), torch.float32).is_cpu
