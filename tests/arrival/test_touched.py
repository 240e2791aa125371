"""What is touched is given to who waits for it before it is stored."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from arrival.inside import ArrivingKit, Item, Shelf
from mount.posix import page_of

from ramfs.arrival.fetch import Arrival
from ramfs.source.base import PageSource, Rest
from ramfs.store.presence import ABSENT, STORED, ZEROS
from ramfs.store.repair import check_store
from ramfs.units import PAGE

COUNT = 40
EMPTY = 11
DATA = b"".join(bytes(PAGE) if n == EMPTY else page_of(n + 1) for n in range(COUNT)) + b"ragged"


class NearItem(Item):
    """Its replies come in a moment; or, where that is ``far``, soon after."""

    maximum = 256 * PAGE

    def read_soon(self, offset: int, buffer: memoryview, patience: float, meanwhile: Callable[[], None]) -> Rest | None:
        assert isinstance(self.shelf, NearShelf)
        if self.shelf.far:
            return partial(self.read_into, offset, buffer)
        self.shelf.asked += 1
        meanwhile()
        for page in range(offset // PAGE, -(-(offset + len(buffer)) // PAGE)):
            self.shelf.fetched[self.description, page] += 1
        buffer[:] = self.data[offset : offset + len(buffer)]
        return None


class NearShelf(Shelf):
    far = False
    asked = 0

    async def open(self, name: str) -> PageSource:
        return NearItem(self, name)


class Reader:
    """Who waits for pages, and what was here when he got them."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.got: list[bytes] = []
        self.states: list[int] = []

    def __call__(self, data: memoryview) -> bool:
        self.got.append(bytes(data))
        self.states = self.arrival.presence.states.tolist()
        return True

    def touch(self, first: int, stop: int, low: int, high: int) -> Rest | None:
        return self.arrival.bring_soon(first, stop, low, high, self)


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[ArrivingKit]:
    kit = ArrivingKit(tmp_path / "store", NearShelf({"ram": DATA}))
    kit.pull("vm", paused=True)
    kit.fetch(kit.arriving("vm/ram"), 39, 40)  # so that it is connected
    yield kit
    kit.store.close()
    assert not check_store(str(kit.directory)).damaged


def arrival_of(kit: ArrivingKit) -> Arrival:
    return kit.pulls.running[0].arrivals[0]


def check(kit: ArrivingKit, first: int, stop: int) -> None:
    """Are these pages what they should be?"""
    found = kit.pager.copy_out(kit.image("vm/ram"), first * PAGE, (stop - first) * PAGE)
    assert found == DATA[first * PAGE : stop * PAGE]


def run(kit: ArrivingKit, work: Callable[[Arrival], Awaitable[object]]) -> None:
    kit.run(lambda: work(arrival_of(kit)), streaming=False)


