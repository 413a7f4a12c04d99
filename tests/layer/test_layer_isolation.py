"""A broken token is the trouble of its own row alone."""

import pytest
import torch
from oracle.layers import Inputs, Layer, Shape, assert_same, make_inputs, make_lora, make_weights
from oracle.registry import ISAS, LAYER_SCALED, each_isa, each_layer_format

SHAPE = Shape(3, 2, 70, 40)


@each_isa
@each_layer_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("with_lora", [False, True], ids=["base", "lora"])
def test_other_rows_keep_their_bits(isa: str, fmt: str, value: float, with_lora: bool) -> None:
    layer = Layer(SHAPE, fmt, isa)
    adapter = layer.adapter(make_lora(SHAPE, 4)) if with_lora else None
    for tokens in (2, 5, 40):
        x = make_inputs(SHAPE, tokens)
        want = layer.forward(x, adapter)
        x.hidden[1, SHAPE.hidden - 1] = value
        got = layer.forward(x, adapter)
        others = torch.arange(tokens) != 1
        assert_same(got[others], want[others], f"tokens={tokens}")
        assert not got[1].isfinite().any(), "a broken row must not look healthy"
        if value != value or fmt == "int8":
            assert got[1].isnan().all()


@each_isa
@each_layer_format
def test_a_whole_row_of_nan(isa: str, fmt: str) -> None:
    layer, x = Layer(SHAPE, fmt, isa), make_inputs(SHAPE, 9)
    want = layer.forward(x)
    x.hidden[4] = float("nan")
    got = layer.forward(x)
    assert got[4].isnan().all()
    keep = torch.arange(9) != 4
    assert_same(got[keep], want[keep], "other rows")


@each_isa
@each_layer_format
def test_a_broken_token_that_is_not_routed_here_gives_zeros(isa: str, fmt: str) -> None:
    layer, x = Layer(SHAPE, fmt, isa), make_inputs(SHAPE, 5)
    x.hidden[2] = float("nan")
    x.ids[2] = -1
    assert (layer.forward(x)[2] == 0).all()


@each_isa
@each_layer_format
def test_a_routing_weight_of_nan(isa: str, fmt: str) -> None:
    layer, x = Layer(SHAPE, fmt, isa), make_inputs(SHAPE, 5)
    want = layer.forward(x)
    x.weights[3, 0] = float("nan")
    got = layer.forward(Inputs(x.hidden, x.ids, x.weights))
    assert got[3].isnan().all()
    keep = torch.arange(5) != 3
    assert_same(got[keep], want[keep], "other rows")


@each_isa
@each_layer_format
def test_gradients_of_other_tokens_keep_their_bits(isa: str, fmt: str) -> None:
    layer, x = Layer(SHAPE, fmt, isa), make_inputs(SHAPE, 20)
    dy = torch.randn(20, SHAPE.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = layer.backward(layer.train(x)[1], dy)
    dy[7, 3] = float("nan")
    got = layer.backward(layer.train(x)[1], dy)
    keep = torch.arange(20) != 7
    for name in ("input", "weights"):
        assert_same(got[name][keep], want[name][keep], name)
        assert got[name][7].isnan().all()


@pytest.mark.parametrize("fmt", LAYER_SCALED)
def test_a_weight_of_nan_does_not_become_a_number(fmt: str) -> None:
    """Refused at load or seen in every result; never a plausible weight."""
    layer = Layer(SHAPE, fmt, ISAS[0])
    gate, up, down = make_weights(SHAPE)[0]
    gate[3, 5] = float("nan")
    x = make_inputs(SHAPE, 5)
    x.ids[:, 0] = 0
    try:
        layer.engine.load_expert(0, gate, up, down)
    except ValueError:
        return
    assert layer.forward(x).isnan().all()
