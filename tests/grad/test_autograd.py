"""moe_forward inside torch's autograd: gradients against float64, checkpointing, lifetimes."""

import gc
import weakref

import pytest
import torch
import torch_oracle as ref
from torch.utils.checkpoint import checkpoint

from ktmoe import autograd
from ktmoe.autograd import LoraTensors, moe_forward

SHAPE = ref.Shape()
NAMES = ("hidden", "weights", "gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")


def inputs(n_tokens, dtype=torch.bfloat16, seed=0, weights_dtype=torch.float32):
    hidden, ids, weights = ref.batch(SHAPE, n_tokens, seed)
    return hidden.to(dtype).requires_grad_(), ids, weights.to(weights_dtype).requires_grad_()


def leaves(hidden, weights, lora):
    return (hidden, weights, *(lora.tensors if lora else ()))


def oracle_grads(wrapper, hidden, ids, weights, lora, grad_out):
    copies = [t.detach().double().requires_grad_() for t in leaves(hidden, weights, lora)]
    adapter = LoraTensors(*copies[2:], scaling=lora.scaling, rank=lora.rank) if lora else None
    out = ref.forward(wrapper, copies[0], ids, copies[1], adapter, for_gradients=True)
    gradients = torch.autograd.grad(out, copies, grad_out.double())
    return ref.forward(wrapper, hidden, ids, weights, lora).detach(), gradients


def random_grad(like, seed=0):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def check(wrapper, hidden, ids, weights, lora, out, grads, grad_out):
    want_out, want = oracle_grads(wrapper, hidden, ids, weights, lora, grad_out)
    assert ref.row_error(out, want_out) <= ref.forward_tolerance(wrapper)
    tolerance = ref.gradient_tolerance(wrapper)
    for name, leaf, got, expected in zip(NAMES, leaves(hidden, weights, lora), grads, want, strict=False):
        assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape), name
        assert ref.relative(got, expected) <= tolerance, name
        assert ref.cosine(got, expected) >= 0.9999, name


@pytest.fixture(params=ref.SFT)
def wrapper(request):
    return ref.loaded(SHAPE, request.param)


# --- numbers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_tokens", [1, 5, 33])
@pytest.mark.parametrize("isa", ref.ISAS)
@pytest.mark.parametrize("method", ref.SFT)
def test_all_gradients(monkeypatch, method, isa, n_tokens) -> None:
    monkeypatch.setenv("KTMOE_ISA", isa)
    wrapper = ref.loaded(SHAPE, method)
    hidden, ids, weights = inputs(n_tokens)
    lora = ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    grad_out = random_grad(out)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), grad_out)
    check(wrapper, hidden, ids, weights, lora, out, grads, grad_out)


def test_without_lora(wrapper) -> None:
    hidden, ids, weights = inputs(7)
    out = moe_forward(wrapper, hidden, ids, weights)
    grad_out = random_grad(out)
    grads = torch.autograd.grad(out, (hidden, weights), grad_out)
    check(wrapper, hidden, ids, weights, None, out, grads, grad_out)


@pytest.mark.parametrize("method", ref.INFERENCE)
def test_inference_wrappers_have_gradients_too(method) -> None:
    wrapper = ref.loaded(SHAPE, method)
    hidden, ids, weights = inputs(7)
    lora = ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    grad_out = random_grad(out)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), grad_out)
    check(wrapper, hidden, ids, weights, lora, out, grads, grad_out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
def test_dtypes(wrapper, dtype, lora_dtype) -> None:
    """Whatever the model computes in: output and gradients come in the dtypes of the inputs."""
    hidden, ids, weights = inputs(5, dtype, weights_dtype=dtype)
    lora = ref.lora(SHAPE, lora_dtype)
    out = moe_forward(wrapper, hidden, ids.int(), weights, lora)
    assert out.dtype is dtype
    grad_out = random_grad(out).bfloat16().to(dtype)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), grad_out)
    check(wrapper, hidden, ids, weights, lora, out, grads, grad_out)


def test_fp32_gradients_are_not_rounded_to_bf16(wrapper) -> None:
    hidden, ids, weights = inputs(5, torch.float32)
    (grad,) = torch.autograd.grad(moe_forward(wrapper, hidden, ids, weights).sum(), hidden)
    assert (grad != grad.bfloat16().float()).any()


