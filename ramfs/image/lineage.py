"""What images have in common: counts of pages, changed sets, and which layers may be merged."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramfs.image.table import PageTable
from ramfs.units import ZERO, LayerId


class PageCounts(NamedTuple):
    """Pages of an image by state; ``total`` is the sum of the others."""

    owned: int
    """stored, and named by no other image"""
    shared: int
    """stored, and named by another image too"""
    zero: int
    """only zeros, stored nowhere"""
    absent: int
    """not here yet (only while an image is arriving)"""
    total: int


Places = Mapping[LayerId, tuple[LayerId, int]]
"""For layers whose pages have names at several places of a table: the layer of the file, and the shift to it."""


def count_pages(table: PageTable, total: int, others: Iterable[PageTable], places: Places) -> PageCounts:
    """Count the pages of an image of ``total`` pages, given the tables of all images that may share some."""
    regions = list(table.regions(stop=total))
    masks = [np.zeros(b - a, np.bool_) for a, b in regions]
    moved, keys = _moved(table, total, places)
    found = np.zeros(len(keys), np.bool_)
    for other in others:
        for (a, b), mask in zip(regions, masks, strict=True):
            theirs = other.entries[a:b]
            mask[: len(theirs)] |= table.entries[a : a + len(theirs)] == theirs
        if len(keys):
            found |= np.isin(keys, _moved(other, other.capacity, places)[1])
    shared = np.zeros(0, np.int64)
    stored = 0
    for (a, b), mask in zip(regions, masks, strict=True):
        named = table.entries[a:b] != ZERO
        stored += int(np.count_nonzero(named))
        shared = np.append(shared, np.flatnonzero(mask & named) + a)
    count = len(np.union1d(shared, moved[found])) if found.any() else len(shared)
    return PageCounts(stored - count, count, total - stored, 0, total)


def _moved(table: PageTable, stop: int, places: Places) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The pages whose layer is in ``places``, and for each a number that tells where its bytes are."""
    pages, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for a, b in table.regions(stop=stop) if places else ():
        for number, (base, shift) in places.items():
            found = np.flatnonzero(table.entries[a:b] == number) + a
            pages.append(found)
            keys.append((found + shift).astype(np.uint64) | np.uint64(base << 32))
    return np.concatenate(pages), np.concatenate(keys)
