"""Every error text of the specification (section 6) and of the cache, word for word at the start of the message."""

import pytest
import torch
import torch_oracle as ref

SHAPE = ref.Shape()


def construct(**options):
    return ref.make(SHAPE, options.pop("table", "BF16"), **options)


def inference():
    return ref.loaded(SHAPE, "BF16")


def sft(lora=True, **options):
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT", **options)
    if lora:
        wrapper.init_lora_weights(*(t.detach() for t in ref.lora(SHAPE).tensors))
    return wrapper


def forward(wrapper, times=1):
    for _ in range(times):
        wrapper.forward_sft(*ref.batch(SHAPE, 2))
    return wrapper


GRAD = torch.ones(2, SHAPE.hidden, dtype=torch.bfloat16)

CASES = [
    ("unknown mode", ValueError, "Unknown mode: training", lambda: construct(mode="training")),
    ("mode before method", ValueError, "Unknown mode: None", lambda: construct(mode=None, method="nonsense")),
    (
        "sft method in inference",
        ValueError,
        "Method AMXBF16_SFT not supported in inference mode",
        lambda: construct(method="AMXBF16_SFT", mode="inference"),
    ),
    (
        "inference method in sft",
        ValueError,
        "Method AMXINT8 not supported in sft mode",
        lambda: construct(method="AMXINT8", mode="sft"),
    ),
    (
        "method that is not built, in the wrong mode",
        ValueError,
        "Method AMXINT4 not supported in sft mode",
        lambda: construct(method="AMXINT4", mode="sft"),
    ),
    (
        "unknown method",
        ValueError,
        "Method int8 not supported in inference mode",
        lambda: construct(method="int8", mode="inference"),
    ),
    (
        "forward before load",
        RuntimeError,
        "Weights not loaded",
        lambda: construct().forward(*ref.batch(SHAPE, 2)),
    ),
    (
        "submit before load",
        RuntimeError,
        "Weights not loaded",
        lambda: construct().submit_forward(*ref.batch(SHAPE, 2)),
    ),
    (
        "forward_sft before load",
        RuntimeError,
        "Weights not loaded",
        lambda: construct(table="AMXBF16_SFT").forward_sft(*ref.batch(SHAPE, 2)),
    ),
    (
        "backward before load",
        RuntimeError,
        "Weights not loaded",
        lambda: construct(table="AMXBF16_SFT").backward(GRAD),
    ),
    ("backward without LoRA", RuntimeError, "LoRA weights not initialized", lambda: sft(lora=False).backward(GRAD)),
    (
        "training forward without LoRA",
        RuntimeError,
        "LoRA weights not initialized",
        lambda: forward(sft(lora=False)),
    ),
    (
        "update without LoRA",
        RuntimeError,
        "LoRA weights not initialized",
        lambda: sft(lora=False).update_lora_weights(),
    ),
    ("index beyond the stack", RuntimeError, "Invalid cache index", lambda: forward(sft()).backward(GRAD, 1)),
    ("negative index", RuntimeError, "Invalid cache index", lambda: forward(sft()).backward(GRAD, -1)),
    ("index into an empty stack", RuntimeError, "Invalid cache index", lambda: sft().backward(GRAD, 0)),
    ("backward without forward", RuntimeError, "No forward cache available", lambda: sft().backward(GRAD)),
    ("cache full", RuntimeError, "Forward cache full", lambda: forward(sft(), 2)),
    ("deeper cache full", RuntimeError, "Forward cache full", lambda: forward(sft(max_cache_depth=3), 4)),
]


@pytest.mark.parametrize(("error", "text", "act"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_text(error, text, act) -> None:
    with pytest.raises(error) as caught:
        act()
    assert type(caught.value) is error
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    "name", ["forward_sft", "backward", "init_lora_weights", "update_lora_weights", "clear_forward_cache"]
)
@pytest.mark.parametrize("method", ref.INFERENCE)
def test_training_calls_in_inference_mode(method, name) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(ref.make(SHAPE, method), name)()
    assert str(caught.value).startswith(f"{name}() not available in inference mode")


@pytest.mark.parametrize("name", ["submit_forward", "sync_forward", "select_deferred_experts", "flush_deferred"])
@pytest.mark.parametrize("method", ref.SFT)
def test_inference_calls_in_sft_mode(method, name) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(ref.make(SHAPE, method), name)(1, 2, 3)
    assert str(caught.value).startswith(f"{name}() not available in SFT mode")


def test_state_survives_refused_calls() -> None:
    wrapper = forward(sft())
    for bad in (GRAD[:1], GRAD.float()):
        with pytest.raises((ValueError, TypeError)):
            wrapper.backward(bad)
    with pytest.raises(RuntimeError):
        wrapper.backward(GRAD, 7)
    wrapper.backward(GRAD)  # the forward still waits
