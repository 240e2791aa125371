"""Fills arriving layers in the background, behind whoever waits for a page.

What comes next: first the neighbourhood of the pages that were touched last, then what guests are known to ask for
first (image/working_set.py), then all others from the beginning on. Asked for is only what is absent, not on its
way, known to be more than zeros, and named by some table: what guests have overwritten or given back meanwhile is
never fetched.
"""

import math
from collections import deque
from functools import partial
from typing import Final

import numpy as np
import trio

from ramfs.arrival.fetch import LARGEST, Arrival, together
from ramfs.errors import SourceError
from ramfs.image.table import Mask, runs_of
from ramfs.pager import Pager
from ramfs.store.images import Image
from ramfs.store.presence import ABSENT
from ramfs.units import PAGE_SHIFT, LayerId, pages

#: Pages that are looked at in one go: 64 MiB; and how few are left of these when it is time to look at the next ones.
_WINDOW: Final = 1 << 14
_SOON: Final = 1 << 12
#: Pages behind one that was touched that come before all others: 4 MiB.
_AHEAD: Final = 1 << 10
#: Touched places that are remembered.
_TOUCHED: Final = 64
#: Fetches at the same time, at most; and for how many seconds the source has work: what is touched on a slow line
#: must not wait long behind it.
_MOST: Final = 8
_LEAD: Final = 0.05
#: Seconds of latency from which on the stream goes on while somebody waits, for what is asked for behind his page does
#: not hold that up. (On shorter lines it does: a piece costs the loop up to one millisecond.) Then there are so many
#: fetches at most, and the source has work for so many times the latency.
_FAR: Final = 5e-3
_MOST_FAR: Final = 16
_LEADS: Final = 2.0
#: The rate is that of the last few seconds.
_MEMORY: Final = 2.0
#: Bytes of a piece where the source is slow. Smaller ones cost the loop more time than those who wait win by them.
_LEAST: Final = 256 << 10
#: Fetches at the same time, at least; and no more for so many seconds after somebody has waited: another one may soon,
#: and then for the loop too.
_FEWEST: Final = 2
_LATELY: Final = 0.05
#: Seconds after which it is looked anew who names pages of the layer.
_LOOK_AGAIN: Final = 0.1
#: ... and of a paused stream, whether something is left to wait for: all may have been touched.
_PAUSED: Final = 1.0


class Throttle:
    """How fast the stream may go. ``rate`` is in bytes a second, 0 for no limit."""

    def __init__(self, rate: int = 0) -> None:
        self.rate = rate
        self.go = trio.Event()
        self.go.set()
        self._free_at = 0.0

    def pause(self) -> None:
        """Let nothing be streamed until :meth:`resume`."""
        if self.go.is_set():
            self.go = trio.Event()

    def resume(self) -> None:
        """Go on."""
        self.go.set()

    @property
    def paused(self) -> bool:
        """Does the stream stand?"""
        return not self.go.is_set()

    async def wait(self, length: int) -> None:
        """Until the next ``length`` bytes may be asked for."""
        await self.go.wait()
        if self.rate:
            now = trio.current_time()
            self._free_at = max(self._free_at, now - _LEAD)
            wait, self._free_at = self._free_at - now, self._free_at + length / self.rate
            if wait > 0:
                await trio.sleep(wait)


