"""fork(): the child starts threads of its own on first use, the parent goes on undisturbed."""

import threading

import pytest
from oracle import child
from oracle.layers import Layer, Shape, assert_same, make_inputs, make_pool

from ktmoe import _ext

SHAPE = Shape(8, 2, 96, 48)
CYCLES = 25


def check_child(layer: Layer, x: object, want: object, timeout: float = 20.0) -> None:
    def body(say: object) -> None:
        say("first")
        assert not layer.pool.started
        assert_same(layer.forward(x), want, "first forward of the child")
        say("again")
        for _ in range(3):
            assert_same(layer.forward(x), want, "another one")
        say("failing")
        with pytest.raises(RuntimeError):
            _ext.testing.failing_job(layer.pool, 20, 5)

    outcome = child.run(body, timeout)
    outcome.check()
    assert outcome.seconds < 10


def test_before_the_first_use() -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=3), make_inputs(SHAPE, 60)
    want = Layer(SHAPE, "bf16", "", threads=1).forward(x)
    fresh = Layer(SHAPE, "bf16", "", pool=make_pool(3))
    check_child(fresh, x, want)
    check_child(layer, x, want)
    assert_same(fresh.forward(x), want, "parent")


def test_after_use() -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=3), make_inputs(SHAPE, 60)
    want = layer.forward(x)
    for _ in range(CYCLES):
        check_child(layer, x, want)
        assert_same(layer.forward(x), want, "parent")


def test_a_child_that_does_nothing() -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=3), make_inputs(SHAPE, 60)
    layer.forward(x)
    for _ in range(CYCLES):
        outcome = child.run(lambda say: None)
        outcome.check()
        assert outcome.seconds < 5


def test_while_another_thread_runs_forwards() -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=3), make_inputs(SHAPE, 60)
    want, wrong, stop = layer.forward(x), [], threading.Event()

    def busy() -> None:
        while not stop.is_set():
            if not (layer.forward(x) == want).all():
                wrong.append("parent")

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for t in threads:
        t.start()
    try:
        for _ in range(CYCLES):
            check_child(layer, x, want)
    finally:
        stop.set()
        for t in threads:
            t.join()
    assert not wrong


def test_a_child_of_a_child() -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=2), make_inputs(SHAPE, 60)
    want = layer.forward(x)

    def body(say: object) -> None:
        check_child(layer, x, want)
        assert_same(layer.forward(x), want, "child")
        check_child(layer, x, want)

    child.run(body).check()


def test_a_queue_belongs_to_its_process() -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=2), make_inputs(SHAPE, 5)
    queue, out = _ext.TaskQueue(), layer.forward(x)
    queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, out).wait()

    def body(say: object) -> None:
        with pytest.raises(RuntimeError, match="made before fork"):
            queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, out)
        own = _ext.TaskQueue()
        own.submit_forward(layer.engine, x.hidden, x.ids, x.weights, out).wait()

    child.run(body).check()
    queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, out).wait()
