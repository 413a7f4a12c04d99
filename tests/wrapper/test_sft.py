"""Training through the stateful API: the loop of the specification, the stack of forwards, renewal of LoRA weights."""

import threading

import pytest
import torch
import torch.utils.checkpoint
import torch_oracle as ref
from torch_oracle import in_child

from ktmoe.autograd import moe_forward
from ktmoe.lora import LORA_NAMES, lora_shapes
from ktmoe.sft import GRAD_NAMES

SHAPE = ref.Shape()
GRADS = [(m, isa) for m in ref.SFT for isa in ref.ISAS]


def adapter(seed=0, dtype=torch.float32):
    """LoRA tensors of the stateful API: plain tensors."""
    return [t.detach().clone() for t in ref.lora(SHAPE, dtype, seed).tensors]


def tuned(method="AMXBF16_SFT", tensors=None, **options):
    wrapper = ref.loaded(SHAPE, method, lora_alpha=0.75 * SHAPE.rank, **options)
    wrapper.init_lora_weights(*(adapter() if tensors is None else tensors))
    return wrapper


def grad(n_tokens, seed=0):
    return torch.randn(n_tokens, SHAPE.hidden, generator=torch.Generator().manual_seed(3000 + seed)).bfloat16()


def oracle(wrapper, tensors, hidden, ids, weights, grad_out):
    """Output and gradients of float64 autograd: hidden, weights, six LoRA tensors."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weights, *tensors)]
    lora = ref.LoraTensors(*leaves[2:], scaling=0.75, rank=SHAPE.rank)
    out = ref.forward(wrapper, leaves[0], ids, leaves[1], lora, for_gradients=True)
    gradients = torch.autograd.grad(out, leaves, grad_out.double())
    return ref.forward(wrapper, hidden, ids, weights, lora).detach(), gradients


@pytest.mark.parametrize("n_tokens", [1, 19])
@pytest.mark.parametrize(("method", "isa"), GRADS)
def test_against_float64_autograd(monkeypatch, method, isa, n_tokens) -> None:
    monkeypatch.setenv("KTMOE_ISA", isa)
    tensors = adapter()
    wrapper = tuned(method, tensors)
    inputs = ref.batch(SHAPE, n_tokens)
    out = wrapper.forward_sft(*inputs)
    grad_input, grad_loras = wrapper.backward(grad(n_tokens))
    want_out, want = oracle(wrapper, tensors, *inputs, grad(n_tokens))
    assert ref.row_error(out, want_out) <= ref.forward_tolerance(wrapper)
    assert isinstance(grad_loras, dict)
    assert tuple(grad_loras) == GRAD_NAMES == tuple(f"grad_{n}" for n in LORA_NAMES)
    assert (grad_input.dtype, grad_input.shape) == (torch.bfloat16, inputs[0].shape)
    got = [grad_input, grad_loras.grad_topk_weights, *grad_loras.values()]
    tolerance = ref.gradient_tolerance(wrapper)
    for name, g, w in zip(("hidden", "weights", *GRAD_NAMES), got, want, strict=True):
        assert g.shape == w.shape, name
        assert name == "hidden" or g.dtype is torch.float32, name
        assert ref.relative(g, w) <= tolerance, name
        assert ref.cosine(g, w) >= 0.9999, name


@pytest.mark.parametrize("method", ref.SFT)
def test_the_loop_of_the_specification(method) -> None:
    """Training with the wrapper's gradients lowers the loss as float64 training does."""
    tensors = adapter()
    for b in (1, 3, 5):
        tensors[b].zero_()  # LoRA starts as the base model
    wrapper = tuned(method, tensors)
    inputs = ref.batch(SHAPE, 24)
    target = ref.forward(ref.loaded(SHAPE, method, seed=9), *inputs)
    params = [torch.nn.Parameter(t) for t in tensors]  # share memory with what the wrapper was given
    assert all(p.data_ptr() == t.data_ptr() for p, t in zip(params, tensors, strict=True))
    optimizer = torch.optim.AdamW(params, lr=2e-2)
    losses = []
    for _ in range(25):
        output = wrapper.forward_sft(*inputs, save_for_backward=True)
        losses.append(float((output - target).pow(2).mean()))
        grad_input, grad_loras = wrapper.backward((2 * (output - target) / output.numel()).bfloat16())
        assert grad_input.shape == inputs[0].shape
        for p, g in zip(params, grad_loras.values(), strict=True):
            p.grad = g
        optimizer.step()
        wrapper.update_lora_weights()
    assert losses[-1] < 0.5 * losses[0]


