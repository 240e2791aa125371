"""What ``ramfs send`` sends: the tree of a snapshot, and the pages that the other side has not.

Which these are its manifest tells, beside that of the snapshot that the other side has: nothing is read but what is
sent, and nothing is hashed. The same snapshots make the same records, so what was interrupted can go on at any of them.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import trio

from ramfs.errors import FileError
from ramfs.image.digest import KNOWN_LOST
from ramfs.image.table import Mask, runs_of
from ramfs.source.file import FileDirectory
from ramfs.source.manifest import HEAD, NAME, Digests, Manifest, fetch_manifest, identity_of
from ramfs.transfer.stream import LAYOUT, MAX_PAGES, MAX_RUNS, Begin, Encoder, Entry, Run
from ramfs.units import PAGE_SHIFT

_KINDS: Final = {
    stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block",
}  # fmt: skip
_LOST: Final = np.frombuffer(KNOWN_LOST, np.uint64)


class Span(NamedTuple):
    """Bytes of a file that come next in a stream, and zeros behind them that make a whole page of the last one."""

    path: str
    offset: int
    length: int
    padding: int


#: What a stream is made of: bytes, or those of a file.
Piece = bytes | Span


def manifest_of(snapshot: str) -> Manifest:
    """The manifest of a snapshot. Raises FileError where there is none, SourceBroken, OSError."""

    async def load() -> Manifest | None:
        return await fetch_manifest(FileDirectory(snapshot))

    path = os.path.join(snapshot, NAME)
    if os.path.exists(path) and not os.access(path, os.R_OK):
        raise FileError(errno.EACCES, f"you may not read all files of {snapshot}, and so not its manifest either")
    # A file of that name, which was in the directory when it was frozen, would be seen instead.
    found = None if NAME in os.listdir(snapshot) else trio.run(load)
    if found is None:
        raise FileError(errno.EINVAL, f"{snapshot} has no manifest: name a snapshot, as DIR/.snap/NAME")
    return found


def identity(snapshot: str) -> str:
    """The id of a snapshot's manifest, which is made for it. Raises FileError, OSError."""
    if NAME not in os.listdir(snapshot):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(snapshot, NAME), "rb", buffering=0) as file:
            if (found := identity_of(file.read(HEAD))) is not None:
                return found
    raise FileError(errno.EINVAL, f"{snapshot} has no manifest: name a snapshot, as DIR/.snap/NAME")


def list_tree(top: str) -> list[Entry]:
    """Everything in a frozen directory, in an order that is always the same. Raises OSError."""
    found: list[Entry] = []
    known: dict[int, str] = {}
    todo = [""]
    while todo:
        way = todo.pop()
        path = os.path.join(top, way) if way else top
        told = os.lstat(path)
        kind = _KINDS[stat.S_IFMT(told.st_mode)]
        values = stat.S_IMODE(told.st_mode), told.st_uid, told.st_gid, told.st_mtime_ns
        if kind == "file" and told.st_ino in known:
            found.append(Entry(way, "hardlink", *values, target=known[told.st_ino]))
            continue
        if kind == "file":
            known[told.st_ino] = way
        if kind == "dir":
            names = sorted(os.listdir(path), key=os.fsencode, reverse=True)
            todo += [f"{way}/{name}" if way else name for name in names]
        attributes = sorted(os.listxattr(path, follow_symlinks=False))
        found.append(
            Entry(
                way, kind, *values, told.st_size if kind == "file" else 0,
                os.readlink(path) if kind == "symlink" else "", told.st_rdev,
                tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in attributes),
                _layout(path) if kind == "dir" else "",
            )
        )  # fmt: skip
    return found