class Stream:
    """What is left of one layer, on its way."""

    def __init__(self, pager: Pager, arrival: Arrival, throttle: Throttle) -> None:
        self._pager = pager
        self._arrival = arrival
        self._throttle = throttle
        self._runs: deque[tuple[int, int]] = deque()
        self._left = 0
        """pages in them"""
        self._ahead: deque[tuple[int, int]] = deque()
        """what comes before all that is in order"""
        self._cursor = 0
        self._end = len(arrival.presence.states)
        self._looking = trio.Lock()
        self._began = 0.0
        self._fetched = 0
        self._at_once = _FEWEST
        self._piece = _LEAST
        self._more = trio.Event()
        self._users: list[Image] = []
        self._names: dict[LayerId, int] = {}
        self._failed: SourceError | None = None
        self._look_again = -math.inf

    async def run(self) -> None:
        """Return when all that tables name of the layer is here, or it is gone.

        Raises SourceError when all is here but what the source cannot give, and other RamfsErrors, OSError.
        """
        try:
            while not await self._is_complete():
                self._cursor, self._began, self._fetched = 0, trio.current_time(), 0
                self._ahead = self._arrival.first.copy()
                self._at_once = _FEWEST
                await together(partial(self._work, number) for number in range(_MOST_FAR))
                if self._failed is not None:
                    raise self._failed
        finally:
            self._let_go()

    async def _is_complete(self) -> bool:
        for first in range(0, self._end, _WINDOW):
            if not self._arrival.is_arriving:
                return True
            # On its way counts as lacking: the fetch may fail.
            absent = self._arrival.presence.states[first : first + _WINDOW] == ABSENT
            if (absent & self._named(first, first + len(absent))).any():
                return False
            await trio.lowlevel.checkpoint()
        return True

    async def _work(self, number: int) -> None:
        """One of several that fetch at the same time."""
        while (piece := await self._turn(number)) is not None:
            for run in await self._released(*piece):
                error = await self._arrival.fetch(*run)
                if error is None:
                    self._adapt((run[1] - run[0]) << PAGE_SHIFT)
                else:
                    self._failed = error
                    self._arrival.touched.clear()  # or it would try these again and again
        self._wake()  # those who wait for their turn

    async def _turn(self, number: int) -> tuple[int, int] | None:
        """What one of them is to fetch next, once there are to be so many; None at the end."""
        while number >= self._at_once and self._arrival.is_arriving and not self._is_at_end:
            await self._more.wait()
        if not self._arrival.is_arriving:
            return None
        return self._touched() or await self._next()

    async def _released(self, first: int, stop: int) -> list[tuple[int, int]]:
        """What is lacking of a piece when its time has come: some may have come meanwhile, or be wanted no more."""
        while self._throttle.paused and self._lacking(first, stop):
            with trio.move_on_after(_PAUSED):
                await self._throttle.go.wait()
        if not self._throttle.paused:
            await self._throttle.wait((stop - first) << PAGE_SHIFT)
            if self._arrival.latency < _FAR:
                await self._arrival.calm()
        return self._lacking(first, stop)

    def _adapt(self, fetched: int) -> None:
        """Keep the source busy for a moment, at the rate at which pieces came of late, with as few as that takes."""
        now = trio.current_time()
        spent = now - self._began
        if spent > _MEMORY:
            spent, self._fetched = spent / 2, self._fetched // 2
            self._began = now - spent
        self._fetched += fetched
        far = self._arrival.latency >= _FAR
        lead = _LEADS * self._arrival.latency if far else 0.0
        if now >= self._arrival.touched_at + _LATELY:
            lead = max(_LEAD, lead)
        ahead = int(self._fetched / spent * lead) if spent > 0 else 0
        self._piece = min(max(_LEAST, 1 << max(ahead.bit_length() - 2, 0)), LARGEST)
        before, self._at_once = self._at_once, min(_MOST_FAR if far else _MOST, _FEWEST + ahead // self._piece)
        if before < self._at_once:
            self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = trio.Event()

    # -- what comes next

    @property
    def _is_at_end(self) -> bool:
        return self._cursor >= self._end and not self._runs and not self._ahead

    def _cut(self, first: int, stop: int) -> tuple[int, int]:
        """The next piece of a run."""
        return first, min(stop, first + (self._piece >> PAGE_SHIFT))

    def _touched(self) -> tuple[int, int] | None:
        """A piece behind a page that was touched lately."""
        touched = self._arrival.touched
        del touched[:-_TOUCHED]
        while touched:
            at = touched[-1]
            runs = self._lacking(at, min(at + _AHEAD, self._end))
            if runs:
                return self._cut(*runs[0])
            touched.pop()
        return None

    async def _next(self) -> tuple[int, int] | None:
        """The next piece in order; None when the end is reached."""
        while (self._ahead or self._cursor < self._end) and (
            not self._runs or (self._left < _SOON and not self._looking.locked())
        ):
            async with self._looking:
                if self._left < _SOON and self._ahead:
                    await self._look_at(*self._ahead.popleft())
                elif self._left < _SOON and self._cursor < self._end:
                    first, stop = self._cursor, min(self._cursor + _WINDOW, self._end)
                    await self._look_at(first, stop)
                    self._cursor = stop
        if not self._runs:
            return None
        run = self._runs.popleft()
        first, stop = self._cut(*run)
        self._left -= stop - first
        if stop < run[1]:
            self._runs.appendleft((stop, run[1]))
        return first, stop

    async def _look_at(self, first: int, stop: int) -> None:
        """Note what is to be fetched of the next window."""
        await self._note_zeros(first, stop)
        found = self._lacking(first, stop)
        self._runs.extend(found)
        self._left += sum(b - a for a, b in found)
        if not self._fetched:  # to connect, and to learn where zeros are, says nothing of the rate
            self._began = trio.current_time()

    async def _note_zeros(self, first: int, stop: int) -> None:
        """Ask the source what it has only zeros of."""
        source = self._arrival.source
        while first < stop and self._lacking(first, stop):
            offset, end = first << PAGE_SHIFT, min(stop << PAGE_SHIFT, source.size)
            extents = await source.extents(offset, end - offset)
            for extent in extents:
                low, high = extent.offset, extent.offset + extent.length
                last = pages(high) if high >= source.size else high >> PAGE_SHIFT
                if extent.zero and pages(low) < last:
                    self._arrival.note_zeros(pages(low), last)
            reached = extents[-1].offset + extents[-1].length
            first = max(first + 1, pages(reached) if reached >= source.size else reached >> PAGE_SHIFT)

    def _lacking(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The runs within a range that are absent, not on their way, and named by some table."""
        runs = self._arrival.unasked(first, stop)
        if not runs:
            return []
        named = self._named(first, stop)
        return [(a + c, a + d) for a, b in runs for c, d in runs_of(named[a - first : b - first])]

    def _named(self, first: int, stop: int) -> Mask:
        """Which pages of the layer's file some table names, now."""
        if trio.current_time() > self._look_again:
            self._find_users()
        found: Mask = np.zeros(stop - first, np.bool_)
        for image in self._users:
            for name, shift in self._names.items():
                low, high = max(first - shift, 0), min(stop - shift, image.pages)
                if low < high:
                    found[low + shift - first : high + shift - first] |= image.table.entries[low:high] == name
        return found

    def _find_users(self) -> None:
        """Look which images may name pages of the layer. (A new one names none that no other names already.)"""
        images = self._pager.images
        self._let_go()
        self._names = self._pager.layers.names_of(self._arrival.layer)
        for number in images.naming(self._names):
            self._users.append(images.acquire(number))
        self._look_again = trio.current_time() + _LOOK_AGAIN

    def _let_go(self) -> None:
        while self._users:
            self._pager.images.release(self._users.pop())
