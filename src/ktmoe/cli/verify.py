"""``ktmoe verify``: reads packed files again and compares every checksum."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ktmoe.cli import console

HELP = (
    "Check packed files: structure, every checksum, and the source if it can be reached. Exit code 1 if one is wrong."
)


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder made by ktmoe quantize (or by cpu_save=True).")],
) -> None:
    """Prints one line per fault; exits with 1 if there is one."""
    from ktmoe.cli.transfer import Transfer
    from ktmoe.errors import WeightFileError
    from ktmoe.io.packed_dir import packed_file_of, packed_layers, read_packed_index
    from ktmoe.io.packed_file import read_info
    from ktmoe.io.packed_verify import verify_packed

    index = read_packed_index(str(folder))
    faults: list[str] = []
    files: list[tuple[str, int]] = []
    for layer in packed_layers(str(folder), index):
        try:
            path = packed_file_of(str(folder), layer)
            info = read_info(path)
            if info.layer != layer:
                raise WeightFileError(f"{path}: layer: got {info.layer}, expected {layer}")
            files.append((path, info.n_experts))
        except WeightFileError as error:
            faults.append(str(error))
    with Transfer("verifying", sum(n for _, n in files) or 1) as bar:
        for path, n_experts in files:
            bar.note(os.path.basename(path))
            done = bar.done
            try:
                verify_packed(path, bar.step)
            except WeightFileError as error:
                faults.append(str(error))
                bar.step(0, n_experts - (bar.done - done))
    source = _source_fault(index.source_path, index.source, faults)
    for fault in faults:
        console.err.print(f"[bold red]Wrong:[/] {escape(fault)}")
    if faults:
        raise typer.Exit(1)
    console.out.print(
        f"{len(files)} layers as {index.method}, {bar.nbytes / 2**30:.2f} GiB: all checksums fit. {source}"
    )


def _source_fault(path: str, expected: str, faults: list[str]) -> str:
    """What can be said about the source; adds to the faults if it has changed."""
    from ktmoe.io.fingerprint import folder_fingerprint

    try:
        current = folder_fingerprint(path)
    except OSError:
        return f"The source, {path or 'unknown'}, cannot be reached."
    if current != expected:
        faults.append(f"{path}: the weight files are not those that were packed (their sizes or times differ)")
    return f"The source, {path}, has not changed."
