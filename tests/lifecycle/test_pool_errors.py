"""An exception in a worker reaches the caller, and the pool is as good as before."""

import threading

import pytest
import torch
from oracle.layers import Layer, Shape, assert_same, make_inputs, make_pool

from ktmoe import _ext

SHAPE = Shape(8, 2, 96, 48)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_pool_works_at_once_after_an_error(threads: int) -> None:
    layer, x = Layer(SHAPE, "bf16", "", threads=threads), make_inputs(SHAPE, 60)
    want = layer.forward(x)
    for tasks, first in ((1, 0), (2, 1), (64, 0), (64, 63), (64, 20), (1000, 500)):
        with pytest.raises(RuntimeError, match=r"^\[failing_job\] task \d+$") as raised:
            _ext.testing.failing_job(layer.pool, tasks, first)
        assert int(str(raised.value).split()[-1]) >= first
        assert_same(layer.forward(x), want, f"after {tasks} tasks that fail from {first}")


def test_a_job_without_failures_passes() -> None:
    pool = make_pool(3)
    for _ in range(200):
        _ext.testing.failing_job(pool, 10, 10)
        _ext.testing.failing_job(pool, 0, 0)


def test_errors_stay_with_their_caller() -> None:
    """Half of the threads fail, the others must not notice."""
    layer, x = Layer(SHAPE, "bf16", "", threads=3), make_inputs(SHAPE, 60)
    want, problems = layer.forward(x), []

    def fail() -> None:
        for _ in range(20):
            try:
                _ext.testing.failing_job(layer.pool, 30, 10)
                problems.append("no error")
            except RuntimeError:
                pass

    def work() -> None:
        for _ in range(20):
            if not torch.equal(layer.forward(x), want):
                problems.append("another result")

    threads = [threading.Thread(target=f) for f in (fail, work) * 3]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems


@pytest.mark.parametrize(
    ("threads", "nodes", "message"),
    [
        ([], [], "at least one"),
        ([1, 2], [0], "2 thread counts and 1 nodes"),
        ([0], [0], "got 0"),
        ([-1], [0], "got -1"),
    ],
)
def test_bad_pools(threads: list[int], nodes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ext.ThreadPool(threads, nodes)


def test_too_many_threads() -> None:
    with pytest.raises(ValueError, match="expected 1 to 4096"):
        _ext.ThreadPool([4000, 97], [0, 0])


def test_sub_pools_add_up_and_start_late() -> None:
    pool = _ext.ThreadPool([1, 2], [0, 0])
    assert pool.threads == 3
    assert not pool.started
    _ext.testing.failing_job(pool, 1, 1)
    assert pool.started
