"""Views as arithmetic: what lies where in them, the head of a core, the note of a kernel."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramfs.inspect import vmcore
from ramfs.inspect.layout import Layout, Range
from ramfs.inspect.views import Bytes, Gap, Piece, View, core, of_range, physmem
from ramfs.inspect.vmcoreinfo import AT_ONCE, MAX_NOTE, MOST, likely_first, note_in, search
from ramfs.ramblock import BlockName, GuestAddress
from ramfs.units import PAGE


def note(text: bytes = b"OSRELEASE=6.1\nPAGESIZE=4096\n", name: bytes = b"VMCOREINFO\0", kind: int = 0) -> bytes:
    return struct.pack("<III", len(name), len(text), kind) + name.ljust(12, b"\0") + text


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    at, ranges = 0, []
    for file in range(draw(st.integers(0, 5))):
        at += draw(st.integers(0, 3)) * PAGE
        size = draw(st.integers(1, 4)) * PAGE
        offset = draw(st.integers(0, 3)) * PAGE
        ranges.append(Range(GuestAddress(at), size, offset, b"f%d" % (file % 2), BlockName(b"ram")))
        at += size
    return Layout(tuple(ranges))


NUMBERS = {b"f0": 100, b"f1": 200}
CONTENTS = {ino: np.random.default_rng(ino).integers(1, 255, 8 * PAGE, np.uint8).tobytes() for ino in NUMBERS.values()}  # type: ignore[arg-type]


def read(view: View, offset: int, length: int) -> bytes:
    found, at = b"", offset
    for part in view.parts(offset, length):
        assert part.start == at
        assert part.length > 0
        at += part.length
        if isinstance(part, Bytes):
            found += part.data
        elif isinstance(part, Gap):
            found += bytes(part.length)
        else:
            found += CONTENTS[part.file][part.offset : part.offset + part.length]
    return found


@given(layouts(), st.integers(0, 20 * PAGE), st.integers(0, 20 * PAGE))
def test_views_read_as_what_they_are_made_of(layout: Layout, offset: int, length: int) -> None:
    memory = bytearray(layout.size)
    parts = []
    for each in layout.ranges:
        parts.append(CONTENTS[NUMBERS[each.file]][each.offset : each.offset + each.size])
        memory[each.gpa : each.end] = parts[-1]
        assert read(of_range(each, NUMBERS), 0, each.size + 1) == parts[-1]
    view = physmem(layout, NUMBERS)
    assert view.size == len(memory)
    assert read(view, offset, length) == memory[offset : offset + length]
    dump = core(layout, NUMBERS, note())
    whole = dump.head + b"".join(parts)
    assert (dump.size, len(dump.head) % PAGE) == (len(whole), 0)
    assert read(dump, offset, length) == whole[offset : offset + length]
    assert View.unpack(dump.pack()) == dump
    assert core(layout, NUMBERS).size == dump.size


def test_a_core_says_where_everything_is() -> None:
    head = vmcore.header([(0, 2 * PAGE), (1 << 32, PAGE)], note())
    assert head[:6] == b"\x7fELF\x02\x01"
    kind, machine = struct.unpack_from("<HH", head, 16)
    phoff, _, _, ehsize, phentsize, phnum = struct.unpack_from("<QQIHHH", head, 32)
    assert (kind, machine, phoff, ehsize, phentsize, phnum) == (4, 62, 64, 64, 56, 3)
    segments = [struct.unpack_from("<IIQQQQQQ", head, phoff + i * phentsize) for i in range(phnum)]
    assert [each[0] for each in segments] == [4, 1, 1]
    _, _, at, _, _, size, _, _ = segments[0]
    assert head[at : at + size] == note()
    assert [(each[2] - len(head), each[3], each[4], each[5], each[6]) for each in segments[1:]] == [
        (0, 0, 0, 2 * PAGE, 2 * PAGE),
        (2 * PAGE, 1 << 32, 1 << 32, PAGE, PAGE),
    ]
    nothing, empty = (struct.unpack_from("<IIQQQQQQ", vmcore.header(each), 64) for each in ([], [(0, PAGE)]))
    assert (nothing[0], nothing[5]) == (0, 0)
    assert (empty[0], *empty[3:7]) == (1, PAGE, PAGE, 0, 0)
    assert len(vmcore.header([], bytes(MAX_NOTE))) == vmcore.data_offset(0) == len(vmcore.header([]))


def test_what_is_a_note() -> None:
    good = note()
    assert note_in(good + b"more") == good
    odd = note(b"OSRELEASE=6.1\n")
    assert note_in(odd.ljust(PAGE, b"\xff")) == odd + b"\0\0"
    longest = note(b"OSRELEASE=".ljust(PAGE, b"x"))
    assert note_in(longest) == longest
    for bad in (
        b"", good[:20], good[:-1], note(b"OTHER=1\n"), note(kind=1), note(name=b"CORE\0\0\0\0\0\0\0"),
        note(b"OSRELEASE=".ljust(PAGE + 1, b"x")), bytes(PAGE),
    ):  # fmt: skip
        assert note_in(bad) == b""


def test_a_note_is_found_and_what_only_looks_like_one_is_not() -> None:
    pages = {5: note(b"OTHER=1\n"), 2 * AT_ONCE + 3: note()}
    reads: list[tuple[int, int]] = []

    def look(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        first, count = offset // PAGE, (length + PAGE - 1) // PAGE
        return b"".join(pages.get(first + i, b"").ljust(PAGE, b"\0") for i in range(count))[:length]

    assert search([(0, 10), (AT_ONCE, 10 * AT_ONCE)], look) == 2 * AT_ONCE + 3
    assert max(offset for offset, _ in reads) < 3 * AT_ONCE * PAGE  # and it ends there
    assert search([(0, 10)], look) is None
    reads.clear()
    assert search(iter([(0, 100 * MOST)]), lambda offset, length: reads.append((offset, length)) or b"") is None
    assert sum(length for _, length in reads) == MOST * PAGE


@pytest.mark.parametrize("pages", [0, 1, 5000, 1 << 16, (1 << 16) + 1, 1 << 17, (1 << 18) + 77])
def test_all_is_looked_at_once_the_ends_first(pages: int) -> None:
    ranges = list(likely_first(pages))
    assert ranges[0] == (max(pages - (1 << 16), 0), pages)
    assert max(stop - first for first, stop in ranges) <= 1 << 16
    assert sorted(page for first, stop in ranges for page in range(first, stop)) == list(range(pages))


def test_pieces_are_found_far_away() -> None:
    view = View(1 << 52, (Piece(1 << 51, PAGE, 100, 0),))
    assert list(view.parts((1 << 51) - 1, 3)) == [Gap((1 << 51) - 1, 1), Piece(1 << 51, 2, 100, 0)]
    assert list(view.parts((1 << 52) - 1, 5)) == [Gap((1 << 52) - 1, 1)]
    assert list(view.parts(1 << 52, 5)) == []
