"""Inference through the wrapper: numbers against the float64 oracle, and what callers may pass."""

import pytest
import torch
import torch_oracle as ref

SHAPE = ref.Shape()
FORWARD = [(m, isa) for m in (*ref.INFERENCE, *ref.SFT) for isa in ref.ISAS]


def run(wrapper, hidden, ids, weights):
    if wrapper.mode == "sft":
        return wrapper.forward(hidden, ids, weights, save_for_backward=False)
    return wrapper.forward(hidden, ids, weights)


@pytest.mark.parametrize("n_tokens", [1, 3, 17, 70])
@pytest.mark.parametrize(("method", "isa"), FORWARD)
def test_against_the_oracle(monkeypatch, method, isa, n_tokens) -> None:
    monkeypatch.setenv("KTMOE_ISA", isa)
    wrapper = ref.loaded(SHAPE, method)
    assert wrapper.loaded
    assert method.startswith("MOE_") or wrapper.layer.isa == isa
    hidden, ids, weights = ref.batch(SHAPE, n_tokens)
    out = run(wrapper, hidden, ids, weights)
    assert (out.dtype, out.shape) == (torch.bfloat16, hidden.shape)
    assert ref.row_error(out, ref.forward(wrapper, hidden, ids, weights)) <= ref.forward_tolerance(wrapper)


@pytest.mark.parametrize(
    "shape",
    [
        ref.Shape(experts=1, top_k=1, hidden=8, inter=8),
        ref.Shape(experts=3, top_k=3, hidden=33, inter=65),
        ref.Shape(experts=40, top_k=8, hidden=64, inter=16),
        ref.Shape(experts=2, top_k=1, hidden=130, inter=7),
    ],
    ids=lambda s: f"{s.experts}x{s.top_k}x{s.hidden}x{s.inter}",
)
@pytest.mark.parametrize("method", ref.INFERENCE)
def test_ragged_shapes(method, shape) -> None:
    wrapper = ref.loaded(shape, method)
    hidden, ids, weights = ref.batch(shape, 6)
    out = wrapper.forward(hidden, ids, weights)
    assert ref.row_error(out, ref.forward(wrapper, hidden, ids, weights)) <= ref.forward_tolerance(wrapper)


def test_formats_keep_the_weights() -> None:
    """bf16 is exact; int8 rounds to 1/127 of the largest of a row, so it is at most half of that away."""
    gate, _, down = ref.weights(SHAPE)
    got_gate, _, got_down = ref.dequantized(ref.loaded(SHAPE, "BF16"))
    assert torch.equal(got_gate, gate.double())
    assert torch.equal(got_down, down.double())
    got, _, _ = ref.dequantized(ref.loaded(SHAPE, "AMXINT8"))
    step = gate.double().abs().amax(-1, keepdim=True) / 127
    assert ((got - gate.double()).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("method", ref.INFERENCE)
def test_the_loop_of_the_specification(method, tmp_path) -> None:
    import ktmoe

    wrapper = ktmoe.KTMoEWrapper(
        layer_idx=0,
        num_experts=SHAPE.experts,
        num_experts_per_tok=SHAPE.top_k,
        hidden_size=SHAPE.hidden,
        moe_intermediate_size=SHAPE.inter,
        num_gpu_experts=0,
        cpuinfer_threads=60,
        threadpool_count=4,
        weight_path=str(tmp_path),
        chunked_prefill_size=25600,
        method=method,
        mode="inference",
    )
    physical_map = torch.arange(SHAPE.experts, dtype=torch.int64)
    wrapper.load_weights_from_tensors(*ref.weights(SHAPE), physical_map)
    hidden = torch.randn(1, SHAPE.hidden, dtype=torch.bfloat16)
    ids = torch.randint(0, SHAPE.experts, (1, SHAPE.top_k))
    weights = torch.rand(1, SHAPE.top_k, dtype=torch.float32)
    out = wrapper.forward(hidden, ids, weights, None)
    assert ref.row_error(out, ref.forward(wrapper, hidden, ids, weights)) <= ref.forward_tolerance(wrapper)
    assert not any(tmp_path.iterdir())


@pytest.fixture(params=ref.INFERENCE)
def wrapper(request):
    return ref.loaded(SHAPE, request.param)


def test_absent_slots_contribute_nothing(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 6)
    ids[0, 1], ids[1, 0], ids[2] = -1, SHAPE.experts, -1
    out = wrapper.forward(hidden, ids, weights)
    assert (out[2] == 0).all()
    kept = [0, 1, 3, 4, 5]
    assert ref.row_error(out[kept], ref.forward(wrapper, hidden, ids, weights)[kept]) <= ref.forward_tolerance(wrapper)


def test_all_slots_absent(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 3)
    assert (wrapper.forward(hidden, torch.full_like(ids, -1), weights) == 0).all()


@pytest.mark.parametrize("bad", [-2, SHAPE.experts + 1, 2**31 - 1])
def test_other_ids_are_refused_by_position_and_value(wrapper, bad) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 4)
    ids[2, 1] = bad
    with pytest.raises(ValueError, match=rf"2.*1.*{bad}"):
        wrapper.forward(hidden, ids, weights)
    ids[2, 1] = -1
    wrapper.forward(hidden, ids, weights)


def test_duplicate_ids_add(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 4)
    ids[:, 1] = ids[:, 0]
    out = wrapper.forward(hidden, ids, weights)
    assert ref.row_error(out, ref.forward(wrapper, hidden, ids, weights)) <= ref.forward_tolerance(wrapper)


def test_dtypes_of_ids_and_weights(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 5)
    weights = weights.bfloat16()
    out = wrapper.forward(hidden, ids, weights)
    assert torch.equal(out, wrapper.forward(hidden, ids.int(), weights))
    assert torch.equal(out, wrapper.forward(hidden, ids, weights.float()))