def test_shared_a(wrapper) -> None:
    """PEFT has one A for gate and up: both gradients add up in it."""
    hidden, ids, weights = inputs(9)
    lora = ref.lora(SHAPE)
    shared = lora._replace(up_a=lora.gate_a)
    out = moe_forward(wrapper, hidden, ids, weights, shared)
    grad_out = random_grad(out)
    (got,) = torch.autograd.grad(out, shared.gate_a, grad_out, retain_graph=True)
    _, want = oracle_grads(wrapper, hidden, ids, weights, shared, grad_out)
    assert ref.relative(got, want[2] + want[4]) <= ref.gradient_tolerance(wrapper)
    assert ref.relative(got, want[2]) > 0.1


def test_views_of_fused_parameters(wrapper) -> None:
    """PEFT's layout: A [E*r, H], B [2I, r*E] with the experts in the fastest dimension."""
    e, h, i, r = SHAPE.experts, SHAPE.hidden, SHAPE.inter, SHAPE.rank
    a, b = torch.randn(e * r, h) * 0.08, torch.randn(2 * i, r * e) * 0.4
    down_a, down_b = torch.randn(e * r, i) * 0.1, torch.randn(h, r * e) * 0.4
    params = [torch.nn.Parameter(t) for t in (a, b, down_a, down_b)]

    def views():
        a, b, down_a, down_b = params
        gate_up = b.reshape(2 * i, r, e).permute(2, 0, 1)
        shared = a.view(e, r, h)
        return LoraTensors(
            shared,
            gate_up[:, :i],
            shared,
            gate_up[:, i:],
            down_a.view(e, r, i),
            down_b.reshape(h, r, e).permute(2, 0, 1),
            scaling=2.0,
            rank=r,
        )

    hidden, ids, weights = inputs(8)
    assert not views().gate_b.is_contiguous()
    out = moe_forward(wrapper, hidden, ids, weights, views())
    packs = wrapper.mirror.packs
    moe_forward(wrapper, hidden, ids, weights, views())
    assert wrapper.mirror.packs == packs  # new views of the same memory
    grad_out = random_grad(out)
    got = torch.autograd.grad(out, params, grad_out)
    plain = views()
    plain = LoraTensors(*(t.double() for t in plain.tensors), scaling=2.0, rank=r)
    want = torch.autograd.grad(
        ref.forward(wrapper, hidden.detach(), ids, weights.detach(), plain, for_gradients=True),
        params,
        grad_out.double(),
    )
    for g, w in zip(got, want, strict=True):
        assert ref.relative(g, w) <= ref.gradient_tolerance(wrapper)


@pytest.mark.parametrize("wanted", range(8))
def test_only_what_is_needed(wrapper, wanted) -> None:
    hidden, ids, weights = inputs(6)
    lora = ref.lora(SHAPE)
    everything = leaves(hidden, weights, lora)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    grad_out = random_grad(out)
    all_grads = torch.autograd.grad(out, everything, grad_out)
    for index, leaf in enumerate(everything):
        leaf.requires_grad_(index == wanted)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    (grad,) = torch.autograd.grad(out, everything[wanted], grad_out)
    assert torch.equal(grad, all_grads[wanted])


def test_leading_dimensions_and_expanded_gradient(wrapper) -> None:
    hidden, ids, weights = inputs(6)
    lora = ref.lora(SHAPE)
    flat = moe_forward(wrapper, hidden, ids, weights, lora)
    deep = moe_forward(wrapper, hidden.view(2, 3, -1), ids.view(2, 3, -1), weights.view(2, 3, -1), lora)
    assert torch.equal(deep.view(6, -1), flat)
    for a, b in zip(
        torch.autograd.grad(flat.sum(), leaves(hidden, weights, lora)),
        torch.autograd.grad(deep.sum(), leaves(hidden, weights, lora)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_absent_duplicate_and_no_tokens(wrapper) -> None:
    hidden, ids, weights = inputs(4)
    ids[0, 1], ids[1], ids[2, 1] = -1, SHAPE.experts, ids[2, 0]
    lora = ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    grad_out = random_grad(out)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), grad_out)
    _, want = oracle_grads(wrapper, hidden, ids, weights, lora, grad_out)
    for n, (g, w) in enumerate(zip(grads, want, strict=True)):
        # The router's gradients are five single products that may cancel: three standard deviations.
        assert ref.relative(g, w) <= ref.gradient_tolerance(wrapper) * (3 if n == 1 else 1)
    assert (grads[0][1] == 0).all()
    hidden, ids, weights = inputs(0)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    grads = torch.autograd.grad(out.sum(), leaves(hidden, weights, lora))
    assert all((g == 0).all() for g in grads)


