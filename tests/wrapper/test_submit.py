"""submit_forward and sync_forward: order, ownership, errors, threads, fork and exit."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torch_oracle as ref
from torch_oracle import in_child

SHAPE = ref.Shape()


@pytest.fixture(params=ref.INFERENCE)
def wrapper(request):
    return ref.loaded(SHAPE, request.param)


def test_equals_forward(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 5)
    assert wrapper.submit_forward(hidden, ids, weights, None) is None
    assert torch.equal(wrapper.sync_forward(hidden, None), wrapper.forward(hidden, ids, weights))
    wrapper.submit_forward(hidden.view(5, 1, -1), ids, weights)
    assert wrapper.sync_forward(hidden).shape == (5, 1, SHAPE.hidden)


def test_first_in_first_out_with_own_copies(wrapper) -> None:
    batches = [ref.batch(SHAPE, n, seed=n) for n in (3, 40, 1, 7)]
    want = [wrapper.forward(*b) for b in batches]
    for hidden, ids, weights in batches:
        wrapper.submit_forward(hidden, ids, weights)
        ids.fill_(-1)  # a server masks the ids in place right after the call
        hidden.zero_()
        weights.zero_()
    for expected in want:
        assert torch.equal(wrapper.sync_forward(None), expected)


def test_layers_share_the_queue_but_not_the_results() -> None:
    a, b = ref.loaded(SHAPE, "BF16"), ref.loaded(SHAPE, "BF16", seed=1)
    assert a.cpu_infer is b.cpu_infer
    inputs = ref.batch(SHAPE, 4)
    a.submit_forward(*inputs)
    b.submit_forward(*inputs)
    assert torch.equal(b.sync_forward(), b.forward(*inputs))
    assert torch.equal(a.sync_forward(), a.forward(*inputs))
    a.submit_forward(*inputs)
    a.cpu_infer.sync()
    assert a._pending[0].ticket.done
    a.sync_forward()


def test_sync_without_submit(wrapper) -> None:
    with pytest.raises(RuntimeError, match="No submitted forward"):
        wrapper.sync_forward(None)


def test_an_error_belongs_to_its_own_forward(wrapper) -> None:
    good, bad = ref.batch(SHAPE, 3), ref.batch(SHAPE, 3)
    bad[1][1, 0] = 77
    for inputs in (good, bad, good):
        wrapper.submit_forward(*inputs)
    assert torch.equal(wrapper.sync_forward(), wrapper.forward(*good))
    with pytest.raises(ValueError, match="77"):
        wrapper.sync_forward()
    assert torch.equal(wrapper.sync_forward(), wrapper.forward(*good))


def test_eight_threads() -> None:
    """Concurrent forwards and submits of several layers give what they give alone."""
    layers = [ref.loaded(SHAPE, "AMXINT8", seed=s) for s in range(3)]
    want = {(i, s): layer.forward(*ref.batch(SHAPE, 4, s)) for i, layer in enumerate(layers) for s in range(8)}
    failures: list[object] = []

    def work(s: int) -> None:
        inputs = ref.batch(SHAPE, 4, s)
        own = ref.loaded(SHAPE, "AMXINT8", seed=0)
        try:
            for _ in range(30):
                own.submit_forward(*inputs)
                for i, layer in enumerate(layers):
                    if not torch.equal(layer.forward(*inputs), want[i, s]):
                        failures.append((i, s))
                if not torch.equal(own.sync_forward(), want[0, s]):
                    failures.append(s)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_fork_with_work_under_way(wrapper) -> None:
    inputs = ref.batch(SHAPE, 4)
    want = wrapper.forward(*inputs)
    wrapper.submit_forward(*inputs)

    def child() -> None:
        with pytest.raises(RuntimeError, match="No submitted forward"):
            wrapper.sync_forward()  # what was submitted is the parent's
        assert torch.equal(wrapper.forward(*inputs), want)
        for _ in range(3):
            wrapper.submit_forward(*inputs)
        for _ in range(3):
            assert torch.equal(wrapper.sync_forward(), want)

    assert [in_child(child) for _ in range(3)] == [0, 0, 0]
    assert torch.equal(wrapper.sync_forward(), want)


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    script = "import torch, torch_oracle as ref\nshape = ref.Shape()\n" + textwrap.dedent(body)
    path = os.pathsep.join([os.path.dirname(ref.__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env)


def test_exit_with_work_under_way_is_clean() -> None:
    result = run_script("""
        w = ref.loaded(shape, "BF16")
        for _ in range(50):
            w.submit_forward(*ref.batch(shape, 60))
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_submit_after_shutdown() -> None:
    result = run_script("""
        import atexit
        def late():
            try:
                w.submit_forward(*ref.batch(shape, 2))
            except RuntimeError as error:
                print(error)
            print(w.forward(*ref.batch(shape, 2)).shape)
        atexit.register(late)  # registered first, so it runs last
        from ktmoe import runtime
        w = ref.loaded(shape, "BF16")
        atexit.unregister(runtime._shut_down)
        atexit.register(runtime._shut_down)
        w.submit_forward(*ref.batch(shape, 2))
        w.sync_forward()
    """)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ktmoe is shut down")
    assert "torch.Size([2, 72])" in result.stdout
    assert result.stderr == ""


def test_library_writes_nothing() -> None:
    """Not even where it warns: there are more threads and sub-pools here than any machine has."""
    result = run_script("""
        w = ref.loaded(shape, "AMXINT8", cpuinfer_threads=100000, threadpool_count=7)
        w.forward(*ref.batch(shape, 3))
        ref.loaded(shape, "AMXINT8")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
