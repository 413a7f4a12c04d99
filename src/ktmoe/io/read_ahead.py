"""Reading the next thing while the present one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def read_ahead(read: Callable[[Item], Value], items: Iterable[Item], use: Callable[[Item, Value], None]) -> None:
    """Calls use(item, read(item)) for each item, in order; `read` runs one item ahead in a thread of its own.

    At most two values exist at a time. An exception of either, or an interrupt, ends it at once; when this returns or
    raises, no read is running any more, so that the caller may close what it reads from.
    """
    queue = iter(items)
    with ThreadPoolExecutor(1, "ktmoe-read") as thread:

        def start() -> tuple[Item, Future[Value]] | None:
            for item in queue:
                return item, thread.submit(read, item)
            return None

        following = start()
        while following is not None:
            item, future = following
            value = future.result()
            del future, following  # they hold the value
            following = start()
            use(item, value)
            del value
