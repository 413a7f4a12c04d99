"""Layers cut along inter, one part on each sub-pool: the same outputs within the bounds of one part, the same bits for
any number of threads."""

import pytest
import torch
from oracle.bounds import row_error
from oracle.experts import ACTIVATIONS
from oracle.layers import Inputs, Layer, Shape, assert_same, make_inputs, make_lora
from oracle.published import PUBLISHED
from oracle.registry import BLOCK_ROWS, activations, each_isa

from ktmoe import _ext

FORMATS: list[str] = list(_ext.formats())
K_STEP = {fmt: int(_ext.testing.k_step(fmt)) for fmt in FORMATS}
# As in test_layer_forward.
TOLERANCE = {fmt: 2.0**-6 if fmt in PUBLISHED else 2.0**-7 for fmt in FORMATS}
PARTS = [1, 2, 3, 4]
each_parts = pytest.mark.parametrize("parts", PARTS)


def check(layer: Layer, x: Inputs, what: str, lora: object = None) -> torch.Tensor:
    adapter = layer.adapter(lora, 1.5) if lora else None  # type: ignore[arg-type]
    out = layer.forward(x, adapter)
    error = row_error(out.double().numpy(), layer.reference(x, lora, 1.5))  # type: ignore[arg-type]
    assert (error <= TOLERANCE[layer.fmt]).all(), f"{layer.fmt} {what}: row {int(error.argmax())}: {error.max():.4f}"
    return out