def test_zero_tokens(wrapper) -> None:
    out = wrapper.forward(*ref.batch(SHAPE, 0))
    assert (out.shape, out.dtype) == ((0, SHAPE.hidden), torch.bfloat16)
    wrapper.submit_forward(*ref.batch(SHAPE, 0))
    assert wrapper.sync_forward(None).shape == (0, SHAPE.hidden)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(wrapper, poison) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 20)
    clean = wrapper.forward(hidden, ids, weights)
    hidden[7, 5] = poison
    out = wrapper.forward(hidden, ids, weights)
    others = [i for i in range(20) if i != 7]
    assert torch.equal(out[others], clean[others])
    assert out[7].isnan().all()


def test_leading_dimensions(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 6)
    want = wrapper.forward(hidden, ids, weights)
    out = wrapper.forward(hidden.view(2, 3, -1), ids.view(2, 3, -1), weights.view(2, 3, -1))
    assert torch.equal(out, want.view(2, 3, -1))
    assert torch.equal(wrapper.forward(hidden.view(2, 3, -1), ids, weights), want.view(2, 3, -1))


def test_strided_inputs(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 6)
    want = wrapper.forward(hidden, ids, weights)
    wide = torch.zeros(6, 2 * SHAPE.hidden, dtype=torch.bfloat16)
    wide[:, 5 : 5 + SHAPE.hidden] = hidden
    out = wrapper.forward(wide[:, 5 : 5 + SHAPE.hidden], ids.t().contiguous().t(), weights.t().contiguous().t())
    assert torch.equal(out, want)
    assert out.is_contiguous()
    assert torch.equal(wrapper.forward(hidden.t().contiguous().t(), ids, weights), want)
    one = wrapper.forward(hidden[:1].expand(6, -1), ids, weights)
    assert torch.equal(one, wrapper.forward(hidden[:1].repeat(6, 1), ids, weights))


def test_inputs_are_not_changed_and_carry_no_graph(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 5)
    copies = hidden.clone(), ids.clone(), weights.clone()
    out = wrapper.forward(hidden.requires_grad_(), ids, weights.requires_grad_())
    assert not out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((hidden, ids, weights), copies, strict=True))


def test_chunks(wrapper) -> None:
    """More tokens than chunked_prefill_size give what the chunks give one by one."""
    small = ref.loaded(SHAPE, wrapper.method, chunked_prefill_size=8)
    hidden, ids, weights = ref.batch(SHAPE, 21)
    parts = [small.forward(*(t[i : i + 8] for t in (hidden, ids, weights))) for i in range(0, 21, 8)]
    assert torch.equal(small.forward(hidden, ids, weights), torch.cat(parts))


HIDDEN, IDS, WEIGHTS = ref.batch(SHAPE, 4)


@pytest.mark.parametrize("call", ["forward", "submit_forward"])
@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("hidden_states", (HIDDEN.float(), IDS, WEIGHTS), TypeError),
        ("hidden_states", (HIDDEN.half(), IDS, WEIGHTS), TypeError),
        ("hidden_states", ([1.0], IDS, WEIGHTS), TypeError),
        ("hidden_states", (HIDDEN.to("meta"), IDS, WEIGHTS), TypeError),
        ("hidden_states", (HIDDEN[:, :-1], IDS, WEIGHTS), ValueError),
        ("hidden_states", (HIDDEN[0], IDS[0], WEIGHTS[0]), ValueError),
        ("topk_ids", (HIDDEN, IDS.float(), WEIGHTS), TypeError),
        ("topk_ids", (HIDDEN, IDS.short(), WEIGHTS), TypeError),
        ("topk_ids", (HIDDEN, None, WEIGHTS), TypeError),
        ("topk_ids", (HIDDEN, IDS[:3], WEIGHTS), ValueError),
        ("topk_ids", (HIDDEN, IDS[:, :1], WEIGHTS), ValueError),
        ("topk_weights", (HIDDEN, IDS, WEIGHTS.double()), TypeError),
        ("topk_weights", (HIDDEN, IDS, WEIGHTS.half()), TypeError),
        ("topk_weights", (HIDDEN, IDS, WEIGHTS[:, :1]), ValueError),
        ("topk_weights", (HIDDEN, IDS, WEIGHTS.to("meta")), TypeError),
    ],
)
def test_bad_inputs_are_named(wrapper, call, name, arguments, error) -> None:
    with pytest.raises(error, match=f"^{name}: got .*expected") as caught:
        getattr(wrapper, call)(*arguments)
    assert type(caught.value) is error
    wrapper.forward(HIDDEN, IDS, WEIGHTS)


def test_equal_for_any_thread_count() -> None:
    """Bitwise, and whatever the number of sub-threads that a pool has."""
    from ktmoe import _ext
    from ktmoe.capsule import to_dlpack

    gate, up, down = ref.weights(SHAPE)
    hidden, ids, weights = ref.batch(SHAPE, 33)
    results = []
    for threads in (1, 2, 3, 5):
        layer = _ext.MoeLayer(
            _ext.ThreadPool([threads], [0]), SHAPE.experts, SHAPE.top_k, SHAPE.hidden, SHAPE.inter, "int8"
        )
        for e in range(SHAPE.experts):
            layer.load_expert(e, *(to_dlpack(t[e]) for t in (gate, up, down)))
        out = torch.empty_like(hidden)
        layer.forward(*(to_dlpack(t) for t in (hidden, ids, weights, out)))
        results.append(out)
    assert all(torch.equal(results[0], r) for r in results[1:])
    assert torch.equal(results[0], ref.loaded(SHAPE, "AMXINT8").forward(hidden, ids, weights))
