"""Working sets, after REAP: what a guest asks for first is recorded, and read ahead for the next one.

A guest that goes on from a snapshot asks for much the same pages each time, one fault after the other. So when a clone
that nothing was written to yet is opened for reading and writing, the READs of that handle are noted for some seconds,
and kept with the frozen image that it was copied from (image/working_set.py). The next clone of it has these pages read
into the kernel's cache as soon as it is opened, by a process that asks for them as anybody could (flush_helper.py).
The kernel then only adds pages that it has not got, and what the guest stores meanwhile stays. (FUSE has a notification
that puts pages into the cache, and it writes over what guests have stored.)

What is noted is what reached the daemon: pages that the kernel read around a fault are in it, and those that it had
already are not. Files that it serves natively send no READs, so nothing is noted of them, nor read ahead.
"""

import contextlib
import logging
import sqlite3
import stat
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import trio

from ramfs.errors import FileError
from ramfs.fuse.extension import pyfuse3
from ramfs.fuse.flush import Flusher
from ramfs.fuse.virtual import WORKING_SET, Kind, Opened
from ramfs.image.working_set import NAME, Records, batches, complete, empty, pack
from ramfs.inspect.counters import Counters
from ramfs.namespace import Inode, Namespace
from ramfs.pager import Pager
from ramfs.store.images import Image
from ramfs.units import PAGE_SHIFT, HandleId, ImageId, InodeNumber

log = logging.getLogger(__name__)

_NAME: Final = NAME.encode()
#: Seconds after the first READ for which they are noted, and how many of them at most.
_WINDOW: Final = 10.0
_MOST_NOTES: Final = 1 << 14
#: Bytes of a file that is worth it: smaller ones are no memory of a guest.
_LEAST: Final = 1 << 20
#: Pages that are read ahead in one go (8 MiB), and how often that is done, if they have arrived, before we look again
#: whether it is still of use; the mount is in use by us meanwhile.
_AT_ONCE: Final = 1 << 11
_IN_A_ROW: Final = 4
#: Seconds between two looks whether pages have arrived, at first and at most.
_SOON: Final = 0.01
_LATER: Final = 1.0
#: Times that a file is looked for which was renamed.
_ATTEMPTS: Final = 10


@dataclass(slots=True)
class _Recording:
    """What the user of a handle asks for."""

    origin: ImageId
    """whose working set it is"""
    size: int
    known: Records
    """of that set"""
    began: float = field(default_factory=time.monotonic)
    asked: list[tuple[float, int, int]] = field(default_factory=list)
    """seconds since it began, offset, bytes"""

    def note(self, offset: int, length: int) -> None:
        """A READ."""
        if len(self.asked) < _MOST_NOTES:
            self.asked.append((time.monotonic() - self.began, offset, length))

    @property
    def is_over(self) -> bool:
        """Has it seen enough?"""
        return bool(self.asked) and time.monotonic() - self.began > self.asked[0][0] + _WINDOW


