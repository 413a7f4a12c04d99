"""Tolerances that follow from the arithmetic: a bound on every sum from the sum of its |terms|, not a percentage."""

import numpy as np

U32 = 2.0**-24  # unit roundoff of fp32
U16 = 2.0**-8  # of bf16


def sum_bound(terms: int, magnitude: np.ndarray, term_error: float = 0.0) -> np.ndarray:
    """Products of bf16 are exact in fp32; each of `terms` additions rounds once, and subnormal products may be flushed.

    magnitude: sum of |a * b|. term_error: relative error that the terms had before.
    """
    return (terms + 8) * U32 * magnitude + term_error * magnitude + terms * 2.0**-126


def assert_within(got: np.ndarray, want: np.ndarray, bound: np.ndarray, what: str) -> None:
    error = np.abs(got.astype(np.float64) - want)
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} values beyond the bound, first at {at}: "
            f"got {got[at]!r}, want {want[at]!r}, bound {np.broadcast_to(bound, error.shape)[at]:.3g}"
        )


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shapes {got.shape} and {want.shape}"
    different = np.ascontiguousarray(got).view(np.uint8) != np.ascontiguousarray(want).view(np.uint8)
    if different.any():
        raise AssertionError(f"{what}: {int(different.sum())} of {different.size} bytes differ")


def row_error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative L2 error of each row (0 where both are zero)."""
    norm = np.linalg.norm(want, axis=1)
    error = np.linalg.norm(got.astype(np.float64) - want, axis=1)
    return np.where(norm > 0, error / np.where(norm > 0, norm, 1), np.where(error > 0, np.inf, 0))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    norm = float(np.linalg.norm(want))
    error = float(np.linalg.norm(got.astype(np.float64) - want))
    return error / norm if norm else (np.inf if error else 0.0)


def cosine(got: np.ndarray, want: np.ndarray) -> float:
    a, b = got.astype(np.float64).ravel(), want.ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
