"""Layouts: what is refused, what is derived, what files remember; QEMU's own words are in test_memorymap.py."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramfs.errors import FileError
from ramfs.inspect.layout import MAX_RANGES, Elsewhere, Layout, Range, compose, derive, parse, records, to_text
from ramfs.ramblock import BlockName, GuestAddress

MIB, GIB = 1 << 20, 1 << 30
FILES = {b"ram0": GIB, b"pc.ram@0x0": 5 * GIB, b"state": 300_000}


def made(gpa: int, size: int, offset: int = 0, file: bytes = b"ram0", block: bytes | None = None) -> Range:
    return Range(GuestAddress(gpa), size, offset, file, BlockName(block or file))


def refused(text: str | bytes | dict[str, object], *words: str) -> None:
    with pytest.raises(FileError) as caught:
        parse(json.dumps(text) if isinstance(text, dict) else text, FILES)
    assert caught.value.errno == errno.EINVAL
    told = str(caught.value)
    assert "\n" not in told
    assert all(word in told for word in words), told


def test_numbers_are_hexadecimal_or_not_and_defaults_are_taken() -> None:
    entry = {"gpa": "0x100000", "size": 2 * MIB, "file": "ram0"}
    layout = parse(json.dumps({"ranges": [entry, {"gpa": 0, "size": "4096", "file": "pc.ram@0x0"}]}), FILES)
    assert layout.ranges == (made(0, 4096, file=b"pc.ram@0x0", block=b"pc.ram"), made(MIB, 2 * MIB))
    assert [each.name for each in layout.ranges] == [b"pc.ram@0x0", b"ram0@0x100000"]
    assert (layout.size, layout.gaps(), layout.derived) == (3 * MIB, [(4096, MIB)], False)


RANGE = {"gpa": 0, "size": MIB, "file": "ram0"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no JSON"]),
        (b"\xff\xfe", ["no JSON"]),
        ("[" * 100_000, ["no JSON"]),
        ("[]", ["no object"]),
        ({}, ['"ranges"']),
        ({"ranges": {}}, ["no list"]),
        ({"ranges": [[]]}, ["no range"]),
        ({"ranges": [RANGE] * (MAX_RANGES + 1)}, ["at most"]),
        ({"ranges": [], "schema": 2}, ['"schema" is 2']),
        ({"ranges": [], "machine": 1}, ["machine"]),
        ({"ranges": [{**RANGE, "offest": 0}]}, ['"offest"']),
        ({"ranges": [{**RANGE, "gpa": "zero"}]}, ['"gpa"']),
        ({"ranges": [{**RANGE, "gpa": -4096}]}, ['"gpa"']),
        ({"ranges": [{**RANGE, "gpa": True}]}, ['"gpa"']),
        ({"ranges": [{**RANGE, "gpa": 100}]}, ["0x64", "page"]),
        ({"ranges": [{**RANGE, "size": 0}]}, ["empty"]),
        ({"ranges": [{**RANGE, "size": 2 * GIB}]}, ["ram0", "0x40000000 bytes"]),
        ({"ranges": [{**RANGE, "offset": GIB}]}, ["ends at 0x40100000"]),
        ({"ranges": [{**RANGE, "file": "ram1"}]}, ["no file ram1"]),
        ({"ranges": [{**RANGE, "file": "../ram0"}]}, ["no file ../ram0"]),
        ({"ranges": [{**RANGE, "file": ""}]}, ['"file"']),
        ({"ranges": [{**RANGE, "file": "\ud800"}]}, ['"file"']),
        ({"ranges": [{**RANGE, "block": "x" * 300}]}, ["no name"]),
        ({"ranges": [{**RANGE, "gpa": "0xfffffffff0000"}]}, ["addresses end"]),
        ({"ranges": [RANGE, {**RANGE, "gpa": MIB - 4096}]}, ["[0x0, 0x100000) and [0xff000, 0x1ff000) overlap"]),
        ({"ranges": [RANGE, RANGE]}, ["overlap"]),
        ({"ranges": [RANGE], "elsewhere": [{"gpa": 4096, "size": 4096, "block": "pc.bios"}]}, ["overlap"]),
        ({"ranges": [], "vmcoreinfo": {"file": "ram0", "offset": GIB}}, ["vmcoreinfo", "no such place"]),
        ({"ranges": [], "vmcoreinfo": {"file": "none", "offset": 0}}, ["none"]),
        ({"ranges": [], "vmcoreinfo": []}, ["no range"]),
        ({"ranges": [], "elsewhere": [{"gpa": 4096, "size": 4096, "block": "b", "file": "x"}]}, ['"file"']),
    ],
)
def test_layouts_that_lie_are_refused_in_one_line(text: str | dict[str, object], words: list[str]) -> None:
    refused(text, *words)


def is_told_or_refused(text: bytes | str) -> bool:
    try:
        layout = parse(text, FILES)
    except FileError as exc:
        return exc.errno == errno.EINVAL
    return parse(to_text(layout), FILES) == layout


@given(st.binary(max_size=300))
def test_whatever_is_written_is_a_layout_or_refused(text: bytes) -> None:
    assert is_told_or_refused(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["0x1000", "ram0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.dictionaries(st.sampled_from(["gpa", "size", "file", "offset", "block"]), JSON)


@given(st.dictionaries(st.sampled_from(["ranges", "elsewhere", "machine", "schema", "x"]), JSON | st.lists(ENTRY)))
def test_whatever_json_is_written_is_a_layout_or_refused(told: dict[str, object]) -> None:
    assert is_told_or_refused(json.dumps(told))


def test_text_and_records_say_the_same() -> None:
    layout = Layout(
        (made(0, 3 * GIB, 0, b"pc.ram@0x0", b"pc.ram"), made(4 * GIB, 2 * GIB, 3 * GIB, b"pc.ram@0x0", b"pc.ram"),
         made(8 * GIB, MIB, 4096, b"ram0", b"x/\xff")),
        (Elsewhere(GuestAddress(4 * GIB - MIB), MIB, BlockName(b"pc.bios")),),
        "pc-q35-7.2",
    )  # fmt: skip
    assert parse(to_text(layout), FILES) == layout
    known = replace(layout, note=(b"ram0", 77 * 4096))
    assert parse(to_text(known), FILES) == known
    told = records(layout)
    assert set(told) == {b"pc.ram@0x0", b"ram0"}
    assert compose(told) == layout
    # A file that was renamed, copied alone, or has another beside it that says something else.
    moved = compose({b"z": told[b"ram0"]})
    assert moved.ranges == (made(8 * GIB, MIB, 4096, b"z", b"x/\xff"),)
    assert (moved.machine, moved.elsewhere) == ("", ())
    both = compose({b"a": told[b"ram0"], b"b": told[b"ram0"]})
    assert [each.file for each in both.ranges] == [b"a"]
    assert [each.file for each in both.ignored] == [b"b"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({b"pc.ram@0x0": 256 * MIB, b"state": 4096}, [made(0, 256 * MIB, file=b"pc.ram@0x0", block=b"pc.ram")]),
        (
            {b"pc.ram@0x0": 5 * GIB},
            [made(0, 3 * GIB, 0, b"pc.ram@0x0", b"pc.ram"), made(4 * GIB, 2 * GIB, 3 * GIB, b"pc.ram@0x0", b"pc.ram")],
        ),
        ({b"pc.ram@0x0": 0xDFFFF000}, [made(0, 0xDFFFF000, file=b"pc.ram@0x0", block=b"pc.ram")]),
        ({b"pc.ram@0x0": MIB + 100}, [made(0, MIB, file=b"pc.ram@0x0", block=b"pc.ram")]),
        (
            {b"pc.ram@0x0": 5 * GIB, b"0000:00:02.0%2Fvga.vram@0xfd000000": 16 * MIB},
            [made(0, 3 * GIB, 0, b"pc.ram@0x0", b"pc.ram"),
             made(0xFD000000, 16 * MIB, 0, b"0000:00:02.0%2Fvga.vram@0xfd000000", b"0000:00:02.0/vga.vram"),
             made(4 * GIB, 2 * GIB, 3 * GIB, b"pc.ram@0x0", b"pc.ram")],
        ),
        ({b"ram": 128 * MIB, b"state": 2 * MIB}, [made(0, 128 * MIB, file=b"ram")]),
        ({b"ram0": 128 * MIB, b"ram1": 128 * MIB}, []),
        ({b"notes": 100, b"pc.ram@0x0": 0}, []),
        ({b"far@0xffffffffffff0000": MIB, b"odd@0x1": MIB}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_what_names_and_sizes_tell(files: dict[bytes, int], expected: list[Range]) -> None:
    layout = derive(files)
    assert (list(layout.ranges), layout.derived, layout.ignored) == (expected, True, ())


def test_files_that_cannot_be_together_are_told() -> None:
    layout = derive({b"a@0x0": MIB, b"b@0x1000": MIB, b"c@0x100000": MIB})
    assert [each.file for each in layout.ranges] == [b"a@0x0", b"c@0x100000"]
    assert [each.file for each in layout.ignored] == [b"b@0x1000"]
    assert json.loads(to_text(layout))["ignored"][0]["file"] == "b@0x1000"
