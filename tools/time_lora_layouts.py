"""What a training step of one layer costs with the LoRA tensors as the engine's own six, and as PEFT has them.

    python tools/time_lora_layouts.py [--method AMXINT8_SFT] [--tokens 256,1024] [--rank 16] [--threads 2] [--rounds 8]

A line for each number of tokens and layout: ms of packing changed tensors, of forward, of backward; medians, layouts by
turns. "views" is PEFT's layout through autograd's own views. The layer is S1 of the benchmark (Qwen3-30B-A3B).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ktmoe import KTMoEWrapper, LoraTensors, moe_forward
from ktmoe.hf.peft_lora import PeftLora, lora_tensors, matrices_of
from ktmoe.lora import LoraSource, lora_shapes

EXPERTS, TOP_K, HIDDEN, INTER = 128, 8, 2048, 768


def layouts(rank: int) -> dict[str, tuple[list[Tensor], Callable[[], LoraSource]]]:
    """Name -> leaves, and what a forward is given of them."""
    own = [torch.randn(shape).div(32).requires_grad_() for shape in lora_shapes(EXPERTS, HIDDEN, INTER, rank)]
    both = EXPERTS * rank
    sizes = ((both, HIDDEN), (2 * INTER, both), (both, INTER), (HIDDEN, both))
    peft, viewed = ([torch.randn(size).div(32).requires_grad_() for size in sizes] for _ in range(2))

    def views() -> LoraTensors:
        first, down = (matrices_of(*viewed[i : i + 2], EXPERTS) for i in (0, 2))
        return lora_tensors(first, down, gated=True, interleaved=False, scaling=2.0, rank=rank, name="views")

    return {
        "own": (own, lambda: LoraTensors(*own, 2.0, rank, "own")),
        "PEFT": (peft, lambda: PeftLora(*peft, EXPERTS, True, False, 2.0, rank, "PEFT")),
        "views": (viewed, views),
    }


def step(wrapper: KTMoEWrapper, leaves: list[Tensor], lora: LoraSource, tokens: int) -> tuple[float, float, float]:
    """ms of packing, forward, backward."""
    hidden, grad = torch.randn(2, tokens, HIDDEN).bfloat16()
    hidden.requires_grad_()
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K, dim=1).indices
    weights = torch.rand(tokens, TOP_K)
    with torch.no_grad():
        for leaf in leaves:
            leaf.grad = None
            leaf.mul_(0.999)
    times = [time.perf_counter()]
    wrapper.mirror.acquire(lora.matrices)
    times.append(time.perf_counter())
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    times.append(time.perf_counter())
    out.backward(grad)
    times.append(time.perf_counter())
    packing, forward, backward = (1e3 * (b - a) for a, b in itertools.pairwise(times))
    return packing, forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="AMXINT8_SFT")
    parser.add_argument("--tokens", default="256,1024")
    for name, default in (("rank", 16), ("threads", 2), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    # fmt: off
    wrapper = KTMoEWrapper(0, EXPERTS, TOP_K, HIDDEN, INTER, 0, args.threads, 1, "", 4096,
                           method=args.method, mode="sft", lora_rank=args.rank)
    # fmt: on
    gate, up = torch.randn(2, EXPERTS, INTER, HIDDEN).mul_(HIDDEN**-0.5).bfloat16()
    wrapper.load_weights_from_tensors(gate, up, torch.randn(EXPERTS, HIDDEN, INTER).mul_(INTER**-0.5).bfloat16())
    of = layouts(args.rank)
    for tokens in map(int, args.tokens.split(",")):
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in of}
        for _ in range(args.rounds + 1):
            for name, (leaves, lora) in of.items():
                samples[name].append(step(wrapper, leaves, lora(), tokens))
        for name, got in samples.items():
            packing, forward, backward = (statistics.median(column) for column in zip(*got[1:], strict=True))
            what = f"{args.method} T={tokens} {name:6}"
            print(f"{what} packing {packing:6.1f}  forward {forward:6.1f}  backward {backward:6.1f}")


if __name__ == "__main__":
    main()
