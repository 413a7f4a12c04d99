"""Every kernel with every operand flush against a page that faults: nothing is read or written outside an operand."""

import ctypes
import mmap
import signal

import numpy as np
import pytest
import torch
from oracle import bf16, child, layout
from oracle.addend import Addend
from oracle.bounds import assert_same_bits
from oracle.experts import ACTIVATIONS
from oracle.formats import int8_quantize_rows
from oracle.kernels import Kernels
from oracle.memory import Guarded, Heap, Place, put_rows
from oracle.published import arrays
from oracle.registry import BLOCK_ROWS, SLOW_ISAS, each_format, each_isa

from ktmoe import _ext
from ktmoe.io.published import QUANTISED, empty_matrix

SIDES = ["right", "left"]
_NUMPY = {torch.uint8: np.uint8, torch.bfloat16: np.uint16}
ROWS = [1, 2, 3, 7, 16, 17, 33, 65]
SHAPES = [(1, 1), (17, 33), (33, 65), (40, 130)]
each_side = pytest.mark.parametrize("side", SIDES)


def gemms(isa: str, fmt: str, place: Place, m: int, n: int, k: int) -> dict[str, np.ndarray]:
    """All results of packing, forward and backward for one shape."""
    rng = np.random.default_rng(m * 1000 + n + k)
    kernels = Kernels(isa, fmt, place)
    w, up = bf16.normal(rng, n, k), bf16.normal(rng, n, k)
    x, index = bf16.normal(rng, m + 4, k), rng.integers(0, m + 4, m)
    out = {"plain": kernels.pack(w, ld=k + 3), "paired": kernels.pack(w, up)}
    panels = layout.n_panels(n, paired=False)
    rows, scale = x, None
    if kernels.oracle.activations == "int8":
        padded = -(-k // kernels.oracle.k_step) * kernels.oracle.k_step
        rows = np.zeros((m + 4, padded), np.int8)
        rows[:, :k], scale = int8_quantize_rows(bf16.widen(x))
        out["levels"], out["scales"] = kernels.quantize_rows(x, ld=k + 5, padded=padded)
    out["operand"] = kernels.operand(rows, m, k, scale, ld=rows.shape[1] + 9)
    gathered = kernels.operand(rows, m, k, scale, index)
    out["forward"] = kernels.forward(out["operand"], m, out["plain"], panels, k)
    out["gathered"] = kernels.forward(gathered, m, out["plain"], panels, k)
    plus = Addend(isa, m, panels, 40, place)
    out["with another product"] = kernels.forward(gathered, m, out["plain"], panels, k, plus=plus.argument)
    dy = bf16.normal(rng, m + 4, n)
    column_scale = rng.uniform(0.5, 2, 32 * panels).astype(np.float32)
    out["grad operand"] = kernels.grad_operand(dy, m, panels, column_scale, ld=n + 3)
    out["backward"] = kernels.backward(out["grad operand"], m, out["plain"], panels, k)
    gathered = kernels.grad_operand(dy, m, panels, None, index)
    start = rng.standard_normal(out["backward"].shape, dtype=np.float32)
    out["backward accumulated"] = kernels.backward(gathered, m, out["plain"], panels, k, start=start)
    return out


def small_kernels(isa: str, place: Place, m: int) -> dict[str, np.ndarray]:
    """Outer products and everything elementwise."""
    rng = np.random.default_rng(m)
    kernels = Kernels(isa, place=place)
    out = {}
    for columns, tiles in ((1, 1), (17, 3)):
        p, q = bf16.normal(rng, m, columns), bf16.normal(rng, m + 2, 16 * tiles)
        out[f"outer {columns}"] = kernels.outer(
            p, q[:m], 16, tiles, p_ld=columns + 1, q_ld=16 * tiles + 7, out_ld=16 * tiles + 5
        )
        wide, index = bf16.normal(rng, m + 2, 32 * (tiles - 1) + 16), rng.integers(0, m + 2, m)
        start = rng.standard_normal((columns, 16 * tiles), dtype=np.float32)
        out[f"outer gathered {columns}"] = kernels.outer(p, wide, 32, tiles, index=index, start=start)
    c = rng.standard_normal((2, m, 32), dtype=np.float32)
    weight = rng.random(m, dtype=np.float32)
    for what, activation in ACTIVATIONS.items():
        out[f"{what} h"], out[f"{what} gate|up"] = kernels.activate(c, ld=5, activation=activation)
        for panels in (1, 2, 3):
            blocks = -(-panels // 2) if activation.gated else panels
            dh = rng.standard_normal((blocks, m, 32), dtype=np.float32)
            gate_up = bf16.normal(rng, m, 32 * panels)
            back = kernels.activate_backward(dh, gate_up, weight, ld=5, activation=activation)
            out |= {f"{what} backward {name} {panels}": value for name, value in back.items()}
    out["biased"] = kernels.add_bias(c, rng.standard_normal(64, dtype=np.float32))
    for n in (1, 16, 33):
        v = rng.standard_normal(-(-n // 16) * 16, dtype=np.float32)
        out[f"dots {n}"] = kernels.dot_rows(bf16.normal(rng, m, n), v, weight, ld=3)
    out["c to bf16"], out["c to rows"] = kernels.c_out(c, weight, ld=7)
    rows = rng.standard_normal((m, 64), dtype=np.float32)
    row_of = np.array([m - 1, -1, 0], np.int32)
    for hidden in (1, 15, 16, 33, 64):
        out["sum"], out[f"rounded {hidden}"] = kernels.combine(rows, row_of, rng.random(3, dtype=np.float32), hidden)
    return out


def compare(guarded: dict[str, np.ndarray], free: dict[str, np.ndarray], what: str) -> None:
    for name in free:
        assert_same_bits(guarded[name], free[name], f"{name}, {what}")


@each_isa
@each_format
@each_side
def test_gemm_kernels(isa: str, fmt: str, side: str) -> None:
    def body(say: object) -> None:
        for n, k in SHAPES:
            for m in (m for m in ROWS if m <= BLOCK_ROWS[isa] and not (isa in SLOW_ISAS and m in (7, 33))):
                say(f"m={m} n={n} k={k}")
                place = Guarded(side)
                compare(gemms(isa, fmt, place, m, n, k), gemms(isa, fmt, Heap(), m, n, k), f"m={m} n={n} k={k}")
                place.assert_slack_untouched()

    child.run(body).check()


@each_isa
@each_side
def test_small_kernels(isa: str, side: str) -> None:
    def body(say: object) -> None:
        for m in ROWS:
            say(f"m={m}")
            place = Guarded(side)
            compare(
                small_kernels(isa, place, min(m, BLOCK_ROWS[isa])),
                small_kernels(isa, Heap(), min(m, BLOCK_ROWS[isa])),
                f"m={m}",
            )
            place.assert_slack_untouched()

    child.run(body).check()


def floats_and_back(isa: str, fmt: str, place: Place, n: int, k: int) -> dict[str, np.ndarray]:
    """A matrix of floats in a published format, and what that stands for."""
    floats = np.random.default_rng(n + k).standard_normal((n, k), np.float32)
    out: dict[str, np.ndarray] = {}
    for name, source in (("fp32", floats), ("bf16", bf16.narrow(floats))):
        parts = [
            place.empty(part.shape, _NUMPY.get(part.dtype, np.float32), part.itemsize)
            for part in empty_matrix(fmt, n, k).parts
        ]
        placed = put_rows(place, source, k + 3)
        given = bf16.tensor(placed) if source.dtype == np.uint16 else placed
        _ext.quantize(fmt, given, arrays(parts), None, isa)
        out |= {f"{name} part {i}": part for i, part in enumerate(parts)}
        back = place.empty((n, k), source.dtype.type, source.itemsize)
        _ext.dequantize(fmt, arrays(parts), bf16.tensor(back) if source.dtype == np.uint16 else back, None, isa)
        out[f"{name} back"] = back
    return out


@each_isa
@each_side
@pytest.mark.parametrize("fmt", QUANTISED)
def test_floats_and_back(isa: str, fmt: str, side: str) -> None:
    def body(say: object) -> None:
        for n, k in (*SHAPES, (130, 257)):
            say(f"n={n} k={k}")
            place = Guarded(side)
            got, want = (floats_and_back(isa, fmt, where, n, k) for where in (place, Heap()))
            compare(got, want, f"n={n} k={k}")
            place.assert_slack_untouched()

    child.run(body).check()


@pytest.mark.parametrize("offset", [0, -1], ids=["behind the right side", "before the left side"])
def test_the_lane_catches_one_byte(offset: int) -> None:
    side = "left" if offset < 0 else "right"

    def touch(say: object) -> None:
        array = Guarded(side).empty((100,), np.uint8, 1)
        at = array.ctypes.data + (offset if side == "left" else 100)
        say("about to touch")
        ctypes.string_at(at, 1)

    outcome = child.run(touch)
    assert outcome.status == -signal.SIGSEGV
    assert "about to touch" in outcome.said


def test_the_lane_catches_a_kernel_that_reads_too_far() -> None:
    """Told of one column more than there is, a kernel must die here."""

    def body(say: object) -> None:
        place = Guarded("right")
        kernels = Kernels("portable", "bf16", place)
        row = bf16.tensor(place.empty((1, 32), np.uint16, 2).view())
        dst = np.zeros(1 << 16, np.uint8)
        _ext.testing.pack_operand(kernels.isa, "bf16", row, None, None, 1, 33, dst)

    assert child.run(body).status == -signal.SIGSEGV


def test_slack_is_checked() -> None:
    place = Guarded("right")
    array = place.empty((4,), np.uint8, 64)
    ctypes.memset(array.ctypes.data + 5, 1, 1)
    with pytest.raises(AssertionError, match="behind"):
        place.assert_slack_untouched()
    assert mmap.PAGESIZE % 64 == 0
