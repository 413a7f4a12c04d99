"""Wrappers on several NUMA nodes, pretended (`KTMOE_FAKE_NUMA`) or made up: the same results, one warning for what is
missing."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch
import torch_oracle as ref

from ktmoe import _ext, runtime
from ktmoe.methods import METHODS
from ktmoe.runtime import WorkerPoolConfig

SHAPE = ref.Shape(inter=300)
COUNTS = [1, 2, 3, 4]
each_count = pytest.mark.parametrize("count", COUNTS)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_engines", {})
    monkeypatch.setattr(runtime, "_warned", set())


def fake(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("KTMOE_FAKE_NUMA", str(count))


def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have all CPUs; node 1 does not exist."""
    monkeypatch.setattr(runtime, "node_cpus", lambda cpus: {0: cpus, 1: cpus})


DEFAULT = {"threadpool_count": None, "cpuinfer_threads": None}


# --- pretended nodes ------------------------------------------------------------------------------------------------
@each_count
@pytest.mark.parametrize("method", ref.INFERENCE)
def test_inference(monkeypatch: pytest.MonkeyPatch, count: int, method: str) -> None:
    """One sub-pool for each node by default; no method needs to know."""
    fake(monkeypatch, count)
    wrapper = ref.loaded(SHAPE, method, **DEFAULT)
    assert wrapper.cpu_infer.config.subpool_numa_map == tuple(range(count))
    assert 1 <= len(wrapper.layer.parts) <= count
    assert len(wrapper.layer.parts) == count or METHODS[method].format not in ("bf16", "int8", "int4")
    inputs = ref.batch(SHAPE, 5)
    out = wrapper.forward(*inputs)
    assert ref.row_error(out, ref.forward(wrapper, *inputs)) <= ref.forward_tolerance(wrapper)
    wrapper.submit_forward(*inputs)
    assert torch.equal(wrapper.sync_forward(), out)


@each_count
@pytest.mark.parametrize("method", ref.SFT)
def test_fine_tuning(monkeypatch: pytest.MonkeyPatch, count: int, method: str) -> None:
    """Against a single node: outputs and every gradient, with dropout."""
    lora = ref.lora(SHAPE)
    x, ids, weights = ref.batch(SHAPE, 20)
    results = []
    for n in (1, count):
        fake(monkeypatch, n)
        wrapper = ref.loaded(SHAPE, method, **DEFAULT, lora_dropout=0.2)
        wrapper.init_lora_weights(*(t.detach() for t in lora[:6]))
        torch.manual_seed(3)
        out = wrapper.forward_sft(x, ids, weights)
        grad_in, grads = wrapper.backward(torch.ones_like(out))
        results.append({"out": out, "input": grad_in, "weights": grads.grad_topk_weights, **grads})
    one, several = results
    for name, value in several.items():
        assert ref.relative(value, one[name]) <= 2e-2, name


@each_count
@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "AMXINT4", "LLAMAFILE"])
def test_packed_files_do_not_know_the_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, method: str
) -> None:
    """What n nodes keep is byte for byte what one keeps; and is read by another number of them."""
    files = []
    for n in (1, count):
        fake(monkeypatch, n)
        folder = tmp_path / str(n)
        folder.mkdir(exist_ok=True)
        wrapper = ref.make(SHAPE, method, weight_path=folder, cpu_save=True, **DEFAULT)
        wrapper.load_weights_from_tensors(*ref.weights(SHAPE))
        files.append(next((folder / f"ktmoe-{method}").glob("*.safetensors")).read_bytes())
    assert files[0] == files[1]
    inputs = ref.batch(SHAPE, 5)
    want = ref.loaded(SHAPE, method, **DEFAULT).forward(*inputs)
    reader = ref.make(SHAPE, method, weight_path=tmp_path / "1", **DEFAULT)
    reader.load_weights()
    assert torch.equal(reader.forward(*inputs), want)


def test_copies_of_a_packed_file_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, 1)
    ref.make(SHAPE, "BF16", weight_path=tmp_path, cpu_save=True, **DEFAULT).load_weights_from_tensors(
        *ref.weights(SHAPE)
    )
    monkeypatch.setattr("ktmoe.memory.available_bytes", lambda: (1000, "a test"))
    ref.make(SHAPE, "BF16", weight_path=tmp_path, **DEFAULT).load_weights()  # mapped: takes no memory
    fake(monkeypatch, 2)
    with pytest.raises(MemoryError, match="2 sub-pools: need"):
        ref.make(SHAPE, "BF16", weight_path=tmp_path, **DEFAULT).load_weights()


