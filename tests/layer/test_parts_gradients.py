"""Gradients of layers cut along inter: every one against float64, the same bits for any number of threads."""

import pytest
import torch
from oracle.bounds import relative
from oracle.experts import ACTIVATIONS, LORA_NAMES, Dropout
from oracle.gradients import bound_of, check, check_base, run_base
from oracle.layers import Layer, Shape, assert_same, grad_out, make_inputs, make_lora
from oracle.registry import BLOCK_ROWS, each_isa

from ktmoe import _ext

PARTS = [1, 2, 3, 4]
each_parts = pytest.mark.parametrize("parts", PARTS)
each_depth = pytest.mark.parametrize("fmt", ["bf16", "int8", "q4_k"])
DROP = Dropout(0.3, 2**61 + 12345)


@pytest.mark.parametrize("fmt", list(_ext.formats()))
def test_every_format(fmt: str) -> None:
    step = int(_ext.testing.k_step(fmt))
    shape = Shape(3, 2, 70, 4 * step - step // 2)
    lora, x = make_lora(shape, 6), make_inputs(shape, 40, "mixed")
    for parts in PARTS:
        layer = Layer(shape, fmt, "", parts=parts)
        check(layer, x, lora, 2.5, f"{parts} parts, LoRA")
        check(layer, x, None, 1.0, f"{parts} parts")


@each_isa
@each_depth
@each_parts
@pytest.mark.parametrize("inter", [33, 70, 290, 768])
def test_inter_of_any_size(isa: str, fmt: str, parts: int, inter: int) -> None:
    for shape, rank in ((Shape(3, 2, 100, inter), 6), (Shape(2, 2, 33, inter), 33)):
        layer, lora = Layer(shape, fmt, isa, parts=parts), make_lora(shape, rank)
        check(layer, make_inputs(shape, 40), lora, 2.5, f"{shape} {parts} parts, LoRA")
        check(layer, make_inputs(shape, 20, "mixed"), None, 1.0, f"{shape} {parts} parts")


@each_isa
@each_parts
@pytest.mark.parametrize("name", ["relu2", "oai", "gelu_tanh"])
def test_activations_and_biases(isa: str, parts: int, name: str) -> None:
    """The bias of down counts once in the router gradient."""
    shape = Shape(4, 2, 100, 290)
    layer = Layer(shape, "bf16", isa, parts=parts, activation=ACTIVATIONS[name], with_biases=True)
    x = make_inputs(shape, 40, "mixed")
    check(layer, x, make_lora(shape, 6, gated=layer.activation.gated), 2.5, f"{parts} parts, LoRA")
    check(layer, x, None, 1.0, f"{parts} parts")


@each_isa
@each_parts
def test_blocks_and_chunks(isa: str, parts: int) -> None:
    """Also experts that only a later chunk reaches."""
    shape = Shape(2, 1, 64, 100)
    tokens = BLOCK_ROWS[isa] + 21
    check(
        Layer(shape, "bf16", isa, parts=parts), make_inputs(shape, tokens, "all to one"), make_lora(shape, 4), 1.0, ""
    )
    shape = Shape(8, 2, 64, 100)
    x = make_inputs(shape, 40)
    x.ids[:7] = x.ids[:7] % 2
    check(Layer(shape, "bf16", isa, parts=parts, chunk_tokens=7), x, make_lora(shape, 4), 1.0, "chunks")


@each_parts
def test_idle_experts_and_experts_on_the_gpu(parts: int) -> None:
    shape = Shape(6, 2, 64, 100)
    layer = Layer(shape, "bf16", "", parts=parts, on_gpu=[False, True, False, False, True, False], chunk_tokens=9)
    lora, x = make_lora(shape, 3), make_inputs(shape, 20)
    x.ids = x.ids % 3  # expert 1 is on the GPU; 3, 4, 5 are idle
    adapter = layer.adapter(lora)
    check(layer, x, lora, 1.0, f"{parts} parts")
    grads = layer.backward(layer.train(x, adapter)[1], grad_out(20, 64), adapter, lora)
    for name in LORA_NAMES:
        for e in range(6):
            assert bool((grads[name][e] != 0).any()) == (e in (0, 2)), f"{name} of expert {e}"
    for inputs in (make_inputs(shape, 5, "masked"), x.part(slice(0, 0))):
        grads = layer.backward(layer.train(inputs, adapter)[1], grad_out(inputs.tokens, 64), adapter, lora)
        assert all((g == 0).all() for g in grads.values())
        assert all((g == 0).all() for g in run_base(layer, inputs, grad_out(inputs.tokens, 64)).values())


@each_isa
@each_parts
@pytest.mark.parametrize("inter", [48, 100, 290])
def test_base_weights(isa: str, parts: int, inter: int) -> None:
    shape = Shape(3, 2, 100, inter)
    layer = Layer(shape, "bf16", isa, parts=parts)
    check_base(layer, 50)
    check_base(layer, 50, dtype=torch.bfloat16)
    check_base(layer, 40, lora=make_lora(shape, 4))
    check_base(Layer(shape, "bf16", isa, parts=parts, chunk_tokens=7), 40)
    check_base(Layer(shape, "bf16", isa, parts=parts, activation=ACTIVATIONS["relu2"], with_biases=True), 40)


@each_isa
@each_parts
@pytest.mark.parametrize("fmt", ["bf16", "int8"])
def test_dropout_masks_do_not_depend_on_the_parts(isa: str, parts: int, fmt: str) -> None:
    """The oracle's masks are those of the whole h; so they would be seen if they began anew in each part."""
    shape = Shape(3, 2, 100, 290)
    layer, lora = Layer(shape, fmt, isa, parts=parts), make_lora(shape, 6)
    x, dy, adapter = make_inputs(shape, 40, "mixed"), grad_out(40, 100), layer.adapter(lora, 2.5)
    out, cache = layer.train(x, adapter, DROP)
    assert_same(out, layer.forward(x, adapter, DROP), "a forward that saves is the same forward")
    got = layer.backward(cache, dy, adapter, lora)
    leaves = {"input": x.hidden.double(), **{n: t.double() for n, t in lora.items()}}
    for leaf in leaves.values():
        leaf.requires_grad_()
    want = layer.exact(leaves["input"], x.ids, x.weights.double(), {n: leaves[n] for n in lora}, 2.5, DROP)
    exact = torch.autograd.grad(want, list(leaves.values()), dy.double())
    assert relative(out.double().numpy(), want.detach().numpy()) <= bound_of(fmt)
    for name, grad in zip(leaves, exact, strict=True):
        error = relative(got[name].double().numpy(), grad.numpy())
        assert error <= bound_of(fmt), f"{fmt} {parts} parts, gradient of {name}: {error:.4f}"


CASES = {
    "many experts": (Shape(24, 2, 96, 300), 60, "uniform"),
    "few experts": (Shape(2, 2, 160, 300), 30, "uniform"),
    "one token": (Shape(8, 4, 300, 290), 1, "uniform"),
    "nobody is woken": (Shape(3, 1, 64, 96), 2, "uniform"),
}


@each_isa
@each_depth
@pytest.mark.parametrize("case", CASES)
def test_threads(isa: str, fmt: str, case: str) -> None:
    shape, tokens, kind = CASES[case]
    x, dy, lora = make_inputs(shape, tokens, kind), grad_out(tokens, shape.hidden), make_lora(shape, 5)

    def everything(layer: Layer) -> dict[str, torch.Tensor]:
        adapter = layer.adapter(lora, 1.5)
        trained, cache = layer.train(x, adapter, DROP)
        result = {"out": trained, **layer.backward(cache, dy, adapter, lora)}
        if fmt == "bf16":
            result |= {f"base {name}": g for name, g in run_base(layer, x, dy).items()}
        return result

    for parts in PARTS:
        want = everything(Layer(shape, fmt, isa, threads=1, parts=parts))
        for threads in (2, 3, 5, 8):
            for name, got in everything(Layer(shape, fmt, isa, threads=threads, parts=parts)).items():
                assert_same(got, want[name], f"{name}: {parts} parts of {threads} threads")


def test_parts_agree() -> None:
    """Within the bound that each has to the exact value."""
    shape = Shape(4, 2, 100, 290)
    x, dy, lora = make_inputs(shape, 40), grad_out(40, 100), make_lora(shape, 5)
    results = []
    for parts in PARTS:
        layer = Layer(shape, "bf16", "", parts=parts)
        adapter = layer.adapter(lora)
        results.append(layer.backward(layer.train(x, adapter)[1], dy, adapter, lora))
    for other in results[1:]:
        for name, value in other.items():
            assert relative(value.double().numpy(), results[0][name].double().numpy()) <= 1e-2, name


def test_a_cache_serves_more_than_one_backward_and_belongs_to_its_layer() -> None:
    shape = Shape(4, 2, 100, 290)
    layer, lora = Layer(shape, "bf16", "", parts=3), make_lora(shape, 5)
    adapter = layer.adapter(lora)
    x, dy = make_inputs(shape, 40), grad_out(40, 100)
    _, cache = layer.train(x, adapter)
    first = layer.backward(cache, dy, adapter, lora)
    for name, value in layer.backward(cache, dy, adapter, lora).items():
        assert_same(value, first[name], name)
    with pytest.raises(ValueError, match="one of another layer"):
        Layer(shape, "bf16", "", parts=2).backward(cache, dy, adapter, lora)
