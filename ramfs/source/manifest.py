"""``ramfs.manifest``: the digest of every page of a frozen directory. docs/format.md has the byte-offset tables.

What is read comes from another host and is believed only where it cannot be otherwise: every number is checked
before it is used, and memory grows only with bytes that have really come.
"""

import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import trio
import xxhash
from numpy.typing import NDArray

from ramfs.errors import SourceBroken, SourceRefused
from ramfs.image.digest import DIGEST
from ramfs.image.table import NORESERVE, Mask, runs_of
from ramfs.source.base import PageSource, SourceDirectory, read_whole
from ramfs.units import MAX_FILE_SIZE, MAX_NAME, MAX_PATH, PAGE, PAGE_SHIFT, is_path, pages

#: The file's name in a frozen directory, and of the export.
NAME: Final = "ramfs.manifest"
MAGIC: Final = b"RAMFSMAN"
VERSION: Final = 1
#: Bytes of the largest manifest that is read: of guests of a tebibyte together.
MAX_SIZE: Final = 4 << 30
#: Bytes of the largest table of files.
_MAX_TABLE: Final = 64 << 20
#: Bytes read in one go, at most; and the first ones, where not all are needed.
_AT_ONCE: Final = 4 << 20
_FIRST: Final = 64 << 10

_HEADER: Final = struct.Struct("<8sIIQQ16s")
_RECORD: Final = struct.Struct("<QQII")
_CHECKSUM: Final = 32  # its offset in the header
#: Bytes of the header.
HEAD: Final = _HEADER.size

Digests = NDArray[np.uint8]
_NOTHING: Final[Mapping[str, Mask]] = MappingProxyType({})


class File(NamedTuple):
    """A file of a manifest: bytes, and the digests of its pages (pages x 16, not to be changed)."""

    size: int
    digests: Digests

    def can_have(self, size: int) -> bool:
        """Can a server call it so large? Some round up, to less than a page more."""
        return self.size <= size < self.size + PAGE


class Manifest(NamedTuple):
    """Digests of the files of a frozen directory, by their paths from there."""

    files: Mapping[str, File]
    id: str = ""
    """the checksum, in hex: two with the same have the same files, pages and sizes"""


class Place(NamedTuple):
    """Where the digests of some contents begin in a manifest."""

    offset: int
    size: int
    """bytes of the contents"""


@dataclass(slots=True)
class Layout:
    """A manifest that is to be written: ``head``, then the digests at their places, in order, without gaps."""

    head: bytearray
    """header and table, the checksum still zero"""
    places: dict[int, Place]
    """of the digests, by the key that the contents were given"""
    size: int
    """bytes in all"""

    def sealed_head(self, checksum: bytes) -> bytes:
        """The head with the checksum: xxh3_128 of the whole as it is without."""
        return bytes(self.head[:_CHECKSUM] + checksum + self.head[_CHECKSUM + DIGEST :])


def lay_out(files: Iterable[tuple[bytes, int, int]]) -> Layout:
    """The layout for files ``(path, bytes, key)``; those of one key are the same contents, and share the digests."""
    ordered = sorted(files, key=lambda file: _order(file[0]))
    table = sum(_RECORD.size + _padded(len(path)) for path, _, _ in ordered)
    end = first = _HEADER.size + table
    places: dict[int, Place] = {}
    head = bytearray(_HEADER.size)
    for path, size, key in ordered:
        if key not in places:
            places[key] = Place(end, size)
            end += pages(size) * DIGEST
        head += _RECORD.pack(size, places[key].offset, len(path), 0) + path.ljust(_padded(len(path)), b"\0")
    _HEADER.pack_into(head, 0, MAGIC, VERSION, len(ordered), end, first, bytes(DIGEST))
    return Layout(head, places, end)


def identity_of(head: bytes) -> str | None:
    """The id (see Manifest) of one that begins so, None if it is no manifest."""
    if len(head) < HEAD or _HEADER.unpack_from(head)[:2] != (MAGIC, VERSION):
        return None
    return head[_CHECKSUM : _CHECKSUM + DIGEST].hex()


def _order(path: bytes) -> bytes:
    """The order of the table: what is below a path comes right after it."""
    return path.replace(b"/", b"\0")


def _padded(length: int) -> int:
    return (length + 7) & ~7


async def fetch_manifest(directory: SourceDirectory, zeros: Mapping[str, Mask] = _NOTHING) -> Manifest | None:
    """The manifest of a directory; None if it has none, or a file of another kind by that name.

    Digests of pages that are said to be ``zeros``, by the paths of their files, are not fetched as long as the checksum
    is right without. Raises SourceBroken if it is damaged, and what reading raises.
    """
    try:
        source = await directory.open(NAME)
    except SourceRefused:
        return None
    try:
        return await read_manifest(source, zeros)
    finally:
        await source.aclose()


