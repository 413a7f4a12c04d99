"""Deferred experts through submit/sync and forward: what is in which layer's output, whatever happens in between."""

import itertools
import threading

import pytest
import torch
import torch_oracle as ref
from deferral_oracle import SHAPE, assert_equal, batch, expected, model, parts, split

from ktmoe import _ext, runtime
from ktmoe.runtime import CPUInfer


def run(layers, batches, how="submit"):
    outs = []
    for wrapper, inputs in zip(layers, batches, strict=True):
        if how == "forward":
            outs.append(wrapper.forward(*inputs))
        else:
            wrapper.submit_forward(*inputs)
            outs.append(wrapper.sync_forward(inputs[0]))
    return outs


@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "FP8"])
@pytest.mark.parametrize("deferred", [1, 3, 4, 99])
def test_every_layer_and_batch_size(method, deferred) -> None:
    """Many layers, dense ones between them, pass after pass; against single layers on the split routing, bit by bit."""
    layers = model((1, 2, 5, 6, 30), method, deferred, chunked_prefill_size=16)
    seed = itertools.count(100 * deferred)
    for n_tokens in (1, 1, 2, 5, 33, 1, 40, 3):
        batches = [batch(n_tokens, next(seed)) for _ in layers]
        want = expected(layers, batches)
        assert_equal(run(layers, batches), want)
        assert_equal(run(layers, batches, "forward"), want)
    assert layers[0].flush_deferred() is None


@pytest.mark.parametrize("n_tokens", [1, 6])
def test_against_the_float_definition(n_tokens) -> None:
    layers = model((0, 3, 4))
    batches = [batch(n_tokens, seed) for seed in range(3)]
    exact = []
    for wrapper, (hidden, ids, weights) in zip(layers, batches, strict=True):
        now, later = split(wrapper, ids, weights, wrapper is layers[-1])
        exact.append(tuple(ref.forward(wrapper, hidden, part, weights) for part in (now, later)))
    before = torch.zeros(n_tokens, SHAPE.hidden, dtype=torch.float64)
    for wrapper, out, (now, later) in zip(layers, run(layers, batches), exact, strict=True):
        # each part errs as a forward does, and the sum is rounded once more: half an ulp of bf16
        bound = ref.forward_tolerance(wrapper) * (now.norm(dim=1) + before.norm(dim=1)) + 2.0**-9 * out.norm(dim=1)
        assert ((out.double() - now - before).norm(dim=1) <= bound).all()
        assert later.norm() > 0 or wrapper is layers[-1] or n_tokens > 1
        before = later


def test_nothing_is_lost() -> None:
    """Over a pass, all experts of all layers are in the outputs."""
    layers = model((0, 1, 2, 3))
    batches = [batch(1, seed) for seed in range(4)]
    outs = torch.stack(run(layers, batches)).double().sum(0)
    full = torch.stack([w._forward(*b) for w, b in zip(layers, batches, strict=True)]).double()
    assert (outs - full.sum(0)).norm() <= 2.0**-6 * full.norm(dim=2).sum()


def test_several_layers_in_flight() -> None:
    layers = model((0, 1, 2, 3))
    batches = [batch(3, seed) for seed in range(4)]
    for wrapper, inputs in zip(layers, batches, strict=True):
        wrapper.submit_forward(*(t.clone() for t in inputs))
    want = expected(layers, batches)
    assert_equal([w.sync_forward() for w in layers], want)


def test_layers_that_defer_nothing_pick_up() -> None:
    """A server sets 0 on the last layer; others may have None."""
    layers = model((0, 1, 2, 3), deferred=[2, None, 3, 0])
    batches = [batch(1, seed) for seed in range(4)]
    assert_equal(run(layers, batches), expected(layers, batches))


def test_the_last_layer_is_the_highest_that_exists() -> None:
    layers = model((0, 1))
    inputs = batch(1, 0)
    only = layers[1].forward(*inputs)  # alone in its pass
    assert torch.equal(only, layers[1]._forward(*inputs))
    assert layers[1].flush_deferred() is None
    later = model((7,), name=layers[0].weight_path)
    now, rest = parts([layers[1], later[0]], [inputs, inputs])[0]
    assert torch.equal(layers[1].forward(*inputs), now)
    assert torch.equal(layers[0].flush_deferred(), rest)
    del later  # it is gone again, so layer 1 is the last
    assert torch.equal(layers[1].forward(*inputs), layers[1]._forward(*inputs))


def test_flush_gives_what_is_left_once() -> None:
    layers = model()
    inputs = batch(5, 1)
    now, rest = parts(layers, [inputs] * 3)[0]
    assert torch.equal(layers[0].forward(*inputs), now)
    assert torch.equal(layers[2].flush_deferred(), rest)
    assert layers[2].flush_deferred() is None
    batches = [batch(5, seed) for seed in range(2)]
    assert torch.equal(layers[1].forward(*batches[0]), parts(layers[1:], batches)[0][0])  # nothing came along
    layers[1].flush_deferred()


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_an_abandoned_pass_leaves_nothing(n_tokens) -> None:
    layers = model((0, 1, 2, 3))
    for ended_after in (1, 2, 3):
        old = [batch(n_tokens, 50 + seed) for seed in range(4)]
        run(layers[:ended_after], old[:ended_after])
        new = [batch(n_tokens, 70 + seed) for seed in range(4)]
        assert_equal(run(layers, new), expected(layers, new))


