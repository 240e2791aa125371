"""What is streamed while others wait for pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trio
import trio.testing
from arrival.inside import ArrivingKit, Item, Shelf

from ramfs.pager import Absent
from ramfs.source.base import PageSource
from ramfs.store.presence import ABSENT
from ramfs.units import PAGE

COUNT = 8192
#: Seconds of a read.
FAR = 0.02


class FarItem(Item):
    maximum = 256 * PAGE

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        await trio.sleep(FAR)
        await super().read_into(offset, buffer, urgent=urgent)


class FarShelf(Shelf):
    async def open(self, name: str) -> PageSource:
        return FarItem(self, name)


def test_a_long_line_is_kept_busy_while_others_wait_all_the_time(tmp_path: Path) -> None:
    kit = ArrivingKit(tmp_path / "store", FarShelf({"ram": bytes(range(1, 129)) * (COUNT * PAGE // 128)}))
    kit.pull("vm")
    layer = kit.arriving("vm/ram")
    touched = range(COUNT // 2, COUNT, 32)

    async def touch(pages: range) -> None:
        for page in pages:
            await kit.pulls.arrivals.bring(Absent(layer.id, page, page + 1))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kit.pulls.run)
            async with trio.open_nursery() as touching:
                for number in range(4):  # each in its turn, so that somebody always waits
                    touching.start_soon(touch, touched[number::4])
                    await trio.sleep(FAR / 4)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert layer.presence is not None
    assert np.count_nonzero(layer.presence.states != ABSENT) > COUNT // 2
    kit.store.close()
