"""How one layer would scale to several NUMA nodes, from times that can be measured on one.

    python -m bench.numa                                  S1 on 2 and 4 sockets, for docs/numa.md
    python -m bench.numa --link 20,50 --threads 1,32 --tokens 1,64

A layer of n parts works like n layers that have a slice of inter each, side by side, and a merge. Measured here are
    slice   a layer whose inter is 1/n, on one thread: what each socket does
    merge   what n fp32 sums take beyond one in bf16: clearing, writing, adding, rounding, on one thread
    wake    what two parts on two threads take beyond a slice and a merge: handing over and waiting for the other
and the time on n sockets is  slice / threads + merge / (n threads) + wake + bytes that cross / link.  Within a socket
all work is taken to be shared perfectly; each socket's memory to be as fast, for each thread, as this machine's.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch

from bench.problem import DISTINCT_EXPERTS, SHAPES, Shape, batch_seeds, routing
from ktmoe import _ext

SOCKETS = (1, 2, 4)
ROUNDS = 4


class Timed:
    """Forwards of a layer with random weights, one thread for each part."""

    def __init__(self, shape: Shape, fmt: str, tokens: int, *, parts: int = 1, masked: bool = False) -> None:
        pool = _ext.ThreadPool([1] * parts, [-1] * parts)
        self.layer = _ext.MoeLayer(pool, shape.experts, shape.top_k, shape.hidden, shape.inter, fmt)
        g = torch.Generator().manual_seed(0)
        sizes = ((shape.inter, shape.hidden), (shape.inter, shape.hidden), (shape.hidden, shape.inter))
        n_distinct = min(DISTINCT_EXPERTS, shape.experts)
        distinct = [
            [(torch.randn(s, generator=g) / math.sqrt(s[1])).bfloat16() for s in sizes] for _ in range(n_distinct)
        ]
        for e in range(shape.experts):
            self.layer.load_expert(e, *distinct[e % n_distinct])
        self.x = torch.randn(tokens, shape.hidden, generator=g).bfloat16()
        self.out = torch.empty_like(self.x)
        self.weights = torch.full((tokens, shape.top_k), 1 / shape.top_k)
        self.ids = [routing(shape, tokens, seed) for seed in batch_seeds(tokens)]
        if masked:
            self.ids = [torch.full_like(i, -1) for i in self.ids]
        self.times: list[float] = []

    def run(self, seconds: float) -> None:
        """Calls for about so long, at least three; the first one is not counted."""
        end = time.perf_counter() + seconds
        for call in range(1_000_000):
            begin = time.perf_counter()
            self.layer.forward(self.x, self.ids[call % len(self.ids)], self.weights, self.out)
            now = time.perf_counter()
            if call:
                self.times.append(now - begin)
            if now > end and call > 2:
                return

    @property
    def quiet(self) -> float:
        """The lowest tenth: the machine may be shared."""
        return sorted(self.times)[len(self.times) // 10]


@dataclass(frozen=True)
class Measured:
    slice: dict[int, float]  # seconds of a call, by number of sockets
    merge: dict[int, float]
    wake: float

    def speedup(self, sockets: int, threads: int, link: float, crossing: float) -> float:
        """Over one socket of as many threads. link: bytes/s into each socket; crossing: bytes that each one fetches."""
        merge = self.merge[sockets] / (sockets * threads)
        return self.slice[1] / threads / (self.slice[sockets] / threads + merge + self.wake + crossing / link)


def crossing_bytes(hidden: int, sockets: int, tokens: int) -> float:
    """What a socket fetches that has neither the tokens nor the other parts' sums of its share of them."""
    return tokens * (2 * hidden + 4 * hidden * (sockets - 1) / sockets)


def measure(shape: Shape, fmt: str, tokens: int, seconds: float) -> Measured:
    def with_inter(inter: int, experts: int, top_k: int) -> Shape:
        return Shape("", shape.hidden, inter, experts, top_k)

    slices = {n: Timed(with_inter(shape.inter // n, shape.experts, shape.top_k), fmt, tokens) for n in SOCKETS}
    # Nothing is routed: nobody is woken, one thread does it all.
    merges = {n: Timed(with_inter(1024, 2, 2), "bf16", tokens, parts=n, masked=True) for n in SOCKETS}
    merge_one = {n: Timed(with_inter(1024, 2, 2), "bf16", 1, parts=n, masked=True) for n in (1, 2)}
    # Small enough to be over before anybody falls asleep.
    two, half = Timed(with_inter(256, 2, 1), "bf16", 1, parts=2), Timed(with_inter(128, 2, 1), "bf16", 1)
    everything = [*slices.values(), *merges.values(), *merge_one.values(), two, half]
    for _ in range(ROUNDS):
        for timed in everything:
            timed.run(seconds / ROUNDS)
    # The best of many: on a busy machine the other thread comes late, and the caller does its part as well.
    wake = min(two.times) - min(half.times) - (merge_one[2].quiet - merge_one[1].quiet)
    merge = {n: max(0.0, merges[n].quiet - merges[1].quiet) for n in SOCKETS}
    return Measured({n: s.quiet for n, s in slices.items()}, merge, max(0.0, wake))


def main() -> None:
    parser = argparse.ArgumentParser(
        "bench.numa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="S1", choices=SHAPES)
    parser.add_argument("--formats", default="bf16,int8")
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--threads", default="1,32", help="of each socket")
    parser.add_argument("--link", default="25,100", help="GB/s into each socket")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    links = [float(text) for text in args.link.split(",")]
    print(shape)
    print(
        "| format | tokens | slice 1, 1/2, 1/4 (ms) | merge 2, 4 (us) | wake (us) | threads | 2 sockets | 4 sockets |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for fmt in args.formats.split(","):
        for tokens in map(int, args.tokens.split(",")):
            m = measure(shape, fmt, tokens, args.seconds)
            for threads in map(int, args.threads.split(",")):
                cells = [", ".join(f"{1e3 * m.slice[n]:.2f}" for n in SOCKETS)]
                cells += [
                    ", ".join(f"{1e6 * m.merge[n]:.1f}" for n in SOCKETS[1:]),
                    f"{1e6 * m.wake:.0f}",
                    str(threads),
                ]
                for n in SOCKETS[1:]:
                    crossing = crossing_bytes(shape.hidden, n, tokens)
                    cells.append(" / ".join(f"{m.speedup(n, threads, 1e9 * link, crossing):.2f}" for link in links))
                print(f"| {fmt} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
