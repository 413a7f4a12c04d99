"""Long use leaves nothing behind: memory, threads and file descriptors stay what they were, and so do results.

`make soak` runs the counts of an hour's use (KTMOE_SOAK=1); otherwise a hundredth of them.
"""

import contextlib
import gc
import os

import torch
import torch_oracle as ref
from oracle import child
from oracle.layers import make_pool

from ktmoe import _ext

SOAK = bool(os.environ.get("KTMOE_SOAK"))
SHAPE = ref.Shape()
LIMIT_S = 3600 if SOAK else 120


def status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def held() -> tuple[int, int]:
    """Threads and open files."""
    return status("Threads"), len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """kB, after garbage is gone."""
    gc.collect()
    return status("VmRSS")


def test_create_and_destroy() -> None:
    """10,000 layers (1,000 without soak) that are loaded, used and dropped."""

    def body(say: object) -> None:
        pool = make_pool(2)
        weights = ref.weights(SHAPE)
        hidden, ids, routing = ref.batch(SHAPE, 3)
        out = torch.empty_like(hidden)

        def cycle(fmt: str) -> None:
            layer = _ext.MoeLayer(pool, SHAPE.experts, SHAPE.top_k, SHAPE.hidden, SHAPE.inter, fmt)
            for e, expert in enumerate(zip(*weights, strict=True)):
                layer.load_expert(e, *expert)
            layer.forward(hidden, ids, routing, out)

        for _ in range(100):
            cycle("bf16")
        before, others = resident(), held()
        for n in range(10_000 if SOAK else 1_000):
            cycle(("bf16", "int8", "int4")[n % 3])
        say(f"{before} kB, then {resident()} kB")  # type: ignore[operator]
        assert resident() - before < 2048
        assert held() == others

    child.run(body, timeout=LIMIT_S).check()


def test_mixed_use_by_call_count() -> None:
    """Inference, submitted forwards, adapters, training, loading: at most 1 MiB for 10,000 calls after the first."""

    def body(say: object) -> None:
        server = ref.loaded(SHAPE, "AMXINT8")
        server.add_adapter("a", *(t.detach() for t in ref.lora(SHAPE).tensors))
        trainer = ref.loaded(SHAPE, "AMXINT4_SFT", max_cache_depth=2, lora_dropout=0.1)
        lora = [t.detach() for t in ref.lora(SHAPE).tensors]
        trainer.init_lora_weights(*lora)
        batches = [ref.batch(SHAPE, n) for n in (1, 2, 7, 33, 150)]
        want = server.forward(*batches[3], adapter=None)

        def round_of_calls(n: int) -> None:
            batch = batches[n % len(batches)]
            server.forward(*batch, adapter="a" if n % 2 else None)
            server.submit_forward(*batch)
            out = server.sync_forward()
            trainer.forward_sft(*batch)
            trainer.forward_sft(*batch)
            trainer.backward(out)
            trainer.backward(out)
            lora[n % 6].mul_(0.999)
            if n % 50 == 0:
                trainer.load_weights_from_tensors(*ref.weights(SHAPE, seed=n % 3))
                with contextlib.suppress(ValueError):
                    server.forward(batch[0], batch[1] + 1000, batch[2])

        for n in range(300):
            round_of_calls(n)
        before, others = resident(), held()
        rounds = 30_000 if SOAK else 1_000
        for n in range(rounds):
            round_of_calls(n)
        grown = resident() - before
        say(f"{rounds} rounds: grown by {grown} kB")  # type: ignore[operator]
        assert grown < 1024 + rounds * 7 * 1024 / 10_000
        assert held() == others
        server.delete_adapter("a")
        assert torch.equal(server.forward(*batches[3]), want)

    child.run(body, timeout=LIMIT_S).check()


def test_fork_cycles() -> None:
    """200 children (20 without soak) of a process that computes meanwhile."""

    def body(say: object) -> None:
        wrapper = ref.loaded(SHAPE, "AMXINT8", cpuinfer_threads=2)
        inputs = ref.batch(SHAPE, 33)
        want = wrapper.forward(*inputs)
        for n in range(200 if SOAK else 20):
            wrapper.submit_forward(*inputs)

            def work() -> None:
                assert torch.equal(wrapper.forward(*inputs), want)

            assert ref.in_child(work) == 0, n
            assert torch.equal(wrapper.sync_forward(), want)

    child.run(body, timeout=LIMIT_S).check()
