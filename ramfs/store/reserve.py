"""Space kept for what frees space.

On a full disk nothing could be deleted: the deletion is rows in the catalog's log first, and tables written
anew, before a page of the file is given back. So a store keeps a file of some megabytes, ``reserve``, that
holds nothing. It goes when the disk is all but full and something is deleted, looked for or recovered, and is
made again when there is plenty.
"""

import contextlib
import os
from typing import Final

#: Bytes: the catalog's log grows to 4 MiB before it is used again from its start ...
SIZE: Final = 8 << 20
#: ... but on a small disk no more than this part of it.
_PART: Final = 8


class Reserve:
    """The file ``reserve`` of a store."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "reserve")
        self._directory = directory
        self._held = os.path.exists(self.path)

    def _space(self) -> tuple[int, int]:
        """Bytes that are free, and bytes to keep."""
        told = os.statvfs(self._directory)
        return told.f_bavail * told.f_frsize, min(SIZE, told.f_blocks * told.f_frsize // _PART)

    def make_room(self) -> None:
        """Call before something that frees space: gives the reserve up if there is little else."""
        if self._held:
            with contextlib.suppress(OSError):  # the directory is gone: what needs it will tell
                free, size = self._space()
                if free < size:
                    self.release()

    def spares(self, length: int) -> bool:
        """May ``length`` bytes be stored that can wait? Not while they would take what was given up for others."""
        if self._held:
            return True
        free, size = self._space()
        return free >= size + length

    def release(self) -> None:
        """Give the reserve up."""
        self._held = False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def keep(self) -> None:
        """Take the space, if twice as much is free."""
        if self._held:
            return
        with contextlib.suppress(OSError):
            free, size = self._space()
            if free < 2 * size:
                return
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                self._held = True
            finally:
                os.close(fd)
                if not self._held:
                    os.unlink(self.path)
