"""The digests of an image's pages, gathered by its table from those of its layers. For any thread: reads only files.

A garbage pass or flattening may let the table name other layers meanwhile, and remove those it named. What was read
by then is right all the same, as a page's digest is the same wherever the page lies; what can no longer be found
is Moved, and whoever gathers begins again.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramfs.image.digest import DIGEST, KNOWN_LOST, ZERO_DIGEST, digest_padded
from ramfs.image.table import Entries, Mask
from ramfs.store.files import read_exactly
from ramfs.store.images import read_table
from ramfs.units import LOST, PAGE, PAGE_SHIFT, ZERO, LayerId, pages

#: Pages gathered in one go: about a millisecond in which the loop waits for the interpreter.
_SLICE: Final = 1 << 15

#: Pages hashed in one go.
_HASHED: Final = 128

#: Digests as two integers each, which numpy compares faster than 16 bytes.
Pairs = NDArray[np.uint64]
_LOST: Final = np.frombuffer(KNOWN_LOST, np.uint64)
_ZERO: Final = np.frombuffer(ZERO_DIGEST, np.uint64)


class Moved(Exception):
    """A table names what is not there any more, or was not there when it began."""


class LayerPlace(NamedTuple):
    """Where a layer's pages are: the paths of the file that has them and of their digests, and how much further on.

    No path of the pages means that they are still arriving, and their digests are those of the source's manifest. No
    path of the digests, that nobody has made them: those that are asked for are made of the pages.
    """

    pages: str | None
    digests: str | None
    shift: int


class Gathering:
    """Digests of images out of some layers. Close it."""

    def __init__(self, places: Mapping[LayerId, LayerPlace]) -> None:
        self._places = places
        self._opened: dict[str, int] = {}

    def close(self) -> None:
        """Close the files."""
        for fd in self._opened.values():
            os.close(fd)
        self._opened.clear()

    def digests(self, table_path: str, size: int) -> Iterator[bytes]:
        """Of the pages of an image of ``size`` bytes, in order, some at a time. Raises Moved, OSError.

        As in a manifest: KNOWN_ZERO for a page of zeros, KNOWN_LOST for one that cannot be read.
        """
        table = read_table(table_path)
        if table is None:
            raise Moved
        whole = size >> PAGE_SHIFT
        for first in range(0, whole, _SLICE):
            stop = min(first + _SLICE, whole)
            yield self.pick(table.entries[first:stop], first).tobytes()
        if whole < pages(size):
            yield self.of_last(LayerId(int(table.entries[whole])), whole, size & (PAGE - 1)).tobytes()

    def pick(self, entries: Entries, first: int, wanted: Mask | None = None) -> Pairs:
        """Digests of the pages from ``first`` on that have these entries; of those that are not ``wanted`` anything.

        Raises Moved, OSError.
        """
        found = np.zeros((len(entries), 2), np.uint64)
        for number in np.unique(entries).tolist():
            if number == ZERO:
                continue
            where = np.flatnonzero(entries == number if wanted is None else (entries == number) & wanted)
            if not len(where):
                continue
            if number == LOST:
                found[where] = _LOST
                continue
            low, high = int(where[0]), int(where[-1]) + 1
            if self._place(LayerId(number)).digests is None:
                for part in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1):
                    found[part] = self._hash(LayerId(number), first + int(part[0]), first + int(part[-1]) + 1)
            else:
                found[where] = self._of_layer(LayerId(number), first + low, first + high)[where - low]
        return found

    def _hash(self, number: LayerId, first: int, stop: int) -> Pairs:
        """Of pages that have no digests yet."""
        place = self._place(number)
        if place.pages is None:
            raise Moved
        fd, first, stop = self._file(place.pages), first + place.shift, stop + place.shift
        found = np.zeros((stop - first, 2), np.uint64)
        for low in range(first, stop, _HASHED):
            high = min(low + _HASHED, stop)
            data = read_exactly(fd, (high - low) << PAGE_SHIFT, low << PAGE_SHIFT)
            part = np.frombuffer(digest_padded(data), np.uint64).reshape(-1, 2)
            found[low - first : low - first + len(part)] = part
        return _as_known(found)

    def _of_layer(self, number: LayerId, first: int, stop: int) -> Pairs:
        place = self._place(number)
        if place.digests is None:
            return self._hash(number, first, stop)
        first, stop = first + place.shift, stop + place.shift
        data = read_exactly(self._file(place.digests), (stop - first) * DIGEST, first * DIGEST)
        found = np.frombuffer(data.ljust((stop - first) * DIGEST, b"\0"), np.uint64).reshape(-1, 2).copy()
        return _as_known(found)

    def of_last(self, number: LayerId, page: int, length: int) -> Pairs:
        """Of the last page, of which ``length`` bytes belong to the file."""
        if number in (ZERO, LOST):
            return np.zeros(2, np.uint64) if number == ZERO else _LOST
        place = self._place(number)
        if place.pages is None:  # it was the last page there too, and zeros are behind its end
            return self._of_layer(number, page, page + 1)
        data = read_exactly(self._file(place.pages), length, (page + place.shift) << PAGE_SHIFT)
        found = np.frombuffer(digest_padded(data), np.uint64) if data else np.zeros(2, np.uint64)
        return _as_known(found.reshape(1, 2).copy())

    def _place(self, number: LayerId) -> LayerPlace:
        try:
            return self._places[number]
        except KeyError:
            raise Moved from None

    def _file(self, path: str) -> int:
        if path not in self._opened:
            try:
                self._opened[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Moved from None
        return self._opened[path]


def _as_known(digests: Pairs) -> Pairs:
    """Of pages that a table names: those that hold only zeros, and those that are not there."""
    lost, zero = ~digests.any(axis=1), (digests == _ZERO).all(axis=1)
    digests[lost], digests[zero] = _LOST, 0
    return digests
