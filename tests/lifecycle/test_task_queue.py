"""The queue of submitted forwards: in order, errors with their ticket, inputs copied."""

import signal
import threading
import time

import pytest
import torch
from oracle.layers import Inputs, Layer, Shape, assert_same, make_inputs, make_lora

from ktmoe import _ext

SHAPE = Shape(4, 2, 96, 48)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(SHAPE, "bf16", "")


def submit(queue: "_ext.TaskQueue", layer: Layer, x: Inputs, out: torch.Tensor, lora: object = None) -> "_ext.Ticket":
    return queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, out, lora)


def empty(tokens: int) -> torch.Tensor:
    return torch.full((tokens, SHAPE.hidden), torch.nan, dtype=torch.bfloat16)


def test_results_are_those_of_forward(layer: Layer) -> None:
    queue, lora = _ext.TaskQueue(), layer.adapter(make_lora(SHAPE, 4))
    for tokens in (0, 1, 9, 40):
        for adapter in (None, lora):
            x = make_inputs(SHAPE, tokens, "mixed")
            for variant in (x, Inputs(x.hidden, x.ids.int(), x.weights.bfloat16())):
                out = empty(tokens)
                ticket = submit(queue, layer, variant, out, adapter)
                ticket.wait()
                assert ticket.done
                assert_same(out, layer.forward(variant, adapter), f"tokens={tokens}")
                ticket.wait()


def test_the_caller_may_overwrite_its_inputs_at_once(layer: Layer) -> None:
    queue, jobs = _ext.TaskQueue(), []
    wide = torch.zeros(30, 150, dtype=torch.bfloat16)
    for i in range(20):
        x = make_inputs(SHAPE, 30, seed=i)
        want, out = layer.forward(x), empty(30)
        wide[:, 20:116] = x.hidden
        strided = Inputs(wide[:, 20:116], x.ids, x.weights)
        jobs.append((submit(queue, layer, strided, out), out, want))
        wide.fill_(torch.nan)
        x.ids.fill_(-7)
        x.weights.fill_(torch.nan)
    for ticket, out, want in jobs:
        ticket.wait()
        assert_same(out, want, "copied inputs")


def test_first_in_first_out(layer: Layer) -> None:
    """All write into one tensor: the last one submitted is what stays; and no ticket is done before an earlier one."""
    queue, out = _ext.TaskQueue(), empty(60)
    inputs = [make_inputs(SHAPE, 60, seed=i) for i in range(30)]
    want = layer.forward(inputs[-1])
    tickets = [submit(queue, layer, x, out) for x in inputs]
    while not tickets[-1].done:
        done = [t.done for t in reversed(tickets)]  # asked from the last to the first
        assert done == sorted(done)
    assert_same(out, want, "last")