def _layout(directory: str) -> str:
    """What a directory was told of where its files lie in the guest's memory; empty if names and sizes tell it."""
    try:
        with open(os.path.join(directory, LAYOUT), encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return ""
    return "" if json.loads(text)["derived"] else text


@dataclass(frozen=True, slots=True)
class _File:
    """What is sent of a file."""

    number: int
    entry: Entry
    digests: Digests
    pages: list[Run]
    zeros: list[Run]


class Sending:
    """A snapshot that is to be sent."""

    def __init__(self, snapshot: str, base: str | None, named: Callable[[str], str]) -> None:
        """``named`` makes of a path what the other side shall be told. Raises FileError, SourceBroken, OSError."""
        self.snapshot = snapshot
        manifest = manifest_of(snapshot)
        before = None if base is None else manifest_of(base)
        self.entries = list_tree(snapshot)
        self._files = [
            self._plan(number, entry, manifest, before)
            for number, entry in enumerate(self.entries) if entry.kind == "file"
        ]  # fmt: skip
        self.pages = sum(stop - first for file in self._files for first, stop in file.pages)
        self.begin = Begin(
            os.path.basename(snapshot), manifest.id, None if before is None else before.id, named(snapshot),
            None if base is None else named(base), len(self.entries), self.pages, 0,
        )  # fmt: skip

    def _plan(self, number: int, entry: Entry, manifest: Manifest, before: Manifest | None) -> _File:
        digests = manifest.files[entry.path].digests
        new = digests.view(np.uint64)
        stored: Mask = np.asarray(new.any(axis=1), np.bool_)
        changed, zeroed = stored, np.zeros(len(new), np.bool_)
        old = None if before is None else before.files.get(entry.path)
        if old is not None:
            common = min(len(new), len(old.digests))
            other = old.digests[:common].view(np.uint64)
            differs = (new[:common] != other).any(axis=1)
            changed = stored.copy()
            changed[:common] &= differs
            zeroed[:common] = differs & ~stored[:common]
        if (new[changed] == _LOST).all(axis=1).any():
            path = os.path.join(self.snapshot, entry.path)
            raise FileError(errno.EIO, f"pages of {path} are lost, so it cannot be sent; `ramfs fsck` names them")
        return _File(number, entry, digests, list(runs_of(changed)), list(runs_of(zeroed)))

    def pieces(self, start: int = 0, *, zstd: bool = False) -> Iterator[Piece]:
        """The stream, or its rest from a record of pages or zeros on."""
        encoder = Encoder()
        yield from encoder.begin(self.begin._replace(start=start), zstd=zstd)
        for number, entry in enumerate(self.entries):
            yield encoder.entry(number, entry)
        skip = start
        for file in self._files:
            for runs, is_zeros in self._records(file):
                if skip:
                    skip -= 1
                elif is_zeros:
                    yield encoder.zeros(file.number, runs)
                else:
                    digests = b"".join(file.digests[first:stop].tobytes() for first, stop in runs)
                    yield encoder.pages(file.number, runs, digests)
                    for first, stop in runs:
                        yield self._span(file.entry, first, stop)
        if skip:
            raise FileError(errno.EINVAL, f"{self.snapshot} has less to send than the token says: begin anew")
        yield encoder.end()

    def _span(self, entry: Entry, first: int, stop: int) -> Span:
        at, end = first << PAGE_SHIFT, min(stop << PAGE_SHIFT, entry.size)
        return Span(os.path.join(self.snapshot, entry.path), at, end - at, (stop << PAGE_SHIFT) - end)

    @staticmethod
    def _records(file: _File) -> Iterator[tuple[list[Run], bool]]:
        """Runs of pages, and of zeros, as many as fit in a record, in the order of their pages."""
        runs: list[Run] = []
        count, kind = 0, False
        for first, stop, is_zeros in sorted(
            [(*run, False) for run in file.pages] + [(*run, True) for run in file.zeros]
        ):
            at = first
            while at < stop:
                if runs and (kind != is_zeros or len(runs) == MAX_RUNS or count == MAX_PAGES):
                    yield runs, kind
                    runs, count = [], 0
                kind = is_zeros
                end = stop if is_zeros else min(stop, at + MAX_PAGES - count)
                runs.append((at, end))
                count += 0 if is_zeros else end - at
                at = end
        if runs:
            yield runs, kind
