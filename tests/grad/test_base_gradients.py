"""Gradients of the base weights (full fine-tuning) against float64 autograd."""

import pytest
import torch
from oracle.experts import ACTIVATIONS
from oracle.gradients import check_base, run_base
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import BLOCK_ROWS, each_isa

SHAPES = [Shape(4, 2, 64, 48), Shape(3, 2, 100, 70), Shape(5, 2, 290, 33)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_isa
@each_shape
def test_base(isa: str, shape: Shape) -> None:
    layer = Layer(shape, "bf16", isa)
    for tokens in (1, 3, 50):
        check_base(layer, tokens, "mixed" if tokens > 3 else "uniform")
    check_base(layer, 40, lora=make_lora(shape, 4))


@each_isa
@pytest.mark.parametrize("name", ["relu2", "oai", "gelu_tanh"])
def test_other_activations(isa: str, name: str) -> None:
    check_base(Layer(SHAPES[1], "bf16", isa, activation=ACTIVATIONS[name], with_biases=True), 40)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_chunks_sum(isa: str, dtype: torch.dtype) -> None:
    check_base(Layer(Shape(2, 1, 64, 48), "bf16", isa), BLOCK_ROWS[isa] + 21, "all to one", dtype)
    check_base(Layer(Shape(8, 2, 64, 48), "bf16", isa, chunk_tokens=7), 40, "uniform", dtype)


@each_isa
def test_bf16_gradients_are_the_fp32_ones_rounded_once(isa: str) -> None:
    layer = Layer(Shape(2, 1, 100, 70), "bf16", isa)
    tokens = BLOCK_ROWS[isa] + 21
    x, dy = make_inputs(layer.shape, tokens), grad_out(tokens, 100)
    wide, narrow = run_base(layer, x, dy), run_base(layer, x, dy, torch.bfloat16)
    for name, grad in wide.items():
        assert_same(narrow[name], grad.bfloat16(), name)


def test_idle_experts_get_exact_zeros() -> None:
    shape = Shape(6, 2, 64, 48)
    layer, x = Layer(shape, "bf16", "", chunk_tokens=7), make_inputs(shape, 20)
    x.ids[:7], x.ids[7:] = x.ids[:7] % 2, x.ids[7:] % 4
    for grad in run_base(layer, x, grad_out(20, 64)).values():
        assert (grad[4:] == 0).all()
        assert (grad[:4] != 0).any()
    empty = make_inputs(shape, 0)
    assert all((g == 0).all() for g in run_base(layer, empty, grad_out(0, 64)).values())


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, dy = make_inputs(SHAPES[1], 60), grad_out(60, 100)
    want = run_base(Layer(SHAPES[1], "bf16", "", threads=2), x, dy)
    for name, got in run_base(Layer(SHAPES[1], "bf16", "", threads=threads), x, dy).items():
        assert_same(got, want[name], name)


def test_wrong_tensors_are_refused() -> None:
    layer = Layer(SHAPES[0], "bf16", "")
    x = make_inputs(SHAPES[0], 5)
    _, cache = layer.train(x)
    good = [torch.zeros(4, 48, 64), torch.zeros(4, 48, 64), torch.zeros(4, 64, 48)]
    for bad, error, text in (
        (good[:2], ValueError, "base_grads: got 2 arrays, expected 3"),
        ([*good[:2], torch.zeros(4, 48, 64)], ValueError, "base_grads"),
        ([good[0].half(), *good[1:]], TypeError, "base_grads"),
    ):
        with pytest.raises(error, match=text):
            layer.engine.backward(cache, grad_out(5, 64), None, None, None, None, bad)