def test_a_pretended_machine_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, 2)
    assert runtime.placement(WorkerPoolConfig(2, [0, 1], [1, 1])) == ([-1, -1], [[], []])


def test_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, 3)
    wrapper, inputs = ref.loaded(SHAPE, "BF16", **DEFAULT), ref.batch(SHAPE, 20)
    want = wrapper.forward(*inputs)
    wrapper.submit_forward(*inputs)

    def body() -> None:
        assert torch.equal(wrapper.forward(*inputs), want)
        wrapper.submit_forward(*inputs)
        assert torch.equal(wrapper.sync_forward(), want)

    for _ in range(5):
        assert ref.in_child(body) == 0
    assert torch.equal(wrapper.sync_forward(), want)


def test_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, 3)
    wrapper, inputs = ref.loaded(SHAPE, "AMXINT8", **DEFAULT), ref.batch(SHAPE, 20)
    want, wrong = wrapper.forward(*inputs), []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(wrapper.forward(*inputs), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- where things are placed ----------------------------------------------------------------------------------------
def place(monkeypatch: pytest.MonkeyPatch, config: tuple[int, list[int], list[int]], refused: str = "") -> object:
    monkeypatch.setattr(runtime, "node_cpus", lambda _: {0: frozenset({0, 1, 2}), 3: frozenset({5, 4})})
    monkeypatch.setattr(_ext, "node_memory_refused", lambda node: refused)
    return runtime.placement(WorkerPoolConfig(*config))


def test_each_sub_pool_on_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, (2, [3, 0], [2, 3])) == ([3, 0], [[4, 5], [0, 1, 2]])
    assert place(monkeypatch, (1, [3], [1])) == ([3], [[4, 5]])


def test_what_is_larger_than_its_node_is_not_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, (1, [0], [5])) == ([-1], [[]])
    assert place(monkeypatch, (2, [0, 7], [3, 1])) == ([0, -1], [[0, 1, 2], []])


def test_one_node_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "node_cpus", lambda _: {0: frozenset({0, 1})})
    assert runtime.placement(WorkerPoolConfig(2, [0, 0], [1, 1])) == ([-1, -1], [[], []])


def test_a_refused_mbind_is_one_warning_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Threads are placed all the same."""
    two_nodes(monkeypatch)
    monkeypatch.setattr(_ext, "node_memory_refused", lambda node: "Operation not permitted")
    inputs = ref.batch(SHAPE, 20)
    with caplog.at_level(logging.WARNING, "ktmoe"):
        for threads in (2, None):
            wrapper = ref.loaded(SHAPE, "BF16", threadpool_count=2, cpuinfer_threads=threads)
            got = wrapper.forward(*inputs)
            assert ref.row_error(got, ref.forward(wrapper, *inputs)) <= ref.forward_tolerance(wrapper)
    texts = [r.getMessage() for r in caplog.records if "not bound" in r.getMessage()]
    assert len(texts) == 1
    assert "Operation not permitted" in texts[0]
    assert runtime.placement(wrapper.cpu_infer.config) == ([-1, -1], [sorted(os.sched_getaffinity(0))] * 2)


def test_a_node_of_this_machine_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system itself refuses node 1 of a machine with one node."""
    two_nodes(monkeypatch)
    if not _ext.node_memory_refused(1):
        pytest.skip("this machine has a node 1")
    inputs = ref.batch(SHAPE, 20)
    with caplog.at_level(logging.WARNING, "ktmoe"):
        wrapper = ref.loaded(SHAPE, "BF16", threadpool_count=2, cpuinfer_threads=2)
    assert caplog.text.count("not bound to the memory of NUMA nodes") == 1
    assert ref.row_error(wrapper.forward(*inputs), ref.forward(wrapper, *inputs)) <= ref.forward_tolerance(wrapper)
    assert os.sched_getaffinity(0) == runtime.usable_cpus()


def test_threads_that_a_node_does_not_have_are_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "usable_cpus", lambda: frozenset(range(8)))
    monkeypatch.setattr(runtime, "node_cpus", lambda _: {0: frozenset({0, 1}), 1: frozenset(range(2, 8))})
    monkeypatch.setattr(runtime, "physical_cores", len)
    with caplog.at_level(logging.WARNING, "ktmoe"):
        for _ in range(2):
            assert WorkerPoolConfig.plan(8, 2).subpool_thread_count == (2, 4)
        assert caplog.text.count("cpuinfer_threads=8") == 1
        caplog.clear()
        assert WorkerPoolConfig.plan(None, None).subpool_thread_count == (2, 4)  # nobody asked for more
    assert not caplog.records
