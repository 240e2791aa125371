"""What the kernel holds of a mount, in memory that outlives the daemon: lookups, open files, temporary names.

The memory is a memfd that the supervisor keeps. Every change of what the kernel holds is a record at its end, made
before the answer that tells the kernel of it. A daemon that takes over reads the records and knows what its
predecessor knew. A record counts once the end of the log lies behind it, which is one store of eight bytes, so a
daemon that is killed leaves no half of one.

A record bears the number of the request that it was made for. When the kernel asks that request again, it never got
the answer: then what the records say is taken back (``Held.by_request``).

    header   magic, version; at byte 16 the offset of the log's end
    log      in one of two areas, changing sides when it is made anew without what has become void
    requests those that are not answered yet, on kernels that cannot be asked for them

    record   length of the payload, kind, four numbers, payload
"""

import mmap
import os
import struct
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

from ramfs.errors import StoreVersion

MAGIC: Final = b"RAMFSLED"
#: Changes with every change that another version could misread.
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sQ")
_END: Final = 2  # index of the u64 that holds the end
#: Bytes of one area. Addresses only: memory is used as far as the log reaches.
_AREA: Final = 1 << 30
#: Bytes for requests that the kernel cannot be asked for again. Addresses too.
_REQUESTS: Final = 288 << 20
_RECORD: Final = struct.Struct("<IIQQQQ")
#: A log that grew by so much is made anew: reading one takes 15 ms for each MiB, in which guests wait.
_GROWN: Final = 1 << 18


class Kind(IntEnum):
    """What a record tells, besides the request that it belongs to (0 for none); ``b``, ``c``, ``d`` are numbers."""

    INIT = 1
    """payload: the kernel's INIT request"""
    LOOKUP = 2
    """c lookups of inode b more"""
    LOOKUPS = 3
    """one lookup more of each inode in the payload (uint64 each)"""
    FORGET = 4
    """c lookups of inode b less"""
    OPEN = 5
    """file b of inode c is open, with flags d; payload: FILE, then what a file of ``.ramfs`` reads as"""
    CLOSE = 6
    """file b is not open any more"""
    ALIAS = 7
    """in directory b the temporary name in the payload leads to inode c"""
    UNALIAS = 8
    """the name in the payload is gone from directory b"""


#: By number, and by name where it counts: an enumeration's own ways take longer than the rest of a record.
_KINDS: Final = {int(kind): kind for kind in Kind}
_LOOKUP, _FORGET, _OPEN, _CLOSE = Kind.LOOKUP, Kind.FORGET, Kind.OPEN, Kind.CLOSE


class Record(NamedTuple):
    """One record of a ledger."""

    kind: Kind
    request: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    payload: bytes = b""


#: The start of an OPEN's payload: user, group and process that opened the file; for one that the kernel reads from a
#: layer by itself, the layer and the backing id (ramfs/fuse/passthrough.py), else zeros.
OPENER: Final = struct.Struct("<IIIIi4x")


