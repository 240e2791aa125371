"""Bring what a guest wrote into mapped files over to the file system, in rounds, while the guest runs on.

A freeze flushes by itself, and nothing would be lost without these rounds. But what a freeze must flush, the
guest waits for. The first round takes long and finds what was dirtied in half a minute (the kernel's own
writeback is that lazy), the next one only what was dirtied during the first, and so on: as live migration
does it. When little is left, or a round finds no less than the one before it, the guest is writing as fast as
we flush, and nothing is won by going on.
"""

import asyncio
import contextlib
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from ramfs.errors import FileError
from ramfs.store import cachestat

T = TypeVar("T")

#: Bytes that are worth no further round: they are flushed in a few milliseconds.
LITTLE: Final = 1 << 20

#: The same in seconds, where the kernel cannot tell bytes.
LITTLE_TIME: Final = 0.005

#: A round that finds more than this part of what the last one found is not worth another.
FALLS: Final = 0.75


@dataclass(frozen=True)
class Round:
    """One flush of every file."""

    #: Bytes that were dirty; None on kernels before 6.5, which do not tell.
    bytes: int | None
    seconds: float
    #: Whether the guest ran meanwhile.
    running: bool

    def little(self) -> bool:
        """Whether what it found needs no further round."""
        return self.seconds <= LITTLE_TIME if self.bytes is None else self.bytes <= LITTLE

    def falls_from(self, before: "Round") -> bool:
        """Whether it found so much less than the round before it that another one is worth it."""
        if self.bytes is None or before.bytes is None:
            return self.seconds <= before.seconds * FALLS
        return self.bytes <= before.bytes * FALLS


async def in_thread(work: Callable[[], T]) -> T:
    """Do blocking work in a thread that nobody has to wait for.

    asyncio's own threads are joined when the program ends. A file of a mount whose daemon hangs would then
    hold up the one thing that matters in that moment: that Ctrl-C lets the guest go on.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[T], None] | Callable[[BaseException], None], value: object) -> None:
        if not future.done():
            set_it(value)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is awaited
            _tell(loop, settle, future.set_exception, error)
        else:
            _tell(loop, settle, future.set_result, result)

    threading.Thread(target=run, daemon=True).start()
    return await future


def _tell(loop: asyncio.AbstractEventLoop, *call: object) -> None:
    try:
        loop.call_soon_threadsafe(*call)  # type: ignore[arg-type]
    except RuntimeError:
        return  # the loop is closed: the program is ending, and the answer came too late


async def rounds(directory: str, limit: int) -> AsyncIterator[Round]:
    """Flush until little is left, at most ``limit`` times; yields each round when it is done."""
    before: Round | None = None
    for _ in range(limit):
        this = await flush(directory, running=True)
        yield this
        if this.little() or (before is not None and not this.falls_from(before)):
            return
        before = this


async def flush(directory: str, *, running: bool) -> Round:
    """Flush every regular file below a directory once.

    :raises FileError: a file cannot be opened, or the file system cannot take what is dirty.
    """
    begin = time.monotonic()
    total: int | None = 0
    for path in await in_thread(lambda: list(regular_files(directory))):
        found = await in_thread(lambda path=path: _flush_file(path))  # type: ignore[misc]
        total = None if total is None or found is None else total + found
    return Round(total, time.monotonic() - begin, running)


def regular_files(directory: str) -> Iterator[str]:
    """The paths of all regular files below a directory; ``.snap`` and ``.guest`` are in no listing."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise FileError(error.errno or 0, f"cannot read the directory {error.filename}: {error.strerror}")

    for parent, _, names in os.walk(directory, onerror=failed):
        for name in names:
            path = os.path.join(parent, name)
            try:
                if stat.S_ISREG(os.lstat(path).st_mode):
                    yield path
            except FileNotFoundError:
                continue  # removed meanwhile, and so nothing to flush


def _flush_file(path: str) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise FileError(error.errno or 0, f"cannot open {path} to flush it: {error.strerror}") from error
    try:
        dirty = dirty_bytes(fd)
        os.fsync(fd)
    except OSError as error:
        raise FileError(error.errno or 0, f"cannot flush {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return dirty


def dirty_bytes(fd: int) -> int | None:
    """Bytes of an open file that are in the page cache only; None when the kernel does not tell."""
    # Of a live native file the cache is that of its layer, which only the daemon can ask about.
    with contextlib.suppress(OSError, ValueError):
        return int(os.getxattr(fd, "user.ramfs.dirty"))
    return cachestat.dirty_bytes(fd)
