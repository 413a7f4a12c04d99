"""Calls from many Python threads are served one after the other, each with the bits that it would have alone."""

import threading
from collections.abc import Callable

import torch
from oracle.layers import Layer, Shape, make_inputs, make_lora, same

CALLERS = 8


def together(body: Callable[[int], None]) -> None:
    """Runs body(i) in all callers at once; the first exception is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(CALLERS)

    def run(i: int) -> None:
        try:
            start.wait()
            body(i)
        except BaseException as e:  # must not be lost in the thread
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(CALLERS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def test_forwards() -> None:
    small, large = Shape(4, 2, 64, 48), Shape(2, 1, 160, 100)
    first = Layer(small, "bf16", "", threads=3)
    layers = [first, Layer(large, "int8", "", pool=first.pool), Layer(large, "bf16", "", pool=first.pool)]
    inputs = [[make_inputs(layer.shape, 1 + 5 * i, seed=i) for i in range(CALLERS)] for layer in layers]
    want = [[layer.forward(x) for x in xs] for layer, xs in zip(layers, inputs, strict=True)]

    def body(i: int) -> None:
        for _ in range(15):
            for n, layer in enumerate(layers):
                assert same(layer.forward(inputs[n][i]), want[n][i])

    together(body)


def test_training_steps() -> None:
    shape = Shape(4, 2, 96, 48)
    layer, lora = Layer(shape, "bf16", "", threads=3), make_lora(Shape(4, 2, 96, 48), 4)
    adapter = layer.adapter(lora)
    inputs = [make_inputs(shape, 3 + 4 * i, seed=i) for i in range(CALLERS)]
    dy = [
        torch.randn(x.tokens, 96, generator=torch.Generator().manual_seed(i)).bfloat16() for i, x in enumerate(inputs)
    ]
    want = [layer.backward(layer.train(x, adapter)[1], d, adapter, lora) for x, d in zip(inputs, dy, strict=True)]

    def body(i: int) -> None:
        for _ in range(5):
            _, cache = layer.train(inputs[i], adapter)
            for name, value in layer.backward(cache, dy[i], adapter, lora).items():
                assert same(value, want[i][name]), name

    together(body)


def test_first_use_by_all_at_once() -> None:
    """The pool starts its threads once."""
    shape = Shape(4, 2, 96, 48)
    x = make_inputs(shape, 30)
    want = Layer(shape, "bf16", "", threads=1).forward(x)
    for _ in range(10):
        layer = Layer(shape, "bf16", "", threads=3)
        results: list[torch.Tensor | None] = [None] * CALLERS
        together(lambda i, layer=layer, results=results: results.__setitem__(i, layer.forward(x)))
        assert all(r is not None and same(r, want) for r in results)
