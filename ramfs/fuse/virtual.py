"""Files that are not stored: of which kinds there are, and ``.ramfs`` at the root of the mount, which is one of them.

Each inode of them has VIRTUAL in its number, and beside it the bit of its kind: none for ``.ramfs`` itself (`Root`).
`Kinds` finds the kind of an inode, and that of a name by which some directory leads to one. None of them is listed.

In ``.ramfs`` are status.json, metrics and control.

``control`` takes one JSON object for each write and answers by the write's errno:

    {"clone": {"source": PATH, "parent": PATH, "name": NAME}}
    {"flatten": PATH}
    {"pull": {"uri": URI, "parent": PATH, "name": NAME, "wait": SECONDS or null, "rate": BYTES, "paused": BOOLEAN}}
    the same with {"sizes": {PATH: BYTES, ...}} instead of "uri": where that comes from is told later, by
    {"arrival": {"path": PATH, and any of "uri", "rate", "paused", "zeros"}}

or runs of pages to be written into one file (image/scatter.py). ``zeros`` are runs of pages which are zeros at the
source, of files that have no digests yet, by what these are called there: {NAME: [[FIRST, STOP], ...], ...}. All but
runs to be written and the first go on while the file is open, and reading the file tells how far they are (jobs.py).
Paths are relative to the root of the mount; bytes that are not UTF-8 are surrogate escapes, as os.fsdecode makes them.
"""

import errno
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ramfs.arrival.pulls import Options
from ramfs.errors import FileError
from ramfs.fuse.extension import pyfuse3
from ramfs.fuse.pulling import Change, Request
from ramfs.inspect.report import Observer
from ramfs.namespace import Namespace
from ramfs.units import MAX_FILE_SIZE, ROOT, InodeNumber

if TYPE_CHECKING:
    from ramfs.fuse.manifests import Text
    from ramfs.fuse.views import OpenView

#: Set in the number of each inode that is not stored.
VIRTUAL: Final = 1 << 61
_KIND_SHIFT: Final = 58
_KIND_MASK: Final = 7
#: The bit of each kind, which is set too.
VIEW, WORKING_SET, MANIFEST = (VIRTUAL | 1 << _KIND_SHIFT + number for number in range(3))
_DIRECTORY_NAME: Final = b".ramfs"
_DIRECTORY: Final = InodeNumber(VIRTUAL | 1)
_STATUS: Final = InodeNumber(VIRTUAL | 2)
_METRICS: Final = InodeNumber(VIRTUAL | 3)
CONTROL: Final = InodeNumber(VIRTUAL | 4)
_FILES: Final = {b"status.json": _STATUS, b"metrics": _METRICS, b"control": CONTROL}
#: The longest command that ``control`` takes, bytes.
MAX_COMMAND: Final = 64 << 10


def is_virtual(ino: int) -> bool:
    """Is it an inode that is not stored?"""
    return bool(ino & VIRTUAL)


@dataclass(slots=True)
class Opened:
    """What a virtual file is for somebody who has opened it."""

    data: bytes = b""
    """a text of that moment"""
    kept: bytes = b""
    """what a daemon that takes over needs to know of it"""
    manifest: "Text | None" = None
    view: "OpenView | None" = None
    written: bytearray | None = None
    """what was written so far, of a layout: it counts when all of it is there"""
    keeps: bool = False
    """may the kernel keep what it reads?"""


class Kind(ABC):
    """A kind of virtual files, as most of them are: each belongs to a snapshot and is as frozen as that."""

    bit: int
    """in the numbers of its inodes"""
    entrances: Collection[bytes]
    """the names by which a directory may lead to one"""

    @abstractmethod
    def find(self, parent: InodeNumber, name: bytes) -> InodeNumber | None:
        """The inode that one of the entrances of a stored directory leads to; None if it leads to none."""

    async def prepare(self, ino: InodeNumber) -> None:  # noqa: B027  (most need nothing)
        """Do what takes long of what :meth:`attributes` needs."""

    @abstractmethod
    def attributes(self, ino: InodeNumber) -> pyfuse3.EntryAttributes:
        """What stat tells. Raises FileError."""

    def made(self, ino: InodeNumber) -> int:
        """When it was made, ns since the epoch; 0 if nobody knows."""
        return 0

    def is_frozen(self, ino: InodeNumber) -> bool:
        """Does it never change?"""
        return True

    def is_writable(self, ino: InodeNumber) -> bool:
        """Does it take what is written?"""
        return False

    def names(self, ino: InodeNumber) -> list[tuple[bytes, InodeNumber]]:
        """What a listing shows. Raises ENOTDIR."""
        raise FileError(errno.ENOTDIR)

    def lookup(self, parent: InodeNumber, name: bytes) -> InodeNumber:
        """The inode of a name in one of its directories. Raises ENOENT, ENOTDIR."""
        for known, ino in self.names(parent):
            if known == name:
                return ino
        raise FileError(errno.ENOENT)

    @abstractmethod
    async def open(self, ino: InodeNumber) -> Opened:
        """Raises FileError, SourceError, OSError."""

    @abstractmethod
    def reopen(self, ino: InodeNumber, kept: bytes) -> Opened:
        """One that is open since the daemon before, which has kept this of it."""


class Kinds:
    """All kinds of a mount."""

    def __init__(self, *kinds: Kind) -> None:
        self._by_bit = {kind.bit >> _KIND_SHIFT & _KIND_MASK: kind for kind in kinds}
        self._by_name = {name: kind for kind in kinds for name in kind.entrances}

    def of(self, ino: int) -> Kind | None:
        """The kind of an inode, None if it is stored."""
        return self._by_bit[ino >> _KIND_SHIFT & _KIND_MASK] if ino & VIRTUAL else None

    def behind(self, parent: InodeNumber, name: bytes) -> tuple[Kind, InodeNumber] | None:
        """What a name of a stored directory leads to, if that is not stored."""
        kind = self._by_name.get(name)
        ino = None if kind is None else kind.find(parent, name)
        return None if kind is None or ino is None else (kind, ino)


