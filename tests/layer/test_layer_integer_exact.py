"""Integer formats, the whole layer to the last bit: exact sums, one fp32 rounding at each step of the design."""

from functools import partial

import numpy as np
import pytest
import torch
from oracle import bf16, int4, layout
from oracle.formats import int8_quantize_rows
from oracle.kernels import Kernels
from oracle.layers import Inputs, Layer, Shape, assert_same, make_inputs, make_weights
from oracle.registry import BLOCK_ROWS, ISAS, LAYER_SCALED, each_isa

SHAPES = [Shape(3, 2, 100, 70), Shape(8, 3, 33, 17), Shape(2, 1, 40, 290), Shape(4, 4, 64, 32)]


def gemm(fmt: str, packed: np.ndarray, panels: int, rows: np.ndarray, used: slice = slice(None)) -> np.ndarray:
    """bf16 bits [m, k] -> fp32 [m, panel columns]: (int32 sum * row scale) * column scale. used: only these k."""
    elements, scale = (int4.unpack if fmt == "int4" else partial(layout.unpack, fmt))(packed, panels, rows.shape[1])
    elements, rows = elements[:, used], rows[:, used]
    q, row_scale = int8_quantize_rows(bf16.widen(rows))
    sums = q.astype(np.int64) @ elements.astype(np.int64).T
    return sums.astype(np.int32).astype(np.float32) * row_scale[:, None] * scale


def exact_layer(layer: Layer, x: Inputs) -> torch.Tensor:
    """One token at a time; SwiGLU by the portable kernel, which its own tests hold to float64.

    Each part quantises its columns of h and adds up its slots; the parts are then added in order.
    """
    shape, fmt = layer.shape, layer.fmt
    slices = [slice(first, first + n) for first, n in layer.engine.parts]
    portable = Kernels("portable", fmt)
    gate_up_panels, down_panels = layout.n_panels(shape.inter, True), layout.n_panels(shape.hidden, False)
    # The bytes are what the tests of the formats hold to NumPy.
    bits = [[bf16.bits_of(w) for w in expert] for expert in make_weights(shape)]
    weights = [(portable.pack(gate, up), portable.pack(down)) for gate, up, down in bits]
    out = np.zeros((x.tokens, shape.hidden), np.uint16)
    for t in range(x.tokens):
        totals = np.zeros((len(slices), shape.hidden), np.float32)
        for slot in range(shape.top_k):
            e = int(x.ids[t, slot])
            if not 0 <= e < shape.experts:
                continue
            c = gemm(fmt, weights[e][0], gate_up_panels, bf16.bits_of(x.hidden[t : t + 1]))
            h, _ = portable.activate(c.reshape(gate_up_panels, 1, 32))
            for total, own in zip(totals, slices, strict=True):
                y = gemm(fmt, weights[e][1], down_panels, h[:, : shape.inter], own)
                total += np.float32(x.weights[t, slot]) * y[0, : shape.hidden]
        out[t] = bf16.narrow(sum(totals[1:], totals[0]))
    return bf16.tensor(out)


@each_isa
@pytest.mark.parametrize("fmt", LAYER_SCALED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_bit_of_the_layer(isa: str, fmt: str, shape: Shape, parts: int) -> None:
    layer = Layer(shape, fmt, isa, parts=parts)
    for kind, tokens in (("uniform", 1), ("mixed", 40), ("duplicates", 5)):
        x = make_inputs(shape, tokens, kind, seed=tokens)
        assert_same(layer.forward(x), exact_layer(layer, x), f"{shape} {kind} tokens={tokens}")


@each_isa
@pytest.mark.parametrize("fmt", LAYER_SCALED)
def test_a_token_does_not_depend_on_its_batch(isa: str, fmt: str) -> None:
    shape = Shape(3, 2, 96, 70)
    layer = Layer(shape, fmt, isa)
    x = make_inputs(shape, BLOCK_ROWS[isa] + 20, "mixed")
    together = layer.forward(x)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 20), slice(BLOCK_ROWS[isa] - 2, BLOCK_ROWS[isa] + 7)):
        assert_same(layer.forward(x.part(rows)), together[rows], f"tokens {rows}")
    order = torch.randperm(x.tokens, generator=torch.Generator().manual_seed(1))
    shuffled = Inputs(x.hidden[order], x.ids[order], x.weights[order])
    assert_same(layer.forward(shuffled), together[order], "another order")


@pytest.mark.parametrize("fmt", LAYER_SCALED)
def test_every_level_gives_the_same_bits(fmt: str) -> None:
    shape = Shape(4, 2, 300, 130)
    x = make_inputs(shape, 50, "mixed")
    want = Layer(shape, fmt, "portable").forward(x)
    for isa in ISAS:
        assert_same(Layer(shape, fmt, isa).forward(x), want, isa)
