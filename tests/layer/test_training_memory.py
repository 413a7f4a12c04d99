"""A layer that is trained holds its packed weights once, and its LoRA: nothing transposed, nothing that grows."""

from pathlib import Path

import pytest
import torch
from oracle import child

from ktmoe import KTMoEWrapper
from ktmoe.lora import lora_shapes
from ktmoe.methods import methods_of

EXPERTS, HIDDEN, INTER, RANK, TOKENS = 8, 1024, 1024, 8, 512
MIB = 1024 * 1024


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


@pytest.mark.parametrize("method", [m.name for m in methods_of("sft")])
def test_one_packed_copy(method: str) -> None:
    def body(say: object) -> None:
        wrapper = KTMoEWrapper(
            0, EXPERTS, 2, HIDDEN, INTER, 0, 2, 1, "", 4096, method=method, mode="sft", lora_rank=RANK
        )
        shapes = (INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)
        g = torch.Generator().manual_seed(0)
        inputs = (
            torch.randn(TOKENS, HIDDEN, generator=g).bfloat16(),
            torch.arange(2 * TOKENS).view(TOKENS, 2) % EXPERTS,
            torch.rand(TOKENS, 2, generator=g),
        )
        lora = [torch.randn(s, generator=g) / 32 for s in lora_shapes(EXPERTS, HIDDEN, INTER, RANK)]
        expert = [torch.randn(s, generator=g).bfloat16() / 32 for s in shapes]

        def step() -> None:
            out = wrapper.forward_sft(*inputs)
            wrapper.backward(out)

        def load() -> float:
            for e in range(EXPERTS):
                wrapper.load_expert(e, *expert)
            return resident()

        with_weights, packed = load(), wrapper.layer.packed_bytes / MIB
        wrapper.layer.unload()
        held = with_weights - resident()
        say(f"packed {packed:.1f} MiB, held {held:.1f} MiB")  # type: ignore[operator]
        assert packed * 0.98 <= held <= packed * 1.02 + 0.5
        load()
        wrapper.init_lora_weights(*lora)
        step()
        working = resident()
        for _ in range(5):
            for t in lora:
                t.mul_(0.9)
            step()
        say(f"after a step {working:.1f} MiB, after six {resident():.1f} MiB")  # type: ignore[operator]
        assert resident() - working < 8

    child.run(body, timeout=120).check()
