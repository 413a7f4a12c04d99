"""Expert weights that are trained themselves (full fine-tuning): the caller's tensors and where their gradients go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BASE_NAMES = ("gate", "up", "down")
BIAS_NAMES = ("gate_bias", "up_bias", "down_bias")
_DTYPES = (torch.bfloat16, torch.float32)


class BaseWeights(NamedTuple):
    """gate (None without one), up [n_experts, inter, hidden] and down [n_experts, hidden, inter], bf16 or fp32."""

    tensors: tuple[Tensor | None, Tensor, Tensor]
    grads: tuple[Tensor | None, Tensor, Tensor]
    """bf16 or fp32, C-contiguous on the CPU: what each backward overwrites."""
    biases: dict[str, Tensor]
    """Frozen; packed again with the weights."""

    @property
    def targets(self) -> list[Tensor]:
        """The gradients that there are, in the order of `BASE_NAMES`."""
        return [g for g in self.grads if g is not None]

    def expert(self, e: int) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """gate, up, down as bf16 on the CPU, and the biases, of one expert."""
        matrices = [None if w is None else w.detach()[e].to("cpu", torch.bfloat16) for w in self.tensors]
        return matrices, {name: bias[e] for name, bias in self.biases.items()}


def base_weights(
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    biases: dict[str, Tensor | None],
    shape: tuple[int, int, int],
    gated: bool,
) -> BaseWeights:
    """Checked. shape: n_experts, hidden, inter. Missing gradients become new fp32 tensors, all or none.

    TypeError (type, dtype, device, strides) or ValueError (shape, number) naming the argument.
    """
    n, hidden, inter = shape
    shapes: dict[str, tuple[int, ...]]
    shapes = {"gate": (n, inter, hidden), "up": (n, inter, hidden), "down": (n, hidden, inter)}
    shapes |= {"gate_bias": (n, inter), "up_bias": (n, inter), "down_bias": (n, hidden)}
    for name, tensor in zip(BASE_NAMES, tensors, strict=True):
        _check(name, tensor, shapes[name], absent=name == "gate" and not gated)
    given = [g for g in grads if g is not None]
    expected = 3 if gated else 2
    if len(given) not in (0, expected):
        raise ValueError(f"grad buffers: got {len(given)}, expected all {expected} or none")
    if not given:
        grads = [None if t is None else torch.zeros(t.shape, dtype=torch.float32, device="cpu") for t in tensors]
    for name, grad in zip(BASE_NAMES, grads, strict=True):
        _check(f"grad_{name}", grad, shapes[name], absent=name == "gate" and not gated)
        if grad is not None and not (grad.is_cpu and grad.is_contiguous()):
            raise TypeError(
                f"grad_{name}: got a tensor on {grad.device}, strides {grad.stride()}, expected contiguous, cpu"
            )
    for name, bias in biases.items():
        if bias is not None:
            _check(name, bias, shapes[name], absent=name == "gate_bias" and not gated)
    _, up, down = tensors
    _, grad_up, grad_down = grads
    assert up is not None and down is not None and grad_up is not None and grad_down is not None  # noqa: PT018  # checked above
    frozen = {name: bias.detach() for name, bias in biases.items() if bias is not None}
    return BaseWeights((tensors[0], up, down), (_detached(grads[0]), grad_up.detach(), grad_down.detach()), frozen)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check(name: str, tensor: object, shape: tuple[int, ...], *, absent: bool) -> None:
    if absent:
        if tensor is not None:
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected None: the experts have no gate")
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in _DTYPES or tensor.is_meta:
        raise TypeError(f"{name}: got {tensor.dtype} on {tensor.device}, expected bfloat16 or float32 with values")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
