"""Drop-behind: a page that the kernel keeps for the mount need not be in the store's page cache as well.

The kernel has its copy of every page that it was handed (READ) or gave (WRITE). Which these are is noted: by the
extension, and by LayerFile.write. Pages that the disk read ahead and nobody asked for yet are not among them
and stay.

Who reads on just behind what is dropped has the disk read around that, and some of it is back, which nobody will ask
for. So what was dropped is looked at once more, with what is dropped next of the same layer: what was read since then.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramfs.image.table import CHUNK, CHUNK_SHIFT, NORESERVE, runs_of
from ramfs.units import PAGE_SHIFT, LayerId

#: Chunks looked at in one go: 1 GiB of a layer.
_BATCH: Final = 256

_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise  # that of Python's mmap would hold the interpreter lock
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Marks:
    """A set of pages: a byte for each, and one for each chunk that may have some. What is not set costs nothing."""

    __slots__ = ("chunks", "pages")

    def __init__(self, count: int, old: "Marks | None" = None) -> None:
        """Room for ``count`` pages at least, those of ``old`` set."""
        size = max(count, CHUNK, 0 if old is None else len(old))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        self.pages = np.frombuffer(mmap.mmap(-1, size, flags), np.uint8)
        self.chunks = np.zeros((size + CHUNK - 1) >> CHUNK_SHIFT, np.uint8)
        if old is not None:
            self.add(old)

    def __len__(self) -> int:
        return len(self.pages)

    def set(self, first: int, stop: int) -> None:
        """Add pages ``[first, stop)``."""
        self.pages[first:stop] = 1
        self.chunks[first >> CHUNK_SHIFT : ((stop - 1) >> CHUNK_SHIFT) + 1] = 1

    def add(self, other: "Marks") -> None:
        """Add the pages of another set, which has no more room than this one."""
        for first, stop in other.regions():
            self.pages[first:stop] |= other.pages[first:stop]
        self.chunks[: len(other.chunks)] |= other.chunks

    def remove(self, other: "Marks") -> None:
        """Take away the pages of another set."""
        for first, stop in self.regions():
            part = other.pages[first:stop]
            self.pages[first : first + len(part)] &= 1 - part

    def keep(self, first: int, which: NDArray[np.uint8]) -> None:
        """Of the pages from ``first`` on, which begins a chunk, keep those that are 1 in ``which``."""
        part = self.pages[first : first + len(which)]
        part &= which
        chunks = np.bitwise_or.reduceat(part, np.arange(0, len(part), CHUNK))
        self.chunks[first >> CHUNK_SHIFT :][: len(chunks)] = chunks

    def regions(self) -> Iterator[tuple[int, int]]:
        """Ranges of pages outside of which there is none."""
        for a, b in runs_of(self.chunks != 0):
            for first in range(a, b, _BATCH):
                yield first << CHUNK_SHIFT, min(min(first + _BATCH, b) << CHUNK_SHIFT, len(self.pages))


class HandedMarks:
    """Marks that the extension sets. It finds them by ``address``: `struct marks` of _native.c."""

    __slots__ = ("_words", "address", "marks")

    def __init__(self, marks: Marks) -> None:
        self._words = np.zeros(3, np.uint64)  # where the bytes of pages and chunks are, and how many were set
        self.address = self._words.ctypes.data
        self.exchange(marks)

    def exchange(self, marks: Marks) -> None:
        """Let others be set from now on."""
        self.marks = marks
        self._words[:] = marks.pages.ctypes.data, marks.chunks.ctypes.data, 0

    def take(self) -> Marks | None:
        """What was set since the last call, if anything was."""
        if not self._words[2]:
            return None
        taken = self.marks
        self.exchange(Marks(len(taken)))
        return taken


class Behind(NamedTuple):
    """Pages of a layer's file that may be dropped, and where they are mapped."""

    layer: LayerId
    path: str
    view: memoryview | None
    marks: Marks
    again: Marks | None = None
    """those that were dropped the last time, and may be back"""


def drop(some: Iterable[Behind]) -> tuple[int, list[Behind]]:
    """Let pages leave the store's page cache, where they are on disk (any thread).

    Returns how many left, and those that did not: somebody read them just then, and had them mapped again.
    """
    dropped, left = 0, []
    for behind in some:
        with contextlib.suppress(FileNotFoundError):  # removed as garbage meanwhile
            fd = os.open(behind.path, os.O_RDONLY | os.O_CLOEXEC)
            stay = 0
            try:
                marks = _wanted(fd, behind)
                for first, stop in marks.regions():
                    which = marks.pages[first:stop]
                    dropped += int(np.count_nonzero(which))
                    marks.keep(first, _drop(fd, behind.view, first, which != 0))
                    stay += int(np.count_nonzero(which))
            finally:
                os.close(fd)
            if stay:
                dropped -= stay
                left.append(behind._replace(marks=marks, again=None))
    return dropped, left


def _wanted(fd: int, behind: Behind) -> Marks:
    """A set of its own of all that is to be dropped."""
    again = behind.again
    if again is None:
        return Marks(len(behind.marks), behind.marks)
    for first, stop in again.regions():
        again.keep(first, _cached(fd, first, stop - first))
    wanted = Marks(max(len(again), len(behind.marks)), again)
    wanted.add(behind.marks)
    return wanted


def _drop(fd: int, view: memoryview | None, first: int, which: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Drop some pages from ``first`` on; 1 for each that is still there."""
    if view is not None:  # the kernel keeps what is mapped; a read maps it again
        memory = np.frombuffer(view, np.uint8)[first << PAGE_SHIFT : (first + len(which)) << PAGE_SHIFT]
        if len(memory):
            _madvise(memory.ctypes.data, len(memory), mmap.MADV_DONTNEED)
    for a, b in runs_of(which):
        os.posix_fadvise(fd, (first + a) << PAGE_SHIFT, (b - a) << PAGE_SHIFT, os.POSIX_FADV_DONTNEED)
    return _cached(fd, first, len(which))


def _cached(fd: int, first: int, count: int) -> NDArray[np.uint8]:
    """For each of some pages from ``first`` on, is it in the page cache?"""
    there = np.zeros(count, np.uint8)
    size = min(count << PAGE_SHIFT, os.fstat(fd).st_size - (first << PAGE_SHIFT))
    if size > 0:
        with mmap.mmap(fd, size, prot=mmap.PROT_READ, offset=first << PAGE_SHIFT) as looked_at:
            memory = np.frombuffer(looked_at, np.uint8)
            _mincore(memory.ctypes.data, size, there.ctypes.data)
            del memory  # or the mapping could not be closed
    return there & np.uint8(1)
