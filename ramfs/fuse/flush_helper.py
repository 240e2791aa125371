"""The process that syncs files of the mount for the daemon: run as a script, with a socket as standard input.

It must not be the daemon itself. A thread that waits for its own process's mount cannot be killed, and keeps
/dev/fuse open: were the daemon killed in that moment, it would stay for ever, and with it every guest, the mount
and the store's lock. This process holds nothing. When the daemon is gone its call fails and it ends.

Requests and answers are objects of `marshal`, which both sides have in the same version:

    (mountpoint, None)              ((st_dev, st_ino) of what is at the mountpoint,)
    (mountpoint, (st_dev, paths))   ([st_ino of each file that was synced],), with None for one that is gone
                                    or (errno, what failed)
"""

import contextlib
import errno
import marshal
import os
import signal
from collections.abc import Sequence
from typing import Any, Final

#: What to run.
SCRIPT: Final = __file__
COVERED: Final = -1
"""the errno of an answer which tells that something is mounted over the mount"""


def sync_files(mountpoint: bytes, device: int, paths: Sequence[bytes]) -> tuple[Any, ...]:
    """Sync the files at ``paths`` below the mount; the answer."""
    synced: list[int | None] = []
    for path in paths:
        try:
            fd = os.open(os.path.join(mountpoint, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
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


def look(mountpoint: bytes) -> tuple[int, int]:
    """The device and inode number at the mountpoint."""
    status = os.stat(mountpoint)
    return status.st_dev, status.st_ino


def main() -> None:
    """Answer until the daemon is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service manager ends the daemon, which still needs us
    with open(0, "rb", closefd=False) as requests, open(0, "wb", closefd=False) as answers:
        while True:
            try:
                mountpoint, job = marshal.load(requests)
            except EOFError:
                return
            try:
                answer = (look(mountpoint),) if job is None else sync_files(mountpoint, *job)
            except OSError as exc:
                answer = (exc.errno or errno.EIO, exc.filename or mountpoint)
            with contextlib.suppress(BrokenPipeError):
                marshal.dump(answer, answers)
                answers.flush()


if __name__ == "__main__":
    main()
