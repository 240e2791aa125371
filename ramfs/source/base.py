"""What every source of pages can do. Implementations: nbd_client, file; wrappers: fault, retry, verify.

All coroutines are trio's. What they raise is a SourceError, of the class that says whether trying again is any use,
or trio.Cancelled.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, Protocol


class Extent(NamedTuple):
    """``length`` bytes from ``offset`` on; ``zero`` if they are known to be only zeros, and need not be read."""

    offset: int
    length: int
    zero: bool


class PageSource(Protocol):
    """One export: the bytes of one file, which do not change."""

    @property
    def description(self) -> str:
        """What it is, for people: a URI without its secrets, or a path."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def maximum(self) -> int:
        """Bytes of the largest read, whatever its offset. Callers keep to it."""

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill all of ``buffer``, which is writable, with the bytes from ``offset`` on, or raise a SourceError.

        Several at once are normal; an urgent one overtakes those that are not. Cancelling one harms no other.
        The contents of the buffer mean nothing until this has returned.
        """

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """What is known of a range of at least one byte: one Extent after the other, from ``offset`` on.

        At least one. They may end before the range does, and never end behind it. What nothing is known of is not zero.
        """

    async def aclose(self) -> None:
        """Let go of everything. Reads that are not complete by then raise SourceLost. Closing twice is no harm."""


#: What is left of a read that was begun: awaited, it fills the buffer or raises, as ``read_into`` does.
Rest = Callable[[], Awaitable[object]]


def read_soon(
    source: PageSource, offset: int, buffer: memoryview, patience: float, meanwhile: Callable[[], None]
) -> Rest | None:
    """Begin an urgent read, and look for the reply for ``patience`` seconds in which no other task has its turn.

    None if the buffer is filled; else what is still to be awaited, always. A reply over loopback takes less time than
    to put a task to sleep and wake it. Sources that can do so have a method of this name; of others all is left.
    They call ``meanwhile`` when they have asked, before they look: to do what takes no longer than the reply.
    """
    begin: Callable[[int, memoryview, float, Callable[[], None]], Rest | None] | None = getattr(
        source, "read_soon", None
    )
    if begin is None or len(buffer) > source.maximum:
        return partial(read_whole, source, offset, buffer, urgent=True)
    return begin(offset, buffer, patience, meanwhile)


async def read_whole(source: PageSource, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
    """Fill a buffer of any length, in as many reads as ``source.maximum`` makes of it, one after the other."""
    for at in range(0, len(buffer), source.maximum):
        await source.read_into(offset + at, buffer[at : at + source.maximum], urgent=urgent)


class SourceDirectory(Protocol):
    """One server, or one local directory: a source for each name. It may have a manifest (manifest.py)."""

    @property
    def description(self) -> str:
        """What it is, for people."""

    async def names(self) -> list[str]:
        """The names that can be opened, in no order; the manifest's need not be among them."""

    async def open(self, name: str) -> PageSource:
        """Open one. It stays usable when the directory is closed. Raises SourceRefused if there is no such name."""

    async def aclose(self) -> None:
        """Let go of everything but what was opened."""


async def size_of(directory: SourceDirectory, name: str) -> int:
    """Bytes of one of its sources. Raises as ``open``.

    A directory that can tell without opening it has a coroutine ``size``.
    """
    tell: Callable[[str], Awaitable[int]] | None = getattr(directory, "size", None)
    if tell is not None:
        return await tell(name)
    source = await directory.open(name)
    await source.aclose()
    return source.size
