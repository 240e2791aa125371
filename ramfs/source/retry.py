"""A source that does not give up: what fails is tried again, from the same server or from another one.

Two kinds of failure are kept apart. An error of one read (a page that is wrong, a block that the server cannot
read) makes that read wait and be repeated. Whatever else goes wrong (SourceLost, SourceRefused, SourceBroken,
SourceChanged) is the end of that connection: all reads wait, one of them opens another, and all are repeated.
No task of its own is needed for that, so a source that nobody reads from does not connect.
"""

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import trio

from ramfs.errors import SourceChanged, SourceCorrupt, SourceError, SourceLost
from ramfs.source.base import Extent, PageSource, Rest, read_soon, read_whole

#: Opens the source anew, perhaps wrapped.
Factory = Callable[[], Awaitable[PageSource]]

#: Bytes of the largest read, where that is not known from a source.
MAXIMUM: Final = 1 << 20
#: Seconds that one attempt to open a source may take ...
_OPENING: Final = 30.0
#: ... and closing a lost one.
_CLOSING: Final = 1.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds to wait before something is tried again: twice as long each time, up to a limit."""

    first: float = 0.1
    limit: float = 10.0

    def seconds(self, attempts: int) -> float:
        """Before the next attempt, when ``attempts`` have failed (1 or more). Half of it is random: jitter."""
        longest: float = min(self.first * 2 ** min(attempts - 1, 60), self.limit)
        return longest * random.uniform(0.5, 1.0)


_BACKOFF: Final = Backoff()


class SourceState(NamedTuple):
    """How a source is doing, for people."""

    ok: bool
    since: float
    """when that began: seconds since the epoch"""
    attempts: int = 0
    """that failed since then"""
    error: SourceError | None = None
    """the last one"""


def of_one_read(error: SourceError) -> bool:
    """Is it an error of one read, and not of the connection?"""
    return type(error) is SourceError or isinstance(error, SourceCorrupt)


def _tell_nobody(state: SourceState) -> None:
    pass


class RetrySource:
    """A source that is opened as often as need be. Its size, once known, never changes."""

    def __init__(
        self, factory: Factory, description: str, size: int, *, maximum: int = MAXIMUM, deadline: float | None = None,
        backoff: Backoff = _BACKOFF, tell: Callable[[SourceState], None] = _tell_nobody,
        source: PageSource | None = None,
    ) -> None:  # fmt: skip
        """Connects with the first read, unless ``source`` is given, an open one.

        ``deadline`` is how many seconds a source may be lost before reads raise SourceLost; None: they wait for ever.
        ``tell`` is called with each change of the state.
        """
        self.size = size
        self.maximum = maximum
        self.deadline = deadline
        self.state = SourceState(True, time.time())
        self._description = description
        self._factory = factory
        self._backoff = backoff
        self._tell = tell
        self._source = source
        self._connecting = trio.Lock()
        self._switched = trio.Event()
        self._lost_at: float | None = None
        """since when no read has succeeded for want of a connection (trio's clock); None while all is well"""
        self._attempts = 0
        """connections that failed, one after the other, without a read that succeeded"""
        self._next_attempt = 0.0
        self._failing = 0
        """reads that wait for an error of their own to go away"""
        self._opening = trio.CancelScope()
        self._closed = False

    @classmethod
    async def open(
        cls, factory: Factory, *, deadline: float | None = None, backoff: Backoff = _BACKOFF,
        tell: Callable[[SourceState], None] = _tell_nobody,
    ) -> "RetrySource":  # fmt: skip
        """Open for the first time: a failure is raised, and not tried again."""
        source = await factory()
        return cls(
            factory, source.description, source.size, maximum=source.maximum, deadline=deadline, backoff=backoff,
            tell=tell, source=source,
        )  # fmt: skip

    @property
    def description(self) -> str:
        """What the source is: the one that was last opened."""
        return self._description

    # -- reading

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill ``buffer``, however long it takes. Raises SourceLost after the deadline, or when it is closed."""
        await self._persist(partial(read_whole, offset=offset, buffer=buffer, urgent=urgent))

    async def attempt(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> SourceError | None:
        """As :meth:`read_into`, but an error of this read alone is returned, and the buffer has nothing then."""
        return await self._persist(partial(read_whole, offset=offset, buffer=buffer, urgent=urgent), patient=False)

    def read_soon(self, offset: int, buffer: memoryview, patience: float, meanwhile: Callable[[], None]) -> Rest | None:
        """See ramfs.source.base.read_soon. What is left also raises an error of this read alone."""

        async def anew() -> None:
            error = await self.attempt(offset, buffer, urgent=True)
            if error is not None:
                raise error

        if self._source is None or not self.state.ok:
            return anew
        rest = read_soon(self._source, offset, buffer, patience, meanwhile)

        async def finish() -> None:
            if rest is not None:
                try:
                    await rest()
                except SourceError:
                    await anew()  # which finds out what is wrong

        return None if rest is None else finish

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As the source says, however long it takes. Raises as ``read_into``."""
        found: list[Extent] = []

        async def ask(source: PageSource) -> None:
            found[:] = await source.extents(offset, length)

        await self._persist(ask)
        return found

    async def _persist(
        self, work: Callable[[PageSource], Awaitable[None]], *, patient: bool = True
    ) -> SourceError | None:
        """Do it until it is done; if not ``patient``, or until it meets an error of its own, which is returned."""
        failed, began = 0, 0.0
        try:
            while True:
                source = await self._connected()
                switched = self._switched
                try:
                    await work(source)
                    break
                except SourceError as exc:
                    if self._closed:
                        raise SourceLost(f"{self.description} is closed") from exc
                    if source is not self._source:
                        continue  # lost or replaced meanwhile: others have seen to it
                    if not of_one_read(exc):
                        await self._lose(source, exc)
                        continue
                    if not patient:
                        return exc
                    if not failed:
                        began = trio.current_time()
                        self._failing += 1
                    failed += 1
                    self._report(exc)
                    self._check_deadline(began, exc)
                    with trio.move_on_after(self._until(began, self._backoff.seconds(failed))):
                        await switched.wait()
        finally:
            if failed:
                self._failing -= 1
        self._attempts, self._lost_at = 0, None
        if not self.state.ok and not self._failing:
            self._say(SourceState(True, time.time()))
        return None

    def _check_deadline(self, began: float, exc: SourceError) -> None:
        if self.deadline is not None and trio.current_time() >= began + self.deadline:
            raise SourceLost(f"{self.description}: given up after {self.deadline:g} s: {exc}") from exc

    def _until(self, began: float, seconds: float) -> float:
        """``seconds``, or as many as are left until the deadline."""
        if self.deadline is None:
            return seconds
        return max(0.0, min(seconds, began + self.deadline - trio.current_time()))

    # -- connections

    async def _connected(self) -> PageSource:
        """The source; opens it if need be, one task for all. Raises SourceLost after the deadline."""
        while True:
            if self._closed:
                raise SourceLost(f"{self.description} is closed")
            if self._source is not None:
                return self._source
            async with self._connecting:
                if self._is_wanting():  # look again: it may have been a long wait
                    await self._try()

    def _is_wanting(self) -> bool:
        return self._source is None and not self._closed

    async def _try(self) -> None:
        """Wait until the next attempt is due, and make it. Raises SourceLost after the deadline."""
        if self._lost_at is None:
            self._lost_at = trio.current_time()
        wait = self._next_attempt - trio.current_time()
        if wait > 0:
            error = self.state.error or SourceLost("not connected")
            self._check_deadline(self._lost_at, error)
            with trio.move_on_after(self._until(self._lost_at, wait)):
                await self._switched.wait()
            return  # look again: it may have been switched, closed, or be too late
        lost_at = self._lost_at
        try:
            with trio.CancelScope() as self._opening, trio.fail_after(_OPENING):
                source = await self.open_other(self._factory)
                if self._is_wanting():
                    self._use(source)
                else:
                    await _close(source)
        except trio.TooSlowError:
            self._failed_to_open(lost_at, SourceLost(f"{self.description} does not answer"))
        except SourceError as exc:
            self._failed_to_open(lost_at, exc)

    def _failed_to_open(self, lost_at: float, exc: SourceError) -> None:
        if self._is_wanting():  # else it matters no more
            self._put_off(exc)
            self._check_deadline(lost_at, exc)

    async def open_other(self, factory: Factory) -> PageSource:
        """Open a source that can stand for the first one, for :meth:`use`. Raises SourceError."""
        source = await factory()
        if source.size != self.size:
            await _close(source)
            raise SourceChanged(f"{source.description} has {source.size} bytes instead of {self.size}")
        return source

    def _use(self, source: PageSource) -> None:
        self._source = source
        self._description = source.description

    async def _lose(self, source: PageSource, exc: SourceError) -> None:
        """This one is of no use any more."""
        self._source = None
        if self._lost_at is None:
            self._lost_at = trio.current_time()
        self._put_off(exc)
        await _close(source)

    def _put_off(self, exc: SourceError) -> None:
        self._attempts += 1
        self._next_attempt = trio.current_time() + self._backoff.seconds(self._attempts)
        self._report(exc)

    def _report(self, exc: SourceError) -> None:
        since = time.time() if self.state.ok else self.state.since
        self._say(SourceState(False, since, self.state.attempts + 1, exc))

    def _say(self, state: SourceState) -> None:
        self.state = state
        self._tell(state)

    async def switch(self, factory: Factory) -> None:
        """Read from another source from now on; all that waits is tried again at once.

        It is opened first: where that fails the error is raised, and all is as before.
        """
        await self.use(factory, await self.open_other(factory))

    async def use(self, factory: Factory, source: PageSource) -> None:
        """Read from ``source``, which ``factory`` has opened, from now on. Raises SourceLost if this one is closed."""
        if self._closed:
            await _close(source)
            raise SourceLost(f"{self.description} is closed")
        before = self._source
        self._factory = factory
        self._attempts, self._next_attempt, self._lost_at = 0, 0.0, None
        self._use(source)
        self._wake()
        if not self.state.ok:
            self._say(SourceState(True, time.time()))
        if before is not None:
            await _close(before)  # its reads are repeated

    async def reopen(self) -> None:
        """Connect anew; reads under way are repeated."""
        before, self._source = self._source, None
        if before is not None:
            await _close(before)

    def _wake(self) -> None:
        self._opening.cancel()
        self._switched.set()
        self._switched = trio.Event()

    async def aclose(self) -> None:
        """Let go of the source. Whatever waits raises SourceLost."""
        self._closed = True
        self._wake()
        source, self._source = self._source, None
        if source is not None:
            await source.aclose()


async def _close(source: PageSource) -> None:
    """Close what may be broken, without waiting long."""
    with trio.move_on_after(_CLOSING, shield=True):
        await source.aclose()
