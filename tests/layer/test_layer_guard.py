"""The caller's tensors flush against pages that fault: the layer touches nothing beside them."""

import numpy as np
import pytest
import torch
from oracle import bf16, child
from oracle.experts import ACTIVATIONS, Activation
from oracle.layers import Inputs, Layer, Shape, assert_same, make_biases, make_inputs, make_lora, make_weights
from oracle.memory import Guarded, put, put_rows
from oracle.registry import each_isa, each_layer_format

SHAPES = [Shape(2, 1, 33, 17), Shape(3, 2, 100, 70)]


def guarded(place: Guarded, t: torch.Tensor) -> torch.Tensor:
    if t.dtype == torch.bfloat16:
        return bf16.tensor(put(place, bf16.bits_of(t.contiguous()), 2))
    return torch.from_numpy(put(place, t.contiguous().numpy(), t.element_size()))


def guarded_rows(place: Guarded, t: torch.Tensor) -> torch.Tensor:
    return bf16.tensor(put_rows(place, bf16.bits_of(t), t.shape[1] + 5))


@each_isa
@each_layer_format
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_tensor_of_the_caller(isa: str, fmt: str, side: str) -> None:
    def body(say: object) -> None:
        for shape in SHAPES:
            for tokens in (1, 3, 20):
                for name in ("silu", "relu2"):
                    say(f"{shape} tokens={tokens} {name}")
                    one(Guarded(side), shape, tokens, ACTIVATIONS[name])

    def one(place: Guarded, shape: Shape, tokens: int, activation: Activation) -> None:
        gated = activation.gated
        plain = Layer(shape, fmt, isa, activation=activation, with_biases=True)
        lora, x = make_lora(shape, 5, gated=gated), make_inputs(shape, tokens)
        adapter = plain.adapter(lora)
        dy = torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
        out, cache = plain.train(x, adapter)
        want = plain.backward(cache, dy, adapter, lora)

        layer = Layer(shape, fmt, isa, activation=activation)
        layer.engine.unload()
        for e in range(shape.experts):
            shapes = ((shape.inter, shape.hidden), (shape.inter, shape.hidden), (shape.hidden, shape.inter))
            dequantized = [torch.from_numpy(put(place, np.zeros(s, np.float32), 4)) for s in shapes]
            plain.engine.dequantize_expert(e, dequantized[0] if gated else None, *dequantized[1:])
        for e, arrays in enumerate(zip(make_weights(shape, gated=gated), make_biases(shape, gated), strict=True)):
            layer.load(e, *(None if t is None else guarded(place, t) for own in arrays for t in own))
        own = layer.adapter({n: guarded(place, t) for n, t in lora.items()})
        inputs = Inputs(guarded_rows(place, x.hidden), guarded(place, x.ids), guarded(place, x.weights))
        y = bf16.tensor(place.empty((tokens, shape.hidden), np.uint16, 2))
        own_cache = layer.engine.forward_train(inputs.hidden, inputs.ids, inputs.weights, y, own)
        assert_same(y, out, "training forward")
        layer.engine.forward(inputs.hidden, inputs.ids, inputs.weights, y, own)
        assert_same(y, out, "forward")
        grads = {n: torch.from_numpy(place.empty(tuple(t.shape), np.float32, 4)) for n, t in want.items()}
        own_grads = [grads[n] for n in lora]
        layer.engine.backward(own_cache, guarded_rows(place, dy), own, grads["input"], grads["weights"], own_grads)
        for name, value in want.items():
            assert_same(grads[name], value, name)
        place.assert_slack_untouched()

    child.run(body).check()
