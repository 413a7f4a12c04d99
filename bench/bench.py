"""One layer of routed experts: ktmoe beside plain PyTorch on the same weights, routing and threads, rounds interleaved.

    python bench/bench.py --shape S1 --tokens 1,16,256 --impl BF16,AMXINT8,torch
    python bench/bench.py --shape T --tokens 64 --impl AMXBF16_SFT,torch --mode sft

Prints medians (ms), GFLOP/s (6 * tokens * top_k * hidden * inter a pass) and the ratio to the fastest;
`--json FILE` keeps every sample.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn import functional

import ktmoe


@dataclass(frozen=True)
class Shape:
    hidden: int
    inter: int
    experts: int
    top_k: int


SHAPES = {
    "S1": Shape(2048, 768, 128, 8),  # a Qwen3-30B-A3B layer
    "S2": Shape(7168, 2048, 16, 8),  # DeepSeek-V3 experts, 16 of them
    "T": Shape(256, 256, 8, 2),
    "TINY": Shape(64, 64, 8, 2),  # call overhead
}
LORA_RANK = 16


@dataclass
class Problem:
    shape: Shape
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def make(cls, shape: Shape) -> "Problem":
        torch.manual_seed(0)
        e, h, i = shape.experts, shape.hidden, shape.inter
        return cls(shape, *((torch.randn(d) / d[2] ** 0.5).bfloat16() for d in ((e, i, h), (e, i, h), (e, h, i))))

    def batch(self, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        ids = torch.rand(tokens, self.shape.experts, generator=g).argsort(-1)[:, : self.shape.top_k].contiguous()
        weights = torch.rand(tokens, self.shape.top_k, generator=g).softmax(-1)
        return torch.randn(tokens, self.shape.hidden, generator=g).bfloat16(), ids, weights

    def lora(self) -> list[torch.Tensor]:
        e, h, i, r = self.shape.experts, self.shape.hidden, self.shape.inter, LORA_RANK
        shapes = ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r))
        return [torch.randn(s) / s[2] ** 0.5 for s in shapes]


class Ktmoe:
    def __init__(self, problem: Problem, method: str, threads: int, max_tokens: int) -> None:
        s = problem.shape
        self.sft = method.endswith("_SFT")
        self.wrapper = ktmoe.KTMoEWrapper(
            0, s.experts, s.top_k, s.hidden, s.inter, 0, threads, 1, "", max_tokens,
            method=method, mode="sft" if self.sft else "inference", lora_rank=LORA_RANK,
        )  # fmt: skip
        self.wrapper.load_weights_from_tensors(problem.gate, problem.up, problem.down)
        if self.sft:
            self.wrapper.init_lora_weights(*problem.lora())

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.sft:
            return self.wrapper.forward_sft(x, ids, weights, save_for_backward=True)
        return self.wrapper.forward(x, ids, weights)

    def backward(self, grad: torch.Tensor) -> None:
        self.wrapper.backward(grad)


class Torch:
    """The eager loop over active experts, bf16, as transformers writes it."""

    def __init__(self, problem: Problem, sft: bool) -> None:
        self.p, self.sft = problem, sft
        self.lora = [t.bfloat16().requires_grad_() for t in problem.lora()] if sft else []

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.sft):
            self.x = x.requires_grad_(self.sft)
            self.y = self._experts(self.x, ids, weights)
            return self.y

    def _experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        lora = [t.unbind(0) for t in self.lora]

        def linear(v: torch.Tensor, w: torch.Tensor, which: int, e: int) -> torch.Tensor:
            base = functional.linear(v, w[e])
            if not self.sft:
                return base
            return base + 2 * functional.linear(functional.linear(v, lora[2 * which][e]), lora[2 * which + 1][e])

        for e in ids.unique().tolist():
            t, k = (ids == e).nonzero(as_tuple=True)
            h = functional.silu(linear(x[t], self.p.gate, 0, e)) * linear(x[t], self.p.up, 1, e)
            y = y.index_add(0, t, linear(h, self.p.down, 2, e) * weights[t, k, None].bfloat16())
        return y

    def backward(self, grad: torch.Tensor) -> None:
        self.y.backward(grad)


def measure(
    impl: Ktmoe | Torch, problem: Problem, tokens: int, sft: bool, seconds: float, first: int
) -> list[list[float]]:
    batches = [problem.batch(tokens, first + i) for i in range(16 if tokens <= 16 else 2)]
    samples: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while len(samples[0]) < 2 or time.perf_counter() < end:
        x, ids, weights = batches[len(samples[0]) % len(batches)]
        start = time.perf_counter()
        impl.forward(x, ids, weights)
        samples[0].append(1e3 * (time.perf_counter() - start))
        if sft:
            grad = torch.ones_like(x)
            start = time.perf_counter()
            impl.backward(grad)
            samples[1].append(1e3 * (time.perf_counter() - start))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S1", choices=SHAPES)
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--impl", default="BF16,AMXINT8,torch")
    parser.add_argument("--mode", default="infer", choices=("infer", "sft"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="per implementation, cell and round")
    parser.add_argument("--json", help="write every sample to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sft, tokens = args.mode == "sft", [int(t) for t in args.tokens.split(",")]
    problem = Problem.make(SHAPES[args.shape])
    impls = {
        name: Torch(problem, sft) if name == "torch" else Ktmoe(problem, name, args.threads, max(tokens))
        for name in args.impl.split(",")
    }
    results: dict[tuple[str, int], list[list[float]]] = {(n, t): [[], []] for n in impls for t in tokens}
    for round_ in range(args.rounds):
        order = list(impls) if round_ % 2 == 0 else list(reversed(impls))
        for t in tokens:
            for name in order:
                got = measure(impls[name], problem, t, sft, args.seconds, 100 * round_)
                for kept, new in zip(results[name, t], got, strict=True):
                    kept += new[1:]  # the first call of a round is cold
    report(results, problem.shape, sft)
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{"impl": n, "tokens": t, "ms": s} for (n, t), s in results.items()], f)


def report(results: dict[tuple[str, int], list[list[float]]], s: Shape, sft: bool) -> None:
    print(f"{s}\n{'impl':>14} {'tokens':>7} {'pass':>8} {'ms':>9} {'GFLOP/s':>9} {'of fastest':>10}")
    for index, label in enumerate(("forward", "backward") if sft else ("forward",)):
        for t in dict.fromkeys(t for _, t in results):
            medians = {n: statistics.median(v[index]) for (n, tt), v in results.items() if tt == t}
            for name, ms in medians.items():
                rate = 6 * t * s.top_k * s.hidden * s.inter / ms / 1e6
                print(f"{name:>14} {t:>7} {label:>8} {ms:>9.2f} {rate:>9.0f} {ms / min(medians.values()):>9.2f}x")


if __name__ == "__main__":
    main()
