"""What images have in common: counts of pages, changed sets, and which layers may be merged."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramfs.image.table import Entries, Mask, PageTable
from ramfs.units import ZERO, LayerId

#: Pages looked at in one go: about a millisecond in which the loop waits for the interpreter.
_SLICE: Final = 1 << 16


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


Lacking = Mapping[LayerId, tuple[Mask, Mask]]
"""For layers that are still arriving, a bit for each page of the table: is it absent, is it known to be zeros?"""


def count_pages(
    table: PageTable, total: int, others: Iterable[PageTable], places: Places, lacking: Lacking | None = None
) -> PageCounts:
    """Count the pages of an image of ``total`` pages, given the tables of all images that may share some.

    ``table`` is changed: what is not stored counts as zero in it.
    """
    absent = 0
    for number, (not_here, zeros) in (lacking or {}).items():
        for a, b in table.regions(stop=total):
            entries = table.entries[a : min(b, len(not_here))]
            named = entries == number
            absent += int(np.count_nonzero(named & not_here[a : a + len(entries)]))
            entries[named & (not_here[a : a + len(entries)] | zeros[a : a + len(entries)])] = ZERO
    regions = list(table.regions(stop=total))
    masks = [np.zeros(b - a, np.bool_) for a, b in regions]
    moved, keys = _moved(table, total, places)
    found = np.zeros(len(keys), np.bool_)
    for other in others:
        for (a, b), mask in zip(regions, masks, strict=True):
            theirs = other.entries[a:b]
            mask[: len(theirs)] |= table.entries[a : a + len(theirs)] == theirs
        if len(keys):
            known = _moved(other, other.capacity, places)[1]
            known.sort()
            found |= _among(keys, known)
    shared: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    stored = 0
    for (a, b), mask in zip(regions, masks, strict=True):
        named = table.entries[a:b] != ZERO
        stored += int(np.count_nonzero(named))
        shared.append(np.flatnonzero(mask & named) + a)
    in_place, also = np.concatenate(shared), moved[found]
    count = len(in_place) + len(also) - int(np.count_nonzero(_among(also, in_place)))
    return PageCounts(stored - count, count, total - stored - absent, absent, total)


def differing(mine: Entries, theirs: Entries, first: int, places: Places) -> Mask:
    """Which pages, from ``first`` on, lie elsewhere by one table than by another; zeros are a place too.

    Whatever was written was written to a new place, so these are the pages that changed, with equal bytes or not.
    """
    found: Mask = mine != theirs
    if places and found.any():
        at = np.flatnonzero(found)
        found[at] = _keys(mine[at], at + first, places) != _keys(theirs[at], at + first, places)
    return found


def _keys(entries: Entries, numbers: NDArray[np.int64], places: Places) -> NDArray[np.uint64]:
    """For each page a number that tells where its bytes are: the layer of the file, and the place there."""
    end = max(places) + 1
    bases, shifts = np.arange(end, dtype=np.uint64), np.zeros(end, np.int64)
    for number, (base, shift) in places.items():
        bases[number], shifts[number] = base, shift
    known = np.where(entries < end, entries, 0)
    files = np.where(entries < end, bases[known], entries)
    return (numbers + shifts[known]).astype(np.uint64) | files << np.uint64(32)


def _among(values: NDArray[Any], known: NDArray[Any]) -> Mask:
    """Which of the values are in ``known``, which is in order. (np.isin keeps the interpreter's lock for seconds.)"""
    found = np.zeros(len(values), np.bool_)
    for low in range(0, len(values) if len(known) else 0, _SLICE):
        part = values[low : low + _SLICE]
        found[low : low + _SLICE] = known[np.minimum(np.searchsorted(known, part), len(known) - 1)] == part
    return found


def _moved(table: PageTable, stop: int, places: Places) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The pages whose layer is in ``places``, and for each a number that tells where its bytes are."""
    pages, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    end = max(places, default=0) + 1
    bases, shifts = np.zeros(end, np.uint64), np.zeros(end, np.int64)
    for number, (base, shift) in places.items():
        bases[number], shifts[number] = base, shift
    for first, last in table.regions(stop=stop) if places else ():
        for a in range(first, last, _SLICE):
            entries = table.entries[a : min(a + _SLICE, last)]
            found = np.flatnonzero(bases[np.where(entries < end, entries, 0)])
            names = entries[found]
            pages.append(found + a)
            keys.append((found + a + shifts[names]).astype(np.uint64) | bases[names] << np.uint64(32))
    return np.concatenate(pages), np.concatenate(keys)
