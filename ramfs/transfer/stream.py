"""The stream of a snapshot, as bytes: records made, and told from bytes that come in any pieces. No file, no socket.

docs/format.md has the byte-offset tables. In short: a prelude, then records, each with a number and a checksum:

    BEGIN   what is sent, and what it builds on
    ENTRY   a directory, file, link ...: all of them, parents first, before any page
    PAGES   runs of pages of one file, with the digest of each page
    ZEROS   runs of pages of one file that hold only zeros now
    END     how much that was

What comes in is believed only when it has been checked: lengths before memory is taken for them, checksums before what
is in a record is looked at, digests before pages are handed out. Only ``SourceError`` leaves the decoder.
"""

import base64
import binascii
import contextlib
import enum
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import xxhash

from ramfs.errors import SourceBroken, SourceCorrupt, UsageError
from ramfs.image.digest import DIGEST, digest_pages
from ramfs.units import MAX_FILE_SIZE, MAX_NAME, MAX_PATH, PAGE, is_path, pages

MAGIC: Final = b"RAMFSSTR"
VERSION: Final = 1
#: The one flag of the prelude: all that follows it is compressed by zstd.
ZSTD: Final = 1
#: Pages in one record, and runs, at most.
MAX_PAGES: Final = 256
MAX_RUNS: Final = 256
#: Entries of a stream, and bytes of a text, at most.
MAX_ENTRIES: Final = 1 << 20
MAX_TEXT: Final = 16 << 20

PRELUDE: Final = struct.Struct("<8sII")
_HEAD: Final = struct.Struct("<IIQ16s")
_RUNS: Final = struct.Struct("<II")
_RUN: Final = struct.Struct("<QQ")
#: Where a directory has its layout.
LAYOUT: Final = ".guest/layout.json"
#: Of the text of a token that is told to people.
_TOKEN: Final = "ramfs1-"

#: Pages ``[first, stop)``.
Run = tuple[int, int]


class Kind(enum.IntEnum):
    """What a record is."""

    BEGIN = 1
    ENTRY = 2
    PAGES = 3
    ZEROS = 4
    END = 5


class Begin(NamedTuple):
    """What is sent."""

    name: str
    """of the snapshot"""
    id: str
    """of its manifest: the checksum, in hex"""
    base: str | None
    """the same of the snapshot that it builds on; None if it is complete in itself"""
    snapshot: str
    """where it is at the sender, for a token"""
    base_snapshot: str | None
    entries: int
    pages: int
    """in all, also those that a resumed stream leaves out"""
    start: int
    """how many records of pages and zeros are left out, as they are there already"""


class Entry(NamedTuple):
    """Something in the tree. Times in ns since the epoch."""

    path: str
    """from the top; of the top itself empty"""
    kind: str
    """``dir``, ``file``, ``symlink``, ``fifo``, ``socket``, ``char``, ``block``; ``hardlink``: a file's other name"""
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int = 0
    """of a file"""
    target: str = ""
    """of a symlink; of a hardlink the path of an earlier file"""
    rdev: int = 0
    xattrs: tuple[tuple[str, bytes], ...] = ()
    layout: str = ""
    """of a directory: its ``.guest/layout.json``, if it was told one"""


class Pages(NamedTuple):
    """Pages of a file, all of them right by their digests."""

    file: int
    """its number among the entries"""
    runs: list[Run]
    data: memoryview
    """whole pages, in order; the next record takes its place"""


class Zeros(NamedTuple):
    """Pages of a file that hold only zeros."""

    file: int
    runs: list[Run]


class End(NamedTuple):
    """Nothing comes any more, and nothing is missing."""

    records: int


Event = Begin | Entry | Pages | Zeros | End
_KINDS: Final = frozenset(("dir", "file", "symlink", "fifo", "socket", "char", "block", "hardlink"))


