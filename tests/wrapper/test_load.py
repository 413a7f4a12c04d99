"""Loading from tensors: slots, maps, GPU experts, failures. Files are in tests/io."""

import pytest
import torch
import torch_oracle as ref

SHAPE = ref.Shape()
METHODS = [*ref.INFERENCE, *ref.SFT]


def out(wrapper):
    call = wrapper.forward(*ref.batch(SHAPE, 5), *([False] if wrapper.mode == "sft" else []))
    assert isinstance(call, torch.Tensor)
    return call


@pytest.mark.parametrize("method", METHODS)
def test_map_puts_logical_experts_into_slots(method) -> None:
    gate, up, down = ref.weights(SHAPE)
    mapping = torch.tensor([3, 0, 0, 4, 1])
    mapped = ref.make(SHAPE, method)
    mapped.load_weights_from_tensors(gate, up, down, mapping)
    direct = ref.make(SHAPE, method)
    direct.load_weights_from_tensors(gate[mapping], up[mapping], down[mapping])
    assert torch.equal(out(mapped), out(direct))
    assert not torch.equal(out(mapped), out(ref.loaded(SHAPE, method)))


def test_map_with_fewer_and_with_more_logical_experts() -> None:
    gate, up, down = ref.weights(SHAPE)
    few = ref.make(SHAPE, "BF16")
    few.load_weights_from_tensors(gate[:2], up[:2], down[:2], torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32))
    direct = ref.make(SHAPE, "BF16")
    order = [0, 1, 0, 1, 1]
    direct.load_weights_from_tensors(gate[order], up[order], down[order])
    assert torch.equal(out(few), out(direct))


@pytest.mark.parametrize(
    ("mapping", "error", "text"),
    [
        (torch.tensor([0, 1, 2, 3]), ValueError, r"physical_to_logical_map: got shape \(4,\)"),
        (torch.tensor([0, 1, 2, 3, 5]), ValueError, r"physical_to_logical_map\[4\]: got 5, expected 0..4"),
        (torch.tensor([0, -1, 2, 3, 4]), ValueError, r"physical_to_logical_map\[1\]: got -1"),
        (torch.arange(5.0), TypeError, "physical_to_logical_map: got dtype torch.float32"),
        (torch.ones(5, dtype=torch.bool), TypeError, "physical_to_logical_map: got dtype torch.bool"),
    ],
)
def test_bad_map_changes_nothing(mapping, error, text) -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    before = out(wrapper)
    with pytest.raises(error, match=f"^{text}"):
        wrapper.load_weights_from_tensors(*ref.weights(SHAPE, 1), mapping)
    assert torch.equal(out(wrapper), before)


GATE, UP, DOWN = ref.weights(SHAPE)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("gate", (GATE.float(), UP, DOWN), TypeError),
        ("up", (GATE, UP.half(), DOWN), TypeError),
        ("down", (GATE, UP, DOWN.to("meta")), TypeError),
        ("down", (GATE, UP, None), TypeError),
        ("gate", (None, UP, DOWN), TypeError),
        ("gate", (GATE[:4], UP, DOWN), ValueError),
        ("up", (GATE, UP.transpose(1, 2), DOWN), ValueError),
        ("down", (GATE, UP, DOWN.transpose(1, 2)), ValueError),
        ("gate", (GATE[0], UP, DOWN), ValueError),
    ],
)
@pytest.mark.parametrize("mapping", [None, torch.arange(5)], ids=["identity", "map"])
def test_bad_tensor_is_named_and_changes_nothing(name, arguments, error, mapping) -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    before = out(wrapper)
    if mapping is not None and isinstance(arguments[0], torch.Tensor) and arguments[0].shape[:1] == (4,):
        name = "up"  # with a map the number of experts is taken from gate
    with pytest.raises(error, match=f"^{name}: got"):
        wrapper.load_weights_from_tensors(*arguments, mapping)
    assert torch.equal(out(wrapper), before)


