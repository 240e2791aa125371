"""Arithmetic on byte ranges and page contents."""

from typing import Final, NamedTuple

import numpy as np

from ramfs.image.table import Mask
from ramfs.units import PAGE, PAGE_SHIFT

Buffer = bytes | bytearray | memoryview

ZERO_PAGE: Final = bytes(PAGE)
_WORDS: Final = PAGE // 8


class Span(NamedTuple):
    """A byte range cut at page boundaries.

    ``head`` and ``tail`` are byte ranges ``(start, stop)`` inside one page each, empty where the range begins
    or ends on a boundary; pages ``[first, stop)`` are covered whole.
    """

    head: tuple[int, int]
    first: int
    stop: int
    tail: tuple[int, int]


def span(offset: int, length: int) -> Span:
    """Cut ``[offset, offset + length)`` into a ragged head, whole pages and a ragged tail."""
    end = offset + length
    first = (offset + PAGE - 1) >> PAGE_SHIFT
    stop = end >> PAGE_SHIFT
    if stop < first:  # inside one page
        return Span((offset, end), first, first, (end, end))
    return Span((offset, first << PAGE_SHIFT), first, stop, (stop << PAGE_SHIFT, end))


def nonzero_pages(data: Buffer) -> Mask:
    """For each whole page of ``data`` (a multiple of PAGE bytes): does it hold anything but zeros?"""
    words = np.frombuffer(data, np.uint64).reshape(-1, _WORDS)
    begins: Mask = words[:, 0] != 0
    if begins.all():  # usual, and nothing else of them has to be looked at
        return begins
    return np.asarray(np.bitwise_or.reduce(words, axis=1) != 0, np.bool_)


def is_zero(data: Buffer) -> bool:
    """Does ``data`` (any length) hold only zeros?"""
    if len(data) == PAGE:
        return data == ZERO_PAGE
    return not np.frombuffer(data, np.uint8).any()
