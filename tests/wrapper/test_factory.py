"""Signature, call styles and parameter checks of KTMoEWrapper."""

import inspect

import numpy as np
import pytest
import torch
import torch_oracle as ref

import ktmoe
from ktmoe import KTMoEWrapper
from ktmoe.methods import METHODS

SHAPE = ref.Shape()
POSITIONAL = """
    layer_idx num_experts num_experts_per_tok hidden_size moe_intermediate_size num_gpu_experts cpuinfer_threads
    threadpool_count weight_path chunked_prefill_size cpu_save max_deferred_experts_per_token method mode lora_rank
    lora_alpha max_cache_depth
"""


def test_signature_is_the_specified_one() -> None:
    parameters = list(inspect.signature(KTMoEWrapper.__new__).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL.split()
    defaults = {p.name: p.default for p in parameters}
    specified = {
        "cpu_save": False,
        "max_deferred_experts_per_token": None,
        "method": "AMXINT4",
        "mode": "inference",
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "max_cache_depth": 1,
    }
    assert {name: defaults[name] for name in specified} == specified
    keyword_only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keyword_only == {
        "gpu_experts_mask": None,
        "numa_nodes": None,
        "swiglu_limit": 0.0,
        "swiglu_alpha": 0.0,
        "group_size": 32,
        "zero_point": False,
        "gguf_type": "Q4_K",
        "activation": "silu",
        "check_finite": False,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "full_weight_grad": False,
    }


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda m: m.name)
def test_backend_class(row) -> None:
    wrapper = ref.make(SHAPE, row.name)
    assert type(wrapper).__name__ == row.backend
    assert type(wrapper) is getattr(ktmoe, row.backend)
    assert (wrapper.method, wrapper.mode, wrapper.layer.format) == (row.name, row.mode, row.format)
    assert not wrapper.loaded
    if not row.amx:
        assert "amx" not in wrapper.layer.isa


def test_moe_int8_honours_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("KTMOE_ISA", "portable")
    assert ref.make(SHAPE, "MOE_INT8").layer.isa == "portable"
    monkeypatch.setenv("KTMOE_ISA", "emulated-amx")
    assert "amx" not in ref.make(SHAPE, "MOE_INT8").layer.isa
    monkeypatch.setenv("KTMOE_ISA", "no such level")
    with pytest.raises(RuntimeError, match="no such level"):
        ref.make(SHAPE, "MOE_INT8")


def test_positional_call() -> None:
    wrapper = KTMoEWrapper(0, 8, 2, 64, 32, 3, 1, 1, "/weights", 100, False, None, "AMXINT8_SFT", "sft", 4, 6.0, 2)
    assert (wrapper.num_gpu_experts, wrapper.weight_path, wrapper.chunked_prefill_size) == (3, "/weights", 100)
    assert (wrapper.lora_rank, wrapper.lora_alpha, wrapper.lora_scaling, wrapper.max_cache_depth) == (4, 6.0, 1.5, 2)


def test_call_styles_of_servers() -> None:
    """One passes num_gpu_experts, the other a mask and options of its own; both by keyword."""
    common = {
        "layer_idx": 0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "cpuinfer_threads": 1,
        "threadpool_count": 1,
        "weight_path": "",
        "chunked_prefill_size": 64,
        "method": "AMXINT8",
        "max_deferred_experts_per_token": 0,
    }
    assert KTMoEWrapper(**common, num_gpu_experts=1).gpu_experts_mask.tolist() == [True, False, False, False]
    mask = torch.tensor([False, True, False, True])
    wrapper = KTMoEWrapper(**common, gpu_experts_mask=mask, numa_nodes=[0], swiglu_limit=0.0, swiglu_alpha=0.0)
    assert wrapper.gpu_experts_mask.tolist() == mask.tolist()
    assert wrapper.num_gpu_experts == 2


def test_short_call() -> None:
    wrapper = KTMoEWrapper(0, 4, 2, 64, 32, method="BF16")
    assert wrapper.num_gpu_experts == 0
    assert wrapper.cpu_infer.pool.threads >= 1


def test_the_mask_wins_and_is_shared() -> None:
    mask = torch.tensor([False, False, True, False, False])
    wrapper = ref.make(SHAPE, "BF16", num_gpu_experts=4, gpu_experts_mask=mask)
    assert wrapper.num_gpu_experts == 1
    mask.fill_(True)
    assert wrapper.gpu_experts_mask.tolist() == [True] * 5
    assert wrapper.num_gpu_experts == 5