def test_it_is_given_then_stored(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        reader = Reader(arrival)
        assert reader.touch(5, 6, 0, 16) is None
        assert reader.got == [DATA[5 * PAGE : 6 * PAGE]]
        assert reader.states[:16] == [ABSENT] * 16
        here = (kit.directory / "layers").glob("*.here")
        assert not any(next(here).read_bytes()[:16]), "a daemon that is killed now fetches it again"
        await trio.testing.wait_all_tasks_blocked()
        assert arrival.presence.states[:16].tolist() == [ZEROS if n == EMPTY else STORED for n in range(16)]

    run(kit, work)
    check(kit, 0, 16)
    assert set(kit.shelf.fetched.values()) == {1}


def test_it_is_stored_while_the_next_one_is_on_its_way(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        reader = Reader(arrival)
        reader.touch(5, 6, 0, 8)
        reader.touch(20, 21, 16, 24)
        assert reader.states[:8] == [STORED] * 8
        assert reader.states[16:24] == [ABSENT] * 8

    run(kit, work)
    check(kit, 0, 8)
    check(kit, 16, 24)


def test_its_neighbours_are_given_before_they_are_stored_too(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        reader = Reader(arrival)
        reader.touch(5, 6, 0, 8)
        assert reader.touch(6, 8, 0, 8) is None
        assert reader.got == [DATA[5 * PAGE : 6 * PAGE], DATA[6 * PAGE : 8 * PAGE]]
        assert reader.states[:8] == [ABSENT] * 8
        rest = reader.touch(7, 9, 0, 16)  # one of these is still at the source
        assert rest is not None
        await rest()
        assert arrival.presence.here(0, 9)

    run(kit, work)
    assert kit.shelf.fetched["ram", 7] == kit.shelf.fetched["ram", 8] == 1


def test_who_needs_it_stored_finds_it_so(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        Reader(arrival).touch(5, 6, 0, 8)
        await arrival.bring(4, 7)
        assert arrival.presence.here(0, 8)
        Reader(arrival).touch(20, 21, 16, 24)
        await arrival.settle()
        assert arrival.presence.here(16, 24)

    run(kit, work)
    assert set(kit.shelf.fetched.values()) == {1}


def test_the_end_of_a_file_is_given_with_zeros_behind_it(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        reader = Reader(arrival)
        reader.touch(COUNT, COUNT + 1, COUNT, COUNT + 1)
        assert reader.got == [b"ragged".ljust(PAGE, b"\0")]

    run(kit, work)
    check(kit, COUNT, COUNT + 1)


def test_it_is_given_as_soon_as_it_comes_from_far_away(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        assert isinstance(kit.shelf, NearShelf)
        kit.shelf.far = True
        reader = Reader(arrival)
        rest = reader.touch(5, 6, 0, 8)
        assert rest is not None
        assert not reader.got
        await rest()
        assert reader.got == [DATA[5 * PAGE : 6 * PAGE]]
        assert reader.states[:8] == [ABSENT] * 8

    run(kit, work)
    check(kit, 0, 8)


def test_a_large_read_is_given_too_and_says_nothing_of_small_ones(tmp_path: Path) -> None:
    data = b"".join(page_of(n + 1) for n in range(256))
    kit = ArrivingKit(tmp_path / "store", NearShelf({"ram": data}))
    kit.pull("vm", paused=True)
    kit.fetch(kit.arriving("vm/ram"), 255, 256)

    async def work(arrival: Arrival) -> None:
        assert isinstance(kit.shelf, NearShelf)
        reader = Reader(arrival)
        arrival.reach = 64
        kit.shelf.far = True
        for first in range(0, 240, 80):
            rest = reader.touch(first, first + 80, first, first + 80)
            assert rest is not None
            await trio.sleep(1)
            await rest()
        assert arrival.reach == 64
        assert b"".join(reader.got) == data[: 240 * PAGE]

    run(kit, work)
    assert set(kit.shelf.fetched.values()) == {1}
    kit.store.close()


def test_who_is_not_content_with_it_waits_until_it_is_stored(kit: ArrivingKit) -> None:
    async def work(arrival: Arrival) -> None:
        assert arrival.bring_soon(5, 6, 0, 8, lambda data: False) is None
        assert arrival.presence.here(0, 8)

    run(kit, work)


def test_without_room_nothing_is_lost(
    kit: ArrivingKit, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("the store is full")
    full = True

    def write(*words: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before(*words)

    file = kit.pager.layers.file(kit.arriving("vm/ram"))
    before = file.write
    monkeypatch.setattr(type(file), "write", lambda self, *words: write(*words))

    async def work(arrival: Arrival) -> None:
        nonlocal full
        first, second = Reader(arrival), Reader(arrival)
        first.touch(5, 6, 0, 8)
        await trio.testing.wait_all_tasks_blocked()
        assert first.got == [DATA[5 * PAGE : 6 * PAGE]]
        assert arrival.presence.states[:8].tolist() == [ABSENT] * 8
        rest = second.touch(20, 21, 16, 24)
        assert rest is not None
        assert not second.got, "what cannot be stored is not held for everybody"
        with trio.move_on_after(5):
            await rest()
        assert not arrival.presence.here(20, 21)
        full = False
        await arrival.bring(5, 6)
        await arrival.bring(20, 21)

    run(kit, work)
    check(kit, 0, 8)
    check(kit, 16, 24)
    assert set(kit.shelf.fetched.values()) == {1}