def test_experts_on_the_gpu_have_no_gradient(wrapper) -> None:
    partial = ref.loaded(SHAPE, wrapper.method, num_gpu_experts=2)
    hidden, ids, weights = inputs(9)
    lora = ref.lora(SHAPE)
    out = moe_forward(partial, hidden, ids, weights, lora)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), random_grad(out))
    _, want = oracle_grads(partial, hidden, ids, weights, lora, random_grad(out))
    for g, w in zip(grads, want, strict=True):
        assert ref.relative(g, w) <= ref.gradient_tolerance(wrapper)
    assert (grads[2][:2] == 0).all()


# --- where no graph is wanted ---------------------------------------------------------------------------------------
def test_no_graph_without_need(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 5)
    frozen = LoraTensors(*(t.detach() for t in ref.lora(SHAPE).tensors), scaling=0.75, rank=SHAPE.rank)
    plain = moe_forward(wrapper, hidden, ids, weights, frozen)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(moe_forward(wrapper, hidden, ids, weights, ref.lora(SHAPE)), plain)
    with torch.inference_mode():
        assert torch.equal(moe_forward(wrapper, hidden, ids, weights, ref.lora(SHAPE)), plain)
        assert torch.equal(moe_forward(wrapper, hidden.clone(), ids.clone(), weights.clone(), frozen), plain)
    assert torch.equal(moe_forward(wrapper, hidden, ids, weights, ref.lora(SHAPE)), plain)
    assert not autograd._holders


def test_tensors_made_under_inference_mode(wrapper) -> None:
    """They have no version, so every change must be assumed."""
    hidden, ids, weights = ref.batch(SHAPE, 5)
    with torch.inference_mode():
        lora = LoraTensors(*(t.detach().clone() for t in ref.lora(SHAPE).tensors), scaling=0.75, rank=SHAPE.rank)
        before = moe_forward(wrapper, hidden, ids, weights, lora)
        lora.gate_b.mul_(3)
        assert not torch.equal(moe_forward(wrapper, hidden, ids, weights, lora), before)


def test_errors(wrapper) -> None:
    hidden, ids, weights = inputs(3)
    lora = ref.lora(SHAPE)
    with pytest.raises(RuntimeError, match="^Weights not loaded"):
        moe_forward(ref.make(SHAPE, wrapper.method), hidden, ids, weights, lora)
    with pytest.raises(TypeError, match="^hidden_states: got dtype torch.float64"):
        moe_forward(wrapper, hidden.double(), ids, weights, lora)
    with pytest.raises(ValueError, match="^gate_lora_b: got shape"):
        moe_forward(wrapper, hidden, ids, weights, lora._replace(gate_b=lora.down_b))
    with pytest.raises(ValueError, match="^gate_lora_a: got shape"):
        moe_forward(wrapper, hidden, ids, weights, lora._replace(rank=7))
    with pytest.raises(ValueError, match="99"):
        moe_forward(wrapper, hidden, torch.full_like(ids, 99), weights, lora)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    wrapper.layer.unload()
    with pytest.raises(RuntimeError, match="^Weights not loaded"):
        out.sum().backward()
    wrapper.load_weights_from_tensors(*ref.weights(SHAPE))
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    (grad,) = torch.autograd.grad(out.float().pow(2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- several forwards, changed adapters -----------------------------------------------------------------------------
def test_any_order_of_backwards(wrapper) -> None:
    lora = ref.lora(SHAPE)
    runs = [(*inputs(3 + n, seed=n), n) for n in range(3)]
    outs = [moe_forward(wrapper, h, i, w, lora) for h, i, w, _ in runs]
    for n in (1, 2, 0):
        hidden, ids, weights, _ = runs[n]
        grads = torch.autograd.grad(outs[n], leaves(hidden, weights, lora), random_grad(outs[n]))
        check(wrapper, hidden, ids, weights, lora, outs[n], grads, random_grad(outs[n]))


def test_retain_graph(wrapper) -> None:
    hidden, ids, weights = inputs(5)
    lora = ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    first = torch.autograd.grad(out.sum(), leaves(hidden, weights, lora), retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves(hidden, weights, lora))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), hidden)


