"""How a tensor reaches the engine."""

from __future__ import annotations

from collections.abc import Callable

import torch.utils.dlpack
from torch import Tensor

# A capsule costs a tenth of what Tensor.__dlpack__ costs, and a forward makes four. Unlike that method it ignores
# requires_grad, which is right here: the engine is below autograd.
to_dlpack: Callable[[Tensor], object] = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
"""A DLPack capsule that shares the tensor's memory, to be used once."""


def rows_in_one_piece(tensor: Tensor) -> Tensor:
    """A matrix with last stride 1, as the engine reads it; copied only if it is not one already.

    Not `contiguous()`: that keeps rows together too, and it calls tensors without elements contiguous whatever their
    strides are.
    """
    return tensor if tensor.stride(1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
