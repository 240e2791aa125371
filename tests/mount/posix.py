"""What the tests of the mount share: system calls that Python lacks, errnos, and processes that do something."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import pickle
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

T = TypeVar("T")
Name = str | bytes | Path

PAGE = 4096
NOBODY = 65534
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
BTIME = 0x800  # STATX_BTIME
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10
PUNCH = PUNCH_HOLE | KEEP_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """The block must raise OSError with this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the errno is the match)
        yield
    got = caught.value.errno
    assert got == number, f"{errno.errorcode.get(got or 0, got)} instead of {errno.errorcode[number]}"


def errno_of(call: Callable[[], object]) -> int:
    """The errno that a call fails with, 0 when it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def renameat2(old: Name, new: Name, flags: int) -> None:
    """renameat2(2) of two paths."""
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def extents(fd: int) -> list[tuple[int, int]]:
    """The byte ranges of a file that are data, by SEEK_DATA and SEEK_HOLE."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        assert start < at <= size
        found.append((start, at))
    return found


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes without a zero page in them, different for each seed, and at each page."""
    block = bytes((i * 7 + seed * 31) % 255 + 1 for i in range(257))
    return (block * (length // len(block) + 1))[:length]


def page_of(number: int) -> bytes:
    """A page that is full of one number."""
    return number.to_bytes(8, "little") * (PAGE // 8)


@contextlib.contextmanager
def opened(path: Name, flags: int = os.O_RDWR, mode: int = 0o666) -> Iterator[int]:
    """A descriptor, closed at the end."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


class Mapping:
    """All of a file, mapped shared, without a descriptor that stays open (as Python's mmap has)."""

    def __init__(self, fd: int, *, writable: bool = False) -> None:
        self.size = os.fstat(fd).st_size
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.address = _libc.mmap(None, self.size, protection, mmap.MAP_SHARED, fd, 0)
        assert self.address != ctypes.c_void_p(-1).value

    def __setitem__(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.address + offset, data, len(data))

    def bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        return ctypes.string_at(self.address + offset, self.size if length is None else length)

    def protect(self, protection: int) -> None:
        """mprotect(2)."""
        self._call(_libc.mprotect, protection)

    def advise(self, advice: int) -> None:
        """madvise(2)."""
        self._call(_libc.madvise, advice)

    def _call(self, call: Callable[[int, int, int], int], argument: int) -> None:
        if call(self.address, self.size, argument):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        _libc.munmap(self.address, self.size)

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Name, offset: int = 0, length: int = -1) -> bytes:
    """Bytes of a file by pread(2)."""
    with opened(path, os.O_RDONLY) as fd:
        length = os.fstat(fd).st_size - offset if length < 0 else length
        parts = []
        while length > 0 and (part := os.pread(fd, min(length, 1 << 20), offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)


def status(mount: Path) -> dict[str, Any]:
    """`.ramfs/status.json` of a mount."""
    told: dict[str, Any] = json.loads((mount / ".ramfs" / "status.json").read_bytes())
    return told


def counters(mount: Path) -> dict[str, int]:
    """The counts of requests in `status.json`."""
    counts: dict[str, int] = status(mount)["requests"]
    return counts


def page_counts(path: Name) -> dict[str, int]:
    """`user.ramfs.pages` of a file."""
    counts: dict[str, int] = json.loads(os.getxattr(path, "user.ramfs.pages"))
    return counts


def eventually(check: Callable[[], Any], what: str, timeout: float = 20) -> None:
    """Wait until `check` holds; for work that the daemon does in the background."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.05)


# --- what os lacks: statx, linkat ---


class Statx(NamedTuple):
    """What statx(2) tells; times in ns since the epoch."""

    mask: int
    blksize: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    atime: int
    btime: int
    ctime: int
    mtime: int
    rdev: tuple[int, int]
    dev: tuple[int, int]


def statx(path: Name, mask: int, flags: int = 0, *, fd: int = AT_FDCWD) -> Statx:
    """statx(2) of what a name, or a descriptor and an empty name with AT_EMPTY_PATH, leads to; of a symlink itself."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, os.fsencode(path), flags | AT_SYMLINK_NOFOLLOW, mask, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    got = struct.unpack_from("=II8xIIIHxxQQQ8xqI4xqI4xqI4xqI4xIIII", buffer)
    times = [got[i] * 1_000_000_000 + got[i + 1] for i in (9, 11, 13, 15)]
    return Statx(*got[:9], *times, got[17:19], got[19:21])


def linkat(fd: int, new: Name) -> None:
    """linkat(2) of an open file: gives it a name, also if it has none."""
    if _libc.linkat(fd, b"", AT_FDCWD, os.fsencode(new), AT_EMPTY_PATH):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# --- processes ---


def become(user: int, groups: Sequence[int] = ()) -> None:
    """Be another user for good."""
    os.setgroups(list(groups))
    os.setgid(user)
    os.setuid(user)


def in_child(work: Callable[[], T], *, user: int | None = None, groups: Sequence[int] = (), cwd: Name = "/") -> T:
    """Do `work` in a forked process, as another user; its result or its exception comes back.

    The working directory is entered before the user changes, so that a relative path below it needs no
    permission on the way there.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer: tuple[bool, Any]
        try:
            os.close(reader)
            os.chdir(cwd)
            if user is not None:
                become(user, groups)
            answer = (True, work())
        except BaseException as error:  # noqa: BLE001  (whatever it is, the parent raises it)
            answer = (False, error)
        try:
            with open(writer, "wb") as pipe:
                pickle.dump(answer, pipe)
        except BaseException:  # noqa: BLE001
            traceback.print_exc(file=sys.__stderr__)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    done, value = pickle.loads(data)
    if not done:
        raise value
    result: T = value
    return result


class Process:
    """A forked process that does something and then stays until it is ended, with all it has open or mapped."""

    def __init__(self, work: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        hold, self._release = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(reader)
                os.close(self._release)
                kept = work()
                os.write(writer, b"+")
                os.read(hold, 1)
                del kept
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc(file=sys.__stderr__)
            os._exit(code)
        os.close(writer)
        os.close(hold)
        started = os.read(reader, 1)
        os.close(reader)
        self._ended = False
        if started != b"+":
            self.end()
            raise AssertionError("the process failed; its traceback is above")

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        os.kill(self.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Let it go on to its end."""
        if not self._ended:
            self._ended = True
            os.close(self._release)
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