@pytest.mark.parametrize("method", METHODS)
def test_strided_and_tracked_weights(method) -> None:
    fused = torch.cat([GATE, UP], 1).requires_grad_()
    wrapper = ref.make(SHAPE, method)
    turned = DOWN.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned[0].is_contiguous()
    wrapper.load_weights_from_tensors(fused[:, : SHAPE.inter], fused[:, SHAPE.inter :], turned)
    assert torch.equal(out(wrapper), out(ref.loaded(SHAPE, method)))


@pytest.mark.parametrize("method", METHODS)
def test_streaming(method) -> None:
    wrapper = ref.make(SHAPE, method)
    for e in reversed(range(SHAPE.experts)):
        assert not wrapper.loaded
        wrapper.load_expert(e, GATE[e], UP[e], DOWN[e])
    assert wrapper.loaded
    assert torch.equal(out(wrapper), out(ref.loaded(SHAPE, method)))
    wrapper.load_expert(0, GATE[1], UP[1], DOWN[1])  # replaces
    assert torch.equal(ref.dequantized(wrapper)[0][0], ref.dequantized(wrapper)[0][1])
    with pytest.raises(ValueError, match=r"expert"):
        wrapper.load_expert(SHAPE.experts, GATE[0], UP[0], DOWN[0])
    with pytest.raises(ValueError, match=r"^gate: got shape"):
        wrapper.load_expert(0, GATE, UP[0], DOWN[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"num_gpu_experts": 2}, {"gpu_experts_mask": [False, True, False, False, True]}])
def test_gpu_experts_get_no_memory_and_contribute_nothing(method, options) -> None:
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    wrapper = ref.loaded(SHAPE, method, **options)
    assert wrapper.loaded
    assert wrapper.layer.packed_bytes < ref.loaded(SHAPE, method).layer.packed_bytes * 0.7
    hidden, ids, weights = ref.batch(SHAPE, 9)
    got = wrapper.forward(hidden, ids, weights, *([False] if wrapper.mode == "sft" else []))
    want = ref.forward(wrapper, hidden, ids, weights)
    assert (want.norm(dim=1) > 0).any()
    assert ((want.norm(dim=1) > 0) == (got.float().norm(dim=1) > 0)).all()
    assert ref.relative(got, want) <= ref.forward_tolerance(wrapper)
    on_gpu = int(wrapper.gpu_experts_mask.nonzero()[0])
    with pytest.raises(ValueError, match=r"(?i)gpu"):
        wrapper.load_expert(on_gpu, GATE[0], UP[0], DOWN[0])


def test_all_experts_on_the_gpu() -> None:
    wrapper = ref.make(SHAPE, "BF16", num_gpu_experts=SHAPE.experts)
    assert wrapper.loaded
    assert (out(wrapper) == 0).all()


@pytest.mark.parametrize("interruption", [MemoryError, KeyboardInterrupt])
def test_a_load_that_breaks_off_leaves_nothing(monkeypatch, interruption) -> None:
    wrapper = ref.loaded(SHAPE, "BF16")
    original = type(wrapper).put_expert

    def load_expert(self, expert, *tensors):
        if expert == 3:
            raise interruption
        original(self, expert, *tensors)

    monkeypatch.setattr(type(wrapper), "put_expert", load_expert)
    with pytest.raises(interruption):
        wrapper.load_weights_from_tensors(*ref.weights(SHAPE, 1))
    assert not wrapper.loaded
    assert wrapper.layer.packed_bytes == ref.make(SHAPE, "BF16").layer.packed_bytes  # nothing of it is kept
    with pytest.raises(RuntimeError, match="^Weights not loaded"):
        out(wrapper)
    monkeypatch.undo()
    wrapper.load_weights_from_tensors(GATE, UP, DOWN)
    assert torch.equal(out(wrapper), out(ref.loaded(SHAPE, "BF16")))


def test_sources_are_not_needed_afterwards() -> None:
    gate, up, down = (t.clone() for t in ref.weights(SHAPE))
    wrapper = ref.make(SHAPE, "BF16")
    wrapper.load_weights_from_tensors(gate, up, down)
    before = out(wrapper)
    for t in (gate, up, down):
        t.zero_()
    assert torch.equal(out(wrapper), before)
    assert "loaded=True" in repr(wrapper)
