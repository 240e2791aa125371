"""What ``ramfs receive`` makes of a stream: a tree that nobody sees, which at its end takes its place in one step.

    PARENT/.NAME.receiving/          of PARENT/NAME, for its owner alone
        state                        how far it is: JSON, filled up with blanks to 4096 bytes
        tree/                        what has come

Every page in ``tree`` was compared with its digest before it was written. ``state`` counts records that are written, so
whoever goes on from it lacks none, at least until the machine goes down; a snapshot that came in more than one piece is
therefore compared with the sender's by its manifest before it counts.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import queue
import shutil
import stat
import threading
from collections.abc import Callable
from typing import Any, Final

import xxhash

from ramfs.errors import FileError, SourceCorrupt
from ramfs.store.files import copy_range, punch_hole, write_all
from ramfs.transfer.stream import LAYOUT, Begin, Decoder, Entry, Pages, Run, Token, Zeros
from ramfs.units import PAGE_SHIFT

#: Bytes of ``state``.
_STATE: Final = 4096
#: Records after which ``state`` is written: 64 MiB of pages.
_OFTEN: Final = 64
#: Records that have come and wait to be written.
_AHEAD: Final = 8
#: What makes a directory take the snapshots of the one that it is exchanged with (docs/format.md).
HEIR: Final = "user.ramfs.heir"
_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_SPECIAL: Final = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK}

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _exchange(one: str, other: str) -> None:
    """Let two names change places, in one step. Raises OSError."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), other)


