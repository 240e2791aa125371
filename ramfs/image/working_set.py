"""Working sets: which pages a guest asks for first when it goes on from a snapshot, in that order.

A record is a run of pages that was asked for at once, and when: milliseconds since its file was opened. The set of one
file is an array of these, each page in it once. ``ramfs.workingset`` of a snapshot has the sets of all its files, as
one list in the order of time; docs/format.md has the byte-offset tables. All of it is advice: who believes a wrong one
reads what nobody wants, and nothing worse.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from ramfs.image.table import Mask, runs_of
from ramfs.units import PAGE_SHIFT, pages

#: The name, in the directory of a snapshot, of the file that has its working set.
NAME: Final = "ramfs.workingset"
MAGIC: Final = b"RAMFSWST"
VERSION: Final = 1

RECORD: Final = np.dtype([("ms", "<u4"), ("first", "<u4"), ("count", "<u4")])
Records = NDArray[np.void]
#: The largest set of one file: its records, and the pages in them together (1 GiB).
MOST_RECORDS: Final = 4096
MOST_PAGES: Final = 1 << 18
#: A set is completed when that adds one page to so many; what guests touch beyond it differs from one to the next.
_GROWTH: Final = 4

#: Bytes of the largest ``ramfs.workingset`` that is read.
MAX_SIZE: Final = 8 << 20
_HEADER: Final = struct.Struct("<8sIIII16s")
_PATH: Final = struct.Struct("<I")
_CHECKSUM: Final = 24  # its offset in the header
_LINE: Final = np.dtype([("ms", "<u4"), ("file", "<u4"), ("first", "<u4"), ("count", "<u4")])


def empty() -> Records:
    """No records."""
    return np.zeros(0, RECORD)


def page_count(records: Records) -> int:
    """Pages in all of them."""
    return int(records["count"].sum(dtype=np.int64))


def is_valid(blob: bytes) -> bool:
    """Are these the bytes of a set?"""
    if not blob or len(blob) % RECORD.itemsize:
        return False
    found = np.frombuffer(blob, RECORD)
    return bool((found["count"] > 0).all()) and bool((np.diff(found["ms"].astype(np.int64)) >= 0).all())


def complete(known: Records, asked: Iterable[tuple[float, int, int]], size: int) -> Records:
    """A set with what was asked for besides, ``(seconds, offset, bytes)`` in order, of a file of ``size`` bytes.

    It is ``known`` itself if too little was, or there is no room for more.
    """
    seen: Mask = np.zeros(pages(size), np.bool_)
    for first, stop in _ranges(known):
        seen[first:stop] = True
    found: list[list[int]] = []
    room = MOST_PAGES - page_count(known)
    for seconds, offset, length in asked:
        first, stop = offset >> PAGE_SHIFT, min(pages(offset + length), len(seen))
        for a, b in runs_of(~seen[first:stop]) if not seen[first:stop].all() else ():
            seen[first + a : first + b] = True
            count = min(b - a, room)
            room -= count
            if found and found[-1][1] + found[-1][2] == first + a:
                found[-1][2] += count
            elif count:
                found.append([int(seconds * 1000), first + a, count])
        if room <= 0 or len(known) + len(found) >= MOST_RECORDS:
            break
    more = np.array([tuple(each) for each in found[: MOST_RECORDS - len(known)]], RECORD)
    if not len(more) or page_count(more) * _GROWTH < page_count(known):
        return known
    if len(known):
        more["ms"] = np.maximum(more["ms"], known["ms"][-1])  # of another run, and after what that one began with
    return np.concatenate([known, more])


def within(records: Records, size: int) -> Records:
    """Those of a file of ``size`` bytes, cut at its end."""
    end = pages(size)
    kept = records[records["first"] < end][:MOST_RECORDS].copy()
    kept["count"] = np.minimum(kept["count"], end - kept["first"].astype(np.int64))
    return kept


def _ranges(records: Records) -> Iterator[tuple[int, int]]:
    for first, count in zip(records["first"].tolist(), records["count"].tolist(), strict=True):
        yield first, first + count


def batches(records: Records, size: int, most: int) -> Iterator[list[tuple[int, int]]]:
    """The pages ``[first, stop)`` in order, some ``most`` of them at a time, as few runs as that makes."""
    batch: list[tuple[int, int]] = []
    left = most
    for first, end in _ranges(within(records, size)):
        at = first
        while at < end:
            stop = min(end, at + left)
            batch.append((at, stop))
            left -= stop - at
            at = stop
            if left == 0:
                yield _joined(batch)
                batch, left = [], most
    if batch:
        yield _joined(batch)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((first, stop))
    return joined


# -- ``ramfs.workingset``


def pack(files: Mapping[bytes, Records]) -> bytes:
    """The sets of files, by their paths, as ``ramfs.workingset``."""
    table = b""
    lines = [np.zeros(0, _LINE)]
    for number, (path, records) in enumerate(files.items()):
        table += _PATH.pack(len(path)) + path
        line = np.zeros(len(records), _LINE)
        line["file"] = number
        for field in ("ms", "first", "count"):
            line[field] = records[field]
        lines.append(line)
    every = np.concatenate(lines)
    every = every[np.argsort(every["ms"], kind="stable")]
    rest = table + every.tobytes()
    head = _HEADER.pack(MAGIC, VERSION, len(files), len(every), len(table), bytes(16))
    return head[:_CHECKSUM] + xxhash.xxh3_128_digest(head + rest) + rest


def is_one(start: bytes) -> bool:
    """Does a file that begins so mean to be a ``ramfs.workingset``?"""
    return start.startswith(MAGIC)


def parse(data: bytes) -> dict[bytes, Records]:
    """The sets in ``ramfs.workingset``, by paths, which are anything. Bytes may follow. Raises ValueError."""
    if len(data) < _HEADER.size:
        raise ValueError("it is too short")
    magic, version, count, records, table, checksum = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it is something else")
    if version != VERSION:
        raise ValueError(f"it has version {version}, which this program does not know")
    first = _HEADER.size + table
    end = first + records * _LINE.itemsize
    if end > len(data):
        raise ValueError("it was cut off")
    blank = data[:_CHECKSUM] + bytes(16) + data[_HEADER.size : end]
    if xxhash.xxh3_128_digest(blank) != checksum:
        raise ValueError("its checksum is wrong")
    paths = list(_paths(data[_HEADER.size : first], count))
    lines = np.frombuffer(data, _LINE, records, first)
    if (lines["file"] >= count).any() or not lines["count"].all():
        raise ValueError("it has impossible records")
    by_file = lines[np.argsort(lines["file"], kind="stable")]
    every = np.zeros(records, RECORD)
    for field in ("ms", "first", "count"):
        every[field] = by_file[field]
    ends = np.searchsorted(by_file["file"], np.arange(count + 1))
    return {path: every[a:b] for path, a, b in zip(paths, ends[:-1], ends[1:], strict=True)}


def _paths(table: bytes, count: int) -> Iterator[bytes]:
    at = 0
    for _ in range(count):
        if at + _PATH.size > len(table):
            raise ValueError("its table of files is too short")
        (length,) = _PATH.unpack_from(table, at)
        at += _PATH.size
        yield table[at : at + length]
        at += length
