"""Where the command line writes, and how it reports what the user can fix."""

from __future__ import annotations

import os

from rich.console import Console
from rich.markup import escape

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class UserError(Exception):
    """Something the user can put right. The text says what and how; it is shown without a traceback."""


# What the library and its neighbours raise for bad input, missing files and missing packages.
EXPECTED = (UserError, ValueError, NotImplementedError, RuntimeError, OSError, ImportError, MemoryError)


def report(error: BaseException) -> None:
    """Prints an error as one block; KTMOE_TRACEBACK=1 asks for the whole story."""
    if os.environ.get("KTMOE_TRACEBACK") == "1":
        err.print_exception()
    text = str(error).strip() or type(error).__name__
    err.print(f"[bold red]Error:[/] {escape(text)}")
