"""What images have in common: counts of pages, changed sets, and which layers may be merged."""

from collections.abc import Iterable, Mapping
from enum import IntEnum
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


class PageState(IntEnum):
    """What a page of an image is; the states that `PageCounts` counts."""

    ZERO = 0
    OWNED = 1
    SHARED = 2
    ABSENT = 3


States = list[tuple[int, NDArray[np.uint8]]]
"""For ranges of pages, from the first one of each on, their states; pages between them are zero."""


def page_states(
    table: PageTable, total: int, others: Iterable[PageTable], places: Places, lacking: Lacking | None = None
) -> States:
    """The states of the pages of an image of ``total`` pages, given the tables of all images that may share some.

    ``table`` is changed: what is not stored counts as zero in it.
    """
    regions = list(table.regions(stop=total))
    states = [np.zeros(b - a, np.uint8) for a, b in regions]
    for number, (not_here, zeros) in (lacking or {}).items():
        for (a, b), found in zip(regions, states, strict=True):
            entries = table.entries[a : min(b, len(not_here))]
            named = entries == number
            found[: len(entries)][named & not_here[a : a + len(entries)]] = PageState.ABSENT
            entries[named & (not_here[a : a + len(entries)] | zeros[a : a + len(entries)])] = ZERO
    masks = [np.zeros(b - a, np.bool_) for a, b in regions]
    moved, keys = _moved(table, total, places)
    known_elsewhere = np.zeros(len(keys), np.bool_)
    for other in others:
        for (a, b), mask in zip(regions, masks, strict=True):
            theirs = other.entries[a:b]
            mask[: len(theirs)] |= table.entries[a : a + len(theirs)] == theirs
        if len(keys):
            known = _moved(other, other.capacity, places)[1]
            known.sort()
            known_elsewhere |= _among(keys, known)
    also = moved[known_elsewhere]
    for (a, b), mask, found in zip(regions, masks, states, strict=True):
        low, high = np.searchsorted(also, (a, b))
        mask[also[low:high] - a] = True
        named = table.entries[a:b] != ZERO
        found[named] = PageState.OWNED
        found[named & mask] = PageState.SHARED
    return [(a, found) for (a, _), found in zip(regions, states, strict=True)]


def count_states(states: States, total: int) -> PageCounts:
    """How many of ``total`` pages are what."""
    found = np.zeros(len(PageState), np.int64)
    for _, part in states:
        found += np.bincount(part, minlength=len(PageState))
    _, owned, shared, absent = found.tolist()
    return PageCounts(owned, shared, total - owned - shared - absent, absent, total)


def count_pages(
    table: PageTable, total: int, others: Iterable[PageTable], places: Places, lacking: Lacking | None = None
) -> PageCounts:
    """Count the pages of an image; the arguments are those of `page_states`."""
    return count_states(page_states(table, total, others, places, lacking), total)


def count_alone(rows: Iterable[Entries]) -> list[int]:
    """For each of some tables, how many pages are stored that no other of them names at the same place.

    Of each the entries for the same pages are given. It costs what comparing each with the one before does, and what
    differs between these: let those follow each other that are much alike.
    """
    keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    begun: NDArray[np.int64] = np.zeros(0, np.int64)  # where the row before differs from the one before that
    before: Entries | None = None
    count = 0
    for row in rows:
        if before is not None:
            changed = row != before
            keys.append(begun.astype(np.uint64) | before[begun].astype(np.uint64) << np.uint64(32))
            owners.append(np.where(changed[begun], count - 1, -1))  # -1: the row that follows has it too
            begun = np.flatnonzero(changed & (row != ZERO))
        else:
            begun = np.flatnonzero(row)
        before = row
        count += 1
    if before is not None:
        keys.append(begun.astype(np.uint64) | before[begun].astype(np.uint64) << np.uint64(32))
        owners.append(np.full(len(begun), count - 1))
    named = np.concatenate(keys)
    order = np.argsort(named)
    named = named[order]
    other = np.append(True, named[1:] != named[:-1])[: len(named)]
    alone = other & np.append(other[1:], True)[: len(named)]  # unlike the one before, and the one behind
    whose = np.concatenate(owners)[order][alone]
    found: list[int] = np.bincount(whose[whose >= 0], minlength=count).tolist()
    return found


def state_runs(states: States, total: int) -> NDArray[np.int64]:
    """The same as runs: rows ``(first page, state)``, each up to the next one's first page."""
    if not total:
        return np.zeros((0, 2), np.int64)
    firsts, kinds = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    for first, part in states:
        cuts = np.append(0, np.flatnonzero(part[1:] != part[:-1]) + 1) if len(part) else np.zeros(0, np.int64)
        firsts += [cuts + first, np.array([first + len(part)])]
        kinds += [part[cuts].astype(np.int64), np.zeros(1, np.int64)]
    runs = np.stack([np.concatenate(firsts), np.concatenate(kinds)], axis=1)
    # Where a range begins right behind another, or with zeros, a row says nothing.
    runs = runs[(runs[:, 0] < total) & np.append(runs[1:, 0] != runs[:-1, 0], True)]
    found: NDArray[np.int64] = runs[np.append(True, runs[1:, 1] != runs[:-1, 1])]
    return found


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