def test_zero_b_is_the_base_and_gives_a_no_gradient() -> None:
    tensors = adapter()
    for b in (1, 3, 5):
        tensors[b].zero_()
    wrapper = tuned(tensors=tensors)
    inputs = ref.batch(SHAPE, 6)
    assert torch.equal(wrapper.forward_sft(*inputs), ref.loaded(SHAPE, "BF16").forward(*inputs))
    _, grads = wrapper.backward(grad(6))
    for name in ("gate", "up", "down"):
        assert (grads[f"grad_{name}_lora_a"] == 0).all()
        assert (grads[f"grad_{name}_lora_b"] != 0).any()


def test_saving_changes_nothing_and_the_alias_is_the_method() -> None:
    wrapper = tuned(max_cache_depth=2)
    inputs = ref.batch(SHAPE, 6)
    saved = wrapper.forward_sft(*inputs)
    assert torch.equal(saved, wrapper.forward_sft(*inputs, save_for_backward=False))
    assert torch.equal(saved, wrapper.forward(*inputs))
    with pytest.raises(TypeError, match="save_for_backward: got None"):
        wrapper.forward(*inputs, None)  # a caller that means cuda_stream must not silently lose its cache


def test_base_only_without_lora() -> None:
    inputs = ref.batch(SHAPE, 6)
    base = ref.loaded(SHAPE, "AMXBF16_SFT").forward_sft(*inputs, save_for_backward=False)
    assert torch.equal(base, ref.loaded(SHAPE, "BF16").forward(*inputs))


# --- the stack -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_last_in_first_out(depth) -> None:
    wrapper, single = tuned(max_cache_depth=depth), tuned()
    batches = [ref.batch(SHAPE, 3 + n, seed=n) for n in range(depth)]
    for b in batches:
        wrapper.forward_sft(*b)
    for n in reversed(range(depth)):
        got, got_loras = wrapper.backward(grad(3 + n))
        single.forward_sft(*batches[n])
        want, want_loras = single.backward(grad(3 + n))
        assert torch.equal(got, want)
        assert torch.equal(got_loras.grad_topk_weights, want_loras.grad_topk_weights)
        assert all(torch.equal(got_loras[k], want_loras[k]) for k in GRAD_NAMES)
    with pytest.raises(RuntimeError, match="^No forward cache available"):
        wrapper.backward(grad(3))


def test_index_picks_a_forward_and_removes_it() -> None:
    wrapper, single = tuned(max_cache_depth=3), tuned()
    batches = [ref.batch(SHAPE, 4, seed=n) for n in range(3)]
    for b in batches:
        wrapper.forward_sft(*b)
    for index, batch in ((1, 1), (0, 0), (None, 2)):
        got, _ = wrapper.backward(grad(4), index)
        single.forward_sft(*batches[batch])
        assert torch.equal(got, single.backward(grad(4))[0])


def test_clear_forward_cache() -> None:
    wrapper = tuned()
    wrapper.forward_sft(*ref.batch(SHAPE, 2))
    wrapper.clear_forward_cache()
    wrapper.forward_sft(*ref.batch(SHAPE, 3))
    assert wrapper.backward(grad(3))[0].shape == (3, SHAPE.hidden)


def test_leading_dimensions_and_strided_gradient() -> None:
    wrapper = tuned(max_cache_depth=2)
    hidden, ids, weights = ref.batch(SHAPE, 6)
    out = wrapper.forward_sft(hidden.view(2, 3, -1), ids.view(2, 3, -1), weights.view(2, 3, -1))
    assert torch.equal(out.view(6, -1), wrapper.forward_sft(hidden, ids, weights))
    flat, flat_loras = wrapper.backward(grad(6))
    strided = grad(6).view(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1)
    deep, deep_loras = wrapper.backward(strided)
    assert torch.equal(deep.view(6, -1), flat)
    assert deep_loras.grad_topk_weights.shape == (2, 3, SHAPE.top_k)
    assert torch.equal(deep_loras.grad_topk_weights.view(6, -1), flat_loras.grad_topk_weights)