class _Counting:
    """Of a handle that reads ahead."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def note(self, _: int, length: int) -> None:
        """A READ."""
        self._counters.reads_ahead += 1
        self._counters.read_ahead_bytes += length


class WorkingSets(Kind):
    """Those of the snapshots of a mount. ``watched`` has what is to be called for each READ of some handles."""

    bit = WORKING_SET
    entrances = (_NAME,)

    def __init__(self, pager: Pager, namespace: Namespace, flusher: Flusher, counters: Counters, used: bool) -> None:
        """If they are not to be ``used`` they are only shown."""
        self.watched: dict[int, _Recording | _Counting] = {}
        self._pager = pager
        self._namespace = namespace
        self._flusher = flusher
        self._counting = _Counting(counters)
        self._used = used
        self._recorded: set[ImageId] = set()
        """the images whose sets are being recorded"""
        self._reading: dict[HandleId, trio.CancelScope] = {}

    # -- recording and reading ahead

    def opened(self, handle: HandleId, inode: Inode, image: Image, pid: int, *, read_write: bool) -> None:
        """A file that the daemon serves was opened, by a process."""
        if pid in self._flusher.pids:
            self.watched[handle] = self._counting
            return
        if not (self._used and read_write and image.live is None and image.size >= _LEAST):
            return
        beginning = self._pager.images.beginning(image)
        if beginning is None:
            return
        origin, known = beginning
        if origin not in self._recorded:
            self._recorded.add(origin)
            self.watched[handle] = _Recording(origin, image.size, known)
        if len(known):
            scope = self._reading[handle] = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._read_ahead, scope, inode.ino, image, known)

    def closed(self, handle: HandleId) -> None:
        """A handle is gone."""
        if (scope := self._reading.pop(handle, None)) is not None:
            scope.cancel()
        self._end(handle)

    def tend(self) -> None:
        """Keep what was recorded for long enough; call it once a second or so."""
        for handle, watch in list(self.watched.items()):
            if isinstance(watch, _Recording) and watch.is_over:
                self._end(handle)

    def _end(self, handle: int) -> None:
        recording = self.watched.pop(handle, None)
        if not isinstance(recording, _Recording):
            return
        self._recorded.discard(recording.origin)
        found = complete(recording.known, recording.asked, recording.size)
        if found is not recording.known:
            try:
                self._pager.images.keep_working_set(recording.origin, found)
            except sqlite3.Error as exc:  # the store is full
                log.warning("a working set cannot be kept: %s", exc)

    async def _read_ahead(self, scope: trio.CancelScope, ino: InodeNumber, image: Image, known: Records) -> None:
        """Have the kernel read what the user of a file will ask for."""
        with scope:
            try:
                left = deque(batches(known, image.size, _AT_ONCE))
                while left:
                    await self._here(image, left[0])
                    parts: list[tuple[int, int]] = []
                    for _ in range(_IN_A_ROW):
                        if left and self._is_here(image, left[0]):
                            runs = left.popleft()
                            parts += [(a << PAGE_SHIFT, (b - a) << PAGE_SHIFT) for a, b in reversed(runs)]
                    for _ in range(_ATTEMPTS):
                        if await self._flusher.read_ahead(ino, self._namespace.path_of(ino), parts):
                            break
            except FileError:
                pass  # it has no name any more
            except Exception as exc:  # noqa: BLE001  (it is help, and nothing more)
                log.info("inode %d: its working set is not read ahead: %s", ino, exc)

    def _is_here(self, image: Image, runs: list[tuple[int, int]]) -> bool:
        """Have pages of an image arrived?"""
        return not any(self._pager.absent(image, a << PAGE_SHIFT, (b - a) << PAGE_SHIFT) for a, b in runs)

    async def _here(self, image: Image, runs: list[tuple[int, int]]) -> None:
        """Return when pages of an image have arrived. They come in the same order, unless somebody has paused that."""
        pause = _SOON
        while not self._is_here(image, runs):
            await trio.sleep(pause)
            pause = min(2 * pause, _LATER)

    # -- ``ramfs.workingset``

    def find(self, parent: InodeNumber, name: bytes) -> InodeNumber | None:
        """The working set that a name leads to; None if it leads to none."""
        space = self._namespace
        top = space.get(parent)
        if not space.is_snapshot(top) or space.has(parent, name) or not self._sets(top)[0]:
            return None
        return InodeNumber(parent | WORKING_SET)

    def _top(self, ino: InodeNumber) -> Inode:
        return self._namespace.get(InodeNumber(ino & ~WORKING_SET))

    def _sets(self, top: Inode) -> tuple[dict[bytes, Records], int]:
        """The sets of the files of a snapshot, and who may read all of these."""
        found: dict[bytes, Records] = {}
        mode = 0o444
        for path, image, each in self._namespace.frozen_files(top):
            records = self._pager.images.working_set(image)
            if records is not None:
                found[path] = records
                mode &= each
        return found, mode

    def text(self, ino: InodeNumber) -> bytes:
        """What it reads as; nothing, if it is gone."""
        with contextlib.suppress(FileError):
            return pack(self._sets(self._top(ino))[0])
        return b""

    def attributes(self, ino: InodeNumber) -> pyfuse3.EntryAttributes:
        """As those of its directory. Raises ENOENT."""
        top = self._top(ino)
        sets, mode = self._sets(top)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_mode = stat.S_IFREG | top.mode & mode
        entry.st_uid, entry.st_gid = top.uid, top.gid
        entry.st_size = len(pack(sets))
        entry.st_blocks = (entry.st_size + 511) // 512
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = top.atime, top.mtime, top.ctime
        entry.attr_timeout = entry.entry_timeout = 1
        return entry

    async def open(self, ino: InodeNumber) -> Opened:
        """With its text as of now."""
        return Opened(self.text(ino))

    def reopen(self, ino: InodeNumber, kept: bytes) -> Opened:
        """With its text as of now: it is made of what is stored."""
        return Opened(self.text(ino))

    def remove(self, ino: InodeNumber) -> None:
        """Forget one: the next resume records another."""
        space = self._namespace
        with space.catalog.transaction(frees=True):
            for _, image, _ in space.frozen_files(self._top(ino)):
                self._pager.images.keep_working_set(image, empty())
            space.outcomes.conclude()
