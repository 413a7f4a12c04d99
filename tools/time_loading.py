"""How fast experts of a Qwen3-30B-A3B layer are packed, by method, from bf16 and from published formats.

    python tools/time_loading.py [--threads 2] [--experts 16] [--sources bf16,fp8,mxfp4,int4_g32,q4_k]

Prints medians of 5 loads: ms an expert, and 10^9 weights a second. The memory of the layer is its own before the first
load that counts; files are not read.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ktmoe import KTMoEWrapper
from ktmoe.io.published import PublishedExpert, quantize
from ktmoe.wrapper import BaseMoEWrapper

HIDDEN, INTER = 2048, 768
METHODS: dict[str, dict[str, str]] = {
    "BF16": {},
    "AMXINT8": {},
    "AMXINT4": {},
    "RAWINT4": {},
    "FP8": {},
    "LLAMAFILE Q8_0": {"gguf_type": "Q8_0"},
    "LLAMAFILE Q4_0": {"gguf_type": "Q4_0"},
    "LLAMAFILE Q4_K": {"gguf_type": "Q4_K"},
}


def expert(source: str) -> PublishedExpert:
    g = torch.Generator().manual_seed(0)
    shapes = (INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)
    floats = [(torch.randn(shape, generator=g) * 0.02).bfloat16() for shape in shapes]
    return PublishedExpert(tuple(quantize(w, source) for w in floats), {})


def make(name: str, threads: int, experts: int) -> BaseMoEWrapper:
    return KTMoEWrapper(
        layer_idx=0,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        hidden_size=HIDDEN,
        moe_intermediate_size=INTER,
        num_gpu_experts=0,
        cpuinfer_threads=threads,
        threadpool_count=1,
        weight_path="",
        chunked_prefill_size=4096,
        method=name.split()[0],
        mode="inference",
        **METHODS[name],
    )


def seconds_an_expert(layer: BaseMoEWrapper, weights: PublishedExpert, experts: int) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        layer.load_experts(lambda e: weights)
        times.append((time.perf_counter() - begin) / experts)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--sources", default="bf16,fp8,mxfp4,int4_g32,q4_k")
    args = parser.parse_args()
    for source in args.sources.split(","):
        weights = expert(source)
        for name in METHODS:
            seconds = seconds_an_expert(make(name, args.threads, args.experts), weights, args.experts)
            rate = 3 * HIDDEN * INTER / seconds / 1e9
            print(f"{source:9}-> {name:15} {seconds * 1e3:7.2f} ms  {rate:6.2f} G weights/s", flush=True)


if __name__ == "__main__":
    main()
