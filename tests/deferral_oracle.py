"""Small models whose layers defer experts, and what each of their layers must give."""

import itertools

import torch
import torch_oracle as ref

from ktmoe.deferred import select_deferred_experts

SHAPE = ref.Shape(experts=9, top_k=4)
_names = itertools.count()


def model(layers=(0, 1, 2), method="BF16", deferred=2, name=None, **options):
    """Wrappers of one model. A name of its own, or layers of other tests would count as later layers of it."""
    name = f"model {next(_names)}" if name is None else name
    amounts = deferred if isinstance(deferred, (list, tuple)) else [deferred] * len(layers)
    return [
        ref.loaded(
            SHAPE, method, seed=i, layer_idx=i, weight_path=name, max_deferred_experts_per_token=amount, **options
        )
        for i, amount in zip(layers, amounts, strict=True)
    ]


def batch(n_tokens, seed):
    """Some entries are absent, in both spellings, and some experts twice in a token."""
    hidden, ids, weights = ref.batch(SHAPE, n_tokens, seed)
    g = torch.Generator().manual_seed(5000 + seed)
    for value in (-1, SHAPE.experts, 3):
        ids[torch.rand(ids.shape, generator=g) < 0.12] = value
    return hidden, ids, weights


def split(wrapper, ids, weights, last):
    known = torch.where(ids == SHAPE.experts, -1, ids)
    amount = 0 if last else wrapper.max_deferred_experts_per_token or 0
    return select_deferred_experts(known, weights, SHAPE.top_k - amount)


def parts(layers, batches):
    """(now, later) of each layer, each as the layer computes it alone."""
    out = []
    for wrapper, (hidden, ids, weights) in zip(layers, batches, strict=True):
        now, later = split(wrapper, ids, weights, wrapper is layers[-1])
        run = wrapper._forward
        out.append((run(hidden, now, weights), run(hidden, later, weights)))
    return out


def expected(layers, batches):
    """Each layer's output: its immediate experts and the deferred ones of the layer before, summed in fp32."""
    both = parts(layers, batches)
    want = [both[0][0]]
    for (now, _), (_, before) in zip(both[1:], both[:-1], strict=True):
        want.append((now.float() + before.float()).bfloat16())
    return want


def assert_equal(outs, want):
    for i, (out, expected_out) in enumerate(zip(outs, want, strict=True)):
        # -0 and +0 are equal: a part without experts is +0, and x + 0 loses the sign
        assert torch.equal(out, expected_out), f"layer {i}"