def test_a_new_batch_size_ends_the_pass() -> None:
    layers = model((0, 1, 2))
    layers[0].forward(*batch(4, 0))
    rest = [batch(3, 1), batch(3, 2)]
    assert_equal(run(layers[1:], rest), expected(layers[1:], rest))
    layers[0].forward(*batch(4, 0))
    assert layers[1].forward(*batch(0, 1)).shape == (0, SHAPE.hidden)
    assert layers[1].flush_deferred() is None


def test_two_models_on_one_engine_keep_apart() -> None:
    a, b = model(), model()
    assert a[0].cpu_infer is b[0].cpu_infer
    batches = [[batch(2, 10 * m + seed) for seed in range(3)] for m in range(2)]
    outs: list[list[torch.Tensor]] = [[], []]
    for i in range(3):
        for m, layers in enumerate((a, b)):
            outs[m].append(layers[i].forward(*batches[m][i]))
    for m, layers in enumerate((a, b)):
        assert_equal(outs[m], expected(layers, batches[m]))


def test_each_thread_has_a_pass_of_its_own() -> None:
    layers, outs = model(), {}
    batches = {t: [batch(2, 10 * t + seed) for seed in range(3)] for t in range(4)}
    together = threading.Barrier(4)

    def body(t: int) -> None:
        outs[t] = []
        for wrapper, inputs in zip(layers, batches[t], strict=True):
            together.wait(20)
            outs[t].append(wrapper.forward(*inputs))

    threads = [threading.Thread(target=body, args=(t,)) for t in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for t in range(4):
        assert_equal(outs[t], expected(layers, batches[t]))


def test_an_error_ends_the_pass_and_not_the_next() -> None:
    layers = model()
    wrong, good = batch(2, 0), [batch(2, seed) for seed in range(3)]
    wrong[1][1, 2] = 77
    layers[0].submit_forward(*wrong)
    layers[1].submit_forward(*good[1])
    for wrapper in layers[:2]:  # the second one lacks what the first one should have left
        with pytest.raises(ValueError, match="token 1, slot 2: got 77"):
            wrapper.sync_forward()
    assert_equal(run(layers, good), expected(layers, good))


def test_a_refused_submit_changes_nothing(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "_engines", {})
    monkeypatch.setattr(runtime, "CPUInfer", lambda config: CPUInfer(config, queue_capacity=2))
    layers = model()
    batches = [batch(1, seed) for seed in range(3)]
    want = expected(layers, batches)
    outs = [layers[0].forward(*batches[0])]
    gate = _ext.testing.Gate(layers[0].cpu_infer.queue)
    assert gate.wait_until_reached(10)
    more = [_ext.testing.Gate(layers[0].cpu_infer.queue) for _ in range(2)]
    with pytest.raises(RuntimeError, match="queue is full"):
        layers[1].submit_forward(*batches[1], block=False)
    for g in (gate, *more):
        g.open()
    outs += run(layers[1:], batches[1:])
    assert_equal(outs, want)


def test_fork_in_the_middle_of_a_pass() -> None:
    layers = model()
    batches = [batch(2, seed) for seed in range(3)]
    want = expected(layers, batches)
    outs = [layers[0].forward(*batches[0])]

    def child() -> None:
        assert layers[0].flush_deferred() is None
        assert_equal(run(layers, batches), want)

    assert ref.in_child(child) == 0
    outs += run(layers[1:], batches[1:])
    assert_equal(outs, want)


def test_experts_on_the_gpu_are_skipped_in_both_parts() -> None:
    layers = model(num_gpu_experts=4)
    batches = [batch(1, seed) for seed in range(3)]
    assert_equal(run(layers, batches), expected(layers, batches))


def test_off_by_default() -> None:
    layers = model(deferred=None)
    assert not layers[0]._chain.defers
    inputs = batch(2, 0)
    assert torch.equal(layers[0].forward(*inputs), layers[0]._forward(*inputs))
    assert layers[0].flush_deferred() is None


class GatedQueue:
    """The engine's queue with a gate between the two parts of a forward."""

    def __init__(self, queue) -> None:
        self.queue, self.gates = queue, []
        self.submit_forward, self.drain, self.close = queue.submit_forward, queue.drain, queue.close

    def submit(self, job, block):
        return self.queue.submit(job, block)

    def submit_later(self, job):
        self.gates.append(_ext.testing.Gate(self.queue))
        return self.queue.submit_later(job)


def test_deferred_experts_run_while_the_accelerator_works() -> None:
    """Order, not time: the result is there before the deferred part begins, and that part needs no further submit."""
    layers = model((0, 1))
    engine = layers[0].cpu_infer
    batches = [batch(1, seed) for seed in range(2)]
    want = expected(layers, batches)
    gated = GatedQueue(engine.queue)
    engine._queue = gated
    try:
        layers[0].submit_forward(*batches[0])
        first = layers[0].sync_forward()
        left = layers[0]._chain.left_for(1, 1, None)
        assert gated.gates[0].wait_until_reached(10)
        assert not left.later_ticket.done  # the accelerator has its input, and these experts have not begun

        def attention() -> None:
            gated.gates[0].open()
            left.later_ticket.wait()  # they end while it works, before anyone asks for layer 1

        accelerator = threading.Thread(target=attention)
        accelerator.start()
        accelerator.join(20)
        assert left.later_ticket.done
        layers[1].submit_forward(*batches[1])
        assert_equal([first, layers[1].sync_forward()], want)
    finally:
        engine._queue = gated.queue