class Ledger:
    """A log in shared memory."""

    def __init__(self, fd: int | None = None) -> None:
        """A new one, or that of a daemon before. Raises StoreVersion for one that this program cannot read."""
        fresh = fd is None
        self.fd = os.memfd_create("ramfs-ledger") if fd is None else fd
        weakref.finalize(self, os.close, self.fd)  # with the mapping
        length = mmap.PAGESIZE + 2 * _AREA + _REQUESTS
        if fresh:
            os.ftruncate(self.fd, length)
        self._memory = mmap.mmap(self.fd, length)
        self.requests = memoryview(self._memory)[-_REQUESTS:]
        """memory for requests that are not answered yet (ramfs/fuse/_mirror.c)"""
        self._words = memoryview(self._memory).cast("Q")
        if fresh:
            _HEADER.pack_into(self._memory, 0, MAGIC, VERSION)
            self._words[_END] = self._end = mmap.PAGESIZE
        elif _HEADER.unpack_from(self._memory) != (MAGIC, VERSION):
            raise StoreVersion(
                "the daemon before this one kept its records in another format: "
                "go on with the version that was running, or unmount and mount again"
            )
        else:
            self._end = self._words[_END]
        self._kept = self._end - self._start

    @property
    def _start(self) -> int:
        return mmap.PAGESIZE + (_AREA if self._end >= mmap.PAGESIZE + _AREA else 0)

    def _put(self, at: int, kind: Kind, request: int, b: int, c: int, d: int, payload: bytes) -> int:
        _RECORD.pack_into(self._memory, at, len(payload), kind, request, b, c, d)
        stop = at + _RECORD.size
        if payload:
            self._memory[stop : stop + len(payload)] = payload
        return stop + _padded(len(payload))

    def add(self, kind: Kind, request: int = 0, b: int = 0, c: int = 0, d: int = 0, payload: bytes = b"") -> None:
        """Append a record."""
        self._words[_END] = self._end = self._put(self._end, kind, request, b, c, d, payload)

    def records(self) -> Iterator[Record]:
        """All records, the oldest first."""
        memory, unpack, size = self._memory, _RECORD.unpack_from, _RECORD.size  # guests wait meanwhile
        at = self._start
        while at < self._end:
            length, kind, request, b, c, d = unpack(memory, at)
            at += size
            if length:
                yield Record(_KINDS[kind], request, b, c, d, memory[at : at + length])
                at += _padded(length)
            else:
                yield Record(_KINDS[kind], request, b, c, d)

    @property
    def has_grown(self) -> bool:
        """Is it time for :meth:`renew`?"""
        return self._end - self._start > 2 * self._kept + _GROWN

    def renew(self, records: Iterable[Record]) -> None:
        """Replace all records by ``records``, which say the same in fewer.

        Call where no request is between its records and its answer: these have no numbers of requests.
        """
        old, area = self._start, mmap.PAGESIZE + (_AREA if self._start == mmap.PAGESIZE else 0)
        end = area
        for record in records:
            end = self._put(end, *record)
        length = self._end - old
        self._words[_END] = self._end = end
        self._kept = end - area
        if length:
            self._memory.madvise(mmap.MADV_REMOVE, old, _whole_pages(length))


@dataclass(slots=True)
class Held:
    """What the kernel holds, as the records tell."""

    init: bytes = b""
    lookups: dict[int, int] = field(default_factory=dict)
    """by inode number"""
    files: dict[int, Record] = field(default_factory=dict)
    """the OPEN records of files that are open, by handle"""
    aliases: dict[tuple[int, bytes], int] = field(default_factory=dict)
    """inode numbers by directory and temporary name"""
    by_request: defaultdict[int, list[Record]] = field(default_factory=lambda: defaultdict(list))
    """what was recorded for a request, which the kernel may ask again"""

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Held":
        """Replay a ledger."""
        held = cls()
        lookups, files, aliases, by_request = held.lookups, held.files, held.aliases, held.by_request
        for record in records:  # thousands, and guests wait meanwhile
            kind, request, b, c, _, payload = record
            if kind is _LOOKUP:
                lookups[b] = lookups.get(b, 0) + c
            elif kind is _FORGET:
                left = lookups.get(b, 0) - c
                if left > 0:
                    lookups[b] = left
                else:
                    lookups.pop(b, None)
            elif kind is _OPEN:
                files[b] = record
            elif kind is _CLOSE:
                files.pop(b, None)
            elif kind is Kind.LOOKUPS:
                for ino in inode_numbers(payload):
                    lookups[ino] = lookups.get(ino, 0) + 1
            elif kind is Kind.INIT:
                held.init = payload
            elif kind is Kind.ALIAS:
                aliases[b, payload] = c
            elif kind is Kind.UNALIAS:
                aliases.pop((b, payload), None)
            if request:
                by_request[request].append(record)
        return held


def inode_numbers(payload: bytes) -> list[int]:
    """The payload of a LOOKUPS record."""
    return [ino for (ino,) in struct.iter_unpack("<Q", payload)]


def _padded(length: int) -> int:
    return (length + 7) & ~7


def _whole_pages(length: int) -> int:
    return (length + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