def test_an_adapter_of_another_forward_does_not_disturb(wrapper) -> None:
    """Another adapter, another rank, another scaling, between a forward and its backward."""
    hidden, ids, weights = inputs(5)
    lora = ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    other = ref.lora(SHAPE, seed=1)
    wide = ref.lora(ref.Shape(rank=5), seed=2)
    for adapter in (other, wide, lora._replace(scaling=5.0), None):
        moe_forward(wrapper, *ref.batch(SHAPE, 3), adapter)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), random_grad(out))
    check(wrapper, hidden, ids, weights, lora, out, grads, random_grad(out))


def test_scaling_is_part_of_the_key(wrapper) -> None:
    inputs_ = ref.batch(SHAPE, 4)
    lora = ref.lora(SHAPE)
    a = moe_forward(wrapper, *inputs_, lora)
    b = moe_forward(wrapper, *inputs_, lora._replace(scaling=3.0))
    assert not torch.equal(a, b)
    assert ref.row_error(b, ref.forward(wrapper, *inputs_, lora._replace(scaling=3.0))) <= ref.forward_tolerance(
        wrapper
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_between_forward_and_backward(wrapper, fused) -> None:
    """The gradient is that of the values that the forward saw."""
    hidden, ids, weights = inputs(5)
    lora, before = ref.lora(SHAPE), ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    for t in lora.tensors:
        t.grad = torch.ones_like(t)
    torch.optim.AdamW(lora.tensors, lr=0.3, fused=fused).step()
    moved = moe_forward(wrapper, hidden, ids, weights, lora)
    assert ref.row_error(moved, ref.forward(wrapper, hidden, ids, weights, lora)) <= ref.forward_tolerance(wrapper)
    assert not torch.equal(moved, out)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), random_grad(out))
    check(wrapper, hidden, ids, weights, before, out, grads, random_grad(out))


def test_memory_of_a_dropped_adapter_is_kept_until_the_next(wrapper) -> None:
    """Otherwise the allocator may give a new adapter the old addresses; versions and shapes are equal too."""

    class Memory(bytearray):
        """Can be watched."""

    inputs_ = ref.batch(SHAPE, 4)
    memory, tensors = [], []
    for t in ref.lora(SHAPE).tensors:
        memory.append(Memory(t.detach().numpy().tobytes()))
        tensors.append(torch.frombuffer(memory[-1], dtype=torch.float32).view(t.shape))
    alive = [weakref.ref(m) for m in memory]
    moe_forward(wrapper, *inputs_, LoraTensors(*tensors, scaling=0.75, rank=SHAPE.rank))
    del memory, tensors, t
    assert all(m() is not None for m in alive)
    other = ref.lora(SHAPE, seed=1)
    out = moe_forward(wrapper, *inputs_, other)
    assert ref.row_error(out, ref.forward(wrapper, *inputs_, other)) <= ref.forward_tolerance(wrapper)
    assert all(m() is None for m in alive)
    other = ref.lora(SHAPE)
    wrapper.mirror.drop()
    assert torch.equal(moe_forward(wrapper, *inputs_, other), moe_forward(wrapper, *inputs_, ref.lora(SHAPE)))


def test_training_with_a_stock_optimizer_learns(wrapper) -> None:
    hidden, ids, weights = ref.batch(SHAPE, 24)
    lora = ref.lora(SHAPE)
    with torch.no_grad():
        for b in (lora.gate_b, lora.up_b, lora.down_b):
            b.zero_()
    target = ref.forward(ref.loaded(SHAPE, wrapper.method, seed=9), hidden, ids, weights)
    optimizer = torch.optim.AdamW(lora.tensors, lr=2e-2, fused=True)
    losses = []
    for _ in range(25):
        loss = (moe_forward(wrapper, hidden, ids, weights, lora) - target).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert wrapper.mirror.packs == 25


