"""Capture and replay: what a graph holds goes on working, and what it can no longer do is an error."""

import fake_cuda
import pytest
import torch
import torch_oracle as ref
from deferral_oracle import SHAPE, assert_equal, batch, expected, model

from ktmoe import KTMoEWrapper, inference


@pytest.fixture(autouse=True)
def sizes(device):
    KTMoEWrapper.set_capture_batch_sizes([2, 8])


def static(inputs):
    """What a server does: graphs read from memory that stays, and new inputs are copied there."""
    return [t.clone() for t in inputs]


def fill(buffers, inputs) -> None:
    for buffer, tensor in zip(buffers, inputs, strict=True):
        buffer.copy_(tensor)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("deferred", [None, 2])
def test_replay_with_new_inputs(device, warm, deferred) -> None:
    """Several layers, with and without deferred experts; between replays the same layers run outside of the graph."""
    layers = model((0, 2, 3, 7), deferred=deferred)
    buffers = [static(batch(8, s)) for s in range(4)]

    def one_pass():
        outs = []
        for wrapper, inputs in zip(layers, buffers, strict=True):
            wrapper.submit_forward(*inputs, device.handle)
            outs.append(wrapper.sync_forward(inputs[0], device.handle))
        return outs

    if warm:
        one_pass()
    with device.capture() as graph:
        outs = one_pass()
    assert all((out == 55).all() for out in outs)  # a capture runs nothing
    for turn in range(3):
        batches = [batch(8, 100 + 10 * turn + s) for s in range(4)]
        for own, inputs in zip(buffers, batches, strict=True):
            fill(own, inputs)
        device.replay(graph)
        assert_equal(outs, expected(layers, batches))
        other = [batch(n, 200 + turn) for n in (8, 8, 8, 8)]
        eager = [w.forward(*inputs, device.handle) for w, inputs in zip(layers, other, strict=True)]
        device.synchronize()
        assert_equal(eager, expected(layers, other))
    layers[0].cpu_infer.raise_stream_error()


def test_a_capture_uses_the_memory_of_a_warm_up_on_another_stream(device, monkeypatch) -> None:
    """A capture must not pin new memory, and torch captures on a stream of its own."""
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), static(batch(8, 0))
    other = fake_cuda.Device(device.driver)
    monkeypatch.setattr(inference, "stream_of", other.stream_of)
    wrapper.forward(*inputs, other.handle)
    other.synchronize()
    monkeypatch.setattr(inference, "stream_of", device.stream_of)
    monkeypatch.setattr(fake_cuda.FakeStream, "pinned", None)
    with device.capture() as graph:
        out = wrapper.forward(*inputs, device.handle)
    device.replay(graph)
    assert torch.equal(out, wrapper.forward(*inputs))
    other.destroy()


def test_graphs_of_several_sizes(device) -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    graphs = {}
    for n in (8, 2):
        buffers = static(batch(n, n))
        with device.capture() as graph:
            graphs[n] = graph, buffers, wrapper.forward(*buffers, device.handle)
    for seed, n in enumerate((2, 8, 8, 2, 2)):
        graph, buffers, out = graphs[n]
        inputs = batch(n, 50 + seed)
        fill(buffers, inputs)
        device.replay(graph)
        assert torch.equal(out, wrapper.forward(*inputs))


@pytest.mark.parametrize("deferred", [None, 2])
def test_the_batch_size_is_read_from_memory(device, deferred) -> None:
    layers = model((0, 1), deferred=deferred)
    buffers = [static(batch(8, s)) for s in range(2)]
    with device.capture() as graph:
        outs = [w.forward(*b, device.handle) for w, b in zip(layers, buffers, strict=True)]
    for n_tokens in (3, 8, 1, 0):
        KTMoEWrapper.set_replay_batch_size(8, n_tokens)
        batches = [batch(n_tokens, 30 + s) for s in range(2)]
        for own, inputs in zip(buffers, batches, strict=True):
            for buffer, tensor in zip(own, inputs, strict=True):
                buffer[:n_tokens] = tensor
            own[1][n_tokens:] = 1000  # not looked at
        device.replay(graph)
        layers[0].cpu_infer.raise_stream_error()
        assert_equal([out[:n_tokens] for out in outs], expected(layers, batches))
        assert all((out[n_tokens:] == 0).all() for out in outs)
    outside = batch(8, 60)  # a forward outside of a graph has the size of its tensors
    out = layers[1].forward(*outside, device.handle)
    device.synchronize()
    assert torch.equal(out, layers[1].forward(*outside))


@pytest.mark.parametrize(("captured", "n_tokens"), [(8, 9), (8, -1)])
def test_a_bad_replay_size(captured, n_tokens) -> None:
    with pytest.raises(ValueError, match=rf"^n_tokens: got {n_tokens}, expected 0..{captured}"):
        KTMoEWrapper.set_replay_batch_size(captured, n_tokens)


def test_a_size_that_was_not_announced(device) -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), batch(5, 0)
    with device.capture(), pytest.raises(RuntimeError, match=r"batch size 5 is being captured, .* got \[2, 8\]"):
        wrapper.submit_forward(*inputs, device.handle)
    out = wrapper.forward(*inputs, device.handle)
    device.synchronize()
    assert torch.equal(out, wrapper.forward(*inputs))


@pytest.mark.parametrize("gone", ["layer", "weights", "buffers"])
def test_a_graph_that_outlives_what_it_runs(device, gone) -> None:
    """An error, and nothing is touched that is not there any more."""
    wrapper, buffers = ref.loaded(SHAPE, "BF16"), static(batch(8, 0))
    engine = wrapper.cpu_infer
    with device.capture() as graph:
        out = wrapper.forward(*buffers, device.handle)
    device.replay(graph)
    assert torch.equal(out, wrapper.forward(*buffers))
    keep = engine.staging._free  # the copies of the graph still need it: only ktmoe's part is tested
    if gone == "layer":
        del wrapper
    elif gone == "weights":
        wrapper.layer = ref.loaded(SHAPE, "BF16", seed=1).layer
        wrapper.forward(*buffers, device.handle)
    else:
        staging = next(iter(keep.values()))[0]
        wrapper._jobs.pop(staging)
    device.synchronize()
    engine.sync()
    device.replay(graph)
    with pytest.raises(RuntimeError, match="a CUDA graph ran a forward that is gone"):
        engine.raise_stream_error()
    engine.raise_stream_error()


def test_clearing_frees_what_graphs_used(device) -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), batch(8, 0)
    wrapper.forward(*inputs, device.handle)
    assert wrapper.cpu_infer.staging._free
    assert len(wrapper._jobs) == 1
    KTMoEWrapper.clear_buffer_cache()
    assert not wrapper.cpu_infer.staging._free
    assert len(wrapper._jobs) == 0
    out = wrapper.forward(*inputs, device.handle)
    device.synchronize()
    assert torch.equal(out, wrapper.forward(*inputs))
