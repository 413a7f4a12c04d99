"""Working memory does not grow with the number of tokens."""

import resource

import torch
from oracle import child
from oracle.layers import make_pool

from ktmoe import _ext


def test_a_long_prefill_of_a_wide_model_stays_below_a_gibibyte() -> None:
    """25,600 tokens at hidden 7168, top-8. inter is small to save time; its buffers are those of single blocks."""
    tokens, hidden, inter = 25_600, 7168, 32

    def body(say: object) -> None:
        layer = _ext.MoeLayer(make_pool(), 8, 8, hidden, inter, "int8")
        for e in range(8):
            layer.load_expert(e, *(torch.zeros(s, dtype=torch.bfloat16) for s in ((32, 7168), (32, 7168), (7168, 32))))
        x, out = torch.ones(tokens, hidden).bfloat16(), torch.ones(tokens, hidden).bfloat16()
        ids, weights = torch.arange(8).repeat(tokens, 1), torch.ones(tokens, 8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        layer.forward(x, ids, weights, out)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        say(f"grown by {grown / 1024:.0f} MiB")  # type: ignore[operator]
        assert (out == 0).all()
        assert grown < 1024 * 1024

    child.run(body, timeout=300).check()
