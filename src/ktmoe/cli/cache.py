"""``ktmoe cache``: what is in the cache of packed experts, and clearing it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer
from rich.markup import escape

from ktmoe import cache as store
from ktmoe.cli import console

HELP = "List the cache of packed experts, or clear it. KTMOE_CACHE moves it, KTMOE_CACHE=off turns it off."


class Action(str, Enum):
    """What to do."""

    LIST = "list"
    CLEAR = "clear"


def cache(action: Annotated[Action, typer.Argument(help="list or clear")] = Action.LIST) -> None:
    """Prints the entries with their sizes, or deletes them."""
    folder = store.packed_root()
    if folder is None:
        console.out.print("The cache is off (KTMOE_CACHE).")
    elif action is Action.CLEAR:
        console.out.print(f"Freed {store.clear() / 2**30:.2f} GiB in {escape(str(folder))}")
    else:
        entries = store.entries()
        for entry in entries:
            console.out.print(f"{entry.nbytes / 2**30:9.2f} GiB  {escape(entry.path.name)}")
        total = sum(entry.nbytes for entry in entries)
        console.out.print(f"{total / 2**30:9.2f} GiB  in {escape(str(folder))}")
