"""Tensors that say they are on another device, without one: what must not reach the engine's memory unnoticed."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class FarTensor(torch.Tensor):
    """Wraps a CPU tensor and says "lazy", the one foreign device that autograd runs without hardware.

    Every operation works on the wrapped tensor and stays far, but for copies to the CPU.
    """

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device="lazy", requires_grad=near.requires_grad
        )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near.detach()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self):
        return self.near.untyped_storage()

    def __repr__(self) -> str:
        return f"FarTensor({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(near, args), **tree_map(near, kwargs))
        if device is not None and torch.device(device).type == "cpu":
            return out.clone()
        if func.overloadpacket.__name__.endswith("_") and isinstance(args[0], FarTensor):
            return args[0]
        return tree_map(lambda t: FarTensor(t) if isinstance(t, torch.Tensor) else t, out)


def near(value: object) -> object:
    return value.near if isinstance(value, FarTensor) else value


class FarDevice(TorchDispatchMode):
    """Copies from CPU tensors to "lazy" become FarTensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "lazy" and not isinstance(args[0], FarTensor):
            return FarTensor(func(*args, **kwargs | {"device": torch.device("cpu")}))
        return func(*args, **kwargs)
