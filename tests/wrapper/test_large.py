"""Large tensors in huge pages behave as any other."""

import gc
from pathlib import Path

import pytest
import torch

from ktmoe import large


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5), (7,), (3, 5, 7), (1 << 20,), (3, 1 << 20), (5, 511, 1025)])
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


def test_memory_goes_with_the_tensor() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

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


def test_under_the_meta_device() -> None:
    with torch.device("meta"):
        assert large.empty((4 << 20,), torch.float32).is_cpu
        assert large.empty((4,), torch.float32).is_cpu
