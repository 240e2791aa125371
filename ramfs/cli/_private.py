"""The pages that the kernel copied for a process that maps files privately.

Such a process sees a page of the file until it stores into it; from then on it has a copy of its own, which no file
knows of. /proc/PID/pagemap tells which pages are copies: those that are there (or swapped out) and are not the file's.
Since Linux 6.7 the ioctl PAGEMAP_SCAN on it gives them as ranges; before, it is eight bytes for each page.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import pwd
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ramfs.errors import FileError
from ramfs.image.table import runs_of
from ramfs.units import PAGE

Ranges = NDArray[np.uint64]
"""Rows ``(start, stop)``: addresses, or offsets in a file, in bytes."""

#: Bytes that are on their way at a time, and of those in one piece.
_BUFFER: Final = 8 << 20
_PIECE: Final = 1 << 20
#: Ranges that process_vm_readv(2) takes in one call (IOV_MAX).
_VECTOR: Final = 1024

#: _IOWR('f', 16, struct pm_scan_arg), see linux/fs.h.
_PAGEMAP_SCAN: Final = 0xC0606610
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
#: Ranges that one PAGEMAP_SCAN may give.
_REGIONS: Final = 1 << 14
#: Of an entry of pagemap, see Documentation/admin-guide/mm/pagemap.rst: file page or shared memory, swapped, present.
_BIT_FILE, _BIT_SWAPPED, _BIT_PRESENT = np.uint64(1 << 61), np.uint64(1 << 62), np.uint64(1 << 63)
_SLICE: Final = 1 << 19
"""pages whose entries are read in one go"""

#: Seconds in which a process must have stopped after SIGSTOP: a thread may be waiting for a page from far away.
_STOPPING: Final = 10.0

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps that has a file."""

    start: int
    stop: int
    offset: int
    """of ``start``, in the file"""
    device: int
    inode: int
    private: bool
    path: str
    """as the process knows it"""