class Root(Kind):
    """``.ramfs``, and what is in it."""

    bit = VIRTUAL
    entrances = (_DIRECTORY_NAME,)

    def __init__(self, namespace: Namespace, observer: Observer) -> None:
        self._namespace = namespace
        self._texts = {_STATUS: observer.status_text, _METRICS: observer.metrics_text}

    def find(self, parent: InodeNumber, name: bytes) -> InodeNumber | None:
        """At the root alone."""
        return _DIRECTORY if parent == ROOT else None

    def attributes(self, ino: InodeNumber) -> pyfuse3.EntryAttributes:
        """The owner of the root, and for others what the root's mode gives them."""
        root = self._namespace.get(ROOT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        readable = root.mode & 0o444
        if ino == _DIRECTORY:
            entry.st_mode = stat.S_IFDIR | (root.mode & 0o555)
            entry.st_nlink = 2
        elif ino == CONTROL:
            entry.st_mode = stat.S_IFREG | readable & 0o400 | 0o222 & (readable >> 1)
        else:
            entry.st_mode = stat.S_IFREG | readable
        entry.st_uid, entry.st_gid = root.uid, root.gid
        entry.attr_timeout = entry.entry_timeout = 1
        return entry

    def is_frozen(self, ino: InodeNumber) -> bool:
        """Nothing of it is."""
        return False

    def is_writable(self, ino: InodeNumber) -> bool:
        """By commands."""
        return ino == CONTROL

    def names(self, ino: InodeNumber) -> list[tuple[bytes, InodeNumber]]:
        """All of its files."""
        return list(_FILES.items())

    async def open(self, ino: InodeNumber) -> Opened:
        """What it reads as, now."""
        text = self._texts[ino]() if ino in self._texts else b""
        return Opened(text, text)

    def reopen(self, ino: InodeNumber, kept: bytes) -> Opened:
        """What it read as."""
        return Opened(kept, kept)


def parse(command: bytes) -> dict[str, Any]:
    """A command as an object. Raises EINVAL."""
    try:
        parsed = json.loads(command)
    except (ValueError, RecursionError):
        raise FileError(errno.EINVAL) from None
    if not isinstance(parsed, dict):
        raise FileError(errno.EINVAL)
    return parsed


def path_to_flatten(command: dict[str, Any]) -> bytes:
    """The path of a flatten command. Raises EINVAL."""
    path = command["flatten"]
    if not isinstance(path, str) or "\0" in path:
        raise FileError(errno.EINVAL)
    return os.fsencode(path)


def parse_pull(command: dict[str, Any]) -> Request:
    """A pull command. Raises EINVAL."""
    pull = command["pull"]
    try:
        sizes, wait = pull.get("sizes"), pull.get("wait")
        uri = _text(pull["uri"]) if sizes is None else ""
        if sizes is not None:
            sizes = {_text(path): int(size) for path, size in sizes.items()}
        parent, name = os.fsencode(pull["parent"]), os.fsencode(pull["name"])
        options = Options(None if wait is None else float(wait), int(pull.get("rate", 0)), bool(pull.get("paused")))
        given = pull.get("like")
        like = given is None if given in (None, False) else os.fsencode(given)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise FileError(errno.EINVAL) from None
    paths = parent if isinstance(like, bool) else parent + like
    if not _fit_name(name) or b"\0" in paths or options.rate < 0 or not 0 <= (options.wait or 0) < 1e9:
        raise FileError(errno.EINVAL)
    if sizes is not None and not (sizes and all(0 <= size <= MAX_FILE_SIZE for size in sizes.values())):
        raise FileError(errno.EINVAL)
    return Request(uri, parent, name, options, like, sizes)


def parse_arrival(command: dict[str, Any]) -> Change:
    """An arrival command. Raises EINVAL."""
    given = command["arrival"]
    try:
        path = os.fsencode(given["path"])
        uri, rate, paused = given.get("uri"), given.get("rate"), given.get("paused")
        zeros = {_text(name): [_run(*run) for run in runs] for name, runs in given.get("zeros", {}).items()}
        change = Change(path, None if uri is None else _text(uri), None if rate is None else int(rate), paused, zeros)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise FileError(errno.EINVAL) from None
    if b"\0" in path or not isinstance(paused, bool | None) or (change.rate or 0) < 0:
        raise FileError(errno.EINVAL)
    return change


def _text(value: Any) -> str:
    """A string that can be stored. Raises TypeError, ValueError."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return value


def _run(first: Any, stop: Any) -> tuple[int, int]:
    """Numbers of pages, from the first up to another. Raises TypeError, ValueError."""
    if not isinstance(first, int) or not isinstance(stop, int):
        raise TypeError
    if not 0 <= first < stop:
        raise ValueError
    return first, stop


def _fit_name(name: bytes) -> bool:
    return bool(name) and b"/" not in name and name not in (b".", b"..") and b"\0" not in name


def parse_clone(command: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """Source path, parent path and name of a clone command. Raises EINVAL."""
    try:
        clone = command["clone"]
        source, parent, name = (os.fsencode(clone[key]) for key in ("source", "parent", "name"))
    except (ValueError, KeyError, TypeError):
        raise FileError(errno.EINVAL) from None
    if not _fit_name(name) or b"\0" in source + parent:
        raise FileError(errno.EINVAL)
    return source, parent, name
