"""Wrong arguments: the exception names function, argument, what came and what was expected; nothing is written."""

from collections.abc import Callable

import pytest
import torch
from oracle.layers import Layer, Shape, make_inputs, make_lora, make_pool, make_weights
from oracle.registry import ISAS

from ktmoe import _ext

SHAPE = Shape(4, 2, 64, 32)
bf16 = torch.bfloat16


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(SHAPE, "bf16", ISAS[0])


def good() -> dict[str, torch.Tensor]:
    x = make_inputs(SHAPE, 3)
    return {"hidden": x.hidden, "ids": x.ids, "weights": x.weights, "out": torch.full((3, 64), 7.0, dtype=bf16)}


BAD: dict[str, tuple[str, Callable[[], torch.Tensor], type, str]] = {
    "hidden fp32": ("hidden", lambda: torch.zeros(3, 64), TypeError, r"hidden dtype: got fp32, expected bf16"),
    "hidden fp16": ("hidden", lambda: torch.zeros(3, 64).half(), TypeError, r"hidden dtype: got an unsupported type"),
    "hidden width": (
        "hidden",
        lambda: torch.zeros(3, 63, dtype=bf16),
        ValueError,
        r"hidden shape: got \[3, 63\], expected \[any, 64\]",
    ),
    "hidden rank": ("hidden", lambda: torch.zeros(3, 1, 64, dtype=bf16), ValueError, r"hidden shape: got \[3, 1, 64\]"),
    "hidden columns apart": (
        "hidden",
        lambda: torch.zeros(3, 128, dtype=bf16)[:, ::2],
        ValueError,
        r"hidden strides: got 2",
    ),
    "ids int16": (
        "ids",
        lambda: torch.zeros(3, 2, dtype=torch.int16),
        TypeError,
        r"ids dtype: got .*expected int32 or int64",
    ),
    "ids fp32": ("ids", lambda: torch.zeros(3, 2), TypeError, r"ids dtype: got fp32"),
    "ids tokens": (
        "ids",
        lambda: torch.zeros(2, 2, dtype=torch.int64),
        ValueError,
        r"ids shape: got \[2, 2\], expected \[3, 2\]",
    ),
    "ids top_k": (
        "ids",
        lambda: torch.zeros(3, 1, dtype=torch.int64),
        ValueError,
        r"ids shape: got \[3, 1\], expected \[3, 2\]",
    ),
    "ids strides": ("ids", lambda: torch.zeros(3, 4, dtype=torch.int64)[:, ::2], ValueError, r"ids strides"),
    "weights fp64": ("weights", lambda: torch.zeros(3, 2, dtype=torch.float64), TypeError, r"weights dtype"),
    "weights shape": (
        "weights",
        lambda: torch.zeros(3, 3),
        ValueError,
        r"weights shape: got \[3, 3\], expected \[3, 2\]",
    ),
    "out fp32": ("out", lambda: torch.zeros(3, 64), TypeError, r"out dtype: got fp32, expected bf16"),
    "out shape": (
        "out",
        lambda: torch.zeros(4, 64, dtype=bf16),
        ValueError,
        r"out shape: got \[4, 64\], expected \[3, 64\]",
    ),
    "out strides": ("out", lambda: torch.zeros(3, 128, dtype=bf16)[:, :64], ValueError, r"out strides"),
    "id too large": (
        "ids",
        lambda: torch.tensor([[0, 1], [2, 5], [9, 0]]),
        ValueError,
        r"token 1, slot 1: got 5, expected 0 to 3",
    ),
    "id too small": ("ids", lambda: torch.tensor([[0, 1], [2, 3], [-2, 0]]), ValueError, r"token 2, slot 0: got -2"),
    "id huge": (
        "ids",
        lambda: torch.tensor([[0, 2**32], [0, 0], [0, 0]]),
        ValueError,
        r"token 0, slot 1: got 4294967296",
    ),
}


@pytest.mark.parametrize("call", ["forward", "forward_train"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(layer: Layer, call: str, case: str) -> None:
    name, make, error, message = BAD[case]
    arguments = good()
    out = arguments["out"]
    arguments[name] = make()
    with pytest.raises(error, match=message) as raised:
        getattr(layer.engine, call)(**arguments)
    assert str(raised.value).startswith("[forward")
    assert (out == 7).all(), "nothing may be written"


def test_out_may_not_overlap_hidden(layer: Layer) -> None:
    memory = torch.zeros(6 * 64, dtype=bf16)
    arguments = good() | {"hidden": memory[: 3 * 64].view(3, 64)}
    for first in (0, 1, 64, 3 * 64 - 1):
        with pytest.raises(ValueError, match="overlaps hidden"):
            layer.engine.forward(**arguments | {"out": memory[first : first + 3 * 64].view(3, 64)})
    layer.engine.forward(**arguments | {"out": memory[3 * 64 :].view(3, 64)})


def test_not_loaded() -> None:
    engine = _ext.MoeLayer(make_pool(1), 4, 2, 64, 32, "bf16")
    with pytest.raises(RuntimeError, match=r"^Weights not loaded: \[forward\] 4 of 4 experts are missing"):
        engine.forward(**good())
    for e, weights in enumerate(make_weights(SHAPE)[:3]):
        engine.load_expert(e, *weights)
    assert not engine.loaded
    with pytest.raises(RuntimeError, match=r"Weights not loaded: \[forward_train\] 1 of 4"):
        engine.forward_train(**good())
    engine.load_expert(3, *make_weights(SHAPE)[3])
    engine.forward(**good())
    engine.unload()
    assert engine.packed_bytes == 0
    with pytest.raises(RuntimeError, match="Weights not loaded"):
        engine.forward(**good())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_experts": 0}, "n_experts: got 0"),
        ({"top_k": 5}, "top_k: got 5, expected 1 to 4"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"inter": 70000}, "inter: got 70000"),
        ({"chunk_tokens": -1}, "chunk_tokens: got -1"),
        ({"format": "int3"}, "unknown weight format: got 'int3', expected one of"),
        ({"on_gpu": torch.zeros(3, dtype=torch.bool)}, r"on_gpu shape: got \[3\], expected \[4\]"),
    ],
)
def test_bad_layers(changed: dict, message: str) -> None:
    arguments = {"n_experts": 4, "top_k": 2, "hidden": 64, "inter": 32, "format": "bf16"} | changed
    with pytest.raises(ValueError, match=message):
        _ext.MoeLayer(make_pool(1), **arguments)