class Process:
    """A process whose memory is read; close it.

    Raises FileError when there is none, or when the caller may not look into it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fds: list[int] = []
        try:
            with self._understood():
                self._alive = self._open(os.pidfd_open(pid))
                self._pagemap = self._open(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
                # Reading memory needs more than looking at maps does, and asks for it only when it reads.
                os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def _open(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        """Give back its descriptors."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """What the kernel says, as a sentence."""
        try:
            yield
        except (ProcessLookupError, FileNotFoundError):
            raise self._ended() if self._fds else FileError(errno.ESRCH, f"there is no process {self.pid}") from None
        except PermissionError:
            raise FileError(errno.EPERM, self._refusal()) from None
        except OSError as error:
            text = f"cannot look into process {self.pid}: {error.strerror}"
            raise FileError(error.errno or errno.EIO, text) from error

    def _refusal(self) -> str:
        text = f"you may not look into the memory of process {self.pid}"
        try:
            owner = os.stat(f"/proc/{self.pid}").st_uid
        except OSError:
            return f"{text}: do it as root"
        if owner != os.geteuid():
            with contextlib.suppress(KeyError):
                return f"{text}, which is {pwd.getpwuid(owner).pw_name}'s: do it as root"
            return f"{text}, which is of user {owner}: do it as root"
        with contextlib.suppress(OSError, ValueError), open("/proc/sys/kernel/yama/ptrace_scope") as file:
            if int(file.read()):
                return f"{text}, as kernel.yama.ptrace_scope is not 0: do it as root"
        return f"{text}: do it as root"

    def check_alive(self) -> None:
        """Raises FileError if it has ended."""
        poll = select.poll()
        poll.register(self._alive, select.POLLIN)
        if poll.poll(0):
            raise self._ended()

    def _ended(self) -> FileError:
        return FileError(errno.ESRCH, f"process {self.pid} has ended meanwhile; nothing was changed")

    # -- what it maps

    def mappings(self) -> list[Mapping]:
        """All of its mappings of files. Raises FileError."""
        found = []
        with self._understood(), open(f"/proc/{self.pid}/maps", "rb") as maps:
            for line in maps:
                span, mode, offset, device, inode, *rest = line.split(maxsplit=5)
                if inode == b"0":
                    continue
                start, _, stop = span.partition(b"-")
                major, _, minor = device.partition(b":")
                found.append(
                    Mapping(
                        int(start, 16),
                        int(stop, 16),
                        int(offset, 16),
                        os.makedev(int(major, 16), int(minor, 16)),
                        int(inode),
                        mode.endswith(b"p"),
                        os.fsdecode(rest[0].strip()) if rest else "",
                    )
                )
        return found

    def copied(self, mapping: Mapping) -> Ranges:
        """The addresses within a private mapping that hold pages of the process's own. Raises FileError."""
        with self._understood():
            found = scan(self._pagemap, mapping.start, mapping.stop)
            if found is None:
                found = read_pagemap(self._pagemap, mapping.start, mapping.stop)
        self.check_alive()  # of a process that has ended no page is there
        return _joined(found)

    # -- its bytes

    def read(self, ranges: Ranges, buffer: mmap.mmap) -> int:
        """Read the ranges of its memory, at most ``_VECTOR``, into the buffer, one behind the other; returns bytes.

        Raises FileError, also when a part of it cannot be read.
        """
        vector = np.ascontiguousarray(ranges, np.uint64).copy()
        vector[:, 1] -= vector[:, 0]
        total = int(vector[:, 1].sum())
        here = (ctypes.c_char * total).from_buffer(buffer)
        local = np.array([[ctypes.addressof(here), total]], np.uint64)
        with self._understood():
            done = _libc.process_vm_readv(
                self.pid, ctypes.c_void_p(local.ctypes.data), 1, ctypes.c_void_p(vector.ctypes.data), len(vector), 0
            )
            del here
            if done < 0:
                raise OSError(number := ctypes.get_errno(), os.strerror(number))
        if done < total:
            self.check_alive()
            at = np.searchsorted(np.cumsum(vector[:, 1]), done, side="right")
            raise FileError(errno.EFAULT, f"process {self.pid} has memory at {vector[at, 0]:#x} that cannot be read")
        return total

    # -- stopping it

    async def running(self) -> bool:
        """Whether it is not stopped already."""
        return not self._stopped()

    def _stopped(self) -> bool:
        with self._understood():
            for task in os.listdir(f"/proc/{self.pid}/task"):
                with contextlib.suppress(FileNotFoundError), open(f"/proc/{self.pid}/task/{task}/stat", "rb") as stat:
                    if stat.read().rpartition(b")")[2].split()[0] not in (b"T", b"t", b"Z", b"X"):
                        return False
        return True

    async def stop(self) -> None:
        """Stop all of its threads by SIGSTOP; when this returns, none of them writes any more."""
        with self._understood():
            signal.pidfd_send_signal(self._alive, signal.SIGSTOP)
        deadline = time.monotonic() + _STOPPING
        while not self._stopped():
            self.check_alive()
            if time.monotonic() > deadline:
                await self.cont()
                raise FileError(errno.EBUSY, f"process {self.pid} has not stopped {_STOPPING:.0f} s after SIGSTOP")
            await asyncio.sleep(0.001)

    async def cont(self) -> None:
        """Let it go on."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._alive, signal.SIGCONT)


def scan(pagemap: int, start: int, stop: int) -> Ranges | None:
    """The ranges of copied pages within ``[start, stop)`` of a private mapping; None before Linux 6.7."""
    regions = np.empty((_REGIONS, 3), np.uint64)
    found = [np.empty((0, 2), np.uint64)]
    at = start
    while at < stop:
        # size, flags, start, end, walk_end, vec, vec_len, max_pages; then of categories inverted, all of these, any
        # of these, and those to tell: none, so that neighbours come as one range.
        words = [96, 0, at, stop, 0, regions.ctypes.data, _REGIONS, 0, _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, 0]
        argument = np.array(words, np.uint64)
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument.data)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return None
            raise
        found.append(regions[:count, :2].copy())
        # The kernel tells where it stopped if it did so for want of room; else the number may be an older one.
        at = int(argument[4]) if count == _REGIONS else stop
    return np.concatenate(found)


def _joined(ranges: Ranges) -> Ranges:
    """Ranges in order, those that touch each other as one: the kernel cuts them where its page tables end."""
    if not len(ranges):
        return ranges
    gaps = ranges[1:, 0] != ranges[:-1, 1]
    starts, stops = np.append(True, gaps), np.append(gaps, True)
    return np.stack([ranges[starts, 0], ranges[stops, 1]], axis=1)


def read_pagemap(pagemap: int, start: int, stop: int) -> Ranges:
    """The same from the entries of all pages. Raises OSError."""
    found: list[tuple[int, int]] = []
    for low in range(start // PAGE, stop // PAGE, _SLICE):
        high = min(low + _SLICE, stop // PAGE)
        entries = np.frombuffer(os.pread(pagemap, (high - low) * 8, low * 8), np.uint64)
        mine = (entries & (_BIT_PRESENT | _BIT_SWAPPED) != 0) & (entries & _BIT_FILE == 0)
        found.extend((low + first, low + last) for first, last in runs_of(mine))
    return np.array(found, np.uint64).reshape(-1, 2) * np.uint64(PAGE)


def batches(ranges: Ranges) -> Iterator[Ranges]:
    """The ranges in portions that fit into the buffer, long ones cut."""
    lengths = (ranges[:, 1] - ranges[:, 0]).astype(np.int64)
    cuts = -(-lengths // _PIECE)
    which = np.repeat(np.arange(len(ranges)), cuts)
    within = np.arange(len(which)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    pieces = np.empty((len(which), 2), np.uint64)
    pieces[:, 0] = ranges[which, 0] + (within * _PIECE).astype(np.uint64)
    pieces[:, 1] = np.minimum(pieces[:, 0] + np.uint64(_PIECE), ranges[which, 1])
    ends = np.cumsum((pieces[:, 1] - pieces[:, 0]).astype(np.int64))
    first = 0
    while first < len(pieces):
        before = int(ends[first - 1]) if first else 0
        last = min(int(np.searchsorted(ends, before + _BUFFER, side="right")), first + _VECTOR)
        yield pieces[first:last]
        first = last


def copy_pages(
    process: Process, parts: Iterable[tuple[int, Ranges]], put: Callable[[Ranges, memoryview], None]
) -> None:
    """Hand over what memory holds: for ``(shift, ranges)`` the ranges, each ``shift`` higher, and their bytes.

    Long ranges come in pieces, and as many at a time as the buffer holds. Raises FileError.
    """
    buffer = mmap.mmap(-1, _BUFFER)
    for shift, ranges in parts:
        for batch in batches(ranges):
            with memoryview(buffer) as view:
                length = process.read(batch, buffer)
                put((batch.astype(np.int64) + shift).astype(np.uint64), view[:length])