async def read_manifest(source: PageSource, zeros: Mapping[str, Mask] = _NOTHING) -> Manifest | None:
    """Read and check a manifest; None if it is a file of another kind. Raises SourceBroken, and what reading raises."""
    if source.size < _HEADER.size:
        return None
    # Of memory that was never touched there is none: it grows with what comes.
    at_once = min(_AT_ONCE, source.maximum)
    first = bytearray(min(_FIRST if zeros else at_once, at_once, source.size))
    await read_whole(source, 0, memoryview(first))
    magic, version, count, size, digests, checksum = _HEADER.unpack_from(first)
    if magic != MAGIC:
        return None
    where = source.description
    if version != VERSION:
        raise SourceBroken(f"{where}: a manifest of version {version}, which this program does not know")
    # Servers round sizes up.
    if not size <= source.size < size + 4096 or size > MAX_SIZE:
        raise SourceBroken(f"{where}: a manifest of {source.size} bytes that calls itself {size} bytes long")
    if not _HEADER.size <= digests <= min(size, _HEADER.size + _MAX_TABLE) or (size - digests) % DIGEST:
        raise SourceBroken(f"{where}: a manifest with an impossible table")
    memory = mmap.mmap(-1, source.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    memory[: len(first)] = first
    view = memoryview(memory)
    here = min(max(len(first), pages(digests) << PAGE_SHIFT), source.size)
    for at in range(len(first), here, at_once):
        await read_whole(source, at, view[at : min(at + at_once, here)])
    # Before more is read for nothing.
    files, places = await trio.to_thread.run_sync(_take_apart, memory, count, size, digests, where)
    for low, high in runs_of(_unknown(source.size, files, places, zeros)):
        end = min(high << PAGE_SHIFT, source.size)
        for at in range(max(low << PAGE_SHIFT, here), end, at_once):
            await read_whole(source, at, view[at : min(at + at_once, end)])
    if await trio.to_thread.run_sync(_checksum, view[:size]) != checksum:
        if zeros:
            return await read_manifest(source)
        raise SourceBroken(f"{where}: the manifest is damaged: its checksum is wrong")
    return Manifest(files, checksum.hex())


def _unknown(size: int, files: Mapping[str, File], places: Mapping[str, int], zeros: Mapping[str, Mask]) -> Mask:
    """The pages of a manifest that have more than digests of ``zeros``; the memory for these has them already."""
    unknown = np.ones(pages(size), np.bool_)
    for path in zeros.keys() & files.keys():
        known, start = zeros[path][: len(files[path].digests)], places[path]
        first, stop = pages(start), (start + len(known) * DIGEST) >> PAGE_SHIFT
        if first < stop:
            lacking = np.append(0, np.cumsum(~known))
            edges = np.arange(first, stop + 1) * PAGE - start
            unknown[first:stop] = lacking[-(-edges[1:] // DIGEST)] > lacking[edges[:-1] // DIGEST]
    return unknown


def _checksum(manifest: memoryview) -> bytes:
    state = xxhash.xxh3_128(manifest[:_CHECKSUM])
    state.update(bytes(DIGEST))
    state.update(manifest[_CHECKSUM + DIGEST :])
    return state.digest()


def _take_apart(
    memory: mmap.mmap, count: int, size: int, first: int, where: str
) -> tuple[dict[str, File], dict[str, int]]:
    """The files of a manifest's table, and where their digests begin, all numbers checked. Raises SourceBroken."""
    files: dict[str, File] = {}
    places: dict[str, int] = {}
    known: dict[int, int] = {}
    at, end, before = _HEADER.size, first, b""
    for _ in range(count):
        if at + _RECORD.size > first:
            raise SourceBroken(f"{where}: a manifest whose table is too short")
        bytes_, offset, length, zero = _RECORD.unpack_from(memory, at)
        at += _RECORD.size
        if zero or not 0 < length <= MAX_PATH or bytes_ > MAX_FILE_SIZE:
            raise SourceBroken(f"{where}: a manifest with an impossible file")
        path = memory[at : at + length]
        is_new = _order(path) > _order(before) and not (before and path.startswith(before + b"/"))
        if any(memory[at + length : at + _padded(length)]) or not is_new or not is_path(path):
            raise SourceBroken(f"{where}: a manifest with an impossible name: {path[:MAX_NAME]!r}")
        at, before = at + _padded(length), path
        total = pages(bytes_)
        if offset == end:
            end += total * DIGEST
            if end > size:
                raise SourceBroken(f"{where}: a manifest with more pages than digests")
            known[offset] = bytes_
        elif known.get(offset) != bytes_:
            raise SourceBroken(f"{where}: a manifest whose digests overlap")
        digests = np.frombuffer(memory, np.uint8, total * DIGEST, offset).reshape(-1, DIGEST)
        digests.flags.writeable = False
        name = path.decode("utf-8", "surrogateescape")
        files[name], places[name] = File(bytes_, digests), offset
    if at != first or end != size:
        raise SourceBroken(f"{where}: a manifest with something between its parts")
    return files, places
