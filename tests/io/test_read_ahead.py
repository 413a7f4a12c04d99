"""One item ahead, never more, and nothing running afterwards."""

from __future__ import annotations

import threading

import pytest

from ktmoe.io.read_ahead import read_ahead


class Source:
    """Counts the values that are alive."""

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self.read_by: list[str] = []
        self.lock = threading.Lock()
        self.started = [threading.Event() for _ in range(21)]

    def read(self, item: int) -> Value:
        self.started[item].set()
        self.read_by.append(threading.current_thread().name)
        return Value(self)


class Value:
    def __init__(self, source: Source) -> None:
        self.source = source
        with source.lock:
            source.alive += 1
            source.peak = max(source.peak, source.alive)

    def __del__(self) -> None:
        with self.source.lock:
            self.source.alive -= 1


def test_order_and_bound() -> None:
    source, order = Source(), []

    def use(item: int, value: Value) -> None:
        order.append(item)
        assert item == 19 or source.started[item + 1].wait(30)

    read_ahead(source.read, range(20), use)
    assert order == list(range(20))
    assert source.peak == 2
    assert source.alive == 0
    assert all(name.startswith("ktmoe-read") for name in source.read_by)


def test_the_next_is_read_while_one_is_used() -> None:
    second = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second.set()
        return item

    def use(item: int, value: int) -> None:
        assert item or second.wait(30)  # would time out if item 1 were read only after item 0 was used

    read_ahead(read, range(2), use)
    assert second.is_set()


def test_nothing_to_do() -> None:
    read_ahead(lambda item: pytest.fail("read"), [], lambda item, value: pytest.fail("used"))


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("where", ["read", "use"])
def test_errors_end_it(error: BaseException, where: str) -> None:
    reads: list[int] = []
    used: list[int] = []

    def read(item: int) -> int:
        reads.append(item)
        if where == "read" and item == 2:
            raise error
        return item

    def use(item: int, value: int) -> None:
        if where == "use" and item == 2:
            raise error
        used.append(item)

    with pytest.raises(type(error)):
        read_ahead(read, range(10), use)
    assert used == [0, 1]
    assert max(reads) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ktmoe-read")]
