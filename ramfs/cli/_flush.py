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
from ramfs.fuse import flush_helper
from ramfs.store import cachestat

T = TypeVar("T")

#: Bytes that are worth no further round: they are flushed in a few milliseconds.
LITTLE: Final = 1 << 20

#: The same in seconds, where the kernel cannot tell bytes.
LITTLE_TIME: Final = 0.005

#: Seconds that the sync of the store may take so that nothing is won by flushing again after it.
LONG_TIME: Final = 0.5

#: Bytes of which twice are written back at a time while the guest runs.
PIECE: Final = 1 << 20

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

    def and_then(self, rest: "Round") -> "Round":
        """Both as one."""
        both = None if self.bytes is None or rest.bytes is None else self.bytes + rest.bytes
        return Round(both, self.seconds + rest.seconds, rest.running)

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
    """Flush until little is left, at most ``limit`` times; yields each round when it is done.

    Then the store syncs what it was given, so that a freeze need not. If that takes long there is more to flush, once.
    """
    before: Round | None = None
    syncs = 0
    for number in range(1, limit + 1):
        this = await flush(directory, running=True)
        if number < limit and not this.little() and (before is None or this.falls_from(before)):
            yield this
            before = this
            continue
        rest = await flush(directory, running=True, sync=True)
        yield this.and_then(rest)
        syncs, before = syncs + 1, None
        if rest.seconds < LONG_TIME or syncs == 2:
            return


async def flush(directory: str, *, running: bool, sync: bool = False) -> Round:
    """Flush every regular file below a directory once; with ``sync``, or a guest that is stopped, the store syncs it.

    :raises FileError: a file cannot be opened, or the file system cannot take what is dirty.
    """
    begin = time.monotonic()
    total: int | None = 0
    for path in await in_thread(lambda: list(regular_files(directory))):
        found = await in_thread(lambda path=path: _flush_file(path, sync=sync or not running))  # type: ignore[misc]
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


def _flush_file(path: str, *, sync: bool) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise FileError(error.errno or 0, f"cannot open {path} to flush it: {error.strerror}") from error
    try:
        dirty = _dirty_natively(fd)
        native = dirty is not None
        dirty = dirty if native else cachestat.dirty_bytes(fd)
        if sync or native:
            os.fsync(fd)
        else:
            _write_back(fd)
    except OSError as error:
        raise FileError(error.errno or 0, f"cannot flush {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return dirty


def _write_back(fd: int) -> None:
    """Hand the daemon what is dirty, a piece at a time.

    From Linux 6.16 on, who stores to a page that is being written back waits for the answer, and fsync(2) has all
    of a file written back at once.
    """
    size = os.fstat(fd).st_size
    flush_helper.begin_write_back(fd, 0, PIECE)
    for offset in range(0, size, PIECE):
        if offset + PIECE < size:  # for the daemon to have something to do
            flush_helper.begin_write_back(fd, offset + PIECE, PIECE)
        flush_helper.write_back_range(fd, offset, PIECE)


def _dirty_natively(fd: int) -> int | None:
    """Dirty bytes of a live native file, whose cache is that of its layer; of others None."""
    with contextlib.suppress(OSError, ValueError):
        return int(os.getxattr(fd, "user.ramfs.dirty"))
    return None