def test_an_error_comes_with_its_ticket(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(), make_inputs(SHAPE, 5)
    wrong = Inputs(x.hidden, torch.full((5, 2), 77), x.weights)
    out_before, out_wrong, out_after = empty(5), empty(5), empty(5)
    before, bad, after = (submit(queue, layer, i, o) for i, o in ((x, out_before), (wrong, out_wrong), (x, out_after)))
    queue.drain()
    for _ in range(2):
        with pytest.raises(ValueError, match="expert id at token 0, slot 0: got 77"):
            bad.wait()
    assert bad.done
    before.wait()
    after.wait()
    assert out_wrong.isnan().all()
    assert_same(out_before, layer.forward(x), "before")
    assert_same(out_after, layer.forward(x), "after")


def test_bad_arguments_are_refused_at_submit(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(), make_inputs(SHAPE, 5)
    with pytest.raises(TypeError, match=r"\[submit_forward\] hidden dtype: got fp32"):
        queue.submit_forward(layer.engine, x.hidden.float(), x.ids, x.weights, empty(5))
    with pytest.raises(ValueError, match=r"\[submit_forward\] out shape"):
        queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, empty(4))


def test_submit_after_close(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(), make_inputs(SHAPE, 40)
    out = empty(40)
    ticket = submit(queue, layer, x, out)
    queue.close(10.0)
    assert ticket.done
    assert_same(out, layer.forward(x), "drained by close")
    with pytest.raises(RuntimeError, match="submit after close"):
        submit(queue, layer, x, out)
    queue.close(10.0)
    queue.drain()


def test_a_full_queue_refuses_or_waits(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(capacity=3), make_inputs(SHAPE, 5)
    assert queue.capacity == 3
    gate = _ext.testing.Gate(queue)
    assert gate.wait_until_reached(10)  # it runs, so it takes no place of those that wait
    outs = [empty(5) for _ in range(6)]
    tickets = [submit(queue, layer, x, out) for out in outs[:3]]
    with pytest.raises(RuntimeError, match="queue is full.*its bound, 3"):
        queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, outs[3], block=False)
    waiting = threading.Thread(target=lambda: tickets.extend(submit(queue, layer, x, out) for out in outs[3:]))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert not any(t.done for t in tickets)
    gate.open()
    waiting.join(10)
    queue.drain()
    assert len(tickets) == 6
    for out in outs:
        assert_same(out, layer.forward(x), "submitted by one who waited")


def test_close_ends_the_wait_for_room(layer: Layer) -> None:
    queue, x, errors = _ext.TaskQueue(1), make_inputs(SHAPE, 5), []
    gate = _ext.testing.Gate(queue)
    assert gate.wait_until_reached(10)
    submit(queue, layer, x, empty(5))

    def body() -> None:
        try:
            submit(queue, layer, x, empty(5))
        except RuntimeError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=body)
    waiting.start()
    queue.close(0)
    waiting.join(10)
    assert errors == ["[TaskQueue] submit after close"]


def test_close_cancels_what_has_not_begun(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(), make_inputs(SHAPE, 5)
    first_out, cancelled_out = empty(5), empty(5)
    first = submit(queue, layer, x, first_out)
    gate = _ext.testing.Gate(queue)
    assert gate.wait_until_reached(10)
    cancelled = [submit(queue, layer, x, cancelled_out) for _ in range(3)]
    queue.close(0.05)
    for ticket in cancelled:
        assert ticket.done
        with pytest.raises(RuntimeError, match="cancelled: closed before this task began"):
            ticket.wait()
    assert cancelled_out.isnan().all()
    assert_same(first_out, layer.forward(x), "done before")
    first.wait()
    assert not gate.ticket.done  # what runs goes on
    gate.open()
    gate.ticket.wait()


def test_the_thread_of_a_closed_queue_ends(layer: Layer) -> None:
    x = make_inputs(SHAPE, 5)
    layer.forward(x)
    before, queues = threading_count(), [_ext.TaskQueue() for _ in range(5)]
    for queue in queues:
        submit(queue, layer, x, empty(5))
        queue.close(10)
    until = time.monotonic() + 5
    while threading_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading_count() <= before


@pytest.mark.parametrize("wait", ["ticket", "drain", "room"])
def test_ctrl_c_ends_a_wait(layer: Layer, wait: str) -> None:
    queue, x, out = _ext.TaskQueue(1), make_inputs(SHAPE, 5), empty(5)
    gate = _ext.testing.Gate(queue)
    assert gate.wait_until_reached(10)
    ticket = submit(queue, layer, x, out)
    waits = {"ticket": ticket.wait, "drain": queue.drain, "room": lambda: submit(queue, layer, x, out)}
    threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        waits[wait]()
    assert not ticket.done
    gate.open()
    ticket.wait()
    assert_same(out, layer.forward(x), "after the interrupt")


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_bad_bound(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity: got"):
        _ext.TaskQueue(capacity)


def test_drain_waits_for_everything(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(), make_inputs(SHAPE, 40)
    queue.drain()
    tickets = [submit(queue, layer, x, empty(40)) for _ in range(20)]
    queue.drain()
    assert all(t.done for t in tickets)


def test_a_dropped_queue_finishes_its_work_and_ends_its_thread(layer: Layer) -> None:
    x, out = make_inputs(SHAPE, 40), empty(40)
    layer.forward(x)
    before = threading_count()
    for _ in range(10):
        queue = _ext.TaskQueue()
        ticket = submit(queue, layer, x, out)
        del queue
        ticket.wait()
    until = time.monotonic() + 5
    while threading_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading_count() <= before


def threading_count() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


def test_the_layer_and_the_result_live_as_long_as_the_task() -> None:
    queue, x = _ext.TaskQueue(), make_inputs(SHAPE, 40)
    for _ in range(10):
        layer = Layer(SHAPE, "bf16", "")
        submit(queue, layer, x, empty(40))
        del layer
    queue.drain()


def test_many_submitters(layer: Layer) -> None:
    queue, x = _ext.TaskQueue(), [make_inputs(SHAPE, 1 + i, seed=i) for i in range(6)]
    want, wrong = [layer.forward(i) for i in x], []

    def body(i: int) -> None:
        for _ in range(20):
            out = empty(1 + i)
            submit(queue, layer, x[i], out).wait()
            if not torch.equal(out, want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