# --- lifetimes ------------------------------------------------------------------------------------------------------
@pytest.fixture
def caches(monkeypatch):
    """Sizes of the forward caches that moe_forward has made and that are still in memory."""
    made = []
    original = autograd.run_forward

    def run_forward(*arguments):
        out, saved = original(*arguments)
        made.append(weakref.ref(saved.cache))
        return out, saved

    monkeypatch.setattr(autograd, "run_forward", run_forward)
    return lambda: [cache().nbytes for cache in made if cache() is not None]


def test_the_cache_is_freed_with_the_graph(caches, wrapper) -> None:
    hidden, ids, weights = inputs(50)
    lora = ref.lora(SHAPE)
    out = moe_forward(wrapper, hidden, ids, weights, lora)
    assert len(caches()) == 1
    assert caches()[0] > 50 * SHAPE.hidden * 2
    del out  # dropped without a backward
    assert caches() == []
    assert not autograd._holders


def test_the_cache_is_freed_by_the_backward(caches, wrapper) -> None:
    hidden, ids, weights = inputs(5)
    out = moe_forward(wrapper, hidden, ids, weights, ref.lora(SHAPE))
    loss = out.float().pow(2).sum()
    loss.backward()
    assert caches() == []  # while out and loss still hold the graph
    assert loss.requires_grad


def test_many_steps_leak_nothing(caches, wrapper) -> None:
    hidden, ids, weights = inputs(5)
    lora = ref.lora(SHAPE)
    for n in range(50):
        out = moe_forward(wrapper, hidden, ids, weights, lora)
        if n % 2:
            out.sum().backward()
    del out
    gc.collect()
    assert caches() == []
    assert wrapper.mirror.packs == 1


# --- activation checkpointing ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(caches, wrapper, reentrant) -> None:
    hidden, ids, weights = inputs(9)
    lora = ref.lora(SHAPE)

    def block(x):
        return moe_forward(wrapper, x, ids, weights, lora) * 2

    plain = torch.autograd.grad(block(hidden).sum(), leaves(hidden, weights, lora))
    assert caches() == []
    out = checkpoint(block, hidden, use_reentrant=reentrant)
    assert caches() == []  # nothing is kept until the recomputation
    for t in leaves(hidden, weights, lora):
        t.grad = None
    out.sum().backward()
    for t, want in zip(leaves(hidden, weights, lora), plain, strict=True):
        assert torch.equal(t.grad, want)
    assert caches() == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_checkpointed_layers_hold_one_cache_at_a_time(monkeypatch, caches, wrapper, reentrant) -> None:
    second = ref.loaded(SHAPE, wrapper.method, seed=4)
    hidden, ids, weights = inputs(9)
    lora = ref.lora(SHAPE)
    held = []
    original = autograd._hold

    def hold(saved):
        tensor = original(saved)
        held.append(len(caches()))
        return tensor

    monkeypatch.setattr(autograd, "_hold", hold)

    def block(layer):
        return lambda x: x + moe_forward(layer, x, ids, weights, lora)

    x = hidden
    for layer in (wrapper, second):
        x = checkpoint(block(layer), x, use_reentrant=reentrant)
    assert caches() == []
    x.sum().backward()
    assert set(held) == {1}
    assert caches() == []
    assert hidden.grad.isfinite().all()


def test_hooks_that_pass_cpu_tensors_on_work(wrapper) -> None:
    hidden, ids, weights = inputs(5)
    lora = ref.lora(SHAPE)
    plain = torch.autograd.grad(moe_forward(wrapper, hidden, ids, weights, lora).sum(), leaves(hidden, weights, lora))
    with torch.autograd.graph.save_on_cpu():
        out = moe_forward(wrapper, hidden, ids, weights, lora)
    got = torch.autograd.grad(out.sum(), leaves(hidden, weights, lora))
    assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))


def test_hooks_that_copy_are_reported(wrapper) -> None:
    hidden, ids, weights = inputs(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = moe_forward(wrapper, hidden, ids, weights)
    with pytest.raises(RuntimeError, match="saved-tensors hook"):
        out.sum().backward()


def test_autocast(wrapper) -> None:
    hidden, ids, weights = inputs(5, torch.float32)
    lora = ref.lora(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe_forward(wrapper, hidden, ids, weights, lora)
    grads = torch.autograd.grad(out, leaves(hidden, weights, lora), random_grad(out).bfloat16().float())
    check(wrapper, hidden, ids, weights, lora, out, grads, random_grad(out).bfloat16().float())
