"""The engine: planning threads, sharing, warnings."""

import logging

import pytest
import torch
import torch_oracle as ref

from ktmoe import _ext, runtime
from ktmoe.runtime import CPUInfer, WorkerPoolConfig, get_engine

SHAPE = ref.Shape()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(runtime, "_engines", {})
    monkeypatch.setattr(runtime, "_warned", set())


def test_equal_configurations_share_an_engine(caplog) -> None:
    with caplog.at_level(logging.WARNING, "ktmoe"):
        a, b = ref.make(SHAPE, "BF16"), ref.make(SHAPE, "AMXINT8_SFT")
        assert a.cpu_infer is b.cpu_infer
        assert get_engine(WorkerPoolConfig(1, [0], [1])) is a.cpu_infer
        assert not caplog.records
        other = get_engine(WorkerPoolConfig(2, (0, 0), (1, 1)))
        assert other is not a.cpu_infer
        assert other.pool.threads == 2
        assert get_engine(WorkerPoolConfig(2, [0, 0], [1, 1])) is other
    assert len(caplog.records) == 1
    assert "second thread pool" in caplog.text


def test_more_subpools_than_nodes_is_one_warning_and_works(caplog) -> None:
    with caplog.at_level(logging.WARNING, "ktmoe"):
        for _ in range(3):
            wrapper = ref.loaded(SHAPE, "BF16", cpuinfer_threads=2, threadpool_count=9)
    assert wrapper.cpu_infer.config.subpool_count == 9
    assert len([r for r in caplog.records if "threadpool_count=9" in r.getMessage()]) == 1
    inputs = ref.batch(SHAPE, 4)
    assert ref.row_error(wrapper.forward(*inputs), ref.forward(wrapper, *inputs)) <= ref.forward_tolerance(wrapper)


