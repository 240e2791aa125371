"""``.ramfs`` at the root of the mount: status.json, metrics, control. Not listed, not stored.

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
from collections.abc import Callable
from typing import Any, Final

from ramfs.arrival.pulls import Options
from ramfs.errors import FileError
from ramfs.fuse.extension import pyfuse3
from ramfs.fuse.pulling import Change, Request
from ramfs.inspect.report import Observer
from ramfs.namespace import Inode
from ramfs.units import MAX_FILE_SIZE, InodeNumber

DIRECTORY_NAME: Final = b".ramfs"
#: Set in the number of each inode that is not stored: also of manifests (manifests.py).
VIRTUAL: Final = 1 << 61
DIRECTORY: Final = InodeNumber(VIRTUAL | 1)
_STATUS: Final = InodeNumber(VIRTUAL | 2)
_METRICS: Final = InodeNumber(VIRTUAL | 3)
CONTROL: Final = InodeNumber(VIRTUAL | 4)
_FILES: Final = {b"status.json": _STATUS, b"metrics": _METRICS, b"control": CONTROL}
#: The longest command that ``control`` takes, bytes.
MAX_COMMAND: Final = 64 << 10


def is_virtual(ino: int) -> bool:
    """Is it an inode that is not stored: of ``.ramfs``, or a manifest?"""
    return bool(ino & VIRTUAL)


def names() -> list[tuple[bytes, InodeNumber]]:
    """What a listing of ``.ramfs`` shows."""
    return list(_FILES.items())


def lookup(name: bytes) -> InodeNumber:
    """The inode of a name in ``.ramfs``. Raises ENOENT."""
    try:
        return _FILES[name]
    except KeyError:
        raise FileError(errno.ENOENT) from None


def attributes(ino: InodeNumber, root: Inode) -> pyfuse3.EntryAttributes:
    """Attributes of a virtual inode: the owner of the root, and for others what the root's mode gives them."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino
    readable = root.mode & 0o444
    if ino == DIRECTORY:
        entry.st_mode = stat.S_IFDIR | (root.mode & 0o555)
        entry.st_nlink = 2
    elif ino == CONTROL:
        entry.st_mode = stat.S_IFREG | readable & 0o400 | 0o222 & (readable >> 1)
    else:
        entry.st_mode = stat.S_IFREG | readable
    entry.st_uid, entry.st_gid = root.uid, root.gid
    entry.attr_timeout = entry.entry_timeout = 1
    return entry


def contents(ino: InodeNumber, observer: Observer) -> bytes:
    """What a file of ``.ramfs`` reads as, now."""
    texts: dict[InodeNumber, Callable[[], bytes]] = {_STATUS: observer.status_text, _METRICS: observer.metrics_text}
    return texts[ino]() if ino in texts else b""


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
