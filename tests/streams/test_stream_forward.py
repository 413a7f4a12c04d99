"""Forwards on a stream: what runs when, on which copies, and what becomes of the memory."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import fake_cuda
import pytest
import torch
import torch_oracle as ref

from ktmoe import KTMoEWrapper, _ext, runtime
from ktmoe.runtime import CPUInfer
from ktmoe.staging import Staging

SHAPE = ref.Shape()


@pytest.fixture(params=["BF16", "AMXINT8"])
def wrapper(request):
    return ref.loaded(SHAPE, request.param)


def stagings() -> "weakref.WeakSet[Staging]":
    gc.collect()
    return weakref.WeakSet(o for o in gc.get_objects() if type(o) is Staging)


def test_equals_forward(wrapper, device) -> None:
    for n_tokens in (1, 7, 40):
        hidden, ids, weights = ref.batch(SHAPE, n_tokens)
        for inputs in ((hidden, ids, weights), (hidden, ids.int(), weights.bfloat16())):
            want = wrapper.forward(*inputs)
            assert wrapper.submit_forward(*inputs, device.handle) is None
            out = wrapper.sync_forward(hidden, device.handle)
            also = wrapper.forward(*inputs, cuda_stream=device.handle)
            device.synchronize()
            assert torch.equal(out, want)
            assert torch.equal(also, want)


def test_shapes_and_strides(wrapper, device) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 6)
    want = wrapper.forward(hidden, ids, weights)
    lead = wrapper.forward(hidden.view(2, 3, -1), ids.view(2, 3, -1), weights, device.handle)
    wide = torch.zeros(6, 2 * SHAPE.hidden, dtype=torch.bfloat16)
    wide[:, 5 : 5 + SHAPE.hidden] = hidden
    strided = wrapper.forward(
        wide[:, 5 : 5 + SHAPE.hidden], ids.t().contiguous().t(), weights.requires_grad_(), device.handle
    )
    device.synchronize()
    assert torch.equal(lead, want.view(2, 3, -1))
    assert torch.equal(strided, want)
    assert not strided.requires_grad


def test_zero_tokens(wrapper, device) -> None:
    wrapper.submit_forward(*ref.batch(SHAPE, 0), device.handle)
    out = wrapper.sync_forward(None, device.handle)
    assert (out.shape, out.dtype) == ((0, SHAPE.hidden), torch.bfloat16)


def test_python_never_waits_and_everything_is_in_stream_order(wrapper, device) -> None:
    """The stream stands still while all of it is enqueued: kernels that write the inputs before the forward and over
    them after it (a server masks the ids in place), and one that reads the result."""
    hidden, ids, weights = ref.batch(SHAPE, 5)
    want = wrapper.forward(hidden, ids, weights)
    on_device = torch.zeros_like(hidden), torch.zeros_like(ids), torch.zeros_like(weights)
    copied = torch.zeros_like(hidden)
    with device.held():
        for tensor, value in zip(on_device, (hidden, ids, weights), strict=True):
            device.write(tensor, value)
        wrapper.submit_forward(*on_device, device.handle)
        device.write(on_device[1], torch.full_like(ids, -1))
        device.write(on_device[0], torch.full_like(hidden, torch.nan))
        out = wrapper.sync_forward(on_device[0], device.handle)
        device.write(copied, out)
        assert (out == 55).all()  # nothing has run yet
    device.synchronize()
    assert torch.equal(out, want)
    assert torch.equal(copied, want)


@pytest.mark.parametrize("sizes", [[], [3]])
def test_several_in_flight(device, sizes) -> None:
    """Layers and forwards of one layer, synced in any order between layers."""
    KTMoEWrapper.set_capture_batch_sizes(sizes)
    layers = [ref.loaded(SHAPE, "BF16", seed=s) for s in range(3)]
    for turn in range(4):
        batches = [[ref.batch(SHAPE, 3, 10 * turn + 3 * i + s) for s in range(2)] for i in range(3)]
        want = [[w.forward(*b) for b in pair] for w, pair in zip(layers, batches, strict=True)]
        for wrapper, pair in zip(layers, batches, strict=True):
            for inputs in pair:
                wrapper.submit_forward(*inputs, device.handle)
        order = [(turn + i) % 3 for i in range(3)]
        outs = {i: [layers[i].sync_forward(None, device.handle) for _ in range(2)] for i in order}
        device.synchronize()
        for i in range(3):
            assert all(torch.equal(out, w) for out, w in zip(outs[i], want[i], strict=True))


def test_host_functions_do_not_take_the_gil(wrapper, device) -> None:
    """Waits for the stream without giving the GIL up; a child, because it would hang."""
    keeping = fake_cuda.Driver(device.driver.path, keep_gil=True)
    inputs = ref.batch(SHAPE, 40)
    want = wrapper.forward(*inputs)

    def child() -> None:
        own = fake_cuda.Device(device.driver)
        KTMoEWrapper.set_capture_batch_sizes([])
        own_wrapper = ref.loaded(SHAPE, wrapper.method)
        runtime_inference = sys.modules["ktmoe.inference"]
        runtime_inference.stream_of = own.stream_of
        with own.held():
            outs = []
            for _ in range(5):
                own_wrapper.submit_forward(*inputs, own.handle)
                outs.append(own_wrapper.sync_forward(None, own.handle))
        keeping.synchronize(own.handle)
        assert all(torch.equal(out, want) for out in outs)

    assert ref.in_child(child) == 0


def test_the_stream_waits_for_room_and_python_does_not(device, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "_engines", {})
    monkeypatch.setattr(runtime, "CPUInfer", lambda config: CPUInfer(config, queue_capacity=1))
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    want = wrapper.forward(*inputs)
    gate = _ext.testing.Gate(wrapper.cpu_infer.queue)
    assert gate.wait_until_reached(10)
    for _ in range(4):
        wrapper.submit_forward(*inputs, device.handle)
    outs = [wrapper.sync_forward(None, device.handle) for _ in range(4)]
    gate.open()
    device.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_submitting_threads(device) -> None:
    layers = [ref.loaded(SHAPE, "BF16", seed=s) for s in range(4)]
    failures: list[object] = []

    def work(s: int) -> None:
        inputs = ref.batch(SHAPE, 1 + s, s)
        want = layers[s].forward(*inputs)
        for _ in range(20):
            layers[s].submit_forward(*inputs, device.handle)
            out = layers[s].sync_forward(None, device.handle)
            device.synchronize()
            if not torch.equal(out, want):
                failures.append(s)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


# --- memory -------------------------------------------------------------------------------------------------------
def test_memory_of_other_sizes_is_freed_when_the_stream_has_passed(wrapper, device) -> None:
    before = set(stagings())
    with device.held():
        outs = [wrapper.forward(*ref.batch(SHAPE, 6), device.handle) for _ in range(3)]
        mine = weakref.WeakSet(set(stagings()) - before)
        assert len(mine) == 3  # the stream has not been there
    device.synchronize()
    wrapper.forward(*ref.batch(SHAPE, 2), device.handle)  # looks what has passed
    gc.collect()
    assert all(s.rows == 2 for s in mine)
    assert len({out.data_ptr() for out in outs}) == 3


def test_memory_of_captured_sizes_is_used_again(wrapper, device) -> None:
    KTMoEWrapper.set_capture_batch_sizes([4])
    before = set(stagings())
    for _ in range(5):
        wrapper.forward(*ref.batch(SHAPE, 4), device.handle)
    mine = weakref.WeakSet(set(stagings()) - before)
    assert len(mine) == 1
    device.synchronize()
    with device.held():
        wrapper.submit_forward(*ref.batch(SHAPE, 4), device.handle)
    KTMoEWrapper.clear_buffer_cache()  # what is in use stays
    out = wrapper.sync_forward(None, device.handle)
    device.synchronize()
    assert torch.equal(out, wrapper.forward(*ref.batch(SHAPE, 4)))
    wrapper.forward(*ref.batch(SHAPE, 2), device.handle)
    gc.collect()
    assert not mine


def test_a_layer_may_go_before_its_forward_has_run(device) -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    want = wrapper.forward(*inputs)
    gone = weakref.ref(wrapper)
    with device.held():
        out = wrapper.forward(*inputs, device.handle)
        del wrapper
        gc.collect()
        assert gone() is None
    device.synchronize()
    assert torch.equal(out, want)


def test_a_layer_that_is_loaded_again_runs_its_new_weights(device) -> None:
    KTMoEWrapper.set_capture_batch_sizes([4])
    wrapper, inputs = ref.make(SHAPE, "LLAMAFILE", gguf_type="Q8_0"), ref.batch(SHAPE, 4)
    for seed in range(3):
        wrapper.load_weights_from_tensors(*ref.weights(SHAPE, seed))
        wrapper.layer = wrapper.layer if seed != 1 else ref.loaded(SHAPE, "BF16", seed=9).layer
        out = wrapper.forward(*inputs, device.handle)
        device.synchronize()
        assert torch.equal(out, wrapper.forward(*inputs))


# --- mistakes -----------------------------------------------------------------------------------------------------
def test_the_stream_of_sync_is_that_of_submit(wrapper, device) -> None:
    inputs = ref.batch(SHAPE, 4)
    wrapper.submit_forward(*inputs, device.handle)
    with pytest.raises(ValueError, match=rf"^cuda_stream: got 1, expected {device.handle}"):
        wrapper.sync_forward(None, 1)
    out = wrapper.sync_forward(None)  # None is that stream
    device.synchronize()
    assert torch.equal(out, wrapper.forward(*inputs))


def test_bad_inputs_are_named_before_anything_is_enqueued(wrapper, device) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 4)
    for inputs, name, error in (
        ((hidden.float(), ids, weights), "hidden_states", TypeError),
        ((hidden, ids.to("meta"), weights), "topk_ids: got device meta", TypeError),
        ((hidden, ids, weights[:, :1]), "topk_weights", ValueError),
    ):
        with pytest.raises(error, match=f"^{name}"):
            wrapper.submit_forward(*inputs, device.handle)
    with pytest.raises(RuntimeError, match="No submitted forward"):
        wrapper.sync_forward()
    with pytest.raises(RuntimeError, match="Weights not loaded"):
        ref.make(SHAPE, "BF16").submit_forward(hidden, ids, weights, device.handle)


@pytest.mark.parametrize(
    ("library", "message"),
    [("/nonexistent/libcuda.so", "cannot be opened: .*nonexistent"), ("libm.so.6", "no function cuLaunchHostFunc")],
)
def test_no_driver(wrapper, device, monkeypatch, library, message) -> None:
    monkeypatch.setenv("KTMOE_CUDA_DRIVER", library)
    with pytest.raises(RuntimeError, match=message):
        wrapper.submit_forward(*ref.batch(SHAPE, 4), device.handle)


def test_the_driver_refuses(wrapper, device) -> None:
    inputs = ref.batch(SHAPE, 4)
    device.driver.fail_launches(1)
    with pytest.raises(RuntimeError, match=r"cuLaunchHostFunc: got CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        wrapper.submit_forward(*inputs, device.handle)
    out = wrapper.forward(*inputs, device.handle)
    device.synchronize()
    assert torch.equal(out, wrapper.forward(*inputs))


def test_cpu_tensors_ignore_the_stream(wrapper) -> None:
    """Without the fixture nothing stands in for anything."""
    inputs = ref.batch(SHAPE, 4)
    want = wrapper.forward(*inputs)
    wrapper.submit_forward(*inputs, 12345)
    assert torch.equal(wrapper.sync_forward(inputs[0], 12345), want)
    assert torch.equal(wrapper.forward(*inputs, 12345), want)


def test_discard_submitted(wrapper, device) -> None:
    inputs, other = ref.batch(SHAPE, 4), ref.batch(SHAPE, 4, 1)
    for stream in (None, device.handle):
        for _ in range(2):
            wrapper.submit_forward(*other, stream)
        wrapper.discard_submitted()
        wrapper.submit_forward(*inputs, stream)
        out = wrapper.sync_forward()
        device.synchronize()
        assert torch.equal(out, wrapper.forward(*inputs))
    wrapper.discard_submitted()


def test_memory_of_a_discarded_forward_is_not_written_while_it_runs(device, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "_engines", {})
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    gate = _ext.testing.Gate(wrapper.cpu_infer.queue)
    wrapper.submit_forward(*inputs, device.handle)
    wrapper.discard_submitted()
    passed = torch.zeros(1)
    device.write(passed, torch.ones(1))
    time.sleep(0.2)  # enough for the stream to come by if it did not wait
    assert passed.item() == 0
    gate.open()
    device.synchronize()
    assert passed.item() == 1


# --- fork and exit ------------------------------------------------------------------------------------------------
def test_fork_with_work_on_the_stream(wrapper, device) -> None:
    KTMoEWrapper.set_capture_batch_sizes([4])
    inputs = ref.batch(SHAPE, 4)
    want = wrapper.forward(*inputs)
    wrapper.forward(*inputs, device.handle)
    with device.held():
        wrapper.submit_forward(*inputs, device.handle)

        def child() -> None:
            with pytest.raises(RuntimeError, match="No submitted forward"):
                wrapper.sync_forward()
            wrapper.submit_forward(*inputs)
            assert torch.equal(wrapper.sync_forward(), want)

        assert ref.in_child(child) == 0
    out = wrapper.sync_forward()
    device.synchronize()
    assert torch.equal(out, want)


EXIT = """
import sys
sys.path[:0] = {path!r}
import fake_cuda, torch_oracle as ref
from ktmoe import inference
device = fake_cuda.Device(fake_cuda.Driver({library!r}))
inference.stream_of = device.stream_of
shape = ref.Shape()
w = ref.loaded(shape, "BF16")
outs = [w.forward(*ref.batch(shape, 60), device.handle) for _ in range(50)]
"""


def test_exit_with_work_on_the_stream(device) -> None:
    code = EXIT.format(path=sys.path, library=str(device.driver.path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
