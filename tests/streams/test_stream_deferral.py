"""Deferred experts on a stream: the definition of tests/wrapper/test_deferral.py, with passes that end anyhow."""

import itertools

import pytest
import torch
from deferral_oracle import assert_equal, batch, expected, model, parts

from ktmoe import KTMoEWrapper, _ext


def run(layers, batches, stream):
    return [w.forward(*inputs, stream) for w, inputs in zip(layers, batches, strict=True)]


@pytest.mark.parametrize("sizes", [[], [1, 2, 5]])
@pytest.mark.parametrize("deferred", [1, 3, 99])
def test_every_layer_and_batch_size(device, sizes, deferred) -> None:
    KTMoEWrapper.set_capture_batch_sizes(sizes)
    layers = model((1, 2, 5, 6, 30), deferred=deferred)
    seed = itertools.count(deferred)
    for n_tokens in (1, 1, 2, 5, 33, 1, 2):
        batches = [batch(n_tokens, next(seed)) for _ in layers]
        outs = run(layers, batches, device.handle)
        device.synchronize()
        assert_equal(outs, expected(layers, batches))
    layers[0].cpu_infer.raise_stream_error()


@pytest.mark.parametrize("sizes", [[], [4]])
def test_submitted_ahead_and_synced_in_any_order(device, sizes) -> None:
    KTMoEWrapper.set_capture_batch_sizes(sizes)
    layers = model((0, 1, 2, 3))
    for order in itertools.permutations(range(4)):
        batches = [batch(4, seed) for seed in range(4)]
        with device.held():
            for wrapper, inputs in zip(layers, batches, strict=True):
                wrapper.submit_forward(*inputs, device.handle)
            outs = {i: layers[i].sync_forward() for i in order}
        device.synchronize()
        assert_equal([outs[i] for i in range(4)], expected(layers, batches))


@pytest.mark.parametrize("sizes", [[], [4]])
@pytest.mark.parametrize("then", ["pass", "cpu", "size", "flush"])
def test_a_pass_that_ends_early(device, sizes, then) -> None:
    KTMoEWrapper.set_capture_batch_sizes(sizes)
    layers = model((0, 1, 2, 3))
    for turn in range(4):
        old = [batch(4, 50 + seed) for seed in range(4)]
        run(layers[:2], old[:2], device.handle)
        n = 3 if then == "size" else 4
        new = [batch(n, 70 + 10 * turn + seed) for seed in range(4)]
        if then == "flush":
            left = layers[3].flush_deferred()
            device.synchronize()
            assert torch.equal(left, parts(layers, old)[1][1])
        first = 0 if then in ("pass", "flush") else 2  # the others could have picked up what was left
        outs = run(layers[first:], new[first:], None if then == "cpu" else device.handle)
        device.synchronize()
        assert_equal(outs, expected(layers[first:], new[first:]))
        assert layers[0].flush_deferred() is None


def test_the_deferred_part_runs_before_anyone_asks(device) -> None:
    """Order, not time: it is behind the result in the queue, and no later layer is needed to run it."""
    layers = model((0, 1))
    engine, batches = layers[0].cpu_infer, [batch(1, seed) for seed in range(2)]
    want = expected(layers, batches)
    with device.held():
        layers[0].submit_forward(*batches[0], device.handle)
        first = layers[0].sync_forward()
    device.synchronize()
    assert torch.equal(first, want[0])
    gate = _ext.testing.Gate(engine.queue)  # behind the deferred part
    assert gate.wait_until_reached(10)  # which has run by now: nobody has asked for layer 1
    gate.open()
    second = layers[1].forward(*batches[1], device.handle)
    device.synchronize()
    assert torch.equal(second, want[1])


def test_an_error_ends_the_pass_and_not_the_next(device) -> None:
    layers, good = model(), [batch(2, seed) for seed in range(3)]
    wrong = batch(2, 0)
    wrong[1][1, 2] = 77
    with device.held():
        outs = run(layers[:2], [wrong, good[1]], device.handle)
    device.synchronize()
    assert all(out.isnan().all() for out in outs)  # the second one lacks what the first one should have left
    with pytest.raises(ValueError, match="layer 0, .* got 77"):
        layers[0].cpu_infer.raise_stream_error()
    outs = run(layers, good, device.handle)
    device.synchronize()
    assert_equal(outs, expected(layers, good))
    layers[0].cpu_infer.raise_stream_error()


def test_memory_alternates_between_two(device) -> None:
    """However many layers there are."""
    KTMoEWrapper.set_capture_batch_sizes([1])
    layers = model(tuple(range(7)))
    for _ in range(3):
        run(layers, [batch(1, seed) for seed in range(7)], device.handle)
    device.synchronize()
    pool = layers[0].cpu_infer.staging
    assert [len(free) for free in pool._free.values()] == [2]


def test_a_capture_and_what_runs_beside_it_keep_apart(device) -> None:
    KTMoEWrapper.set_capture_batch_sizes([4])
    layers = model((0, 1, 2))
    buffers = [tuple(t.clone() for t in batch(4, seed)) for seed in range(3)]
    run(layers[:1], buffers[:1], device.handle)
    with device.capture() as graph:
        outs = run(layers[1:], buffers[1:], device.handle)  # not what layer 0 has left outside
        run(layers[:1], buffers[:1], device.handle)
    eager = run(layers[1:], buffers[1:], device.handle)  # not what layer 0 has left in the graph
    for _ in range(2):
        device.replay(graph)
        assert_equal(outs, expected(layers[1:], buffers[1:]))
        assert_equal(eager, outs)
