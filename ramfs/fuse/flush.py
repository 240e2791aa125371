"""Brings what guests stored into mapped pages to the daemon: fsync through the mount, from a worker thread.

The kernel hands dirty mapped pages over when it likes to, up to half a minute late. A snapshot must have them,
so before it freezes anything it syncs the files that somebody has open for writing. The loop serves the
writes meanwhile; it must never touch the mount itself.
"""

import os
from collections.abc import Sequence

import trio

from ramfs.errors import MountError


class Flusher:
    """Syncs files of the mount by their paths."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = os.fsencode(mountpoint)
        self.device = -1
        # Threads of its own: they wait for FSYNC requests, which need one of the others.
        self._threads = trio.CapacityLimiter(8)

    def look(self) -> int:
        """Learn the mount's st_dev (worker thread). Raises OSError."""
        self.device = os.stat(self.mountpoint).st_dev
        return self.device

    async def flush(self, paths: Sequence[bytes]) -> None:
        """Sync the files at ``paths``, relative to the root of the mount. Raises MountError or OSError."""
        if paths:
            await trio.to_thread.run_sync(self._flush, paths, limiter=self._threads)

    def _flush(self, paths: Sequence[bytes]) -> None:
        if self.device < 0:
            self.look()  # told to stop before the mount was ready
        for path in paths:
            full = os.path.join(self.mountpoint, path)
            try:
                fd = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                continue  # removed since: no part of the snapshot
            try:
                if os.fstat(fd).st_dev != self.device:
                    raise MountError(
                        f"{os.fsdecode(self.mountpoint)} is covered by another mount, so dirty pages cannot be "
                        "flushed: unmount what lies over it"
                    )
                os.fsync(fd)
            finally:
                os.close(fd)
