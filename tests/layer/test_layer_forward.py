"""The whole layer against float64 on the weights that the kernels really use, row by row."""

import pytest
import torch
from oracle.bounds import row_error
from oracle.layers import Inputs, Layer, Shape, assert_same, make_inputs, make_lora
from oracle.published import PUBLISHED
from oracle.registry import BLOCK_ROWS, LAYER_FORMATS, each_isa, each_layer_format

# h is rounded to bf16; AMX also rounds unpacked weights to bf16.
TOLERANCE = {fmt: 2.0**-6 if fmt in PUBLISHED else 2.0**-7 for fmt in LAYER_FORMATS}
KINDS = ["uniform", "all to one", "one each", "mixed", "duplicates"]
SHAPES = [
    Shape(1, 1, 64, 32),
    Shape(2, 1, 33, 17),
    Shape(3, 2, 100, 70),
    Shape(3, 2, 300, 40),
    Shape(2, 2, 40, 290),
    Shape(8, 8, 96, 48),
    Shape(8, 2, 65, 129),
    Shape(64, 8, 64, 32),
]


def check(fmt: str, got: torch.Tensor, want: object, what: str) -> None:
    error = row_error(got.double().numpy(), want)
    assert (error <= TOLERANCE[fmt]).all(), f"{what}: row {int(error.argmax())} is off by {error.max():.4f}"


@each_isa
@each_layer_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_routing(isa: str, fmt: str, shape: Shape) -> None:
    layer = Layer(shape, fmt, isa)
    for kind in KINDS:
        for tokens in (1, 2, 3, 33):
            x = make_inputs(shape, tokens, kind, seed=tokens)
            check(fmt, layer.forward(x), layer.reference(x), f"{isa}/{fmt} {shape} {kind} tokens={tokens}")


@each_isa
@each_layer_format
def test_more_rows_than_a_block(isa: str, fmt: str) -> None:
    shape = Shape(2, 1, 64, 48)
    layer = Layer(shape, fmt, isa)
    for tokens in (BLOCK_ROWS[isa], BLOCK_ROWS[isa] + 1, 2 * BLOCK_ROWS[isa] + 5):
        x = make_inputs(shape, tokens, "all to one")
        error = row_error(layer.forward(x).double().numpy(), layer.reference(x))
        # a last block of few rows may round x and h to int8, by up to 2^-8 of the largest of 32 k each
        assert (error <= (2.0**-5 if fmt in PUBLISHED else 2.0**-7)).all(), f"tokens={tokens}: {error.max():.4f}"


@each_isa
@each_layer_format
def test_so_many_rows_that_they_are_kept_in_bf16(isa: str, fmt: str) -> None:
    shape, tokens = Shape(16, 8, 70, 40), 150  # 1200 rows, from 1024 on
    layer = Layer(shape, fmt, isa)
    for kind in ("uniform", "mixed"):
        x = make_inputs(shape, tokens, kind)
        check(fmt, layer.forward(x), layer.reference(x), f"{isa}/{fmt} {kind}")


@each_isa
@each_layer_format
@pytest.mark.parametrize("rank", [1, 4, 16, 33])
def test_lora(isa: str, fmt: str, rank: int) -> None:
    for shape in (Shape(3, 2, 100, 70), Shape(2, 1, 33, 17)):
        layer, lora = Layer(shape, fmt, isa), make_lora(shape, rank)
        adapter = layer.adapter(lora, scaling=2.5)
        for tokens in (1, 3, 20):
            x = make_inputs(shape, tokens, "mixed" if tokens > 3 else "uniform")
            check(fmt, layer.forward(x, adapter), layer.reference(x, lora, 2.5), f"{shape} tokens={tokens}")


@each_isa
@each_layer_format
def test_lora_tensors_may_be_fp32_and_strided(isa: str, fmt: str) -> None:
    shape = Shape(3, 2, 70, 40)
    layer, x = Layer(shape, fmt, isa), make_inputs(shape, 9)
    lora = make_lora(shape, 5)
    want = layer.forward(x, layer.adapter(lora))
    assert_same(layer.forward(x, layer.adapter({n: t.float() for n, t in lora.items()})), want, "fp32")
    transposed = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in lora.items()}
    assert_same(layer.forward(x, layer.adapter(transposed)), want, "strided")


@each_isa
@each_layer_format
def test_nothing_routed_here_gives_exact_zeros(isa: str, fmt: str) -> None:
    shape = Shape(4, 2, 70, 40)
    layer = Layer(shape, fmt, isa)
    assert (layer.forward(make_inputs(shape, 9, "masked")) == 0).all()


