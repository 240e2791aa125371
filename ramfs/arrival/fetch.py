"""Absent pages are brought from their source, each once.

    a page that is     touched (bring)                            streamed (fetch)
    here               nothing to do                              nothing to do
    absent             a fetch of its own, which overtakes        a fetch, when nobody waits for one
    on its way         waits for that fetch                       nothing to do

A fetch that the source cannot answer (an unreadable block, a page with a wrong digest) is made anew for each of its
pages, so that the good ones are not held up. For one that somebody has touched it goes on until it succeeds.

One event for each fetch, set when it has succeeded and when it has failed; whoever waited looks again. Bytes go
first into the layer's file, then the states of their pages change: a killed daemon leaves pages absent that were
here already, never the other way round.

Who reads what is touched is answered out of the buffer, and it is stored after that, which takes as long as to
receive it: while the next one is on its way, if that is touched at once, or by a task. Until then it is on its way for
all others. So it is in a full store, until there is room; then nobody else is answered before his pages are stored.
"""

import contextlib
import errno
import logging
import math
import mmap
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import trio

from ramfs.errors import RamfsError, SourceError
from ramfs.image.pages import nonzero_pages
from ramfs.image.table import NORESERVE, Mask, runs_of
from ramfs.pager import Absent, Pager
from ramfs.source.base import Rest, read_soon
from ramfs.source.retry import RetrySource, of_one_read
from ramfs.store.images import Image
from ramfs.store.layers import Layer
from ramfs.store.presence import ABSENT, STORED, ZEROS, Presence
from ramfs.units import PAGE, PAGE_SHIFT, LayerId

log = logging.getLogger(__name__)

#: Bytes of the largest fetch, and thus of a buffer: each costs the loop the same work besides what its bytes cost.
LARGEST: Final = 1 << 20
#: Pages of the largest that brings the neighbours of what is touched along.
_NEAR: Final = 64
#: Seconds that a fetch may keep everything else waiting, where that is usually enough: a reply over loopback takes
#: less than to let another task have its turn, and come back.
_GLANCE: Final = 150e-6 if (os.cpu_count() or 1) > 1 else 0.0
#: Seconds without any progress for those who wait, after which the stream waits for them no more.
_STUCK: Final = 0.5
#: Buffers that are kept.
_BUFFERS: Final = 12
#: After so many fetches that took longer only each so manieth is waited for.
_MISSES: Final = 4
_TRY_AGAIN: Final = 32
#: Of the time that a page alone takes, what it may take with its neighbours, which are up to 63.
_DEAR: Final = 4
#: Seconds between attempts to store pages for which the store has no room.
_FULL_AGAIN: Final = 1.0


#: Is given the bytes of pages as soon as they are there, and tells whether that was all that was wanted.
Answer = Callable[[memoryview], bool]


@dataclass(slots=True)
class Counts:
    """What arrived. Bytes are of whole pages."""

    fetched_bytes: int = 0
    """read from the source, and stored"""
    demand_faults: int = 0
    """times that somebody waited for absent pages"""
    demand_seconds: float = 0.0
    """how long they waited, together"""
    slowest: float = 0.0
    """how long the one waited that waited longest, in seconds"""


@dataclass(slots=True, eq=False)
class _Flight:
    """Pages on their way."""

    first: int
    stop: int
    buffer: mmap.mmap
    view: memoryview
    """the part of the buffer that the source is to fill"""
    began: float
    before: int
    """bytes that had come by then"""
    landed: trio.Event = field(default_factory=trio.Event)

    @property
    def is_large(self) -> bool:
        """Was more asked for than is ever brought along with a page?"""
        return self.stop - self.first > _NEAR


