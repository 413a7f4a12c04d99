"""Sub-pools as threads: errors in one of them, fork, several callers, where workers run and memory lies."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from oracle import child
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora

from ktmoe import _ext

SHAPE = Shape(8, 2, 96, 300)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_in_one_part_surfaces_when_all_have_stopped(threads: int) -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=threads, parts=3), make_inputs(SHAPE, 60)
    want = layer.forward(x)
    for part in range(3):
        for tasks, first in ((1, 0), (64, 20), (1000, 500)):
            with pytest.raises(RuntimeError, match=r"^\[failing_job\] task \d+$"):
                _ext.testing.failing_job(layer.pool, tasks, first, part)
            assert_same(layer.forward(x), want, f"after an error in part {part}")
    with pytest.raises(RuntimeError, match="failing_job"):
        _ext.testing.failing_job(layer.pool, 10, 0)
    _ext.testing.failing_job(layer.pool, 10, 10)
    assert_same(layer.forward(x), want, "after errors in all parts")


def test_callers_from_many_threads() -> None:
    """Layers with all parts and with fewer, forward, training and errors, on one engine."""
    big = Layer(SHAPE, "bf16", "", threads=2, parts=3)
    small_shape = Shape(4, 2, 96, 40)
    small = Layer(small_shape, "bf16", "", pool=big.pool)
    lora, x, y = make_lora(SHAPE, 4), make_inputs(SHAPE, 40), make_inputs(small_shape, 40)
    adapter, dy = big.adapter(lora), grad_out(40, 96)
    want, want_small = big.forward(x), small.forward(y)
    grads = big.backward(big.train(x, adapter)[1], dy, adapter, lora)
    problems: list[str] = []

    def forward() -> None:
        for _ in range(20):
            if not (torch.equal(big.forward(x), want) and torch.equal(small.forward(y), want_small)):
                problems.append("forward")

    def train() -> None:
        for _ in range(5):
            got = big.backward(big.train(x, adapter)[1], dy, adapter, lora)
            if not all(torch.equal(got[n], grads[n]) for n in grads):
                problems.append("backward")

    def fail() -> None:
        for i in range(20):
            with pytest.raises(RuntimeError):
                _ext.testing.failing_job(big.pool, 30, 10, i % 3)

    threads = [threading.Thread(target=f) for f in (forward, train, fail) * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems


def check_child(layer: Layer, x: object, want: torch.Tensor) -> None:
    def body(say: object) -> None:
        assert not layer.pool.started
        for _ in range(3):
            assert_same(layer.forward(x), want, "child")  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            _ext.testing.failing_job(layer.pool, 20, 5, 1)

    outcome = child.run(body, 20)
    outcome.check()
    assert outcome.seconds < 10


def test_fork() -> None:
    """Before the first use, after it, and while other threads run forwards."""
    x, want = make_inputs(SHAPE, 60), Layer(SHAPE, "bf16", "", threads=1, parts=3).forward(make_inputs(SHAPE, 60))
    fresh = Layer(SHAPE, "bf16", "", pool=_ext.ThreadPool([2, 2, 2], [-1, -1, -1]))
    check_child(fresh, x, want)
    layer, stop, wrong = Layer(SHAPE, "bf16", "", threads=2, parts=3), threading.Event(), []
    for _ in range(10):
        check_child(layer, x, want)
        assert_same(layer.forward(x), want, "parent")

    def busy() -> None:
        while not stop.is_set():
            if not torch.equal(layer.forward(x), want):
                wrong.append("parent")

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for t in threads:
        t.start()
    try:
        for _ in range(15):
            check_child(layer, x, want)
    finally:
        stop.set()
        for t in threads:
            t.join()
    assert not wrong


def test_fork_while_threads_are_started() -> None:
    """Starting needs what fork() holds while it waits for running calls."""

    def body(say: object) -> None:
        for _ in range(100):
            pool = _ext.ThreadPool([2, 2, 2], [-1, -1, -1])
            first = threading.Thread(target=_ext.testing.failing_job, args=(pool, 10, 10))
            first.start()
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            first.join()

    child.run(body, 60).check()


# --- where workers run ---
def cpus_of_threads() -> dict[int, set[int]]:
    return {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")}


def test_workers_run_where_they_are_told_and_callers_where_they_want() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    homes = [[allowed[0]], [allowed[-1]]]
    before = cpus_of_threads()
    layer = Layer(SHAPE, "bf16", "", pool=_ext.ThreadPool([2, 3], [-1, -1], homes))
    x = make_inputs(SHAPE, 60)
    assert_same(layer.forward(x), Layer(SHAPE, "bf16", "", threads=1, parts=2).forward(x), "pinned")
    # A leader for the second sub-pool, and the workers beside each leader. A worker that nobody waited for may
    # not have started yet on a busy machine.
    expected = sorted([allowed[0]] + 3 * [allowed[-1]])
    deadline = time.monotonic() + 20
    while True:
        after = cpus_of_threads()
        own = sorted(min(c) for t, c in after.items() if t not in before and len(c) == 1)
        if own == expected or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert own == expected
    assert {t: after[t] for t in before if t in after} == {t: c for t, c in before.items() if t in after}
    assert os.sched_getaffinity(0) == set(allowed)


def test_a_cpu_that_does_not_exist_is_no_error() -> None:
    layer = Layer(SHAPE, "bf16", "", pool=_ext.ThreadPool([2, 2], [-1, -1], [[1023], [-5]]))
    x = make_inputs(SHAPE, 60)
    assert_same(layer.forward(x), Layer(SHAPE, "bf16", "", threads=1, parts=2).forward(x), "pinned nowhere")
    with pytest.raises(ValueError, match="subpool_cpus: got 1 lists, expected none or 2"):
        _ext.ThreadPool([1, 1], [0, 0], [[0]])


# --- where memory lies ---
def bindings() -> list[str]:
    return [line.split()[1] for line in Path("/proc/self/numa_maps").read_text().splitlines()]


def test_weights_are_bound_to_the_node_of_their_part() -> None:
    if _ext.node_memory_refused(0):
        pytest.skip(f"mbind: {_ext.node_memory_refused(0)}")
    shape = Shape(4, 2, 512, 768)
    before = bindings().count("prefer:0")
    layer = Layer(shape, "bf16", "", pool=_ext.ThreadPool([1, 1, 1], [0, -1, 0]))
    assert bindings().count("prefer:0") == before + 2
    x = make_inputs(shape, 9)
    assert_same(layer.forward(x), Layer(shape, "bf16", "", threads=1, parts=3).forward(x), "bound")


def test_a_node_that_cannot_be_had_is_no_error() -> None:
    """Asking says why; a layer then takes what memory there is."""
    assert _ext.node_memory_refused(5000)
    assert _ext.node_memory_refused(-1) == ""
    layer = Layer(SHAPE, "bf16", "", pool=_ext.ThreadPool([1, 1], [5000, 1000]))
    x = make_inputs(SHAPE, 9)
    assert_same(layer.forward(x), Layer(SHAPE, "bf16", "", threads=1, parts=2).forward(x), "elsewhere")