@each_isa
@each_layer_format
def test_masked_slots_do_not_change_a_bit(isa: str, fmt: str) -> None:
    """-1 and E alike; the other slots stay."""
    shape = Shape(4, 3, 70, 40)
    layer, x = Layer(shape, fmt, isa), make_inputs(shape, 9)
    x.ids[:, 1] = -1
    want = layer.forward(x)
    check(fmt, want, layer.reference(x), "masked")
    assert_same(layer.forward(Inputs(x.hidden, torch.where(x.ids < 0, 4, x.ids), x.weights)), want, "E for -1")


@each_isa
@each_layer_format
def test_a_duplicate_expert_counts_twice(isa: str, fmt: str) -> None:
    shape = Shape(4, 2, 70, 40)
    layer = Layer(shape, fmt, isa)
    x = make_inputs(shape, 6, "duplicates")
    once = Inputs(x.hidden, x.ids.clone(), x.weights.sum(dim=1, keepdim=True).repeat(1, 2))
    once.ids[:, 1] = -1
    error = row_error(layer.forward(x).double().numpy(), layer.forward(once).double().numpy())
    assert (error <= TOLERANCE[fmt]).all()


@each_isa
@each_layer_format
def test_types_of_ids_and_weights(isa: str, fmt: str) -> None:
    shape = Shape(5, 3, 70, 40)
    layer, x = Layer(shape, fmt, isa), make_inputs(shape, 9, "mixed")
    x.weights = x.weights.bfloat16().float()
    want = layer.forward(x)
    assert_same(layer.forward(Inputs(x.hidden, x.ids.int(), x.weights)), want, "int32 ids")
    assert_same(layer.forward(Inputs(x.hidden, x.ids.int(), x.weights.bfloat16())), want, "bf16 weights")
    assert_same(layer.forward(Inputs(x.hidden, x.ids, x.weights.bfloat16())), want, "int64 ids, bf16 weights")


@each_isa
@each_layer_format
def test_no_tokens(isa: str, fmt: str) -> None:
    shape = Shape(2, 1, 64, 32)
    layer = Layer(shape, fmt, isa)
    x = make_inputs(shape, 3).part(slice(0, 0))
    assert layer.forward(x).shape == (0, 64)
    out, cache = layer.train(x)
    assert out.shape == (0, 64)
    assert cache.n_tokens == 0


@each_isa
@each_layer_format
def test_strided_rows_of_hidden(isa: str, fmt: str) -> None:
    shape = Shape(3, 2, 70, 40)
    layer, x = Layer(shape, fmt, isa), make_inputs(shape, 9)
    wide = torch.full((9, 200), torch.nan, dtype=torch.bfloat16)
    wide[:, 30:100] = x.hidden
    assert_same(layer.forward(Inputs(wide[:, 30:100], x.ids, x.weights)), layer.forward(x), "a slice of columns")
    every_other = torch.full((18, 70), torch.nan, dtype=torch.bfloat16)
    every_other[::2] = x.hidden
    assert_same(layer.forward(Inputs(every_other[::2], x.ids, x.weights)), layer.forward(x), "every other row")


@each_isa
@each_layer_format
def test_experts_on_the_gpu_are_skipped(isa: str, fmt: str) -> None:
    shape = Shape(5, 2, 70, 40)
    x = make_inputs(shape, 20)
    layer = Layer(shape, fmt, isa, on_gpu=[True, False, True, False, False])
    check(fmt, layer.forward(x), layer.reference(x), "mask")
    assert layer.engine.loaded
    assert layer.engine.packed_bytes * 5 == Layer(shape, fmt, isa).engine.packed_bytes * 3
    everything = Layer(shape, fmt, isa, on_gpu=[True] * 5)
    assert everything.engine.packed_bytes == 0
    assert (everything.forward(x) == 0).all()


@each_isa
@each_layer_format
def test_loading_again_replaces_an_expert(isa: str, fmt: str) -> None:
    shape = Shape(2, 1, 64, 32)
    layer, x = Layer(shape, fmt, isa), make_inputs(Shape(2, 1, 64, 32), 7)
    before = layer.forward(x)
    layer.load_zeros(1)
    after = layer.forward(x)
    to_zero = (x.ids == 1).any(dim=1)
    assert to_zero.any()
    assert (after[to_zero] == 0).all()
    assert_same(after[~to_zero], before[~to_zero], "the other expert")


@each_isa
@each_layer_format
def test_outliers(isa: str, fmt: str) -> None:
    """One value of 1e4 in a token, and tokens that are zero or tiny."""
    shape = Shape(3, 2, 96, 48)
    layer, x = Layer(shape, fmt, isa), make_inputs(Shape(3, 2, 96, 48), 6)
    x.hidden[1, 5] = 1e4
    x.hidden[2] = 0
    x.hidden[3] *= 1e-3
    got = layer.forward(x)
    assert (got[2] == 0).all()
    check(fmt, got, layer.reference(x), "outliers")
