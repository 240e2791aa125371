"""Counts the pages of all images that are related in one go: whoever asks for those of one asks for the others next.

For one image alone the tables of all its relatives are read, so of N generations N times N tables would be. Here
each is read once, and what was found holds until a table changes.
"""

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import trio

from ramfs.image.lineage import PageCounts, count_alone
from ramfs.image.table import CHUNK, ENTRY, Entries, Mask, as_bytes
from ramfs.store.files import data_extents, read_exactly, read_into
from ramfs.store.images import HEADER, Image, unpack_header
from ramfs.store.store import Store
from ramfs.units import ImageId, pages

#: Entries looked at in one go, of all tables together: some 30 bytes of memory for each, if no two tables are alike.
_AT_ONCE: Final = 1 << 20


class _Counts(NamedTuple):
    stored: int
    owned: int


class Census:
    """Counts pages, and keeps the counts of the relatives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changes = -1
        self._found: dict[ImageId, _Counts] = {}

    async def counts(self, image: Image) -> PageCounts | None:
        """The pages of an image by state. None where tables alone do not tell them.

        So it is with direct images, and where pages are still arriving, or have names at several places.
        """
        images = self._store.images
        if image.direct is not None:
            return None
        total = image.pages
        if self._changes != images.changes or image.id not in self._found:
            tables = self._relatives(image)
            if tables is None:
                return None
            begun = images.changes
            found = await trio.to_thread.run_sync(_count, tables)
            if begun != self._changes:
                self._found.clear()
            self._changes = begun
            self._found |= found
        stored, owned = self._found[image.id]
        return PageCounts(owned, stored - owned, total - stored, 0, total)

    def _relatives(self, image: Image) -> dict[ImageId, str] | None:
        """The table files of all images that have pages in common, by whatever others, those first that are alike."""
        images, layers = self._store.images, self._store.layers
        records = images.records()
        wanted = np.zeros(max((int(record.max(initial=0)) for _, record in records), default=0) + 1, np.bool_)
        wanted[list(image.layers)] = True
        related = {image.id}
        while found := [each for each in records if each[0] not in related and wanted[each[1]].any()]:
            for number, record in found:
                related.add(number)
                wanted[record] = True
        for layer in layers.by_id.values():
            named = {number for number in (layer.id, layer.base) if number < len(wanted) and wanted[number]}
            if named and (layer.is_alias or layer.presence is not None):
                return None
        tables = {number: images.path(number) for number, _ in records if number in related}
        tables[image.id] = image.path  # that of one that was deleted, and is in use, is the last
        return tables


def _count(tables: dict[ImageId, str]) -> dict[ImageId, _Counts]:
    """Stored and owned pages of images that are related to nobody else (any thread)."""
    span = max(_AT_ONCE // len(tables) // CHUNK, 1) * CHUNK
    used = [_used(path, span) for path in tables.values()]
    stored, owned = np.zeros(len(tables), np.int64), np.zeros(len(tables), np.int64)
    paths = list(tables.values())
    for number in range(max(map(len, used))):
        there = [i for i, mask in enumerate(used) if number < len(mask) and mask[number]]

        def rows(first: int = number * span, there: list[int] = there) -> Iterator[Entries]:
            for i in there:
                row = _read(paths[i], first, span)
                stored[i] += np.count_nonzero(row)
                yield row

        if there:
            owned[there] += count_alone(rows())
    return {number: _Counts(int(a), int(b)) for number, a, b in zip(tables, stored, owned, strict=True)}


def _used(path: str, span: int) -> Mask:
    """For each ``span`` pages of a table file: may there be anything but zeros? Nothing of one that is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return np.zeros(0, np.bool_)
    try:
        total = pages(unpack_header(read_exactly(fd, HEADER, 0), path).size)
        found = np.zeros(-(-total // span), np.bool_)
        for low, high in data_extents(fd, HEADER):
            found[(low - HEADER) // (span * ENTRY) : -(-(high - HEADER) // (span * ENTRY))] = True
        return found
    finally:
        os.close(fd)


def _read(path: str, first: int, count: int) -> Entries:
    """So many entries of a table file, zero behind its end."""
    found: Entries = np.zeros(count, "<u4")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return found
    try:
        read_into(fd, as_bytes(found), HEADER + first * ENTRY)
        return found
    finally:
        os.close(fd)
