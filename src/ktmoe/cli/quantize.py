"""``ktmoe quantize``: packs a model's experts into files that load by mapping."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ktmoe.cli import console

HELP = "Pack the experts of a model for one method, into files that load at once. It can be interrupted and goes on."


def quantize(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the packed files.")],
    method: Annotated[str, typer.Option("--method", "-m", help="How the experts are to be held.")] = "AMXINT8",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    group_size: Annotated[int, typer.Option(help="32, 64 or 128: of RAWINT4 from floats.")] = 32,
    zero_point: Annotated[
        bool, typer.Option("--zero-point", help="One for each group of RAWINT4 from floats.")
    ] = False,
    gguf_type: Annotated[str, typer.Option(help="Q4_K, Q8_0, Q4_0 or MXFP4: LLAMAFILE from floats.")] = "Q4_K",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per physical core.")] = None,
) -> None:
    """Writes one file per layer. Exit code 130 if interrupted: the same command goes on."""
    from ktmoe.methods import METHODS, resolve

    resolve(method, METHODS[method].mode if method in METHODS else "inference")
    from ktmoe.cli.packed_model import PackedModel
    from ktmoe.config import check_format_options

    options = {"group_size": group_size, "zero_point": zero_point, "gguf_type": gguf_type}
    check_format_options(**options)
    job = PackedModel(model_folder(model, revision), output, method, threads, **options)
    job.prepare()
    need, free = job.missing_bytes(), shutil.disk_usage(output).free
    if need > free:
        raise console.UserError(f"{output}: need {need / 2**30:.2f} GiB, have {free / 2**30:.2f} GiB of disk space")
    already = job.finished
    try:
        speed = job.run()
    except KeyboardInterrupt:
        console.err.print(
            f"Interrupted: {job.finished} of {len(job.layers)} layers are finished. The same command goes on."
        )
        raise typer.Exit(130) from None
    size = sum(file.stat().st_size for file in output.glob("ktmoe-layer-*.safetensors"))
    how = f"{already} of them were finished" if already else speed
    console.out.print(f"{len(job.layers)} layers as {method} in {output}: {size / 2**30:.2f} GiB, {how}")


def model_folder(model: str, revision: str | None = None) -> str:
    """A model's folder or GGUF file. A Hub id is downloaded: weights, index, config. UserError if there is none."""
    from ktmoe.io.gguf_file import is_gguf

    if os.path.isdir(model) or is_gguf(model):
        return model
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise console.UserError(f"there is no model folder or GGUF file {model}")
    from huggingface_hub import snapshot_download

    return snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"])
