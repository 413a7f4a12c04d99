"""Any number of threads, chunks and calls give the same bits, forward and backward, under both schedules."""

import pytest
import torch
from oracle.layers import Inputs, Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import BLOCK_ROWS, each_isa, each_layer_format

THREADS = [2, 3, 5]
# large enough that work is shared: many experts (a task owns a block) and few (all share each stage)
CASES = {
    "many experts": (Shape(24, 2, 96, 48), 60, "uniform"),
    "few experts": (Shape(2, 2, 160, 100), 30, "uniform"),
    "one token": (Shape(8, 4, 300, 290), 1, "uniform"),
    "unbalanced": (Shape(6, 1, 130, 70), 40, "all to one"),
}
each_case = pytest.mark.parametrize("case", CASES)


def everything(layer: Layer, x: Inputs, dy: torch.Tensor, with_lora: bool) -> dict[str, torch.Tensor]:
    lora = make_lora(layer.shape, 5) if with_lora else None
    adapter = layer.adapter(lora, 1.5) if lora else None
    trained, cache = layer.train(x, adapter)
    result = {"forward": layer.forward(x, adapter), "training forward": trained}
    return result | layer.backward(cache, dy, adapter, lora)


@each_isa
@each_layer_format
@each_case
@pytest.mark.parametrize("with_lora", [False, True], ids=["base", "lora"])
def test_threads(isa: str, fmt: str, case: str, with_lora: bool) -> None:
    shape, tokens, kind = CASES[case]
    x, dy = make_inputs(shape, tokens, kind), grad_out(tokens, shape.hidden)
    want = everything(Layer(shape, fmt, isa, threads=1), x, dy, with_lora)
    assert_same(want["training forward"], want["forward"], "training forward")
    for threads in THREADS:
        layer = Layer(shape, fmt, isa, threads=threads)
        got = everything(layer, x, dy, with_lora)
        assert layer.pool.started
        for name, value in want.items():
            assert_same(got[name], value, f"{name} with {threads} threads")


@each_isa
@each_layer_format
def test_run_twice(isa: str, fmt: str) -> None:
    shape, tokens, kind = CASES["many experts"]
    x, dy = make_inputs(shape, tokens, kind), grad_out(tokens, shape.hidden)
    layer = Layer(shape, fmt, isa, threads=3)
    first = everything(layer, x, dy, True)
    for name, value in everything(layer, x, dy, True).items():
        assert_same(value, first[name], name)


@each_isa
@each_layer_format
@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_chunks_equal_calls_chunk_by_chunk(isa: str, fmt: str, chunk: int) -> None:
    shape = Shape(4, 2, 100, 70)
    x, dy = make_inputs(shape, 37, "mixed"), grad_out(37, 100)
    whole, pieces = Layer(shape, fmt, isa, chunk_tokens=chunk), Layer(shape, fmt, isa)
    lora = make_lora(shape, 3)
    adapter, piece_adapter = whole.adapter(lora), pieces.adapter(lora)
    out, cache = whole.train(x, adapter)
    assert_same(out, whole.forward(x, adapter), "training forward")
    grads = whole.backward(cache, dy, adapter, lora)
    sums = {n: torch.zeros_like(t) for n, t in lora.items()}
    for first in range(0, 37, chunk):
        rows = slice(first, first + chunk)
        part, part_cache = pieces.train(x.part(rows), piece_adapter)
        assert_same(out[rows], part, f"forward of {rows}")
        part_grads = pieces.backward(part_cache, dy[rows], piece_adapter, lora)
        for name in ("input", "weights"):
            assert_same(grads[name][rows], part_grads[name], f"{name} of {rows}")
        sums = {n: sums[n].float() + part_grads[n] for n in sums}
    for name in sums:
        assert_same(grads[name], sums[name], f"{name}: chunk partials added in chunk order")


@each_isa
def test_the_schedule_does_not_depend_on_the_threads_of_another_layer(isa: str) -> None:
    """Two layers share one pool; the bits are those of a pool of their own."""
    a, b = Shape(4, 2, 64, 48), Shape(2, 1, 100, 70)
    first = Layer(a, "bf16", isa, threads=3)
    second = Layer(b, "bf16", isa, pool=first.pool)
    xa, xb = make_inputs(a, BLOCK_ROWS[isa] + 3), make_inputs(b, 9)
    for _ in range(3):
        assert_same(first.forward(xa), Layer(a, "bf16", isa, threads=1).forward(xa), "a")
        assert_same(second.forward(xb), Layer(b, "bf16", isa, threads=1).forward(xb), "b")


@each_isa
@each_layer_format
def test_experts_add_in_slot_order(isa: str, fmt: str) -> None:
    """In fp32: ((slot 0 + slot 1) + slot 2) + ..., seen in the input gradient, which is not rounded any further."""
    shape = Shape(6, 5, 96, 48)
    layer, x, dy = Layer(shape, fmt, isa), make_inputs(shape, 1), grad_out(1, 96)
    whole = layer.backward(layer.train(x)[1], dy)["input"]
    total = torch.zeros(1, 96)
    for slot in range(5):
        ids = torch.where(torch.arange(5) == slot, x.ids, -1)
        total = total + layer.backward(layer.train(Inputs(x.hidden, ids, x.weights))[1], dy)["input"]
    assert_same(whole, total, "sum over slots")