def test_absent_slots_and_zero_tokens() -> None:
    wrapper = tuned()
    hidden, ids, weights = ref.batch(SHAPE, 3)
    ids[0, 1], ids[1] = -1, SHAPE.experts
    wrapper.forward_sft(hidden, ids, weights)
    grad_input, grads = wrapper.backward(grad(3))
    assert (grad_input[1] == 0).all()
    assert (grads.grad_topk_weights[1] == 0).all()
    assert grads.grad_topk_weights[0, 1] == 0
    assert (grad_input[2] != 0).any()
    out = wrapper.forward_sft(*ref.batch(SHAPE, 0))
    assert out.shape == (0, SHAPE.hidden)
    grad_input, grads = wrapper.backward(grad(0))
    assert grad_input.shape == (0, SHAPE.hidden)
    assert all((g == 0).all() for g in grads.values())


def test_micro_batches_add_up() -> None:
    wrapper = tuned(max_cache_depth=2)
    hidden, ids, weights = ref.batch(SHAPE, 20)
    wrapper.forward_sft(hidden, ids, weights)
    _, whole = wrapper.backward(grad(20))
    parts = []
    for half in (slice(0, 9), slice(9, 20)):
        wrapper.forward_sft(hidden[half], ids[half], weights[half])
        parts.append(wrapper.backward(grad(20)[half])[1])
    for name in GRAD_NAMES:
        assert ref.relative(parts[0][name] + parts[1][name], whole[name]) <= 1e-5


# --- LoRA weights ---------------------------------------------------------------------------------------------------
def expected(tensors, inputs):
    return tuned(tensors=[t.detach().clone() for t in tensors]).forward_sft(*inputs)


def in_place(tensors):
    with torch.no_grad():
        tensors[1].mul_(2)


def optimizer_step(fused):
    def step(tensors):
        params = [torch.nn.Parameter(t) for t in tensors]
        for p in params:
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(params, lr=0.1, fused=fused).step()

    return step


@pytest.mark.parametrize(
    "change", [in_place, optimizer_step(False), optimizer_step(True)], ids=["in_place", "step", "fused_step"]
)
def test_changes_are_noticed_by_the_next_forward(change) -> None:
    """Also those of fused optimizers, which do not raise Tensor._version."""
    tensors = adapter()
    wrapper = tuned(tensors=tensors, max_cache_depth=9)
    inputs = ref.batch(SHAPE, 5)
    before = wrapper.forward_sft(*inputs)
    packs = wrapper._own_mirror.packs
    wrapper.forward_sft(*inputs)
    assert wrapper._own_mirror.packs == packs  # nothing changed, nothing packed
    change(tensors)
    after = wrapper.forward_sft(*inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected(tensors, inputs))


def test_update_sees_what_torch_does_not() -> None:
    tensors = adapter()
    wrapper = tuned(tensors=tensors, max_cache_depth=9)
    inputs = ref.batch(SHAPE, 5)
    wrapper.forward_sft(*inputs)
    tensors[1].numpy()[:] *= 3
    wrapper.update_lora_weights()
    assert torch.equal(wrapper.forward_sft(*inputs), expected(tensors, inputs))


@pytest.mark.parametrize("explicit", [False, True])
def test_a_backward_uses_the_values_of_its_forward(explicit) -> None:
    tensors = adapter()
    wrapper, untouched = tuned(tensors=tensors, max_cache_depth=2), tuned()
    inputs = ref.batch(SHAPE, 5)
    wrapper.forward_sft(*inputs)
    in_place(tensors)
    if explicit:
        wrapper.update_lora_weights()
    wrapper.forward_sft(*inputs)  # packs the new values while the old ones are still needed
    new, _ = wrapper.backward(grad(5))
    old, _ = wrapper.backward(grad(5))
    untouched.forward_sft(*inputs)
    want, _ = untouched.backward(grad(5))
    assert torch.equal(old, want)
    assert not torch.equal(new, old)


def test_one_packed_copy_suffices_for_a_training_loop() -> None:
    tensors = adapter()
    wrapper = tuned(tensors=tensors)
    inputs = ref.batch(SHAPE, 5)
    first = wrapper._own_mirror._current[""].adapter
    for _ in range(3):
        wrapper.forward_sft(*inputs)
        wrapper.backward(grad(5))
        in_place(tensors)
    wrapper.forward_sft(*inputs)
    assert wrapper._own_mirror._current[""].adapter is first
    assert wrapper._own_mirror.packs == 4