class Partial:
    """The hidden place of a directory that is being received. Close it."""

    def __init__(self, directory: str) -> None:
        """Makes nothing. ``directory`` is an absolute path."""
        above, name = os.path.split(directory)
        self.directory = directory
        self.path = os.path.join(above, f".{name}.receiving")
        self.tree = os.path.join(self.path, "tree")
        self._state = os.path.join(self.path, "state")
        self._fd = -1

    def lock(self, *, make: bool) -> bool:
        """Keep others away from it. False if it is not there, and not to be made. Raises FileError (EBUSY), OSError."""
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise FileError(errno.EBUSY, f"another ramfs receive to {self.directory} is running") from None
        return True

    def close(self) -> None:
        """Let others have it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load(self) -> dict[str, Any] | None:
        """How far it is; None if nothing of it is there that could be used."""
        try:
            with open(self._state, encoding="ascii") as file:
                told = json.load(file)
        except (OSError, ValueError):
            return None
        return told if isinstance(told, dict) else None

    def save(self, state: dict[str, Any]) -> None:
        """Note how far it is, in place, so that it needs no room."""
        text = json.dumps(state).encode("ascii").ljust(_STATE)
        fd = os.open(self._state, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, text, 0)
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Nothing of it is to be gone on with."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._state)

    def token(self) -> Token | None:
        """Where it goes on, if something is there."""
        state = self.load()
        return None if state is None else Token(**state["token"])

    def worthwhile(self) -> bool:
        """Has anything come that need not come again?"""
        token = self.token()
        return token is not None and token.record > 0

    def remove(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(os.path.join(self.tree, ".snap")):
                os.rmdir(os.path.join(self.tree, ".snap", name))
        _make_removable(self.path)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)


def _make_removable(top: str) -> None:
    """Let the owner remove what is in directories that came with other modes."""
    for directory, names, _ in os.walk(top):
        for path in (os.path.join(directory, name) for name in names):
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
                os.chmod(path, 0o700)


class Receiving:
    """A stream that becomes a directory."""

    def __init__(self, partial: Partial, base: str | None, decoder: Decoder) -> None:
        """``base`` is the snapshot that it builds on, if it does, whose id was compared; the decoder has begun."""
        self.partial = partial
        self.decoder = decoder
        self.written = 0
        """records of pages and zeros that are in the tree"""
        self.bytes = 0
        """of pages that have come"""
        self.resumed = False
        self._base = base
        self._begin: Begin | None = None
        self._built = False
        self._open: tuple[int, int] = -1, -1  # entry and descriptor
        self._queue: queue.Queue[Pages | Zeros | None] = queue.Queue(_AHEAD)
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._writer = threading.Thread(target=self._write_on, daemon=True)

    # -- what has come

    def take(self, read_into: Callable[[memoryview], int], show: Callable[[int], None]) -> None:
        """Take the stream from where its first record ends. ``read_into`` gives 0 at its end, which must not be yet.

        Raises SourceError, OSError, FileError. Whatever comes of it, what was verified is in the tree, and told by
        ``state``.
        """
        decoder, self._begin = self.decoder, self.decoder.begun
        try:
            while not decoder.ended:
                event = _next(decoder, read_into)
                if isinstance(event, Pages | Zeros):
                    self._start()
                    self._put(event)
                    if isinstance(event, Pages):
                        self.bytes += len(event.data)
                        show(self.bytes)
                        with contextlib.suppress(queue.Empty):
                            decoder.spare = self._free.get_nowait()
            self._start()
        finally:
            self._finish()
        if self._failed is not None:
            raise self._failed

    def _put(self, event: Pages | Zeros) -> None:
        while self._failed is None:
            with contextlib.suppress(queue.Full):
                self._queue.put(event, timeout=0.2)
                return
        raise self._failed

    def _start(self) -> None:
        """The entries have all come: have the tree, before the first page."""
        if self._built:
            return
        begin, state = self._begin, self.partial.load()
        assert begin is not None
        fingerprint = _fingerprint(begin, self.decoder.entries)
        if state is not None and state["tree"] == fingerprint and state["token"]["record"] >= begin.start:
            self.resumed = True
        elif begin.start:
            raise FileError(
                errno.EINVAL,
                f"the stream goes on where nothing of it is: send it to {self.partial.directory} from its start",
            )
        else:
            self._build()
        self.written = begin.start
        self._fingerprint = fingerprint
        self._note()
        self._built = True
        self._writer.start()

    def _note(self) -> None:
        assert self._begin is not None
        token = Token.of(self._begin, self.written)
        self.partial.save({"tree": self._fingerprint, "token": token._asdict()})

    def _finish(self) -> None:
        if self._writer.is_alive():
            while self._writer.is_alive():
                with contextlib.suppress(queue.Full):
                    self._queue.put(None, timeout=0.2)
                    break
            self._writer.join()
        if self._built:
            with contextlib.suppress(OSError):  # then what was noted before counts
                self._note()

    def _write_on(self) -> None:
        """Thread: write what was verified, one after the other."""
        try:
            while (event := self._queue.get()) is not None:
                self._write(event)
                self.written += 1
                if self.written % _OFTEN == 0:
                    self._note()
                if isinstance(event, Pages):
                    self._free.put(event.data.obj)  # type: ignore[arg-type]
        except BaseException as exc:  # noqa: BLE001 - raised by take()
            self._failed = exc
        finally:
            number, fd = self._open
            if number >= 0:
                os.close(fd)
                self._open = -1, -1

    def _write(self, event: Pages | Zeros) -> None:
        fd, size = self._file(event.file), self.decoder.entries[event.file].size
        if isinstance(event, Zeros):
            for first, stop in event.runs:
                length = min(stop << PAGE_SHIFT, size) - (first << PAGE_SHIFT)
                if not punch_hole(fd, first << PAGE_SHIFT, length):
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return
        at = 0
        for run in event.runs:
            length = _bytes_of(run, size)
            write_all(fd, event.data[at : at + length], run[0] << PAGE_SHIFT)
            at += (run[1] - run[0]) << PAGE_SHIFT

    def _file(self, number: int) -> int:
        if self._open[0] != number:
            if self._open[0] >= 0:
                os.close(self._open[1])
            path = self._place(self.decoder.entries[number])
            self._open = number, os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._open[1]

    # -- the tree

    def _place(self, entry: Entry) -> str:
        return os.path.join(self.partial.tree, entry.path) if entry.path else self.partial.tree

    def _build(self) -> None:
        """Make everything but contents; of files that the base has, with the pages of that."""
        if os.path.lexists(self.partial.tree):
            _make_removable(self.partial.tree)
            shutil.rmtree(self.partial.tree)
        for entry in self.decoder.entries:
            path = self._place(entry)
            match entry.kind:
                case "dir":
                    os.mkdir(path, 0o700)
                case "symlink":
                    os.symlink(entry.target, path)
                case "hardlink":
                    os.link(os.path.join(self.partial.tree, entry.target), path)
                case "file":
                    self._make_file(entry, path)
                case _:
                    os.mknod(path, _SPECIAL[entry.kind] | 0o600, entry.rdev)

    def _make_file(self, entry: Entry, path: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            old = None if self._base is None else os.path.join(self._base, entry.path)
            if old is not None and os.path.isfile(old) and not os.path.islink(old):
                source = os.open(old, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    copy_range(source, 0, fd, 0, os.fstat(source).st_size)
                finally:
                    os.close(source)
            os.ftruncate(fd, entry.size)
        finally:
            os.close(fd)

    def settle(self) -> None:
        """Give everything its owner, attributes, mode and time, first what is below a directory. Raises OSError."""
        root = os.geteuid() == 0
        for entry in reversed(self.decoder.entries):
            path = self._place(entry)
            if entry.kind == "hardlink":
                continue
            if entry.kind == "dir":
                _set_layout(path, entry.layout)
            if root:
                os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
            for name, value in entry.xattrs:
                if root or name.startswith("user."):
                    os.setxattr(path, name, value, follow_symlinks=False)
            if entry.kind != "symlink":
                os.chmod(path, entry.mode)
            os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)

    def freeze(self, identify: Callable[[str], str]) -> None:
        """Make the snapshot of it. What came in pieces is compared with the sender's. Raises SourceCorrupt, OSError."""
        begin = self._begin
        assert begin is not None
        snapshot = os.path.join(self.partial.tree, ".snap", begin.name)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(snapshot)  # of one that was killed behind this
        os.mkdir(snapshot)
        if self.resumed and identify(snapshot) != begin.id:
            self.partial.forget()
            raise SourceCorrupt(
                f"what came for {self.partial.directory} in several pieces is not what was sent; "
                "it was removed, send it again from its start"
            )

    def publish(self, *, onto: bool) -> None:
        """Let it take its place, with its snapshot, and with those of what was there before. Raises OSError."""
        tree, directory, state = self.partial.tree, self.partial.directory, self.partial.load()
        self.partial.forget()  # from here on the tree may be what was there before
        try:
            if onto:
                os.setxattr(tree, HEIR, b"1")
                _exchange(tree, directory)
            else:
                os.rename(tree, directory)
        except OSError:
            if state is not None:
                self.partial.save(state)
            raise
        fd = os.open(os.path.dirname(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _set_layout(directory: str, layout: str) -> None:
    """Let a directory have this layout, or if it is empty none that it was told: what files of the base had is gone."""
    path = os.path.join(directory, LAYOUT)
    if not layout:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # only root may remove one
            os.unlink(path)
        return
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        # One whose files have become shorter since is refused: then names and sizes tell it.
        with contextlib.suppress(OSError):
            os.write(fd, layout.encode("utf-8", "surrogateescape"))
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def read_begin(decoder: Decoder, read_into: Callable[[memoryview], int]) -> Begin:
    """The first record of a stream. Raises SourceError, OSError."""
    while decoder.begun is None:
        _next(decoder, read_into)
    return decoder.begun


def _next(decoder: Decoder, read_into: Callable[[memoryview], int]) -> object:
    """Read on until something is complete, or the buffer changes."""
    count = read_into(decoder.get_buffer())
    if count == 0:
        raise EOFError
    return decoder.received(count)


def _bytes_of(run: Run, size: int) -> int:
    return min(run[1] << PAGE_SHIFT, size) - (run[0] << PAGE_SHIFT)


def _fingerprint(begin: Begin, entries: list[Entry]) -> str:
    """What must be the same for a stream to go on where another one ended."""
    state = xxhash.xxh3_128(repr((begin.name, begin.id, begin.base, begin.pages)).encode())
    for entry in entries:
        state.update(repr(entry).encode())
    return state.hexdigest()
