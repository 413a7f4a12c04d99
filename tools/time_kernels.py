"""How fast single kernels are: one thread, one matrix of 256 columns (8 panels), weights and rows in the caches.

    python tools/time_kernels.py [--isa amx] [--formats bf16,int8,q4_k] [--rows 1,16,256] [--k 2048]

A line for each format: rows, Gop/s forward (and GB/s of packed weights), Gop/s backward; medians. What a layer reaches
beside it says how much its other work, or the memory, costs: `python -m bench`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ktmoe import _ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from oracle import bf16
from oracle.kernels import Kernels
from oracle.published import PUBLISHED

COLUMNS, SECONDS = 256, 0.05
_k = _ext.testing


def median_s(call: Callable[[], object]) -> float:
    call()
    samples: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(samples) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def gops(isa: str, fmt: str, k: int, rows: list[int]) -> str:
    rng, kernels = np.random.default_rng(0), Kernels(isa, fmt)
    published = fmt in PUBLISHED
    packed = (
        kernels.repack(PUBLISHED[fmt].random(rng, COLUMNS, k, 1.0), COLUMNS, k)
        if published
        else kernels.pack(bf16.normal(rng, COLUMNS, k))
    )
    panels, step = COLUMNS // 32, int(_k.k_step(fmt))
    steps = -(-k // step)
    texts = []
    for m in rows:
        x = bf16.normal(rng, m, k)
        scale = None
        if _k.direct(fmt) == "int8":
            x, scale = kernels.quantize_rows(x, k, steps * step)
        operand, c = kernels.operand(x, m, k, scale), np.empty((panels, -(-m // 32) * 32, 32), np.float32)
        forward = median_s(lambda: _k.forward(isa, fmt, operand, m, packed, panels, k, 0, panels, c, None))  # noqa: B023
        dy = kernels.grad_operand(bf16.normal(rng, m, COLUMNS), m, panels)
        dx = np.empty((steps * step // 32, -(-m // 32) * 32, 32), np.float32)
        backward = median_s(lambda: _k.backward(isa, fmt, dy, m, packed, panels, k, 0, steps, dx, False))  # noqa: B023
        work = 2e-9 * m * COLUMNS * k
        texts.append(
            f"{m}: {work / forward:.0f} ({packed.nbytes * 1e-9 / forward:.0f} GB/s), back {work / backward:.0f}"
        )
    return " | ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=_ext.active_isa())
    parser.add_argument("--formats", default="bf16,int8,int4,int4_g32,fp8,q4_k,q8_0")
    parser.add_argument("--rows", default="1,4,16,64,256")
    parser.add_argument("--k", type=int, default=2048)
    options = parser.parse_args()
    for fmt in options.formats.split(","):
        print(f"{fmt:9}", gops(options.isa, fmt, options.k, [int(m) for m in options.rows.split(",")]), flush=True)


if __name__ == "__main__":
    main()
