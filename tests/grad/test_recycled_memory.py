"""The memory of a freed cache serves the next forward: with the same bits, and never more than was in use at once."""

import torch
from oracle import child
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora

from ktmoe import _ext

SHAPE = Shape(8, 4, 64, 256)
waiting = _ext.testing.waiting_bytes


def test_a_step_on_used_memory_has_the_bits_of_one_on_fresh_memory() -> None:
    def body(say: object) -> None:
        layer, lora = Layer(SHAPE, "bf16", ""), make_lora(SHAPE, 4)
        adapter = layer.adapter(lora)

        def step(tokens: int) -> dict[str, torch.Tensor]:
            out, cache = layer.train(make_inputs(SHAPE, tokens), adapter)
            return {"out": out, **layer.backward(cache, grad_out(tokens, SHAPE.hidden), adapter, lora)}

        sizes = (1024, 900, 500, 1100)
        fresh = {}
        for tokens in sizes:
            fresh[tokens] = step(tokens)
            say(f"{tokens}: {waiting()} bytes wait")  # type: ignore[operator]
        assert waiting() > 1 << 20
        for tokens in (*sizes, *sizes):
            for name, got in step(tokens).items():
                assert_same(got, fresh[tokens][name], f"{tokens} {name}")

    child.run(body, timeout=120).check()


def test_no_more_waits_than_was_in_use() -> None:
    def body(say: object) -> None:
        layer, most = Layer(SHAPE, "bf16", ""), 0
        assert waiting() == 0
        for tokens in (600, 700, 800, 3000, 2000, 1200, 600):
            _, cache = layer.train(make_inputs(SHAPE, tokens))
            most = max(most, cache.nbytes)
            assert cache.nbytes + waiting() <= most * 1.25  # a buffer may be larger than asked for
            del cache
            say(f"{tokens}: {waiting()} bytes wait")  # type: ignore[operator]
            assert 0 < waiting() <= most * 1.25
        _, first = layer.train(make_inputs(SHAPE, 3000))
        assert waiting() < 1 << 20  # it is in use again
        _, second = layer.train(make_inputs(SHAPE, 3000))
        del first, second
        assert waiting() > 2 * most * 0.9

    child.run(body, timeout=120).check()


def test_small_buffers_do_not_wait() -> None:
    def body(say: object) -> None:
        layer = Layer(SHAPE, "bf16", "")
        _, cache = layer.train(make_inputs(SHAPE, 8))
        del cache
        assert waiting() == 0

    child.run(body, timeout=120).check()
