"""Another product, which a forward kernel adds to its own."""

import numpy as np

from . import bf16
from .kernels import Kernels
from .memory import Place


class Addend:
    """Random bf16 rows [m, k] times weights of so many panels; `argument` is what the kernel takes."""

    def __init__(self, isa: str, m: int, panels: int, k: int, place: Place | None = None) -> None:
        rng, kernels = np.random.default_rng(m + k), Kernels(isa, "bf16", place)
        x, w = bf16.normal(rng, m, k), bf16.normal(rng, 32 * panels, k)
        self.argument = kernels.operand(x, m, k), kernels.pack(w), k
        exact_x, exact_w = bf16.widen(x).astype(np.float64), bf16.widen(w).astype(np.float64)
        self.k, self.sums, self.magnitude = k, exact_x @ exact_w.T, np.abs(exact_x) @ np.abs(exact_w).T