class Arrival:
    """One arriving layer, and the source of its pages."""

    def __init__(self, pager: Pager, layer: Layer, source: RetrySource, first: Iterable[tuple[int, int]] = ()) -> None:
        assert layer.presence is not None
        self.pager = pager
        self.layer = layer
        self.presence: Presence = layer.presence
        self.source = source
        self.counts = Counts()
        self.trouble = ""
        """why nothing can be stored, while that is so"""
        self.touched: list[int] = []
        """pages after which somebody who waited will look next, the last one last; the stream takes them"""
        self.waiting = 0
        """how many wait for absent pages"""
        self.first: deque[tuple[int, int]] = deque(first)
        """the pages that guests ask for first, in that order, as far as they are not known to be here"""
        self.touched_at = -math.inf
        """when somebody had what he waited for"""
        self._idle = trio.Event()
        self._idle.set()
        self._moved = 0.0
        """when somebody began to wait, or had what he waited for"""
        self._flights: list[_Flight] = []
        self._kept: _Flight | None = None
        """one that has come, was given away, and is yet to be stored"""
        self._storing = False
        """is there a task that will?"""
        self._memory = mmap.mmap(-1, len(self.presence.states), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        self._asked: Mask = np.frombuffer(self._memory, np.bool_)
        self._buffers: list[mmap.mmap] = []
        self.reach = 1
        """pages around one that is read which come with it, a power of two"""
        self._least, self._length = 1.0, 0
        """seconds that a fetch takes at least, of late, and its bytes"""
        self._rate = 1.0
        """bytes a second that have come at most while a fetch was under way, of late"""
        self._missed = 0
        """fetches in a row that took more than a moment"""
        self._most = max(PAGE, min(LARGEST, source.maximum)) >> PAGE_SHIFT

    @property
    def is_arriving(self) -> bool:
        """Is something of it still to come, for all that is known? Not when it was deleted."""
        return self.layer.id in self.pager.layers.arriving

    # -- what is to be fetched

    def first_lacking(self) -> int:
        """Pages that guests ask for first, and that are absent."""
        while self.first and self.presence.here(*self.first[0]):
            self.first.popleft()
        return sum(int(np.count_nonzero(self.presence.states[a:b] == ABSENT)) for a, b in self.first)

    def unasked(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The runs of pages within ``[first, stop)`` that are absent and not on their way."""
        lacking = (self.presence.states[first:stop] == ABSENT) & ~self._asked[first:stop]
        return [(first + a, first + b) for a, b in runs_of(lacking)]

    def pieces(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Runs of pages, cut into what one fetch may bring."""
        return [(a, min(a + self._most, stop)) for first, stop in runs for a in range(first, stop, self._most)]

    def bring_soon(self, first: int, stop: int, low: int, high: int, answer: Answer) -> Rest | None:
        """Have pages ``[first, stop)`` here. None if they are when it returns; else what is to be awaited for that.

        With them come their neighbours within ``[low, high)``: whoever touches a page touches those next. Where
        replies usually come in a moment, that is waited for, as read_soon of source/base.py does. Where one fetch has
        them, they are given to ``answer`` before they are stored; if that was all, they may be stored later.
        """
        kept = self._kept
        if kept is not None and kept.first < stop and first < kept.stop:
            if kept.first <= first and stop <= kept.stop and answer(_part(kept, first, stop)):
                return None
            self._store_kept()
            if self.presence.here(first, stop):
                return None
        piece = self._with_neighbours(first, stop, low, high)
        if piece is None:
            return partial(self.bring, first, stop)
        flight = self._take_off(*piece)
        patience = 0.0 if flight.is_large or (self._missed >= _MISSES and self._missed % _TRY_AGAIN) else _GLANCE
        rest = read_soon(self.source, flight.first << PAGE_SHIFT, flight.view, patience, self._store_kept)
        if not flight.is_large:
            self._missed = 0 if rest is None else self._missed + 1
        if rest is not None:
            return partial(self._finish, rest, flight, first, stop, answer)
        answered = self._land(flight, first, stop, answer)
        self._count(trio.current_time() - flight.began, stop)
        return None if answered or self.presence.here(first, stop) else partial(self.bring, first, stop)

    def _land(self, flight: _Flight, first: int, stop: int, answer: Answer) -> bool:
        """Give away pages ``[first, stop)`` of what came, and have all of it stored. Was that the answer?"""
        self._measure(flight)
        self._adapt(flight)
        self._store_kept()
        self._kept = flight
        if not self._storing:
            self._storing = True
            trio.lowlevel.spawn_system_task(self._store_soon)
        if not self.trouble and answer(_part(flight, first, stop)):
            return True
        self._store_kept()
        return False

    async def _store_soon(self) -> None:
        self._storing = False
        self._store_kept()

    def _store_kept(self) -> None:
        """Store what was given away. Where that fails for want of room it is a longer wait, and a task's."""
        flight, self._kept = self._kept, None
        if flight is None:
            return
        try:
            self._write(flight)
        except (OSError, RamfsError):
            trio.lowlevel.spawn_system_task(self._store_later, flight)
        else:
            self._arrived(flight)

    async def _store_later(self, flight: _Flight) -> None:
        """Nobody may be left who waits for it, and is told of an error: who asks for it next is."""
        try:
            await self._store(flight)
        except Exception as exc:  # noqa: BLE001  (what a system task raises would end the daemon)
            log.error("%s: what came cannot be stored: %s", self.source.description, exc)
        finally:
            self._arrived(flight)

    def _with_neighbours(self, first: int, stop: int, low: int, high: int) -> tuple[int, int] | None:
        """What one fetch can bring of absent pages and those around them; None if they are more, or partly here."""
        runs = [run for run in self.unasked(low, high) if run[0] <= first and stop <= run[1]]
        if not runs or stop - first > self._most:
            return None
        if stop - first > _NEAR:
            return first, stop
        low, high = runs[0]
        low = max(low, first // _NEAR * _NEAR)
        high = min(high, low + _NEAR)
        if high < stop:
            low, high = first, stop
        return low, high

    def _adapt(self, flight: _Flight) -> None:
        """Reach as far around what is touched as takes no more time than a few pages alone would."""
        if flight.is_large:
            return
        took = trio.current_time() - flight.began
        if took > _DEAR * self._least:
            self.reach = max(1, self.reach // 2)
        elif flight.stop - flight.first > self.reach // 2:
            self.reach = min(_NEAR, self.reach * 2)

    def _measure(self, flight: _Flight) -> None:
        """Note how long one took that has come, and what else came meanwhile."""
        took = trio.current_time() - flight.began
        self._least *= 1.005
        if took < self._least:
            self._least, self._length = took, len(flight.view)
        if took > 0:
            came = self.counts.fetched_bytes + len(flight.view) - flight.before
            self._rate = max(came / took, self._rate * 0.995)

    @property
    def latency(self) -> float:
        """Seconds until the first byte of a reply comes, at least, as far as several fetches at a time have told."""
        return max(0.0, self._least - self._length / self._rate)

    async def _finish(self, rest: Rest, flight: _Flight, first: int, stop: int, answer: Answer) -> None:
        """What is left of a fetch that was begun by :meth:`bring_soon`."""
        with self._waits(flight.began, stop):
            try:
                await rest()
            except BaseException as exc:
                self._arrived(flight)
                if not isinstance(exc, SourceError) or (self.is_arriving and not of_one_read(exc)):
                    raise
            else:
                if self._land(flight, first, stop, answer):
                    return
        await self.bring(first, stop)  # it could not be answered, or not be stored yet

    async def bring(self, first: int, stop: int) -> None:
        """Return when pages ``[first, stop)`` are here, or the layer arrives no more. Raises SourceError, OSError."""
        if self.presence.here(first, stop):
            return
        with self._waits(trio.current_time(), stop):
            while self.is_arriving and not self.presence.here(first, stop):
                pieces = self.pieces(self.unasked(first, stop))
                if len(pieces) == 1:
                    await self.fetch(*pieces[0], urgent=True)
                elif pieces:
                    await together(partial(self.fetch, a, b, urgent=True) for a, b in pieces)
                else:
                    flight = next(each for each in self._flights if each.first < stop and first < each.stop)
                    if flight is self._kept:
                        self._store_kept()
                    await flight.landed.wait()

    @contextlib.contextmanager
    def _waits(self, began: float, stop: int) -> Iterator[None]:
        """Somebody waits for pages up to ``stop``."""
        self.waiting += 1
        self._moved = began
        if self.waiting == 1:
            self._idle = trio.Event()
        try:
            yield
        finally:
            self.waiting -= 1
            self._moved = trio.current_time()
            if self.waiting == 0:
                self._idle.set()
            self._count(self._moved - began, stop)

    async def settle(self) -> None:
        """Return when what is on its way now has come, or failed."""
        self._store_kept()
        for flight in list(self._flights):
            await flight.landed.wait()

    async def calm(self) -> None:
        """Return when nobody waits, or all who do wait for what does not come."""
        while self.waiting and (left := self._moved + _STUCK - trio.current_time()) > 0:
            with trio.move_on_after(left):
                await self._idle.wait()

    def _count(self, took: float, stop: int) -> None:
        counts = self.counts
        counts.demand_faults += 1
        counts.demand_seconds += took
        counts.slowest = max(counts.slowest, took)
        self.touched.append(stop)
        self.touched_at = trio.current_time()

    async def fetch(self, first: int, stop: int, *, urgent: bool = False) -> SourceError | None:
        """Fetch what of some pages is absent and not on its way.

        Returns why the source could not give some of them; never if it is ``urgent``, for then it is waited for.
        Raises SourceError, OSError.
        """
        error = None
        while self.is_arriving and (runs := self.unasked(first, stop)):
            error = await self._fetch(*runs[0], urgent) or error
            first = runs[0][1]
            if first == stop:
                break
        return error

    async def _fetch(self, first: int, stop: int, urgent: bool) -> SourceError | None:
        error = await self._carry(self._take_off(first, stop), urgent, patient=urgent and stop - first == 1)
        if error is None or stop - first == 1:
            return error
        errors: list[SourceError] = []

        async def carry(flight: _Flight) -> None:
            error = await self._carry(flight, urgent, patient=urgent)
            if error is not None:
                errors.append(error)

        await together([partial(carry, self._take_off(page, page + 1)) for page in range(first, stop)])
        return errors[0] if errors else None

    async def _carry(self, flight: _Flight, urgent: bool, patient: bool) -> SourceError | None:
        """Bring the pages of a flight. Returns an error of that read alone, unless it is to be ``patient``."""
        try:
            if patient:
                await self.source.read_into(flight.first << PAGE_SHIFT, flight.view, urgent=urgent)
            elif error := await self.source.attempt(flight.first << PAGE_SHIFT, flight.view, urgent=urgent):
                return error
            self._measure(flight)
            await self._store(flight)
            return None
        finally:
            self._arrived(flight)

    def _take_off(self, first: int, stop: int) -> _Flight:
        """Note that pages are on their way, into a buffer."""
        buffer = self._buffers.pop() if self._buffers else mmap.mmap(-1, LARGEST)
        length = min(stop << PAGE_SHIFT, self.source.size) - (first << PAGE_SHIFT)
        view = memoryview(buffer)[:length]
        flight = _Flight(first, stop, buffer, view, trio.current_time(), self.counts.fetched_bytes)
        self._flights.append(flight)
        self._asked[first:stop] = True
        return flight

    def _arrived(self, flight: _Flight) -> None:
        """They are not on their way any more, whether they came or not."""
        if len(self._buffers) < _BUFFERS:
            self._buffers.append(flight.buffer)
        self._asked[flight.first : flight.stop] = False
        self._flights.remove(flight)
        flight.landed.set()

    async def _store(self, flight: _Flight) -> None:
        """Put what came into the layer's file, and let it be here. Waits for room in the store."""
        while True:
            try:
                self._write(flight)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not self.trouble:
                    self.trouble = f"the store is full ({exc.strerror}): make room, and it goes on"
                    log.error("%s: %s", self.source.description, self.trouble)
                await trio.sleep(_FULL_AGAIN)
            else:
                self.trouble = ""
                return

    def _write(self, flight: _Flight) -> None:
        if not self.is_arriving:
            return  # deleted meanwhile
        first, data = flight.first, _part(flight, flight.first, flight.stop)
        self.pager.images.unsynced.add(self.layer.id)
        kept = nonzero_pages(data)
        if not self.pager.store.reserve.spares(len(data)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file = self.pager.layers.file(self.layer)
        for a, b in runs_of(kept):
            file.write((first + a) << PAGE_SHIFT, data[a << PAGE_SHIFT : b << PAGE_SHIFT])
        self.presence.set(first, np.where(kept, np.uint8(STORED), np.uint8(ZEROS)))
        self.counts.fetched_bytes += len(data)

    def note_zeros(self, first: int, stop: int) -> None:
        """The source says that pages are only zeros: those that are absent need not be fetched. Raises OSError."""
        for a, b in self.unasked(first, stop):
            self.presence.set(a, np.full(b - a, ZEROS, np.uint8))
            self.pager.images.unsynced.add(self.layer.id)


def _part(flight: _Flight, first: int, stop: int) -> memoryview:
    """Whole pages of what came."""
    came, whole = len(flight.view), (flight.stop - flight.first) << PAGE_SHIFT
    if came < whole:  # the last page of a file
        flight.buffer[came:whole] = bytes(whole - came)
    return memoryview(flight.buffer)[(first - flight.first) << PAGE_SHIFT : (stop - flight.first) << PAGE_SHIFT]


async def together(jobs: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Do them at the same time. The first error ends the others, and is raised."""
    failed: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(job: Callable[[], Awaitable[object]]) -> None:
            try:
                await job()
            except Exception as exc:  # noqa: BLE001  (raised below, without the group that a nursery makes of it)
                failed.append(exc)
                nursery.cancel_scope.cancel()

        for job in jobs:
            nursery.start_soon(run, job)
    if failed:
        raise failed[0]


class Arrivals:
    """The arriving layers of a store that have a source."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._by_layer: dict[LayerId, Arrival] = {}
        self._changed = trio.Event()

    def add(self, arrival: Arrival) -> None:
        """From now on its pages can be brought."""
        self._by_layer[arrival.layer.id] = arrival
        self._wake()

    def discard(self, layer: LayerId) -> None:
        """Nothing more is to be brought of a layer: all is here, or it is gone."""
        self._by_layer.pop(layer, None)
        self._wake()

    def _wake(self) -> None:
        """Whoever waits for an arrival looks again."""
        self._changed.set()
        self._changed = trio.Event()

    async def bring(self, absent: Absent) -> None:
        """Return when pages are here that were absent. Raises SourceError, OSError."""
        while absent.layer in self._pager.layers.arriving:
            arrival = self._by_layer.get(absent.layer)
            if arrival is not None:
                try:
                    await arrival.bring(absent.first, absent.stop)
                except SourceError:
                    if arrival.is_arriving:
                        raise
                return
            await self._changed.wait()  # its source is just being opened

    def bring_soon(self, image: Image, absent: list[Absent], answer: Answer) -> Rest | None:
        """As :meth:`bring_all`, for who reads the image; at once if that takes a moment only: then None.

        He may be given the pages before they are stored, if they are all of one layer.
        """
        arrival = self._by_layer.get(absent[0].layer) if len(absent) == 1 else None
        if arrival is None:
            return partial(self.bring_all, absent)
        near = self._pager.around(image, absent[0], arrival.reach)
        return arrival.bring_soon(absent[0].first, absent[0].stop, *near, answer)

    async def bring_all(self, absent: list[Absent]) -> None:
        """As :meth:`bring`, of several at once."""
        if len(absent) == 1:
            await self.bring(absent[0])
            return
        await together(partial(self.bring, each) for each in absent)