def plan(monkeypatch, cpus, nodes, *arguments):
    monkeypatch.setattr(runtime, "usable_cpus", lambda: frozenset(range(cpus)))
    monkeypatch.setattr(runtime, "physical_cores", lambda cpus: max(1, len(cpus) // 2))
    own = {n: frozenset(range(cpus * i // len(nodes), cpus * (i + 1) // len(nodes))) for i, n in enumerate(nodes)}
    monkeypatch.setattr(runtime, "node_cpus", lambda cpus: own)
    config = WorkerPoolConfig.plan(*arguments)
    return config.subpool_numa_map, config.subpool_thread_count


@pytest.mark.parametrize(
    ("cpus", "nodes", "arguments", "want"),
    [
        (64, (0, 1), (None, None), ((0, 1), (16, 16))),
        (64, (0, 1), (60, 4), ((0, 1, 0, 1), (15, 15, 15, 15))),
        (64, (0, 1), (7, 2), ((0, 1), (4, 3))),
        (64, (2, 5), (4, 2), ((2, 5), (2, 2))),
        (64, (0, 1), (4, 2, [1, 1]), ((1, 1), (2, 2))),
        (64, (0, 1), (4, 2, [1, 9]), ((1, 1), (2, 2))),
        (64, (0, 1), (None, None, [1]), ((1,), (16,))),  # one node: its own cores
        (64, (0, 1), (None, 1), ((0,), (16,))),
        (64, (0, 1), (None, 2, [1, 1]), ((1, 1), (8, 8))),
        (64, (0, 1), (60, 1), ((0,), (60,))),  # more than a node has, and no node named: all nodes
        (64, (0, 1), (60, 1, [0]), ((0,), (32,))),
        (64, (0, 1), (60, 3), ((0, 1, 0), (16, 20, 16))),
        (2, (0,), (60, 4), ((0, 0, 0, 0), (1, 1, 1, 1))),
        (2, (0,), (60, 1), ((0,), (2,))),
        (1, (0,), (None, None), ((0,), (1,))),
    ],
)
def test_plan(monkeypatch, cpus, nodes, arguments, want) -> None:
    assert plan(monkeypatch, cpus, nodes, *arguments) == want


def test_too_many_threads_are_cut_with_a_warning(monkeypatch, caplog) -> None:
    with caplog.at_level(logging.WARNING, "ktmoe"):
        assert plan(monkeypatch, 4, (0,), 60, 1) == ((0,), (4,))
        assert plan(monkeypatch, 4, (0,), 60, 1) == ((0,), (4,))
    assert caplog.text.count("cpuinfer_threads=60") == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, [], []), ValueError),
        ((2, [0], [1, 1]), ValueError),
        ((1, [0], [1, 1]), ValueError),
        ((1, [-1], [1]), ValueError),
        ((1, [0], [0]), ValueError),
        ((1.5, [0], [1]), TypeError),
        ((1, [0], ["1"]), TypeError),
    ],
)
def test_bad_pool_config(arguments, error) -> None:
    with pytest.raises(error):
        WorkerPoolConfig(*arguments)


def test_the_queue_is_made_on_first_use_and_closed() -> None:
    engine = CPUInfer(WorkerPoolConfig(1, [0], [1]))
    engine.sync()
    assert engine._queue is None
    queue = engine.queue
    assert engine.queue is queue
    assert queue.capacity == runtime.QUEUE_CAPACITY
    engine.sync()
    engine.close(0.1)
    assert engine.closed


def test_isa_without_amx(monkeypatch) -> None:
    class Ext:
        active = "amx"

        @staticmethod
        def active_isa():
            return Ext.active

        @staticmethod
        def isa_levels():
            return ["amx", "avx512", "avx2", "portable"]

    monkeypatch.setattr(runtime, "_ext", Ext)
    assert runtime.isa_without_amx() == "avx512"
    Ext.active = "avx2"
    assert runtime.isa_without_amx() == "avx2"


def test_close_refuses_what_comes_later() -> None:
    """Queued work within the time, later submits never; new layers get a new engine."""
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    want = wrapper.forward(*inputs)
    wrapper.submit_forward(*inputs)
    wrapper.cpu_infer.close()
    assert torch.equal(wrapper.sync_forward(), want)
    with pytest.raises(RuntimeError, match=r"the engine is closed: .*CPUInfer\.close"):
        wrapper.submit_forward(*inputs)
    with pytest.raises(RuntimeError, match="No submitted forward"):
        wrapper.sync_forward()
    assert torch.equal(wrapper.forward(*inputs), want)
    wrapper.cpu_infer.close(0)
    wrapper.cpu_infer.sync()
    other = ref.loaded(SHAPE, "BF16")
    assert other.cpu_infer is not wrapper.cpu_infer
    other.submit_forward(*inputs)
    assert torch.equal(other.sync_forward(), want)


def test_close_before_the_first_submit() -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    wrapper.cpu_infer.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        wrapper.submit_forward(*ref.batch(SHAPE, 4))


def test_close_cancels_what_does_not_begin_in_time() -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    gate = _ext.testing.Gate(wrapper.cpu_infer.queue)
    wrapper.submit_forward(*inputs)
    wrapper.cpu_infer.close(0.05)
    with pytest.raises(RuntimeError, match="cancelled"):
        wrapper.sync_forward()
    gate.open()


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf")])
def test_close_checks_its_timeout(timeout) -> None:
    engine = CPUInfer(WorkerPoolConfig(1, [0], [1]))
    with pytest.raises(ValueError, match="timeout_s"):
        engine.close(timeout)
    assert not engine.closed


def test_a_full_queue(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "CPUInfer", lambda config: CPUInfer(config, queue_capacity=2))
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    gate = _ext.testing.Gate(wrapper.cpu_infer.queue)
    assert gate.wait_until_reached(10)
    for _ in range(2):
        wrapper.submit_forward(*inputs, block=False)
    with pytest.raises(RuntimeError, match="queue is full.*its bound, 2"):
        wrapper.submit_forward(*inputs, block=False)
    gate.open()
    for _ in range(2):
        assert torch.equal(wrapper.sync_forward(), wrapper.forward(*inputs))
    with pytest.raises(RuntimeError, match="No submitted forward"):
        wrapper.sync_forward()
