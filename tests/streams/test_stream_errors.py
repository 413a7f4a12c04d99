"""An error of a forward on a stream: NaN in its result, an exception at the next sync, and the process lives."""

import pytest
import torch
import torch_oracle as ref

from ktmoe import KTMoEWrapper, _ext, runtime

SHAPE = ref.Shape()


@pytest.fixture(autouse=True)
def own_engine(monkeypatch):
    monkeypatch.setattr(runtime, "_engines", {})


def bad_batch():
    hidden, ids, weights = ref.batch(SHAPE, 4)
    ids[2, 1] = 77
    return hidden, ids, weights


def test_nan_and_the_next_sync(device) -> None:
    layers = [ref.loaded(SHAPE, "BF16", seed=s, layer_idx=s) for s in range(2)]
    good = ref.batch(SHAPE, 4)
    wrong = layers[0].forward(*bad_batch(), device.handle)
    device.synchronize()
    assert wrong.isnan().all()
    layers[1].submit_forward(*good, device.handle)
    with pytest.raises(ValueError, match=r"^layer 0, on a CUDA stream: .*token 2, slot 1: got 77"):
        layers[1].sync_forward()
    for wrapper in layers:  # once
        out = wrapper.forward(*good, device.handle)
        device.synchronize()
        assert torch.equal(out, wrapper.forward(*good))


def test_inputs_that_are_not_finite(device) -> None:
    wrapper = ref.loaded(SHAPE, "BF16", check_finite=True)
    hidden, ids, weights = ref.batch(SHAPE, 4)
    hidden[3, 1] = float("inf")
    wrong = wrapper.forward(hidden, ids, weights, device.handle)
    device.synchronize()
    assert wrong.isnan().all()
    with pytest.raises(ValueError, match="hidden_states: got inf at token 3, element 1"):
        wrapper.cpu_infer.raise_stream_error()


def test_the_first_of_several(device) -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    for _ in range(3):
        wrapper.submit_forward(*bad_batch(), device.handle)
    outs = [wrapper.sync_forward() for _ in range(1)]
    device.synchronize()
    with pytest.raises(ValueError, match="77"):
        wrapper.sync_forward()
    device.synchronize()
    with pytest.raises(ValueError, match="77"):
        wrapper.sync_forward()
    device.synchronize()
    with pytest.raises(ValueError, match="77"):
        wrapper.cpu_infer.raise_stream_error()
    wrapper.cpu_infer.raise_stream_error()
    assert outs[0].isnan().all()


def test_weights_that_were_unloaded_meanwhile(device) -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    with device.held():
        out = wrapper.forward(*ref.batch(SHAPE, 4), device.handle)
        wrapper.layer.unload()
    device.synchronize()
    assert out.isnan().all()
    with pytest.raises(RuntimeError, match="Weights not loaded"):
        wrapper.cpu_infer.raise_stream_error()


def test_a_closed_engine(device) -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    with device.held():
        out = wrapper.forward(*inputs, device.handle)
        wrapper.cpu_infer.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            wrapper.submit_forward(*inputs, device.handle)
    device.synchronize()
    assert out.isnan().all()
    with pytest.raises(RuntimeError, match="submit after close"):
        wrapper.cpu_infer.raise_stream_error()


def test_cancelled_by_close(device) -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4)
    gate = _ext.testing.Gate(wrapper.cpu_infer.queue)
    last = _ext.testing.Gate(wrapper.cpu_infer.queue)  # behind the other one, so it is never reached
    out = wrapper.forward(*inputs, device.handle)
    wrapper.cpu_infer.close(0.3)
    gate.open()
    device.synchronize()
    assert not last.wait_until_reached(0)
    assert out.isnan().all()
    with pytest.raises(RuntimeError, match="cancelled|submit after close"):
        wrapper.cpu_infer.raise_stream_error()


def test_an_error_in_a_graph(device) -> None:
    KTMoEWrapper.set_capture_batch_sizes([4])
    wrapper, good, bad = ref.loaded(SHAPE, "BF16"), ref.batch(SHAPE, 4), bad_batch()
    inputs = [t.clone() for t in good]
    with device.capture() as graph:
        out = wrapper.forward(*inputs, device.handle)
    for ids, wrong in ((good[1], False), (bad[1], True), (good[1], False)):
        inputs[1].copy_(ids)
        device.replay(graph)
        if wrong:
            assert out.isnan().all()
            with pytest.raises(ValueError, match="got 77"):
                wrapper.cpu_infer.raise_stream_error()
        else:
            wrapper.cpu_infer.raise_stream_error()
            assert torch.equal(out, wrapper.forward(*good))
