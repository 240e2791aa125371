"""What a view of a guest's memory reads as: some bytes of its own, and pieces of files. Arithmetic only.

    physmem   at each offset what the guest has at that physical address
    vmcore    an ELF core of the same ranges (vmcore.py)
    a range   one range alone

Between the pieces lie gaps, which read as zeros.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ramfs.inspect import vmcore
from ramfs.inspect.layout import Layout, Range


class Piece(NamedTuple):
    """Bytes of a view that lie in a file."""

    start: int
    """in the view"""
    length: int
    file: int
    """the file's inode number"""
    offset: int
    """in the file"""


class Bytes(NamedTuple):
    """Bytes of a view that it has of its own."""

    start: int
    data: bytes

    @property
    def length(self) -> int:
        """How many."""
        return len(self.data)


class Gap(NamedTuple):
    """Zeros of a view that lie nowhere."""

    start: int
    length: int


Part = Piece | Bytes | Gap


@dataclass(frozen=True, slots=True)
class View:
    """Where the bytes of a view are."""

    size: int
    pieces: tuple[Piece, ...]
    """in order; none overlaps another, or the head"""
    head: bytes = b""
    """the view's first bytes"""

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """Bytes ``[offset, offset + length)``, cut at the view's end: in order, without anything between them."""
        at, end = offset, min(offset + length, self.size)
        if at < end and at < len(self.head):
            yield Bytes(at, self.head[at:end])
            at = min(len(self.head), end)
        index = max(bisect_right(self.pieces, at, key=lambda piece: piece.start) - 1, 0)
        for start, size, file, place in self.pieces[index:]:
            if at >= end or start >= end:
                break
            if start + size <= at:
                continue
            if at < start:
                yield Gap(at, start - at)
                at = start
            stop = min(start + size, end)
            yield Piece(at, stop - at, file, place + at - start)
            at = stop
        if at < end:
            yield Gap(at, end - at)

    def pack(self) -> bytes:
        """As bytes, for :meth:`unpack`."""
        return json.dumps([self.size, self.pieces, self.head.hex()]).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "View":
        """A view from what :meth:`pack` made of it."""
        size, pieces, head = json.loads(data)
        return cls(size, tuple(Piece(*piece) for piece in pieces), bytes.fromhex(head))


def of_range(each: Range, numbers: Mapping[bytes, int]) -> View:
    """One range; ``numbers`` are the inode numbers of files by their names."""
    return View(each.size, (Piece(0, each.size, numbers[each.file], each.offset),))


def physmem(layout: Layout, numbers: Mapping[bytes, int]) -> View:
    """All of the physical memory."""
    pieces = tuple(Piece(each.gpa, each.size, numbers[each.file], each.offset) for each in layout.ranges)
    return View(layout.size, pieces)


def core(layout: Layout, numbers: Mapping[bytes, int], note: bytes = b"") -> View:
    """An ELF core, with a note of the guest's kernel if there is one."""
    at = vmcore.data_offset(len(layout.ranges))
    pieces: list[Piece] = []
    for each in layout.ranges:
        pieces.append(Piece(at, each.size, numbers[each.file], each.offset))
        at += each.size
    head = vmcore.header([(each.gpa, each.size) for each in layout.ranges], note)
    return View(at, tuple(pieces), head)