def test_init_replaces_and_bf16_is_accepted() -> None:
    wrapper = tuned(max_cache_depth=9)
    inputs = ref.batch(SHAPE, 5)
    wrapper.forward_sft(*inputs)
    other = adapter(seed=1, dtype=torch.bfloat16)
    wrapper.init_lora_weights(*other)
    assert torch.equal(wrapper.forward_sft(*inputs), expected(other, inputs))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in other]
    wrapper.init_lora_weights(*strided)
    assert torch.equal(wrapper.forward_sft(*inputs), expected(other, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_buffers(dtype) -> None:
    shapes = lora_shapes(SHAPE.experts, SHAPE.hidden, SHAPE.inter, SHAPE.rank)
    buffers = [torch.full(s, 7.0, dtype=dtype) for s in shapes]
    wrapper, plain = tuned(), tuned()
    wrapper.init_lora_weights(*adapter(), *buffers)
    inputs = ref.batch(SHAPE, 5)
    wrapper.forward_sft(*inputs)
    plain.forward_sft(*inputs)
    _, got = wrapper.backward(grad(5))
    _, want = plain.backward(grad(5))
    for buffer, name in zip(buffers, GRAD_NAMES, strict=True):
        assert got[name].dtype is torch.float32
        assert torch.equal(got[name], want[name])
        assert torch.equal(buffer, want[name].to(dtype))


@pytest.mark.parametrize(
    ("index", "value", "error", "text"),
    [
        (0, torch.zeros(SHAPE.experts, SHAPE.rank + 1, SHAPE.hidden), ValueError, "gate_lora_a: got shape"),
        (1, torch.zeros(SHAPE.experts, SHAPE.rank, SHAPE.inter), ValueError, "gate_lora_b: got shape"),
        (2, torch.zeros(SHAPE.rank, SHAPE.hidden), ValueError, "up_lora_a: got shape"),
        (3, torch.zeros(SHAPE.experts, SHAPE.inter, SHAPE.rank).half(), TypeError, "up_lora_b: got dtype"),
        (
            4,
            torch.zeros(SHAPE.experts, SHAPE.rank, SHAPE.inter, device="meta"),
            TypeError,
            "down_lora_a: got a tensor without values",
        ),
        (5, None, TypeError, "down_lora_b: got NoneType"),
    ],
)
def test_bad_lora_tensor_is_named_and_changes_nothing(index, value, error, text) -> None:
    wrapper = tuned(max_cache_depth=3)
    inputs = ref.batch(SHAPE, 3)
    before = wrapper.forward_sft(*inputs)
    tensors = adapter(seed=5)
    tensors[index] = value
    with pytest.raises(error, match=f"^{text}"):
        wrapper.init_lora_weights(*tensors)
    assert torch.equal(wrapper.forward_sft(*inputs), before)
    with pytest.raises(ValueError, match="^grad buffers: got 1, expected all six or none"):
        wrapper.init_lora_weights(*adapter(), torch.zeros(1))
    with pytest.raises(ValueError, match="^grad_gate_lora_a: got shape"):
        wrapper.init_lora_weights(*adapter(), *[torch.zeros(1)] * 6)


def test_two_threads_at_once_are_refused() -> None:
    wrapper = tuned(max_cache_depth=10_000)
    inputs = ref.batch(SHAPE, 200)
    seen: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            try:
                wrapper.forward_sft(*inputs, save_for_backward=False)
            except RuntimeError as error:
                seen.append(error)
                done.set()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    done.wait(20)
    done.set()
    for t in threads:
        t.join()
    assert seen
    assert "in use by another thread" in str(seen[0])
    wrapper.forward_sft(*inputs, save_for_backward=False)


def test_fork_while_another_thread_trains() -> None:
    wrapper = tuned()
    inputs = ref.batch(SHAPE, 100)
    want = wrapper.forward_sft(*inputs, save_for_backward=False)
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            wrapper.forward_sft(*inputs, save_for_backward=False)

    def child() -> None:
        assert torch.equal(wrapper.forward_sft(*inputs), want)
        wrapper.backward(grad(100))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert [in_child(child) for _ in range(5)] == [0] * 5
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (grad(4).float(), TypeError),
        (grad(4).to("meta"), TypeError),
        (None, TypeError),
        (grad(3), ValueError),
        (grad(4).view(2, 2, -1), ValueError),
    ],
)
def test_bad_gradient_is_named(value, error) -> None:
    wrapper = tuned()
    wrapper.forward_sft(*ref.batch(SHAPE, 4))
    with pytest.raises(error, match="^grad_output: got"):
        wrapper.backward(value)
    wrapper.backward(grad(4))