def test_bad_weights() -> None:
    gate, up, down = make_weights(SHAPE)[0]
    engine = Layer(SHAPE, "bf16", ISAS[0], on_gpu=[False, True, False, False]).engine
    with pytest.raises(TypeError, match=r"\[load_expert\] up dtype: got fp32"):
        engine.load_expert(0, gate, up.float(), down)
    with pytest.raises(ValueError, match=r"\[load_expert\] down shape: got \[32, 64\], expected \[64, 32\]"):
        engine.load_expert(0, gate, up, gate)
    with pytest.raises(ValueError, match=r"\[load_expert\] gate strides"):
        engine.load_expert(0, down.T, up, down)
    with pytest.raises(ValueError, match=r"expert: got 4, expected 0 to 3"):
        engine.load_expert(4, gate, up, down)
    with pytest.raises(ValueError, match=r"expert: got -1"):
        engine.load_expert(-1, gate, up, down)
    with pytest.raises(ValueError, match="on the GPU"):
        engine.load_expert(1, gate, up, down)
    with pytest.raises(ValueError, match="expert: got 1, expected one that is loaded"):
        engine.dequantize_expert(1, gate.float(), up.float(), down.float())


def test_arrays_on_another_device_are_refused(layer: Layer) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError, BufferError, NotImplementedError)):
        layer.engine.forward(**good() | {"hidden": torch.zeros(3, 64, dtype=bf16, device="meta")})


def test_lora_errors(layer: Layer) -> None:
    lora = make_lora(SHAPE, 4)
    for rank in (0, 5000):
        with pytest.raises(ValueError, match=f"rank: got {rank}, expected 1 to 4096"):
            _ext.LoraAdapter(4, 64, 32, rank, 1.0)
    empty = _ext.LoraAdapter(4, 64, 32, 4, 1.0)
    with pytest.raises(RuntimeError, match="^LoRA weights not initialized"):
        layer.engine.forward(**good(), lora=empty)
    other = Layer(Shape(4, 2, 70, 32), "bf16", ISAS[0]).adapter(make_lora(Shape(4, 2, 70, 32), 4))
    with pytest.raises(ValueError, match="lora shape: got 4 x 70 x 32, expected 4 x 64 x 32"):
        layer.engine.forward(**good(), lora=other)
    lora["up_b"] = lora["up_b"][:, :, :3]
    with pytest.raises(ValueError, match=r"\[LoraAdapter.update\] up_b shape: got \[4, 32, 3\], expected \[4, 32, 4\]"):
        layer.adapter(lora)
    assert empty.version == 0


def test_backward_errors(layer: Layer) -> None:
    lora = make_lora(SHAPE, 4)
    adapter, dy = layer.adapter(lora), torch.zeros(3, 64, dtype=bf16)
    x = make_inputs(SHAPE, 3)
    _, plain = layer.train(x)
    _, with_lora = layer.train(x, adapter)
    with pytest.raises(ValueError, match=r"grad_out shape: got \[2, 64\], expected \[3, 64\]"):
        layer.engine.backward(plain, dy[:2], None, None, None, None)
    with pytest.raises(TypeError, match="grad_out dtype: got fp32"):
        layer.engine.backward(plain, dy.float(), None, None, None, None)
    with pytest.raises(ValueError, match="lora: got an adapter, expected what the forward had"):
        layer.engine.backward(plain, dy, adapter, None, None, None)
    with pytest.raises(ValueError, match="lora: got none, expected what the forward had"):
        layer.engine.backward(with_lora, dy, None, None, None, None)
    with pytest.raises(ValueError, match="cache: got one of another layer"):
        Layer(SHAPE, "bf16", ISAS[0]).engine.backward(plain, dy, None, None, None, None)
    with pytest.raises(RuntimeError, match="^LoRA weights not initialized"):
        layer.engine.backward(plain, dy, None, None, None, [torch.zeros(1)] * 6)
    with pytest.raises(ValueError, match="lora_grads: got 5 arrays, expected 6"):
        layer.engine.backward(with_lora, dy, adapter, None, None, [torch.zeros(1)] * 5)
    with pytest.raises(ValueError, match="grad_in shape"):
        layer.engine.backward(plain, dy, None, torch.zeros(3, 63), None, None)
    with pytest.raises(TypeError, match="grad_weights dtype: got bf16, expected fp32"):
        layer.engine.backward(plain, dy, None, None, torch.zeros(3, 2, dtype=bf16), None)
