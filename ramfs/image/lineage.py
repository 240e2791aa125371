"""What images have in common: counts of pages, changed sets, and which layers may be merged."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ramfs.image.table import Mask, PageTable
from ramfs.units import ZERO, ImageId, LayerId


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


def shared_mask(table: PageTable, others: Iterable[PageTable], first: int, stop: int) -> Mask:
    """Which of the pages ``[first, stop)`` of ``table`` some other table names in the same layer."""
    mine = table.entries[first:stop]
    shared = np.zeros(len(mine), np.bool_)
    for other in others:
        theirs = other.entries[first:stop]
        shared[: len(theirs)] |= mine[: len(theirs)] == theirs
    shared &= mine != ZERO
    return shared


def count_pages(table: PageTable, total: int, others: Iterable[PageTable], aliases: Iterable[LayerId]) -> PageCounts:
    """Count the pages of an image of ``total`` pages.

    ``aliases`` are the layers that name pages of another layer at shifted places: such a page has a second
    owner by construction, or had one, and counts as shared.
    """
    others = list(others)
    shifted = np.array(sorted(aliases), np.uint32)
    stored = shared = 0
    for a, b in table.regions(stop=total):
        mask = shared_mask(table, others, a, b)
        if len(shifted):
            mask |= np.isin(table.entries[a:b], shifted)
        stored += int(np.count_nonzero(table.entries[a:b]))
        shared += int(np.count_nonzero(mask))
    return PageCounts(stored - shared, shared, total - stored, 0, total)


def exclusive_layers(users: Mapping[LayerId, set[ImageId]], image: ImageId) -> set[LayerId]:
    """Of the layers in ``users`` (layer -> images that may name it), those that only ``image`` names."""
    return {layer for layer, images in users.items() if images == {image}}
