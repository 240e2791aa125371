"""The process that syncs files of the mount for the daemon, and has the kernel read them: run as a script, with a
socket as standard input.

It must not be the daemon itself. A thread that waits for its own process's mount cannot be killed, and keeps
/dev/fuse open: were the daemon killed in that moment, it would stay for ever, and with it every guest, the mount
and the store's lock. This process holds nothing. It ends soon after the daemon: where a supervisor keeps the
connection, its call would wait for the next daemon, and if there is none the mount would be in use by it for ever.

Requests and answers are objects of `marshal`, which both sides have in the same version:

    (mountpoint, None)              ((st_dev, st_ino) of what is at the mountpoint,)
    (mountpoint, (st_dev, paths))   ([st_ino of each file that was synced],), with None for one that is gone
    (mountpoint, (st_dev, st_ino, path, offset, length))
    (mountpoint, (st_dev, st_ino, path, [(offset, length), ...]))
                                    (whether the file at the path is still that one,)
                                    or (errno, what failed)
"""

import _thread
import contextlib
import ctypes
import errno
import functools
import marshal
import os
import select
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

#: What to run.
SCRIPT: Final = __file__
COVERED: Final = -1
"""the errno of an answer which tells that something is mounted over the mount"""
#: Of sync_file_range(2): write all that is dirty; and wait for writeback under way before, and for that.
_WRITE: Final = 2
_WRITE_AND_WAIT: Final = 1 | _WRITE | 4
#: Bytes that the daemon is asked for at a time, about: for as long as they take the guest's own requests may wait.
_UNDER_WAY: Final = 4 << 20

#: Seconds until it ends after the daemon has. A call that the daemon had read and not answered ends by no signal before
#: somebody has the kernel ask again: the next daemon, or a supervisor that starts none.
_FAREWELL: Final = 0.5

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _open(mountpoint: bytes, path: bytes) -> int:
    return os.open(os.path.join(mountpoint, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def sync_files(mountpoint: bytes, device: int, paths: Sequence[bytes]) -> tuple[Any, ...]:
    """Sync the files at ``paths`` below the mount; the answer."""
    synced: list[int | None] = []
    for path in paths:
        try:
            fd = _open(mountpoint, path)
        except FileNotFoundError:
            synced.append(None)
            continue
        try:
            status = os.fstat(fd)
            if status.st_dev != device:
                return (COVERED, path)
            os.fsync(fd)
        finally:
            os.close(fd)
        synced.append(status.st_ino)
    return (synced,)


def write_back_range(fd: int, offset: int = 0, length: int = 0) -> None:
    """Have the kernel write back what is dirty from ``offset`` on, without the file's lock. A length of 0: to the end.

    Waits until the daemon has it, from Linux 6.16 on.
    """
    _sync_file_range(fd, offset, length, _WRITE_AND_WAIT)


def begin_write_back(fd: int, offset: int, length: int) -> None:
    """The same, and do not wait."""
    _sync_file_range(fd, offset, length, _WRITE)


def _sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    if _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _same(mountpoint: bytes, device: int, ino: int, path: bytes) -> Iterator[int]:
    """The file at a path, open, if it is still that one; else -1. Raises OSError, with COVERED too."""
    try:
        fd = _open(mountpoint, path)
    except FileNotFoundError:
        yield -1
        return
    try:
        status = os.fstat(fd)
        if status.st_dev != device:
            raise OSError(COVERED, "another mount", path)
        yield fd if status.st_ino == ino else -1
    finally:
        os.close(fd)  # which flushes nothing, as it can only read: so it does not wait for the lock


def write_back(mountpoint: bytes, device: int, ino: int, path: bytes, offset: int, length: int) -> tuple[Any, ...]:
    """Have what is dirty in a range of a file written back; the answer."""
    with _same(mountpoint, device, ino, path) as fd:
        if fd >= 0:
            write_back_range(fd, offset, length)
        return (fd >= 0,)


@functools.cache
def _ahead(device: int) -> int:
    """Bytes that the kernel reads for one posix_fadvise(2), at most, of a file that is said to be read in order."""
    with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb") as file:
        return max(2 * int(file.read()) << 10, 4096)


def read_ahead(
    mountpoint: bytes, device: int, ino: int, path: bytes, parts: Sequence[tuple[int, int]]
) -> tuple[Any, ...]:
    """Have the kernel read parts of a file that it has not got, in their order; the answer, when it has them.

    It only ever adds pages to its cache, so what a guest stores meanwhile stays. Each part is read from its end to its
    beginning: a guest that faults in it has the kernel read the other way, so they meet once. Side by side each would
    add some pages of every range, and ask for them in as many small requests.
    """
    with _same(mountpoint, device, ino, path) as fd:
        if fd >= 0:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            step = _ahead(device)
            under_way: deque[tuple[int, int]] = deque()
            asked = 0  # bytes of these
            for offset, length in parts:
                for end in range(offset + length, offset, -step):
                    at = max(offset, end - step)
                    os.posix_fadvise(fd, at, end - at, os.POSIX_FADV_WILLNEED)
                    under_way.append((at, end - at))
                    asked += end - at
                    while asked - under_way[0][1] > _UNDER_WAY:
                        first = under_way.popleft()
                        asked -= first[1]
                        os.pread(fd, 1, sum(first) - 1)  # waits for its last page
            if under_way:
                os.pread(fd, 1, sum(under_way[-1]) - 1)
        return (fd >= 0,)


def answer_to(mountpoint: bytes, job: Any) -> tuple[Any, ...]:
    """What a request asks for, done."""
    if job is None:
        return (look(mountpoint),)
    if len(job) == 2:
        return sync_files(mountpoint, *job)
    return read_ahead(mountpoint, *job) if len(job) == 4 else write_back(mountpoint, *job)


def look(mountpoint: bytes) -> tuple[int, int]:
    """The device and inode number at the mountpoint, once the daemon has answered something."""
    try:
        os.statvfs(mountpoint)  # attributes the kernel may know from the daemon before
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        # An answer too: of a daemon whose store has lost something.
    status = os.stat(mountpoint)
    return status.st_dev, status.st_ino


def _end_with_daemon() -> None:
    """Wait until nobody has the other end of the socket."""
    poll = select.poll()
    poll.register(0, 0)  # a hang-up is told always
    poll.poll()
    time.sleep(_FAREWELL)
    os._exit(0)


def main() -> None:
    """Answer until the daemon is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service manager ends the daemon, which still needs us
    # The daemon may have been in a hurry when it started this process, and its session is (supervisor/process.py).
    os.setsid()
    os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
    _thread.start_new_thread(_end_with_daemon, ())  # as nice
    with open(0, "rb", closefd=False) as requests, open(0, "wb", closefd=False) as answers:
        while True:
            try:
                mountpoint, job = marshal.load(requests)
            except EOFError:
                return
            try:
                answer = answer_to(mountpoint, job)
            except OSError as exc:
                answer = (exc.errno or errno.EIO, exc.filename or mountpoint)
            with contextlib.suppress(BrokenPipeError):
                marshal.dump(answer, answers)
                answers.flush()


if __name__ == "__main__":
    main()
