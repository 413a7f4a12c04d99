"""The entry point: ``ktmoe VERB ...`` or ``python -m ktmoe.cli VERB ...``.

Exit codes: 0 done, 1 failed (the message says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import metadata

import typer

from ktmoe.cli import console
from ktmoe.cli.cache import HELP as CACHE
from ktmoe.cli.cache import cache
from ktmoe.cli.demo import HELP as DEMO
from ktmoe.cli.demo import demo
from ktmoe.cli.doctor import HELP as DOCTOR
from ktmoe.cli.doctor import doctor
from ktmoe.cli.generate import HELP as GENERATE
from ktmoe.cli.generate import generate
from ktmoe.cli.quantize import HELP as QUANTIZE
from ktmoe.cli.quantize import quantize
from ktmoe.cli.sft import HELP as SFT
from ktmoe.cli.sft import sft
from ktmoe.cli.verify import HELP as VERIFY
from ktmoe.cli.verify import verify

app = typer.Typer(
    name="ktmoe",
    help="MoE experts on the CPU: fine-tune and run Hugging Face models whose experts do not fit the GPU.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_VERBS = (
    (doctor, DOCTOR),
    (sft, SFT),
    (generate, GENERATE),
    (quantize, QUANTIZE),
    (verify, VERIFY),
    (cache, CACHE),
    (demo, DEMO),
)
for verb, text in _VERBS:
    app.command(verb.__name__, help=text)(verb)


def version() -> str:
    """The installed version, or "unknown" when the package runs from a source tree."""
    try:
        return metadata.version("ktmoe")
    except metadata.PackageNotFoundError:
        return "unknown"


def _show_version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"ktmoe {version()}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and leave."
    ),
) -> None:
    pass


def main() -> None:
    """Runs the command line and ends the process."""
    # torch's OpenMP threads spin when they have nothing to do, on the very cores that the experts then need; on a
    # machine with busy neighbours that made training ten times slower. Read when torch is loaded, so not later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Renamings inside transformers and PEFT are not the user's business.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except KeyboardInterrupt:
        console.err.print("Interrupted.")
        sys.exit(130)
    except console.EXPECTED as error:
        console.report(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
