"""Files of a store that share blocks, where its file system can (XFS, btrfs): what live native files need.

The file of a *direct* image (store/direct.py) is written by the kernel on behalf of guests, at any moment. Whoever
wants its pages as they are now takes a reflink of it, which the file system makes in one moment, also towards stores
into mapped memory. It costs some 20 us for each extent, and writing back what is dirty.
"""

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ramfs.image.table import Entries
from ramfs.store.files import data_extents
from ramfs.units import PAGE, PAGE_SHIFT, LayerId, pages

_FICLONERANGE: Final = 0x4020940D
_FS_IOC_FIEMAP: Final = 0xC020660B
_FIEMAP: Final = struct.Struct("=QQIIII")  # from, length, flags, extents that are told, room for, reserved
_EXTENT: Final = struct.Struct("=QQQ16xI12x")  # offset, place on disk, length, flags
_FIEMAP_SYNC, _UNWRITTEN, _SHARED, _EXTENTS = 1, 0x800, 0x2000, 1000
_RANGE: Final = struct.Struct("=qQQQ")  # source, its offset, length (0: to its end), offset in the target


def clone_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> None:
    """Let two files share the blocks of a range; a length of 0 means to the end of the source. Raises OSError."""
    fcntl.ioctl(target, _FICLONERANGE, _RANGE.pack(source, source_offset, length, target_offset))


def can_reflink(directory: str) -> bool:
    """Can files of a directory share single pages?"""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(range(256)) * (2 * PAGE // 256))
        file.flush()
        clone_range(file.fileno(), 0, file.fileno(), 3 * PAGE, PAGE)
        return True
    return False


def stored_extents(fd: int) -> list[tuple[int, int]]:
    """The ranges of pages of a file that are data."""
    return [(low >> PAGE_SHIFT, pages(high)) for low, high in data_extents(fd)]


def allocated_extents(fd: int) -> list[tuple[int, int]]:
    """The ranges of pages of a file, of which nothing is dirty, that its file system has on disk (FIEMAP).

    To SEEK_DATA what XFS has set aside beside a page that was copied on a write looks like data.
    """
    return [(low >> PAGE_SHIFT, pages(high)) for low, high, _, _ in _mapped(fd, _FIEMAP_SYNC)]


def shared_extents(fd: int) -> list[tuple[int, int]]:
    """The ranges of pages of a file in blocks that other files have too, as far as it has been written back."""
    return [(low >> PAGE_SHIFT, pages(high)) for low, high, _, flags in _mapped(fd, 0) if flags & _SHARED]


def blocks_of(fd: int, first: int, stop: int) -> NDArray[np.int64]:
    """Where pages ``[first, stop)`` of a file are on its disk: the same place is the same page, and 0 is a hole.

    Has what is dirty there written back. A page that is not in one piece has an odd number, which tells nothing.
    Raises OSError.
    """
    found, size = np.zeros(stop - first, np.int64), os.fstat(fd).st_size
    for low, high, place, _ in _mapped(fd, _FIEMAP_SYNC, first << PAGE_SHIFT, stop << PAGE_SHIFT):
        a, b = max(low >> PAGE_SHIFT, first), min(pages(high), stop)
        found[a - first : b - first] = np.arange(a, b) * PAGE + (place - low + 2 * PAGE)
        for page in {a, b - 1}:
            if page << PAGE_SHIFT < low or high < min((page + 1) << PAGE_SHIFT, size):
                found[page - first] |= 1
    return found


def _mapped(fd: int, how: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """The ranges of bytes that were written, up to the end of the file: start, end, place on disk, flags of FIEMAP."""
    size = os.fstat(fd).st_size
    stop = size if stop is None else min(size, stop)
    while start < stop:
        answer = bytearray(_FIEMAP.pack(start, stop - start, how, 0, _EXTENTS, 0))
        answer += bytes(_EXTENT.size * _EXTENTS)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, answer)
        *_, count, _, _ = _FIEMAP.unpack_from(answer)
        if count == 0:
            break
        for number in range(count):
            low, place, length, flags = _EXTENT.unpack_from(answer, _FIEMAP.size + number * _EXTENT.size)
            start = low + length
            if not flags & _UNWRITTEN and low < size:
                yield low, min(start, size), place, flags


def entries_of(extents: list[tuple[int, int]], layer: LayerId) -> list[tuple[int, Entries]]:
    """Table entries that name a layer for ranges of pages."""
    return [(first, np.full(stop - first, layer, np.uint32)) for first, stop in extents]


@dataclass(frozen=True, slots=True)
class Cloned:
    """A range of a direct image's file as it was at one moment, in a file that has no row yet."""

    path: str
    size: int
    """of the whole, as it was then, or the end of the range"""
    mtime: int
    ctime: int
    extents: list[tuple[int, int]]
    """pages of the new file that are there"""

    @classmethod
    def make(cls, source_path: str, path: str, offset: int = 0, length: int = 0, at: int = 0) -> "Cloned":
        """Clone ``[offset, offset + length)`` to byte ``at`` of a new file, whole pages or up to the end (any thread).

        A length of 0 means all up to the end. Raises OSError; then there is no file.
        """
        source = os.open(source_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(source)  # so that little is to be written while stores wait for the clone
            target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                told = os.fstat(source)
                whole = offset + length >= told.st_size
                clone_range(source, offset, target, at, 0 if whole else length)
                if length:
                    os.ftruncate(target, at + length)  # it may have grown meanwhile
                size = os.fstat(target).st_size
                os.ftruncate(target, pages(size) << PAGE_SHIFT)
                os.fdatasync(target)
                return cls(path, size, told.st_mtime_ns, told.st_ctime_ns, stored_extents(target))
            except BaseException:
                os.unlink(path)
                raise
            finally:
                os.close(target)
        finally:
            os.close(source)

    def discard(self) -> None:
        """Remove the file, which nobody needs."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