# --- where a layer is cut ---
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("inter", [1, 33, 70, 290, 768, 1000])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_cuts(fmt: str, inter: int, activation: str) -> None:
    """At multiples of a k-step of down (which hold whole panels of gate/up), evenly, larger parts first, none empty."""
    granule = max(K_STEP[fmt], 32 if activation == "relu2" else 16)
    granules = -(-inter // granule)
    for parts in (*PARTS, 7):
        pool = _ext.ThreadPool([1] * parts, [-1] * parts)
        slices = _ext.MoeLayer(pool, 2, 1, 32, inter, fmt, activation=activation).parts
        assert len(slices) == min(parts, granules)
        ends = [first + n for first, n in slices]
        assert [first for first, _ in slices] == [0, *ends[:-1]]
        assert ends[-1] == inter
        assert all(n > 0 for _, n in slices)
        assert all(first % granule == 0 for first, _ in slices)
        shares = [-(-n // granule) for _, n in slices]
        assert shares == sorted(shares, reverse=True)
        assert max(shares) - min(shares) <= 1


# --- outputs ---
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt: str) -> None:
    shape = Shape(3, 2, 70, 4 * K_STEP[fmt] - K_STEP[fmt] // 2)  # four parts, the last one ragged
    for parts in PARTS:
        layer = Layer(shape, fmt, "", parts=parts)
        assert len(layer.engine.parts) == parts
        for tokens in (1, 2, 40):
            check(layer, make_inputs(shape, tokens, "mixed" if tokens > 2 else "uniform"), f"{parts} parts")


@each_isa
@each_parts
@pytest.mark.parametrize("fmt", ["bf16", "int8", "q4_k"])
@pytest.mark.parametrize("inter", [33, 70, 290, 768])
def test_inter_of_any_size(isa: str, fmt: str, inter: int, parts: int) -> None:
    for shape in (Shape(3, 2, 100, inter), Shape(2, 1, 33, inter)):
        layer = Layer(shape, fmt, isa, parts=parts)
        for tokens in (1, 3, 33):
            x = make_inputs(shape, tokens, "mixed" if tokens > 3 else "uniform")
            check(layer, x, f"{shape} {parts} parts")
            check(layer, x, f"{shape} {parts} parts, LoRA", make_lora(shape, 5))


@each_isa
@each_parts
@pytest.mark.parametrize("name", ["relu2", "oai", "gelu_tanh"])
def test_activations_and_biases(isa: str, name: str, parts: int) -> None:
    shape = Shape(3, 2, 100, 290)
    for fmt in ("bf16", "int8"):
        layer = Layer(shape, fmt, isa, parts=parts, activation=ACTIVATIONS[name], with_biases=True)
        x = make_inputs(shape, 20)
        check(layer, x, f"{name} {parts} parts")
        check(layer, x, f"{name} {parts} parts, LoRA", make_lora(shape, 5, gated=layer.activation.gated))


@pytest.mark.parametrize("fmt", FORMATS)
def test_parts_agree(fmt: str) -> None:
    """Two roundings of the same sum to bf16; of h to int8, 2^-6 each, where products are."""
    shape = Shape(4, 2, 96, 3 * K_STEP[fmt] + 5)
    x = make_inputs(shape, 40)
    want = Layer(shape, fmt, "").forward(x).double().numpy()
    bound = 2.0**-5 if activations(fmt) == "int8" else 2.0**-7
    for parts in PARTS[1:]:
        error = row_error(Layer(shape, fmt, "", parts=parts).forward(x).double().numpy(), want)
        assert (error <= bound).all(), f"{fmt}, {parts} parts: {error.max():.4f}"


@each_isa
def test_more_rows_than_a_block_and_chunks(isa: str) -> None:
    shape = Shape(2, 1, 64, 96)
    for chunk in (0, 33):
        layer = Layer(shape, "bf16", isa, parts=3, chunk_tokens=chunk)
        check(layer, make_inputs(shape, 2 * BLOCK_ROWS[isa] + 5, "all to one"), f"chunk={chunk}")


def test_experts_on_the_gpu_and_nothing_routed() -> None:
    shape = Shape(5, 2, 70, 290)
    layer = Layer(shape, "int8", "", parts=3, on_gpu=[True, False, True, False, False])
    assert layer.engine.loaded
    check(layer, make_inputs(shape, 20), "mask")
    assert (layer.forward(make_inputs(shape, 9, "masked")) == 0).all()
    assert layer.forward(make_inputs(shape, 9).part(slice(0, 0))).shape == (0, 70)
    everything = Layer(shape, "int8", "", parts=3, on_gpu=[True] * 5)
    assert everything.engine.packed_bytes == 0
    assert (everything.forward(make_inputs(shape, 9)) == 0).all()


def test_a_row_of_nan_stays_alone() -> None:
    shape = Shape(3, 2, 96, 290)
    for fmt in ("bf16", "int8"):
        layer, x = Layer(shape, fmt, "", parts=3), make_inputs(shape, 20)
        clean = layer.forward(x)
        x.hidden[7, 3] = torch.nan
        got = layer.forward(x)
        assert got[7].isnan().all()
        others = torch.arange(20) != 7
        assert_same(got[others], clean[others], "other rows")


# --- bits ---
CASES = {
    "many experts": (Shape(24, 2, 96, 300), 60, "uniform"),
    "few experts": (Shape(2, 2, 160, 300), 30, "uniform"),
    "one token": (Shape(8, 4, 300, 290), 1, "uniform"),
    "nobody is woken": (Shape(3, 1, 64, 96), 2, "uniform"),
}


@each_isa
@pytest.mark.parametrize("fmt", ["bf16", "int8", "q4_k"])
@pytest.mark.parametrize("case", CASES)
def test_threads(isa: str, fmt: str, case: str) -> None:
    shape, tokens, kind = CASES[case]
    x, lora = make_inputs(shape, tokens, kind), make_lora(shape, 5)
    for parts in PARTS:
        one = Layer(shape, fmt, isa, threads=1, parts=parts)
        want, with_lora = one.forward(x), one.forward(x, one.adapter(lora))
        for threads in (2, 3, 5, 8):
            layer = Layer(shape, fmt, isa, threads=threads, parts=parts)
            assert_same(layer.forward(x), want, f"{parts} parts of {threads} threads")
            assert_same(layer.forward(x, layer.adapter(lora)), with_lora, f"{parts} parts of {threads} threads, LoRA")


def test_sub_pools_of_different_size() -> None:
    shape = Shape(8, 2, 160, 300)
    x, want = make_inputs(shape, 40), None
    for threads in ([1, 1, 1], [3, 1, 2], [1, 4, 1]):
        layer = Layer(shape, "bf16", "", pool=_ext.ThreadPool(threads, [-1] * 3))
        got = layer.forward(x)
        want = got if want is None else want
        assert_same(got, want, str(threads))


def test_layers_with_fewer_parts_share_the_engine() -> None:
    """A small inter leaves sub-pools idle; the bits are those of an engine of as many sub-pools as parts."""
    big, small = Shape(4, 2, 96, 290), Shape(4, 2, 96, 40)
    first = Layer(big, "bf16", "", parts=4)
    second = Layer(small, "bf16", "", pool=first.pool)
    assert [len(layer.engine.parts) for layer in (first, second)] == [4, 2]
    xa, xb = make_inputs(big, 30), make_inputs(small, 30)
    for _ in range(3):
        assert_same(first.forward(xa), Layer(big, "bf16", "", threads=1, parts=4).forward(xa), "big")
        assert_same(second.forward(xb), Layer(small, "bf16", "", threads=1, parts=2).forward(xb), "small")
