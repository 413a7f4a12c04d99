"""bf16 as uint16 bits in NumPy, and views of them as torch tensors (NumPy has no bf16 type)."""

import numpy as np
import torch


def narrow(x: np.ndarray) -> np.ndarray:
    """Nearest bf16, ties to even; NaN stays NaN."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, (u >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tensor(bits: np.ndarray) -> torch.Tensor:
    """The same memory as a torch bf16 tensor, strides kept."""
    return torch.from_numpy(bits).view(torch.bfloat16)


def bits_of(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.uint16).numpy()


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return narrow(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))
