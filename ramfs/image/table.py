"""The page table of an image: for every page, the layer that holds it.

Page i of every layer lies at byte ``i * PAGE`` of that layer, so the layer's number is all there is to know,
and copying a slice of this array shares the pages. Entry 0 means "only zeros, stored nowhere".

Beside the entries stand two bits for each *chunk* of 1024 pages (4 KiB of table, 4 MiB of image):
``touched`` (the chunk may hold something else than zeros: whoever copies or scans a table looks only there)
and ``stale`` (it changed since the durable copy of the table was written, see store/images.py).
"""

import contextlib
import mmap
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ramfs.units import ZERO, LayerId

Entries = NDArray[np.uint32]
Mask = NDArray[np.bool_]

CHUNK_SHIFT: Final = 10
#: Pages for each chunk of a table.
CHUNK: Final = 1 << CHUNK_SHIFT
NORESERVE: Final = 0x4000  # MAP_NORESERVE, which Python has from 3.12 on
_SLICE: Final = 1 << 16
"""Entries that a search looks at in one go: it needs no more memory than that, and stops early."""
ENTRY: Final = 4
"""Bytes of a table entry (little-endian uint32)."""


def runs_of(mask: Mask) -> Iterator[tuple[int, int]]:
    """The maximal runs ``[start, stop)`` of true elements of a one-dimensional mask."""
    if not len(mask):
        return iter(())
    if mask.all():  # usual, and quickly told
        return iter(((0, len(mask)),))
    edges: list[int] = (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()
    if mask[0]:
        edges.insert(0, 0)
    if mask[-1]:
        edges.append(len(mask))
    return zip(edges[::2], edges[1::2], strict=True)


def equal_runs(entries: Entries) -> list[tuple[int, int, LayerId]]:
    """The maximal runs ``(start, stop, value)`` of equal elements of a non-empty array."""
    cuts = np.flatnonzero(entries[1:] != entries[:-1]) + 1
    starts = [0, *cuts.tolist()]
    stops = [*starts[1:], len(entries)]
    values = entries[starts].tolist()
    return list(zip(starts, stops, values, strict=True))


def as_bytes(entries: Entries) -> memoryview:
    """The bytes of entries as a file has them, not copied where memory has them so, as it does in a table."""
    return entries.astype("<u4", copy=False).data.cast("B")


class PageTable:
    """A growable array of layer numbers, zero where nothing was ever written.

    The memory is an anonymous mapping: pages of it that were never touched cost nothing, and growing moves
    no data. Views of ``entries`` must not be kept across a call of :meth:`resize`.
    """

    __slots__ = ("_memory", "capacity", "entries", "stale", "touched")

    def __init__(self, pages: int = 0) -> None:
        self.capacity = 0
        self._memory: mmap.mmap | None = None
        self.entries: Entries = np.zeros(0, np.uint32)
        self.touched: Mask = np.zeros(0, np.bool_)
        self.stale: Mask = np.zeros(0, np.bool_)
        self.resize(pages)

    def resize(self, pages: int) -> None:
        """Make room for at least ``pages`` entries; never shrinks the memory. New entries are zero."""
        if pages <= self.capacity:
            return
        chunks = (pages + CHUNK - 1) >> CHUNK_SHIFT
        if self.capacity and chunks < (self.capacity >> CHUNK_SHIFT) * 2:
            chunks = (self.capacity >> CHUNK_SHIFT) * 2  # files that grow by appending
        memory, old = self._memory, self.entries
        self.entries = np.zeros(0, np.uint32)
        size = chunks * CHUNK * ENTRY
        if memory is None:
            # NORESERVE: the table of a sparse file of terabytes may exceed the machine's memory.
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        else:
            del old
            memory.resize(size)  # mremap: moves page table entries, not bytes
        self._memory = memory
        self.entries = np.frombuffer(memory, "<u4")
        self.capacity = chunks * CHUNK
        self.touched = np.concatenate([self.touched, np.zeros(chunks - len(self.touched), np.bool_)])
        self.stale = np.concatenate([self.stale, np.zeros(chunks - len(self.stale), np.bool_)])

    def expect_all(self) -> None:
        """Nearly all entries are about to be stored: huge pages then cost a fraction of the faults and no memory.

        For the whole mapping or none of it, as one that consists of several kinds cannot grow.
        """
        with contextlib.suppress(OSError):  # a kernel without them
            if self._memory is not None:
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def mark(self, first: int, stop: int) -> None:
        """Note that entries ``[first, stop)`` changed, or are about to."""
        chunks = slice(first >> CHUNK_SHIFT, ((stop - 1) >> CHUNK_SHIFT) + 1)
        self.touched[chunks] = True
        self.stale[chunks] = True

    def fill(self, first: int, stop: int, layer: LayerId) -> None:
        """Let pages ``[first, stop)`` be held by ``layer``."""
        self.entries[first:stop] = layer
        self.mark(first, stop)

    def regions(self, which: Mask | None = None, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Page ranges within ``[first, stop)`` that lie in touched chunks (or those set in ``which``)."""
        mask = self.touched if which is None else which
        stop = self.capacity if stop is None else min(stop, self.capacity)
        base = first >> CHUNK_SHIFT
        last = (stop + CHUNK - 1) >> CHUNK_SHIFT
        for a, b in runs_of(mask[base:last]):
            low, high = max((base + a) << CHUNK_SHIFT, first), min((base + b) << CHUNK_SHIFT, stop)
            if low < high:
                yield low, high

    def layers(self) -> set[LayerId]:
        """The layers that hold at least one page."""
        found: set[LayerId] = set()
        for a, b in self.regions():
            found.update(np.unique(self.entries[a:b]).tolist())
        found.discard(ZERO)
        return found

    def count(self, layer: LayerId) -> int:
        """Number of pages that ``layer`` holds."""
        return sum(int(np.count_nonzero(self.entries[a:b] == layer)) for a, b in self.regions())

    def resident(self, first: int = 0, stop: int | None = None) -> int:
        """Number of pages within ``[first, stop)`` that are stored in some layer."""
        return sum(int(np.count_nonzero(self.entries[a:b])) for a, b in self.regions(first=first, stop=stop))

    def find(self, first: int, stop: int, *, stored: bool) -> int:
        """The first page within ``[first, stop)`` that is stored in some layer, or that is not; else ``stop``."""
        at = first
        for low, high in self.regions(first=first, stop=stop):
            if not stored and at < low:
                return at
            for a in range(low, high, _SLICE):
                fit = (self.entries[a : min(a + _SLICE, high)] != ZERO) == stored
                found = int(fit.argmax())
                if fit[found]:
                    return a + found
            at = high
        return stop if stored else at
