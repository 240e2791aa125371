"""A source whose pages are compared with the digests of a manifest, so that no wrong one is given out."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import trio

from ramfs.errors import SourceChanged, SourceCorrupt
from ramfs.image.digest import DIGEST, KNOWN_LOST, KNOWN_ZERO, ZERO_DIGEST, digest_padded
from ramfs.image.table import Mask, runs_of
from ramfs.source.base import Extent, PageSource, Rest, read_soon, read_whole
from ramfs.source.manifest import Digests, File
from ramfs.units import PAGE, PAGE_SHIFT, pages

#: How often a page that is wrong is read again.
AGAIN: Final = 2
#: Bytes from which on digests are made in a thread: less costs the loop no more than the thread's start.
_IN_THREAD: Final = 256 << 10
#: Extents told in one answer.
_EXTENTS: Final = 1024
#: ... and pages that are looked at for it: about a millisecond.
_PAGES: Final = 1 << 16
_ZERO: Final = np.frombuffer(KNOWN_ZERO, np.uint8)
_ZERO_PAGE: Final = np.frombuffer(ZERO_DIGEST, np.uint8)


class VerifiedSource:
    """A source, compared with a file of a manifest. It reads whole pages, but the last of the file.

    Buffers must be ordinary memory: the bytes are looked at.
    """

    def __init__(self, source: PageSource, file: File, name: str, *, again: int = AGAIN) -> None:
        """Raises SourceChanged if it has not the size that the manifest tells."""
        if not file.can_have(source.size):
            raise SourceChanged(
                f"{source.description}: {name} has {source.size} bytes, and {file.size} by its manifest"
            )
        self._source = source
        self._name = name
        self._again = again
        self._digests: Digests = file.digests
        self.size = file.size
        self.maximum = max(source.maximum // PAGE * PAGE, PAGE)
        self.verified = 0
        """bytes that were right"""

    @property
    def description(self) -> str:
        """What the source is."""
        return self._source.description

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill ``buffer`` with pages that match. Raises SourceCorrupt when one still does not after some attempts."""
        await read_whole(self._source, offset, buffer, urgent=urgent)
        wrong = await self._compare(offset, buffer)
        for _ in range(self._again):
            if not wrong:
                break
            still: list[tuple[int, int]] = []
            for low, high in wrong:
                part = buffer[low - offset : high - offset]
                await read_whole(self._source, low, part, urgent=urgent)
                still += await self._compare(low, part)
            wrong = still
        if wrong:
            page = wrong[0][0] >> PAGE_SHIFT
            lost = self._digests[page].tobytes() == KNOWN_LOST
            why = "is lost at its source" if lost else "is not what its manifest says"
            raise SourceCorrupt(f"{self.description}: page {page} of {self._name} {why}")
        self.verified += len(buffer)

    def read_soon(self, offset: int, buffer: memoryview, patience: float, meanwhile: Callable[[], None]) -> Rest | None:
        """See ramfs.source.base.read_soon."""
        if len(buffer) > _IN_THREAD:
            return partial(self.read_into, offset, buffer, urgent=True)
        rest = read_soon(self._source, offset, buffer, patience, meanwhile)
        if rest is None and not self._wrong(offset, buffer, digest_padded(buffer)):
            self.verified += len(buffer)
            return None

        async def finish() -> None:
            if rest is not None:
                await rest()
                if not self._wrong(offset, buffer, digest_padded(buffer)):
                    self.verified += len(buffer)
                    return
            await self.read_into(offset, buffer, urgent=True)

        return finish

    async def _compare(self, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
        """The byte ranges that are wrong; they begin and end where a read may."""
        if len(buffer) > _IN_THREAD:
            return self._wrong(offset, buffer, await trio.to_thread.run_sync(digest_padded, buffer))
        return self._wrong(offset, buffer, digest_padded(buffer))

    def _wrong(self, offset: int, buffer: memoryview, found: bytes) -> list[tuple[int, int]]:
        first = offset >> PAGE_SHIFT
        expected = self._digests[first : first + len(found) // DIGEST]
        if found == expected.tobytes():
            return []
        digests = np.frombuffer(found, np.uint8).reshape(-1, DIGEST)
        right = (digests == expected).all(axis=1)
        right |= (expected == _ZERO).all(axis=1) & (digests == _ZERO_PAGE).all(axis=1)
        end = offset + len(buffer)
        return [((first + a) << PAGE_SHIFT, min((first + b) << PAGE_SHIFT, end)) for a, b in runs_of(~right)]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """By the digests: what the source says of zeros could be wrong, and nobody would read them."""
        await trio.lowlevel.checkpoint()
        first, end = offset >> PAGE_SHIFT, offset + length
        stop = min(pages(end), first + _PAGES)
        zero: Mask = ~np.asarray(self._digests[first:stop].any(axis=1), np.bool_)
        cuts = (np.flatnonzero(zero[1:] != zero[:-1]) + 1)[: _EXTENTS - 1].tolist()
        limit = min(end, stop << PAGE_SHIFT) if len(cuts) < _EXTENTS - 1 else (first + cuts[-1]) << PAGE_SHIFT
        edges = [offset, *((first + cut) << PAGE_SHIFT for cut in cuts), limit]
        return [
            Extent(low, high - low, bool(zero[(low >> PAGE_SHIFT) - first]))
            for low, high in itertools.pairwise(edges)
            if low < high
        ]

    async def aclose(self) -> None:
        """Close the source."""
        await self._source.aclose()