def test_capture_batch_sizes() -> None:
    KTMoEWrapper.set_capture_batch_sizes([1, 2, 8])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 8]
    KTMoEWrapper.set_capture_batch_sizes([])
    assert KTMoEWrapper.get_capture_batch_sizes() == []
    KTMoEWrapper.clear_buffer_cache()


def test_made_under_another_default_device() -> None:
    with torch.device("meta"):
        wrapper = ref.make(SHAPE, "BF16", num_gpu_experts=1)
    assert wrapper.gpu_experts_mask.is_cpu
    assert wrapper.num_gpu_experts == 1


BAD = [
    ("layer_idx", -1, ValueError),
    ("group_size", 16, ValueError),
    ("group_size", "32", TypeError),
    ("gguf_type", "Q6_K", ValueError),
    ("gguf_type", None, ValueError),
    ("layer_idx", "0", TypeError),
    ("num_experts", 0, ValueError),
    ("num_experts", 65_537, ValueError),
    ("num_experts", True, TypeError),
    ("num_experts_per_tok", 0, ValueError),
    ("num_experts_per_tok", 6, ValueError),
    ("hidden_size", 0, ValueError),
    ("hidden_size", 65_537, ValueError),
    ("hidden_size", 64.0, TypeError),
    ("moe_intermediate_size", -4, ValueError),
    ("moe_intermediate_size", 65_537, ValueError),
    ("num_gpu_experts", -1, ValueError),
    ("num_gpu_experts", 6, ValueError),
    ("num_gpu_experts", None, TypeError),
    ("cpuinfer_threads", 0, ValueError),
    ("cpuinfer_threads", -3, ValueError),
    ("threadpool_count", 0, ValueError),
    ("chunked_prefill_size", 0, ValueError),
    ("chunked_prefill_size", 1.5, TypeError),
    ("weight_path", 7, TypeError),
    ("weight_path", None, TypeError),
    ("cpu_save", "yes", TypeError),
    ("check_finite", 1, TypeError),
    ("max_deferred_experts_per_token", -1, ValueError),
    ("max_deferred_experts_per_token", 1.5, TypeError),
    ("gpu_experts_mask", torch.zeros(4, dtype=torch.bool), ValueError),
    ("gpu_experts_mask", torch.zeros(5), TypeError),
    ("numa_nodes", [0, 0], ValueError),
    ("numa_nodes", [-1], ValueError),
    ("swiglu_limit", -7.0, ValueError),
    ("swiglu_alpha", -1.7, ValueError),
    ("activation", "gelu", ValueError),
    ("activation", None, TypeError),
    ("swiglu_limit", float("nan"), ValueError),
    ("swiglu_limit", "0", TypeError),
    ("zero_point", 1, TypeError),
]
BAD_SFT = [
    ("lora_rank", 0, ValueError),
    ("lora_rank", 4097, ValueError),
    ("lora_rank", 16.0, TypeError),
    ("lora_alpha", "32", TypeError),
    ("lora_alpha", float("inf"), ValueError),
    ("max_cache_depth", 0, ValueError),
    ("max_cache_depth", None, TypeError),
    ("lora_dropout", 1.0, ValueError),
    ("lora_dropout", -0.1, ValueError),
    ("lora_dropout", None, TypeError),
    ("use_rslora", 1, TypeError),
    ("full_weight_grad", "yes", TypeError),
]


@pytest.mark.parametrize(
    ("method", "name", "value", "error"),
    [("BF16", *case) for case in BAD] + [("AMXBF16_SFT", *case) for case in BAD_SFT],
    ids=lambda v: str(v)[:40] if not isinstance(v, type) else v.__name__,
)
def test_bad_parameter_is_named(method, name, value, error) -> None:
    with pytest.raises(error) as caught:
        ref.make(SHAPE, method, **{name: value})
    assert type(caught.value) is error
    assert str(caught.value).startswith(name)


def test_edges_are_accepted() -> None:
    assert ref.make(ref.Shape(experts=1, top_k=1, hidden=1, inter=1), "BF16").num_experts == 1
    assert ref.make(SHAPE, "BF16", num_gpu_experts=np.int64(5)).num_gpu_experts == 5
    assert ref.make(ref.Shape(rank=4096), "AMXBF16_SFT").lora_rank == 4096
    # Values of the other mode are not looked at.
    assert ref.make(SHAPE, "BF16", lora_rank=0).mode == "inference"