# --- dropout -------------------------------------------------------------------------------------------------------
def test_dropout_follows_torchs_generator_and_stops_in_eval() -> None:
    plain, wrapper = tuned(), tuned(lora_dropout=0.4)
    inputs = ref.batch(SHAPE, 7)
    want = plain.forward_sft(*inputs, save_for_backward=False)
    torch.manual_seed(3)
    first, second = (wrapper.forward_sft(*inputs, save_for_backward=False) for _ in range(2))
    assert (first != want).any()
    assert (first != second).any()
    torch.manual_seed(3)
    assert torch.equal(wrapper.forward_sft(*inputs), first), "a forward that saves drops the same elements"
    assert wrapper.eval() is wrapper
    assert torch.equal(wrapper.forward_sft(*inputs, save_for_backward=False), want)
    assert (wrapper.train().forward_sft(*inputs, save_for_backward=False) != want).any()


def test_dropout_is_right_on_average() -> None:
    """The mean over masks of an output that is linear in the LoRA term is the output without dropout."""
    tensors = adapter()
    for n in (0, 1, 2, 3):
        tensors[n].zero_()  # down alone: h does not change, so the output is linear in its mask
    wrapper, plain = tuned(tensors=tensors, lora_dropout=0.5), tuned(tensors=tensors)
    base = ref.loaded(SHAPE, "AMXBF16_SFT").forward_sft(*ref.batch(SHAPE, 4), save_for_backward=False).double()
    inputs = ref.batch(SHAPE, 4)
    torch.manual_seed(0)
    outs = torch.stack([wrapper.forward_sft(*inputs, save_for_backward=False).double() for _ in range(400)])
    term = plain.forward_sft(*inputs, save_for_backward=False).double() - base
    error = (outs.mean(0) - base - term).norm() / (outs.std(0).norm() / 400**0.5)
    assert error < 1.5  # 1 is what independent masks give; the norm is over hundreds of elements
    assert term.norm() > 5 * outs.std(0).norm() / 400**0.5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_masks(use_reentrant) -> None:
    wrapper = ref.loaded(SHAPE, "AMXBF16_SFT")
    hidden, ids, weights = ref.batch(SHAPE, 9)

    def gradients(checkpointed):
        lora = ref.lora(SHAPE)
        x = hidden.clone().requires_grad_()
        torch.manual_seed(5)

        def layer(x):
            return moe_forward(wrapper, x, ids, weights, lora, dropout=0.3)

        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        torch.rand(7)  # others use the generator in between
        out.backward(grad(9))
        return out, x.grad, *(t.grad for t in lora.tensors)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)


def test_rslora() -> None:
    wrapper, plain = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=1.5, use_rslora=True), tuned()
    assert wrapper.lora_scaling == pytest.approx(1.5 / SHAPE.rank**0.5)
    same = ref.loaded(SHAPE, "AMXBF16_SFT", lora_alpha=1.5 * SHAPE.rank**0.5)
    inputs = ref.batch(SHAPE, 5)
    for w in (wrapper, same):
        w.init_lora_weights(*adapter())
    assert torch.equal(wrapper.forward_sft(*inputs), same.forward_sft(*inputs))
    assert (wrapper.forward_sft(*inputs, save_for_backward=False) != plain.forward_sft(*inputs)).any()


# --- gate and up share A -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("buffers", ["none", "apart", "one"])
def test_a_shared_a_gets_the_sum(buffers) -> None:
    tensors = adapter()
    tensors[2] = tensors[0]
    apart, shared = tuned(tensors=[t.clone() for t in tensors]), tuned(tensors=tensors)
    own = [torch.full(t.shape, 7.0) for t in tensors]
    if buffers == "one":
        own[2] = own[0]
    if buffers != "none":
        shared.init_lora_weights(*tensors, *own)
    inputs = ref.batch(SHAPE, 9)
    assert torch.equal(apart.forward_sft(*inputs), shared.forward_sft(*inputs))
    want, got = apart.backward(grad(9))[1], shared.backward(grad(9))[1]
    total = want["grad_gate_lora_a"] + want["grad_up_lora_a"]
    for n, name in enumerate(GRAD_NAMES):
        exact = total if name in ("grad_gate_lora_a", "grad_up_lora_a") else want[name]
        assert torch.equal(got[name], exact), name
        assert buffers == "none" or torch.equal(own[n], exact), name