@dataclass(slots=True)
class Encoder:
    """Makes the bytes of a stream; pages themselves are not among them, and follow where it says so."""

    number: int = 0
    """of the next record of pages or zeros"""
    _key: bytes = b""

    def begin(self, begin: Begin, *, zstd: bool) -> tuple[bytes, bytes]:
        """The prelude, which is never compressed, and the first record."""
        self.number = begin.start
        record = self._record(Kind.BEGIN, 0, _text(begin._asdict()))
        self._key = _key(begin)
        return PRELUDE.pack(MAGIC, VERSION, ZSTD if zstd else 0), record

    def entry(self, number: int, entry: Entry) -> bytes:
        """An entry, by its number."""
        told = {**entry._asdict(), "xattrs": [[name, base64.b64encode(value).decode()] for name, value in entry.xattrs]}
        return self._record(Kind.ENTRY, number, _text(told))

    def pages(self, file: int, runs: Sequence[Run], digests: bytes) -> bytes:
        """What stands before pages; these follow, the last page of a file filled up with zeros."""
        return self._next(Kind.PAGES, file, runs, digests, len(digests) // DIGEST * PAGE)

    def zeros(self, file: int, runs: Sequence[Run]) -> bytes:
        """Pages that hold only zeros now."""
        return self._next(Kind.ZEROS, file, runs, b"", 0)

    def end(self) -> bytes:
        """The last record."""
        return self._record(Kind.END, self.number, b"")

    def _next(self, kind: Kind, file: int, runs: Sequence[Run], digests: bytes, payload: int) -> bytes:
        packed = b"".join(_RUN.pack(first, stop - first) for first, stop in runs)
        record = self._record(kind, self.number, _RUNS.pack(file, len(runs)) + packed + digests, payload)
        self.number += 1
        return record

    def _record(self, kind: Kind, number: int, body: bytes, payload: int = 0) -> bytes:
        length = len(body) + payload
        return _HEAD.pack(kind, length, number, _checksum(self._key, kind, length, number, body)) + body


def _checksum(key: bytes, kind: int, length: int, number: int, body: bytes | memoryview) -> bytes:
    state = xxhash.xxh3_128(key + _HEAD.pack(kind, length, number, b""))
    state.update(body)
    return state.digest()


def _key(begin: Begin) -> bytes:
    """What makes records those of one stream."""
    return f"{begin.id} {begin.base} {begin.pages}".encode()


def _text(told: dict[str, Any]) -> bytes:
    return json.dumps(told, separators=(",", ":")).encode()


@dataclass(slots=True)
class Decoder:
    """Takes a stream apart. Put the next bytes where :meth:`get_buffer` says, and tell :meth:`received` how many.

    A prelude was read by :func:`read_prelude` before. The steps are: head, body, and for pages the payload.
    """

    begun: Begin | None = None
    entries: list[Entry] = field(default_factory=list)
    number: int = 0
    """of records of pages and zeros that have come, or were left out"""
    ended: bool = False
    _key: bytes = b""
    _buffer: bytearray = field(default_factory=lambda: bytearray(_HEAD.size))
    _filled: int = 0
    _head: tuple[int, int, int, bytes] | None = None
    _body: bytes = b""
    _pages: tuple[int, list[Run], bytes] | None = None
    _last: tuple[int, int] = (0, 0)
    """file and page behind which the next run must lie"""
    _paths: dict[str, str] = field(default_factory=dict)
    """kinds of the entries"""
    spare: bytearray | None = None
    """memory for the pages of the next record, if the caller keeps those of the last one"""

    def get_buffer(self) -> memoryview:
        """Where the next bytes belong: never beyond what is being read. Empty when the stream has ended."""
        return memoryview(self._buffer)[self._filled :]

    def received(self, count: int) -> Event | None:
        """So many bytes were put there; what is complete by them, if anything. Raises SourceBroken, SourceCorrupt."""
        self._filled += count
        if self._filled < len(self._buffer) or self.ended:
            return None
        if self._head is None:
            return self._take_head()
        if self._pages is None:
            return self._take_body()
        return self._take_pages()

    def _expect(self, length: int) -> None:
        self._buffer, self._filled = bytearray(length), 0

    def _take_head(self) -> Event | None:
        kind, length, number, _ = self._head = _HEAD.unpack(self._buffer)
        if kind not in list(Kind):
            raise SourceBroken("the stream has a record of a kind that nobody knows")
        wanted = self._wanted(Kind(kind))
        if number != wanted:
            raise SourceBroken(f"the stream has record {number} where number {wanted} belongs")
        most = MAX_TEXT
        if kind in (Kind.PAGES, Kind.ZEROS):
            most = _RUNS.size + MAX_RUNS * _RUN.size + MAX_PAGES * (DIGEST + PAGE)
        if length > most or (kind in (Kind.PAGES, Kind.ZEROS) and length < _RUNS.size):
            raise SourceBroken("the stream has a record of an impossible length")
        if kind == Kind.PAGES:
            self._expect(_RUNS.size)
            return None
        self._expect(length)
        return self.received(0)

    def _wanted(self, kind: Kind) -> int:
        """The number that the next record must have, if one of this kind may come. Raises SourceBroken."""
        if self.begun is None:
            allowed = kind == Kind.BEGIN
        elif len(self.entries) < self.begun.entries:
            allowed = kind == Kind.ENTRY
        else:
            allowed = kind in (Kind.PAGES, Kind.ZEROS, Kind.END)
        if not allowed:
            raise SourceBroken(f"the stream has a record where none of kind {kind.name} may be")
        return {Kind.BEGIN: 0, Kind.ENTRY: len(self.entries)}.get(kind, self.number)

    def _take_body(self) -> Event | None:
        assert self._head is not None
        kind, length, number, checksum = self._head
        self._body += bytes(self._buffer)
        if kind == Kind.PAGES and len(self._body) == _RUNS.size:
            _, count = _RUNS.unpack(self._body)
            if not 0 < count <= MAX_RUNS:
                raise SourceBroken("the stream has a record with an impossible number of runs")
            rest = length - _RUNS.size - count * _RUN.size
            if rest <= 0 or rest % (DIGEST + PAGE):
                raise SourceBroken("the stream has a record of an impossible length")
            self._expect(count * _RUN.size + rest // (DIGEST + PAGE) * DIGEST)
            return None
        if _checksum(self._key, kind, length, number, self._body) != checksum:
            raise SourceCorrupt("the stream is damaged: the checksum of a record is wrong")
        body, self._body = self._body, b""
        if kind != Kind.PAGES:
            self._head = None
            self._expect(_HEAD.size)
        match kind:
            case Kind.BEGIN:
                return self._take_begin(body)
            case Kind.ENTRY:
                return self._take_entry(body)
            case Kind.END:
                self._expect(0)
                self.ended = True
                return End(self.number)
        file, count = _RUNS.unpack_from(body)
        runs = self._take_runs(body, file, count, kind)
        if kind == Kind.ZEROS:
            self.number += 1
            return Zeros(file, runs)
        digests = body[_RUNS.size + count * _RUN.size :]
        total = sum(stop - first for first, stop in runs)
        if total * DIGEST != len(digests):
            raise SourceBroken("the stream has a record with other pages than digests")
        self._pages = file, runs, digests
        self._buffer, self._filled = bytearray(total * PAGE) if self.spare is None else self.spare, 0
        if len(self._buffer) != total * PAGE:
            self._buffer = bytearray(total * PAGE)
        self.spare = None
        return None

    def _take_runs(self, body: bytes, file: int, count: int, kind: int) -> list[Run]:
        if not 0 < count <= MAX_RUNS or len(body) < _RUNS.size + count * _RUN.size:
            raise SourceBroken("the stream has a record with an impossible number of runs")
        if kind == Kind.ZEROS and len(body) != _RUNS.size + count * _RUN.size:
            raise SourceBroken("the stream has a record of an impossible length")
        if file >= len(self.entries) or self.entries[file].kind != "file":
            raise SourceBroken("the stream has pages of what is no file")
        total, runs = pages(self.entries[file].size), []
        for number in range(count):
            first, length = _RUN.unpack_from(body, _RUNS.size + number * _RUN.size)
            if length == 0 or first + length > total or (file, first) < self._last:
                raise SourceBroken(f"the stream has pages in the wrong place of {self.entries[file].path!r}")
            runs.append((first, first + length))
            self._last = file, first + length
        return runs

    def _take_pages(self) -> Pages:
        assert self._pages is not None
        file, runs, digests = self._pages
        if digest_pages(self._buffer) != digests:
            raise SourceCorrupt(
                f"the stream is damaged: a page of {self.entries[file].path!r} is not what its digest says"
            )
        data = memoryview(self._buffer)
        self._pages = self._head = None
        self._expect(_HEAD.size)
        self.number += 1
        return Pages(file, runs, data)

    def _take_begin(self, body: bytes) -> Begin:
        told = _object(body)
        begin = Begin(
            _string(told, "name"), _hex(told, "id"), None if told.get("base") is None else _hex(told, "base"),
            _string(told, "snapshot"), None if told.get("base_snapshot") is None else _string(told, "base_snapshot"),
            _number(told, "entries", 1, MAX_ENTRIES), _number(told, "pages"), _number(told, "start"),
        )  # fmt: skip
        name = _encoded(begin.name)
        if not is_path(name) or b"/" in name:
            raise SourceBroken("the stream is of a snapshot whose name cannot be one")
        self.begun, self.number, self._key = begin, begin.start, _key(begin)
        return begin

    def _take_entry(self, body: bytes) -> Entry:
        told = _object(body)
        xattrs = told.get("xattrs")
        if not isinstance(xattrs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in xattrs):
            raise SourceBroken("the stream has an entry with impossible attributes")
        numbers = _number(told, "mode", 0, 0o7777), _number(told, "uid", 0, 1 << 32), _number(told, "gid", 0, 1 << 32)
        entry = Entry(
            _string(told, "path"), _string(told, "kind"), *numbers, _number(told, "mtime", -(1 << 63)),
            _number(told, "size", 0, MAX_FILE_SIZE), _string(told, "target"), _number(told, "rdev"),
            tuple(_attribute(pair) for pair in xattrs), _string(told, "layout"),
        )  # fmt: skip
        self._check_entry(entry)
        self._paths[entry.path] = entry.kind
        self.entries.append(entry)
        return entry

    def _check_entry(self, entry: Entry) -> None:
        """It must be a new name in a directory that has come before. Raises SourceBroken."""
        path, known = _encoded(entry.path), self._paths
        fit = entry.kind in _KINDS and entry.path not in known
        if not known:
            fit = fit and not path and entry.kind == "dir"
        else:
            above = entry.path.rpartition("/")[0]
            parts = path.split(b"/")
            fit = (
                fit
                and is_path(path)
                and len(path) <= MAX_PATH
                and not {b".snap", b".guest"} & set(parts)
                and known.get(above) == "dir"
            )
        if entry.kind == "hardlink":
            fit = fit and known.get(entry.target) == "file"
        if entry.kind == "symlink":
            fit = fit and bool(entry.target) and "\0" not in entry.target
        if not fit:
            raise SourceBroken(f"the stream has an entry that cannot be: {entry.path[:MAX_NAME]!r}")


def read_prelude(prelude: bytes) -> bool:
    """Is what follows these 16 bytes compressed? Raises SourceBroken."""
    magic, version, flags = PRELUDE.unpack(prelude)
    if magic != MAGIC:
        raise SourceBroken("this is no stream of `ramfs send`")
    if version != VERSION or flags & ~ZSTD:
        raise SourceBroken(
            f"this is a stream of version {version}, which this program does not know: use a newer ramfs"
        )
    return bool(flags & ZSTD)


class Token(NamedTuple):
    """Where an interrupted stream goes on, for the one who sends it."""

    snapshot: str
    base_snapshot: str | None
    id: str
    base: str | None
    record: int

    @classmethod
    def of(cls, begin: Begin, record: int) -> "Token":
        """Of a stream of which so many records of pages and zeros are there."""
        return cls(begin.snapshot, begin.base_snapshot, begin.id, begin.base, record)

    def text(self) -> str:
        """For people and command lines."""
        told = _text(self._asdict())
        return _TOKEN + base64.urlsafe_b64encode(xxhash.xxh3_64_digest(told) + told).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "Token":
        """From a command line. Raises UsageError."""
        given = text.strip().removeprefix(_TOKEN).encode("ascii", "replace")
        data = b""
        with contextlib.suppress(binascii.Error):
            data = base64.b64decode(given + b"=" * (-len(given) % 4), b"-_", validate=True)
        if not text.strip().startswith(_TOKEN) or xxhash.xxh3_64_digest(data[8:]) != data[:8]:
            raise UsageError("this is no token of `ramfs receive`, or not all of one: copy the whole line")
        told = _object(data[8:])
        base = None if told.get("base") is None else _hex(told, "base")
        base_snapshot = None if base is None else _string(told, "base_snapshot")
        return cls(_string(told, "snapshot"), base_snapshot, _hex(told, "id"), base, _number(told, "record"))


def _object(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise SourceBroken("the stream has a record that is no JSON object")
    return told


def _string(told: dict[str, Any], key: str) -> str:
    value = told.get(key)
    if not isinstance(value, str):
        raise SourceBroken(f"the stream has a record without {key}")
    _encoded(value)
    return value


def _encoded(value: str) -> bytes:
    """The bytes of a name. Raises SourceBroken for text that is none."""
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise SourceBroken("the stream has a name that cannot be one") from None


def _hex(told: dict[str, Any], key: str) -> str:
    value = _string(told, key)
    if len(value) != 2 * DIGEST or set(value) - set("0123456789abcdef"):
        raise SourceBroken(f"the stream has a record without {key}")
    return value


def _number(told: dict[str, Any], key: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    value = told.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SourceBroken(f"the stream has a record without {key}")
    return value


def _attribute(pair: Iterable[Any]) -> tuple[str, bytes]:
    name, value = pair
    if not isinstance(name, str) or not isinstance(value, str) or not name or "\0" in name:
        raise SourceBroken("the stream has an entry with impossible attributes")
    _encoded(name)
    try:
        return name, base64.b64decode(value, validate=True)
    except ValueError:
        raise SourceBroken("the stream has an entry with impossible attributes") from None
