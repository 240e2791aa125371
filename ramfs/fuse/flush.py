"""Brings what guests stored into mapped pages to the daemon: fsync through the mount, by a process of its own.

The kernel hands dirty mapped pages over when it likes to, up to half a minute late. A snapshot must have them,
so before it freezes anything it syncs the files that somebody has open for writing. The loop serves the
writes meanwhile. An LSEEK has the part of a file written back that its answer depends on. What a clone will ask
for is read into the kernel's cache (working_sets.py). No thread of the daemon touches the mount: flush_helper.py
tells why.
"""

import contextlib
import errno
import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

import trio

from ramfs.errors import MountError
from ramfs.fuse import flush_helper
from ramfs.store.cachestat import clean_is_answered
from ramfs.units import ROOT

#: Processes at most that sync at a time; each syncs one file after the other.
_MOST: Final = 8
#: ... and that have the kernel read: for others there is to be time in between.
_MOST_AHEAD: Final = 2


class _Helper:
    """One process that syncs, and our end of the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Its standard error would keep the pipe open that `ramfs mount` was started with.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", flush_helper.SCRIPT],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
        with ours:
            self._requests = ours.makefile("wb")
            self._answers = ours.makefile("rb")

    def ask(self, request: Any) -> Any:
        """Send a request and wait for the answer (worker thread). Raises OSError, EOFError."""
        marshal.dump(request, self._requests)
        self._requests.flush()
        return marshal.load(self._answers)

    def close(self) -> None:
        """Let the process end; it does once what it waits for has failed or come to pass."""
        with contextlib.suppress(OSError):  # it is gone already
            self._requests.close()
        self._answers.close()


class Flusher:
    """Syncs files of the mount by their paths."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = os.fsencode(mountpoint)
        self.device = -1
        # Threads of its own: they wait for FSYNC requests, which need one of the others.
        self._threads = trio.CapacityLimiter(_MOST)
        # ... and these for no lock that somebody holds while he waits for them.
        self._writing_back = trio.CapacityLimiter(_MOST)
        # ... and these hold nobody up.
        self._reading_ahead = trio.CapacityLimiter(_MOST_AHEAD)
        self.can_write_back = clean_is_answered()
        self.pids: set[int] = set()
        """of the processes: what they have open is not in use"""
        # The first starts up while the mount is made.
        self._idle = [self._start()]

    def _start(self) -> _Helper:
        helper = _Helper()
        self.pids.add(helper.process.pid)
        return helper

    async def look(self) -> int:
        """Learn the mount's st_dev. Raises OSError; ENOTCONN when it is unmounted already."""
        ((device, ino),) = await self._ask(None)
        if ino != ROOT:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self.device = device
        return self.device

    async def flush(self, paths: Sequence[bytes]) -> set[int]:
        """Sync the files at ``paths``, relative to the root of the mount, but for those that are gone.

        Returns the inode numbers of those that were synced. Raises MountError or OSError.
        """
        if not paths:
            return set()
        if self.device < 0:
            await self.look()  # told to stop before the mount was ready
        (synced,) = await self._ask((self.device, list(paths)))
        return {ino for ino in synced if ino is not None}

    async def write_back(self, ino: int, path: bytes, offset: int, length: int) -> bool:
        """Take over the dirty pages of a range while somebody holds the file's lock in the kernel.

        False if the file is not at ``path`` any more. Raises MountError or OSError. Give it up after a while:
        opening the path can need the lock of a directory, and who has that may wait for the file's.
        """
        return await self._of_one((ino, path, offset, length), self._writing_back)

    async def read_ahead(self, ino: int, path: bytes, parts: Sequence[tuple[int, int]]) -> bool:
        """Have the kernel read parts ``(offset, length)`` of a file that it has not got; returns when it has them.

        False if the file is not at ``path`` any more. Raises MountError or OSError.
        """
        return await self._of_one((ino, path, list(parts)), self._reading_ahead)

    async def _of_one(self, job: tuple[Any, ...], limiter: trio.CapacityLimiter) -> bool:
        if self.device < 0:
            await self.look()
        (same,) = await self._ask((self.device, *job), limiter)
        return bool(same)

    async def _ask(self, job: Any, limiter: trio.CapacityLimiter | None = None) -> Any:
        # Given up when the session ends: then nobody answers the helper any more until the mount is gone.
        answer = await trio.to_thread.run_sync(
            self._ask_helper, (self.mountpoint, job), limiter=limiter or self._threads, abandon_on_cancel=True
        )
        if len(answer) == 1:
            return answer
        code, what = answer
        if code == flush_helper.COVERED:
            raise MountError(
                f"{os.fsdecode(self.mountpoint)} is covered by another mount, so dirty pages cannot be "
                "flushed: unmount what lies over it"
            )
        raise OSError(code, os.strerror(code), os.fsdecode(what))

    def _ask_helper(self, request: Any) -> Any:
        while True:
            try:
                helper, fresh = self._idle.pop(), False
            except IndexError:
                helper, fresh = self._start(), True
            try:
                answer = helper.ask(request)
            except (EOFError, OSError) as exc:
                helper.close()
                self.pids.discard(helper.process.pid)
                if fresh:
                    raise OSError(errno.EIO, "the process that syncs files of the mount has ended") from exc
            else:
                self._idle.append(helper)
                return answer

    def close(self) -> None:
        """Let the processes that have nothing to do end."""
        while self._idle:
            helper = self._idle.pop()
            helper.close()
            helper.process.wait()
