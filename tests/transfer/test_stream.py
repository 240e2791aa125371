"""The stream's codec: bytes in any pieces, cut off anywhere, changed anywhere; told by no file and no socket."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from ramfs.cli._transfer import zstd
from ramfs.errors import SourceBroken, SourceError, UsageError
from ramfs.image.digest import digest_pages
from ramfs.transfer.stream import (
    MAX_PAGES,
    PRELUDE,
    Begin,
    Decoder,
    Encoder,
    End,
    Entry,
    Kind,
    Pages,
    Run,
    Token,
    Zeros,
    read_prelude,
)
from ramfs.units import PAGE

ID, BASE = "ab" * 16, "cd" * 16
#: What a record holds: a file, its runs, and whether they are zeros.
Part = tuple[int, list[Run], bool]
ENTRIES = [
    Entry("", "dir", 0o755, 0, 0, 1),
    Entry("a", "file", 0o600, 0, 0, 2, size=5 * PAGE + 100, xattrs=(("user.x", b"\0\xff"),)),
    Entry("b", "symlink", 0o777, 1, 2, 3, target="anywhere"),
    Entry("sub", "dir", 0o700, 0, 0, 4),
    Entry("sub/\udcff", "file", 0o644, 0, 0, -5, size=10 * PAGE),
    Entry("sub/hard", "hardlink", 0o600, 0, 0, 6, target="a"),
    Entry("sub/pipe", "fifo", 0o600, 0, 0, 7),
]  # fmt: skip
FILES = {1: 6, 4: 10}


def made(parts: list[Part], start: int = 0, begin: Begin | None = None) -> tuple[bytes, list[Any]]:
    """A stream, and what must be told of it."""
    total = sum(b - a for _, runs, zeros in parts for a, b in runs if not zeros)
    begin = begin or Begin("snap", ID, BASE, "/vm/.snap/snap", "/vm/.snap/old", len(ENTRIES), total, start)
    encoder = Encoder()
    stream = b"".join(encoder.begin(begin, zstd=False))
    events: list[Any] = [begin, *ENTRIES]
    stream += b"".join(encoder.entry(number, entry) for number, entry in enumerate(ENTRIES))
    for number, (file, runs, zeros) in enumerate(parts):
        if number < start:
            continue
        if zeros:
            stream += encoder.zeros(file, runs)
            events.append(Zeros(file, runs))
        else:
            data = os.urandom(sum(b - a for a, b in runs) * PAGE)
            stream += encoder.pages(file, runs, digest_pages(data)) + data
            events.append((file, runs, data))
    return stream + encoder.end(), [*events, End(len(parts))]


def decode(stream: bytes, sizes: Iterable[int] = ()) -> tuple[list[Any], Decoder]:
    """What is told of bytes that come in pieces of these sizes, each at least one byte, then as large as may be."""
    if read_prelude(stream[: PRELUDE.size]):
        try:
            stream = stream[: PRELUDE.size] + zstd().decompress(stream[PRELUDE.size :])
        except zstd().ZstdError as exc:
            raise SourceBroken(str(exc)) from None
    decoder, at, events = Decoder(), PRELUDE.size, []
    pieces = itertools.chain(sizes, itertools.repeat(1 << 30))
    while at < len(stream) and not decoder.ended:
        buffer = decoder.get_buffer()
        count = min(len(buffer), next(pieces), len(stream) - at)
        assert count > 0
        buffer[:count] = stream[at : at + count]
        at += count
        event = decoder.received(count)
        if isinstance(event, Pages):
            events.append((event.file, event.runs, bytes(event.data)))
        elif event is not None:
            events.append(event)
    return events, decoder


@st.composite
def some_parts(draw: st.DrawFn) -> list[Part]:
    """Runs of pages of the files, in order."""
    found: list[Part] = []
    for file, total in FILES.items():
        cuts = sorted(draw(st.sets(st.integers(0, total), max_size=6)))
        runs = list(itertools.pairwise(cuts))
        split = draw(st.sampled_from([[runs], [[run] for run in runs]]))
        found += [(file, several, draw(st.booleans())) for several in split if several]
    return found


ALL: list[Part] = [(1, [(0, 2), (4, 6)], False), (1, [], True), (4, [(3, 4)], True), (4, [(7, 10)], False)]
ALL = [part for part in ALL if part[1]]


@given(some_parts(), st.lists(st.integers(1, 5000), max_size=50))
def test_it_comes_out_as_it_went_in(parts: list[Part], sizes: list[int]) -> None:
    stream, expected = made(parts)
    events, decoder = decode(stream, sizes)
    assert events == expected
    assert decoder.ended


def test_a_byte_at_a_time() -> None:
    stream, expected = made(ALL)
    assert decode(stream, itertools.repeat(1))[0] == expected


@given(some_parts(), st.data())
def test_the_rest_of_a_stream(parts: list[Part], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(parts)))
    stream, expected = made(parts, start)
    events, decoder = decode(stream)
    assert events == expected
    assert (decoder.ended, decoder.number) == (True, len(parts))


STREAM, TOLD = made(ALL)


@given(st.integers(PRELUDE.size, len(STREAM) - 1))
def test_what_is_cut_off_has_no_end(length: int) -> None:
    events, decoder = decode(STREAM[:length])
    assert not decoder.ended
    assert events == TOLD[: len(events)]


@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
@example(PRELUDE.size - 4, 1)  # says that the rest is compressed
@example(PRELUDE.size, 1)
@example(len(STREAM) - 1, 128)
def test_no_byte_can_be_changed(at: int, flip: int) -> None:
    """What is told before is right, and nothing that is wrong is told, nor that this was all."""
    stream = bytearray(STREAM)
    stream[at] ^= flip
    events: list[Any] = []
    try:
        events, decoder = decode(bytes(stream))
    except SourceError:
        return
    assert not decoder.ended
    assert events == TOLD[: len(events)]


def test_records_of_another_stream_do_not_fit() -> None:
    other = Begin("snap", ID, None, "/vm/.snap/snap", None, len(ENTRIES), 7, 0)
    mine, first = Encoder().begin(TOLD[0], zstd=False)
    theirs = b"".join(Encoder().begin(other, zstd=False))
    assert decode(mine + first + STREAM[len(mine + first) :])[1].ended
    with pytest.raises(SourceError):
        decode(mine + first + made([], begin=other)[0][len(theirs) :])


def lie(**changes: Any) -> bytes:
    """A stream whose one file has an entry of which something is not true, with the right checksums."""
    encoder = Encoder()
    stream = b"".join(encoder.begin(Begin("s", ID, None, "x", None, 2, 0, 0), zstd=False))
    stream += encoder.entry(0, ENTRIES[0])
    told = {**ENTRIES[1]._asdict(), "xattrs": [], **changes}
    return stream + encoder._record(Kind.ENTRY, 1, json.dumps(told).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "../a"}, {"path": "/a"}, {"path": ""}, {"path": "a/b"}, {"path": "a\0"}, {"path": ".snap"},
        {"path": "\ud800"}, {"path": 7}, {"path": "x" * 256}, {"kind": "door"}, {"kind": "hardlink", "target": "b"},
        {"kind": "symlink", "target": ""}, {"mode": 0o10000}, {"mode": -1}, {"mode": True}, {"size": 1 << 50},
        {"size": None}, {"uid": "root"}, {"mtime": 1e300}, {"xattrs": {}}, {"xattrs": [["a"]]}, {"xattrs": [[1, "aa"]]},
        {"xattrs": [["a", "!"]]}, {"xattrs": [["", base64.b64encode(b"x").decode()]]},
    ],
)  # fmt: skip
def test_entries_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(SourceBroken):
        decode(lie(**changes))


@pytest.mark.parametrize(
    ("file", "runs"),
    [(0, [(0, 1)]), (2, [(0, 1)]), (99, [(0, 1)]), (1, [(6, 7)]), (1, [(5, 7)]), (1, [(2, 2)]), (1, [(3, 4), (1, 2)]),
     (1, [(0, 2), (1, 3)]), (1, []), (1, [((1 << 64) - 1, 1 << 64)])],
)  # fmt: skip
@pytest.mark.parametrize("zeros", [False, True])
def test_pages_where_none_can_be(file: int, runs: list[Run], zeros: bool) -> None:
    with pytest.raises(SourceBroken):
        decode(made([(file, runs, zeros)])[0])


def test_records_where_none_can_be() -> None:
    encoder = Encoder()
    begin = Begin("s", ID, None, "x", None, 1, 0, 0)
    prelude, first = encoder.begin(begin, zstd=False)
    for records in (
        encoder.entry(0, ENTRIES[0]), first + first, first + encoder.end(), first + encoder.zeros(0, [(0, 1)]),
        first + encoder.entry(1, ENTRIES[0]), first + encoder.entry(0, ENTRIES[0]) * 2,
    ):  # fmt: skip
        with pytest.raises(SourceError):
            decode(prelude + records)
    for name in ("", "..", "a/b", "\0"):
        with pytest.raises(SourceBroken):
            decode(b"".join(Encoder().begin(begin._replace(name=name), zstd=False)))


def test_a_page_that_is_too_much() -> None:
    data = bytes((MAX_PAGES + 1) * PAGE)
    encoder = Encoder()
    stream = b"".join(encoder.begin(Begin("s", ID, None, "x", None, 2, 0, 0), zstd=False))
    stream += encoder.entry(0, ENTRIES[0]) + encoder.entry(1, ENTRIES[1]._replace(size=1 << 30))
    stream += encoder.pages(1, [(0, MAX_PAGES + 1)], digest_pages(data)) + data
    with pytest.raises(SourceBroken):
        decode(stream)


@given(st.binary(max_size=300))
def test_anything_at_all(noise: bytes) -> None:
    for stream in (noise, STREAM[: PRELUDE.size] + noise):
        with contextlib.suppress(SourceError):
            assert len(stream) < PRELUDE.size or not decode(stream)[1].ended


def test_preludes() -> None:
    assert not read_prelude(PRELUDE.pack(b"RAMFSSTR", 1, 0))
    assert read_prelude(PRELUDE.pack(b"RAMFSSTR", 1, 1))
    for version, flags in ((2, 0), (1, 2), (0, 0)):
        with pytest.raises(SourceBroken, match="newer"):
            read_prelude(PRELUDE.pack(b"RAMFSSTR", version, flags))


def test_tokens() -> None:
    for token in (Token("/vm/.snap/\udcff", None, ID, None, 0), Token("a", "b", ID, BASE, 1 << 40)):
        text = token.text()
        assert Token.parse(f" {text}\n") == token
        for at in range(len(text)):
            with pytest.raises(UsageError):
                Token.parse(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
            with pytest.raises(UsageError):
                Token.parse(text[:at])
    for text in ("", "ramfs1-", "ü", "ramfs1-=", "ramfs1-" + "A" * 50):
        with pytest.raises(UsageError):
            Token.parse(text)
