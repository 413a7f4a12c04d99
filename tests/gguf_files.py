"""Makers of GGUF files, good and bad."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

Tensors = dict[str, tuple[str, np.ndarray]]
"""Name -> type name and bytes."""
Stacks = tuple[tuple[str, np.ndarray], tuple[str, np.ndarray], tuple[str, np.ndarray]]
"""(type name, bytes [E, n, bytes of a row]) of gate, up and down."""

# Where the fp16 scales of a block are.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "MXFP4": (),
}
TYPES = [*_HALVES, "F32", "F16", "BF16"]


def random_rows(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """uint8 [..., n, bytes of a row]: any codes, with scales that make weights of order 1 / sqrt(k)."""
    *lead, k = shape
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    weights = rng.standard_normal(shape).astype(np.float32) / k**0.5
    if kind == "F32":
        return weights.view(np.uint8)
    if kind == "F16":
        return weights.astype(np.float16).view(np.uint8)
    if kind == "BF16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = rng.integers(0, 256, (*lead, k // block, nbytes), dtype=np.uint8)
    for at in _HALVES[kind]:
        scale = rng.uniform(0.5, 1.0, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(119, 123, blocks.shape[:-1])
    rows = blocks.reshape(*lead, -1)
    # The right order of magnitude, through the scales alone.
    sample = rows.reshape(-1, rows.shape[-1])[:16]
    size = float(np.sqrt(np.mean(decode(kind, sample).astype(np.float64) ** 2)) * k**0.5)
    for at in _HALVES[kind]:
        scale = (blocks[..., at : at + 2].copy().view(np.float16) / size).astype(np.float16)
        blocks[..., at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(*lead, -1)


def decode(kind: str, rows: np.ndarray) -> np.ndarray:
    """fp32 [..., n, k], by the gguf package."""
    return gguf.quants.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[kind])


def random_stacks(types: tuple[str, str, str], experts: int, hidden: int, inter: int, seed: int = 0) -> Stacks:
    """Random experts of these types."""
    rng = np.random.default_rng(seed)
    shapes = ((experts, inter, hidden), (experts, inter, hidden), (experts, hidden, inter))
    gate, up, down = ((kind, random_rows(kind, shape, rng)) for kind, shape in zip(types, shapes, strict=True))
    return gate, up, down


def layer_tensors(stacks: Stacks, layer: int) -> Tensors:
    """The names of today."""
    return {f"blk.{layer}.ffn_{p}_exps.weight": s for p, s in zip(("gate", "up", "down"), stacks, strict=True)}


def fused_tensors(stacks: Stacks, layer: int) -> Tensors:
    """Gate above up."""
    gate, up, down = stacks
    assert gate[0] == up[0]
    return {
        f"blk.{layer}.ffn_gate_up_exps.weight": (gate[0], np.concatenate((gate[1], up[1]), 1)),
        f"blk.{layer}.ffn_down_exps.weight": down,
    }


def old_tensors(stacks: Stacks, layer: int) -> Tensors:
    """One tensor an expert."""
    return {
        f"blk.{layer}.ffn_{p}.{e}.weight": (kind, rows[e])
        for p, (kind, rows) in zip(("gate", "up", "down"), stacks, strict=True)
        for e in range(rows.shape[0])
    }


def write(path: Path, tensors: Tensors, per_file: int = 0, **keys: object) -> Path:
    """A file by the official writer, or with `per_file` a set of them. Returns the (first) file.

    keys: `alignment`, or numbers of the architecture such as `block_count`.
    """
    writer = gguf.GGUFWriter(path, "qwen3moe", split_max_tensors=per_file)
    writer.add_string("general.name", "test")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(300)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(300)])
    for key, value in keys.items():
        if key == "alignment":
            writer.add_custom_alignment(value)
        else:
            writer.add_uint32(f"qwen3moe.{key}", value)
    for name, (kind, rows) in tensors.items():
        quant = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, rows.view(np.float32 if kind == "F32" else np.float16))
        else:
            writer.add_tensor(name, rows, raw_dtype=quant)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Writes what `writer` has been given; the (first) file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(path.stem + "-00001-of-*.gguf"))


# --- by hand ------------------------------------------------------------------------------------------------------
def string(text: bytes) -> bytes:
    """A GGUF string."""
    return struct.pack("<Q", len(text)) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    """A key with a value of any type."""
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int, dims: int | None = None) -> bytes:
    """An entry of the tensor table; `shape` fastest first, as in the file."""
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return (
        string(name)
        + struct.pack("<I", len(shape) if dims is None else dims)
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


def raw(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    """A whole file; counts default to the true ones."""
    keys, tensors = keys or [], tensors or []
    head = magic + struct.pack(
        "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    )
    body = head + b"".join(keys) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + data
