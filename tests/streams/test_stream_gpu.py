"""The same on a real GPU: `pytest -m gpu`. The stand-in for the driver is not used here."""

import pytest
import torch
import torch_oracle as ref
from deferral_oracle import SHAPE, assert_equal, batch, expected, model

from ktmoe import KTMoEWrapper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a torch that sees it"),
]


@pytest.fixture(autouse=True)
def sizes():
    KTMoEWrapper.set_capture_batch_sizes([1, 8])
    yield
    torch.cuda.synchronize()
    KTMoEWrapper.set_capture_batch_sizes([])
    KTMoEWrapper.clear_buffer_cache()


def to_gpu(inputs):
    return [t.cuda() for t in inputs]


@pytest.mark.parametrize("stream", ["current", "other", "none"])
@pytest.mark.parametrize("n_tokens", [1, 7, 8, 40])
def test_equals_the_cpu(stream, n_tokens) -> None:
    wrapper, inputs = ref.loaded(SHAPE, "AMXINT8"), batch(n_tokens, 0)
    want = wrapper.forward(*inputs)
    used = torch.cuda.Stream() if stream == "other" else torch.cuda.current_stream()
    handle = None if stream == "none" else used.cuda_stream
    for _ in range(5):
        hidden, ids, weights = to_gpu(inputs)
        used.wait_stream(torch.cuda.current_stream())
        wrapper.submit_forward(hidden, ids, weights, handle)
        with torch.cuda.stream(used):
            ids.fill_(-1)  # a server masks the ids in place right after the call
            hidden.fill_(torch.nan)
        out = wrapper.sync_forward(hidden, handle)
        torch.cuda.current_stream().wait_stream(used)
        assert out.device == hidden.device
        assert torch.equal(out.cpu(), want)
        del hidden, ids, weights, out


@pytest.mark.parametrize("deferred", [None, 2])
def test_graph(deferred) -> None:
    layers = model((0, 2, 3), deferred=deferred)
    buffers = [to_gpu(batch(8, s)) for s in range(3)]

    def one_pass():
        handle = torch.cuda.current_stream().cuda_stream
        outs = []
        for wrapper, inputs in zip(layers, buffers, strict=True):
            wrapper.submit_forward(*inputs, handle)
            outs.append(wrapper.sync_forward(inputs[0], handle))
        return outs

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            one_pass()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = one_pass()
    for n_tokens in (8, 8, 3, 8):
        KTMoEWrapper.set_replay_batch_size(8, n_tokens)
        batches = [batch(n_tokens, 10 * n_tokens + s) for s in range(3)]
        for own, inputs in zip(buffers, batches, strict=True):
            for buffer, tensor in zip(own, inputs, strict=True):
                buffer[:n_tokens].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal([out[:n_tokens].cpu() for out in outs], expected(layers, batches))
        assert all((out[n_tokens:] == 0).all() for out in outs)
    layers[0].cpu_infer.raise_stream_error()


def test_deferred_experts() -> None:
    layers = model((0, 1, 4))
    for n_tokens in (1, 5, 8, 33):
        batches = [batch(n_tokens, seed) for seed in range(3)]
        outs = [w.forward(*to_gpu(inputs)) for w, inputs in zip(layers, batches, strict=True)]
        assert_equal([out.cpu() for out in outs], expected(layers, batches))


def test_an_error_is_nan_and_the_next_sync() -> None:
    wrapper, inputs = ref.loaded(SHAPE, "BF16"), batch(4, 0)
    wrong = to_gpu(inputs)
    wrong[1][2, 1] = 77
    out = wrapper.forward(*wrong)
    torch.cuda.synchronize()
    assert out.isnan().all()
    with pytest.raises(ValueError, match="token 2, slot 1: got 77"):
        wrapper.forward(*to_gpu(inputs))
    assert torch.equal(wrapper.forward(*to_gpu(inputs)).cpu(), wrapper.forward(*inputs))


def test_mixed_devices_are_named() -> None:
    wrapper, (hidden, ids, weights) = ref.loaded(SHAPE, "BF16"), batch(4, 0)
    with pytest.raises(TypeError, match="^topk_ids: got device cpu, expected cuda:0"):
        wrapper.submit_forward(hidden.cuda(), ids, weights.cuda())
    with pytest.raises(TypeError, match="^topk_weights: got device cuda:0, expected cpu"):
        wrapper.submit_forward(hidden, ids, weights.cuda())
