"""A local raw image as a source, or a directory of them. Holes are known zeros."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import trio

from ramfs.errors import SourceChanged, SourceError, SourceLost, SourceRefused
from ramfs.source.base import Extent

T = TypeVar("T")

#: Bytes of the largest read.
MAXIMUM: Final = 4 << 20
#: Extents told in one answer: a file of many holes is asked for again, where the answer ends.
_EXTENTS: Final = 1024
#: Reads in threads at the same time, for each file; urgent ones have as many of their own.
_THREADS: Final = 4


class FileSource:
    """One regular file or block device, read straight into the caller's buffer, in threads."""

    maximum: int = MAXIMUM

    def __init__(self, path: str, *, not_on: int | None = None) -> None:
        """Open a file. Raises SourceRefused.

        ``not_on`` is the device number of a file system that it must not be on: a daemon's own mount, on which
        its threads would wait for itself.
        """
        self.description = path
        self._calm, self._urgent = trio.CapacityLimiter(_THREADS), trio.CapacityLimiter(_THREADS)
        self._users = 0
        self._closed = False
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO is refused, not waited for
        except (OSError, ValueError) as exc:
            raise _refused(path, exc) from exc
        try:
            _check(path, os.fstat(self._fd), not_on)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException as exc:
            os.close(self._fd)
            if isinstance(exc, OSError):
                raise _refused(path, exc) from exc
            raise

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill ``buffer``. Raises SourceChanged where the file has become shorter."""
        await self._in_thread(lambda: self._read(offset, buffer), self._urgent if urgent else self._calm)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """By SEEK_DATA and SEEK_HOLE."""
        return await self._in_thread(lambda: list(self._extents(offset, offset + length)), self._calm)

    async def aclose(self) -> None:
        """Close it, once no thread uses it any more."""
        self._closed = True
        self._leave(0)
        await trio.lowlevel.checkpoint()

    async def _in_thread(self, work: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        if self._closed:
            raise SourceLost(f"{self.description} is closed")
        self._users += 1
        try:
            # A cancelled read waits for its thread, which would else write to a buffer that is not its own any more.
            return await trio.to_thread.run_sync(work, limiter=limiter)
        except OSError as exc:
            raise SourceError(f"{self.description} cannot be read: {exc.strerror}") from exc
        finally:
            self._leave(1)

    def _leave(self, users: int) -> None:
        self._users -= users
        if self._closed and not self._users and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, offset: int, buffer: memoryview) -> None:
        at = 0
        while at < len(buffer):
            if self._closed:
                raise SourceLost(f"{self.description} is closed")
            done = os.preadv(self._fd, [buffer[at:]], offset + at)
            if not done:
                raise SourceChanged(f"{self.description} has become shorter than {self.size} bytes")
            at += done

    def _extents(self, at: int, end: int) -> Iterator[Extent]:
        for _ in range(_EXTENTS):
            data = self._seek(at, os.SEEK_DATA, end)
            stop = data if data > at else self._seek(at, os.SEEK_HOLE, end)
            yield Extent(at, stop - at, data > at)
            at = stop
            if at >= end:
                return

    def _seek(self, at: int, whence: int, end: int) -> int:
        """Where data or a hole begins from ``at`` on, at most ``end``."""
        try:
            return min(os.lseek(self._fd, at, whence), end)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return end
            if exc.errno == errno.EINVAL:  # a block device, or a file system without holes: all is data
                return at if whence == os.SEEK_DATA else end
            raise


class FileDirectory:
    """The regular files below a directory, by their paths from there; or a single file, by its name."""

    def __init__(self, path: str, *, not_on: int | None = None) -> None:
        """Raises SourceRefused where there is nothing. ``not_on`` as for FileSource."""
        self.description = path
        self._not_on = not_on
        self._is_file = not os.path.isdir(path)
        if self._is_file:
            try:
                os.stat(path)
            except (OSError, ValueError) as exc:
                raise _refused(path, exc) from exc

    async def names(self) -> list[str]:
        """All regular files, in subdirectories too; symlinks are not followed."""
        if self._is_file:
            return [os.path.basename(self.description)]
        return await trio.to_thread.run_sync(self._names)

    def _names(self) -> list[str]:
        def refuse(exc: OSError) -> None:
            raise _refused(exc.filename or self.description, exc) from exc

        found: list[str] = []
        for directory, _, names in os.walk(self.description, onerror=refuse):
            for name in names:
                path = os.path.join(directory, name)
                if stat.S_ISREG(os.lstat(path).st_mode):
                    found.append(os.path.relpath(path, self.description))
        return found

    async def open(self, name: str) -> FileSource:
        """Open a file by its path from the directory. Raises SourceRefused, for what leads out of it too."""
        if self._is_file:
            if name != os.path.basename(self.description):
                raise SourceRefused(f"{self.description} is not {name}")
            return await trio.to_thread.run_sync(lambda: FileSource(self.description, not_on=self._not_on))
        if not name or name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise SourceRefused(f"{name!r} is no path of a file below {self.description}")
        path = os.path.join(self.description, name)
        return await trio.to_thread.run_sync(lambda: FileSource(path, not_on=self._not_on))

    async def aclose(self) -> None:
        """Nothing is held."""


def _check(path: str, told: os.stat_result, not_on: int | None) -> None:
    if told.st_dev == not_on:
        raise SourceRefused(f"{path} is on the mount that it would be pulled to: use `ramfs clone`")
    if not (stat.S_ISREG(told.st_mode) or stat.S_ISBLK(told.st_mode)):
        raise SourceRefused(f"{path} is neither a regular file nor a block device")


def _refused(path: str, exc: OSError | ValueError) -> SourceRefused:
    why = exc.strerror if isinstance(exc, OSError) else str(exc)
    return SourceRefused(f"{path} cannot be opened: {why}")
