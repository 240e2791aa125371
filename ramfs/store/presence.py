"""What is here of an arriving layer.

    state of a page   byte   its bytes
    absent            0      are still at the source
    stored            1      are in the layer's file
    zeros             2      are zeros, and the file has a hole

A page only ever goes from absent to one of the others. There are two files with a byte for each page:

    ID.here   as it is now: written at once, after the page. It outlives a killed daemon.
    ID.kept   as of the last sync of the layer: after power loss the pages that it names are on disk.

When all pages that a table names are here the layer is like any other sealed one, and both files go.
"""

import contextlib
import mmap
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ramfs.errors import StoreDamaged
from ramfs.image.table import CHUNK_SHIFT, NORESERVE, Mask, runs_of
from ramfs.store.files import copy_range, data_extents, read_exactly, sync_data, write_all

ABSENT: Final = 0
STORED: Final = 1
ZEROS: Final = 2

States = NDArray[np.uint8]


class Presence:
    """The states of a layer's pages, in memory and in ``ID.here``."""

    __slots__ = ("_fd", "_memory", "path", "states", "unkept")

    def __init__(self, path: str, pages: int, *, create: bool = False) -> None:
        """Read the states of ``pages`` pages; or ``create`` the file, all absent. Raises OSError, StoreDamaged."""
        self.path = path
        self._fd = self._open(os.O_CREAT | os.O_TRUNC if create else 0)
        try:
            # Pages of this that nothing was written to cost nothing, as in the file.
            self._memory = mmap.mmap(-1, max(pages, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
            self.states: States = np.frombuffer(self._memory, np.uint8)[:pages]
            """one for each page of the layer's file; change them with :meth:`set` only"""
            self.unkept: Mask = np.zeros((pages >> CHUNK_SHIFT) + 1, np.bool_)
            """chunks of pages whose states changed since ``ID.kept`` was written"""
            if create:
                os.ftruncate(self._fd, pages)
            else:
                self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self, flags: int = 0) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        except FileNotFoundError as exc:
            raise StoreDamaged(f"{self.path} is missing; run `ramfs fsck` on the store") from exc

    def _read(self) -> None:
        if os.fstat(self._fd).st_size != len(self.states):
            raise StoreDamaged(f"{self.path} has not a byte for each page; run `ramfs fsck` on the store")
        for start, stop in data_extents(self._fd):
            found = np.frombuffer(read_exactly(self._fd, stop - start, start), np.uint8)
            if (found > ZEROS).any():
                raise StoreDamaged(f"{self.path} has states that there are not; run `ramfs fsck` on the store")
            self.states[start:stop] = found
        self.unkept[:] = True

    @property
    def address(self) -> int:
        """Where the states are in memory."""
        return int(self.states.ctypes.data)

    def set(self, first: int, states: States) -> None:
        """Pages from ``first`` on are here: their bytes are in the file already. Raises OSError; then they are not."""
        stop = first + len(states)
        if self._fd < 0:
            self._fd = self._open()  # the layer was deleted, and that was rolled back
        write_all(self._fd, states.tobytes(), first)
        self.states[first:stop] = states
        self.unkept[first >> CHUNK_SHIFT : ((stop - 1) >> CHUNK_SHIFT) + 1] = True

    def here(self, first: int, stop: int) -> bool:
        """Is all of a range here?"""
        return bool(self.states[first:stop].all())

    def at(self, first: int, stop: int) -> States:
        """The states of pages ``[first, stop)``, which may lie outside of the file: there they count as stored."""
        low, high = max(first, 0), min(stop, len(self.states))
        if (low, high) == (first, stop):
            return self.states[first:stop]
        found = np.full(stop - first, STORED, np.uint8)
        if low < high:
            found[low - first : high - first] = self.states[low:high]
        return found

    def take_unkept(self) -> list[tuple[int, bytes]]:
        """What is to be written to ``ID.kept`` once the layer is synced, as it is now: offsets and bytes."""
        taken = [
            (a << CHUNK_SHIFT, self.states[a << CHUNK_SHIFT : b << CHUNK_SHIFT].tobytes())
            for a, b in runs_of(self.unkept)
        ]
        self.unkept[:] = False
        return taken

    def put_back(self, parts: list[tuple[int, bytes]]) -> None:
        """What was taken was not written."""
        for start, data in parts:
            self.unkept[start >> CHUNK_SHIFT : (start + len(data) + (1 << CHUNK_SHIFT) - 1) >> CHUNK_SHIFT] = True

    def close(self) -> None:
        """Close the file; the memory goes when nobody uses it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_states(path: str, pages: int) -> States | None:
    """The states in ``ID.here`` or ``ID.kept``; None if the file does not tell them. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        states = np.zeros(pages, np.uint8)
        if os.fstat(fd).st_size != pages:
            return None
        for start, stop in data_extents(fd):
            states[start:stop] = np.frombuffer(read_exactly(fd, stop - start, start), np.uint8)
    finally:
        os.close(fd)
    return None if (states > ZEROS).any() else states


def make_kept(path: str, pages: int) -> None:
    """Make ``ID.kept``: nothing is on disk yet."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, pages)
    finally:
        os.close(fd)


def write_kept(path: str, parts: list[tuple[int, bytes]]) -> None:
    """Bring ``ID.kept`` up to date, after a sync of the layer (any thread). Each byte is valid before and after.

    Raises FileNotFoundError when the layer is gone, or complete.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for offset, data in parts:
            write_all(fd, data, offset)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def forget_unsynced(here: str, kept: str, pages: int) -> None:
    """After power loss: only what was synced counts. Replaces ``here`` by a copy of ``kept``."""
    new = here + ".new"
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, pages)
        with contextlib.suppress(FileNotFoundError):
            source = os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, stop in data_extents(source):
                    if start < pages:
                        copy_range(source, start, fd, start, min(stop, pages) - start)
            finally:
                os.close(source)
    finally:
        os.close(fd)
    sync_data(new)
    os.rename(new, here)
