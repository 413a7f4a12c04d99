"""What is packed from published files, and from experts with biases, is mapped with the same formats and results."""

from pathlib import Path

import gguf_files
import published_files
import pytest
import torch
import torch_oracle as ref
from hostile_files import save_sharded

from ktmoe.base import BaseMoEWrapper

LAYER = 3
SHAPE = ref.Shape(experts=3, hidden=256, inter=256)


def int4_folder(folder: Path) -> None:
    save_sharded(folder, published_files.int4_tensors(ref.weights(SHAPE), LAYER, 64)[0])


def fp8_folder(folder: Path) -> None:
    save_sharded(folder, published_files.fp8_tensors(ref.weights(SHAPE), LAYER, "blocks")[0])


def gguf_folder(folder: Path) -> None:
    stacks = gguf_files.random_stacks(("Q4_K", "Q4_K", "Q6_K"), SHAPE.experts, SHAPE.hidden, SHAPE.inter, seed=1)
    gguf_files.write(folder / "m.gguf", gguf_files.layer_tensors(stacks, LAYER))


SOURCES = {
    "RAWINT4": (int4_folder, ("int4_g64", "int4_g64")),
    "FP8": (fp8_folder, ("fp8", "fp8")),
    "LLAMAFILE": (gguf_folder, ("q4_k", "q6_k")),
    "AMXINT4": (fp8_folder, ("int4", "int4")),
}


def run(wrapper: BaseMoEWrapper) -> torch.Tensor:
    return wrapper.forward(*ref.batch(SHAPE, 5))


@pytest.mark.parametrize("method", SOURCES)
def test_published_formats_come_back_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    make, formats = SOURCES[method]
    make(tmp_path)
    direct = ref.make(SHAPE, method, weight_path=tmp_path, layer_idx=LAYER)
    direct.load_weights()
    assert (direct.layer.format, direct.layer.down_format) == formats
    kept = ref.make(SHAPE, method, weight_path=tmp_path, layer_idx=LAYER, cpu_save=True)
    kept.load_weights()
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", lambda *_: pytest.fail("an expert was packed"))
    again = ref.make(SHAPE, method, weight_path=tmp_path, layer_idx=LAYER)
    again.load_weights()
    for wrapper in (kept, again):
        assert (wrapper.layer.format, wrapper.layer.down_format) == formats
        assert torch.equal(run(wrapper), run(direct))


def test_tensors_after_a_packed_file_have_the_formats_of_the_method_again(tmp_path: Path) -> None:
    gguf_folder(tmp_path)
    kept = ref.make(SHAPE, "LLAMAFILE", weight_path=tmp_path, layer_idx=LAYER, cpu_save=True)
    kept.load_weights()
    wrapper = ref.make(SHAPE, "LLAMAFILE", weight_path=tmp_path, layer_idx=LAYER)
    wrapper.load_weights()
    assert (wrapper.layer.format, wrapper.layer.down_format) == ("q4_k", "q6_k")
    wrapper.load_weights_from_tensors(*ref.weights(SHAPE))
    assert torch.equal(run(wrapper), run(ref.loaded(SHAPE, "LLAMAFILE")))


@pytest.mark.parametrize("names", [("gate_bias", "up_bias", "down_bias"), ("down_bias",)], ids=" ".join)
def test_biases_come_back_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    sizes = {"gate_bias": SHAPE.inter, "up_bias": SHAPE.inter, "down_bias": SHAPE.hidden}
    biases = {name: torch.randn(SHAPE.experts, sizes[name]) for name in names}
    weights = ref.weights(SHAPE)
    direct = ref.make(SHAPE, "AMXINT8", layer_idx=LAYER)
    direct.load_weights_from_tensors(*weights, **biases)
    kept = ref.make(SHAPE, "AMXINT8", weight_path=tmp_path, layer_idx=LAYER, cpu_save=True)
    kept.load_weights_from_tensors(*weights, **biases)
    shuffle = [2, 0, 1]
    plain = ref.make(SHAPE, "AMXINT8", layer_idx=LAYER)
    plain.load_weights_from_tensors(*(w[shuffle] for w in weights), **{n: b[shuffle] for n, b in biases.items()})
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", lambda *_: pytest.fail("an expert was packed"))
    again = ref.make(SHAPE, "AMXINT8", weight_path=tmp_path, layer_idx=LAYER)
    again.load_weights(torch.tensor(shuffle))
    assert torch.equal(run(kept), run(direct))
    assert torch.equal(run(again), run(plain))
    assert again.layer.packed_bytes == direct.layer.packed_bytes
