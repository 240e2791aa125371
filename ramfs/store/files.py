"""The few system calls on files of the store that Python's os module does not give, or gives with a trap."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from ramfs.image.pages import Buffer
from ramfs.image.table import Mask
from ramfs.store import cachestat
from ramfs.units import PAGE, PAGE_SHIFT

#: Modes of fallocate(2).
KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int

_statfs = _libc.statfs
_statfs.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_TMPFS, _RAMFS = 0x01021994, 0x858458F6  # linux/magic.h


def is_memory(path: str) -> bool:
    """Is it on a file system that has its files in the page cache and nowhere else?"""
    facts = ctypes.create_string_buffer(512)  # struct statfs, which is smaller; its first word tells the kind
    if _statfs(os.fsencode(path), facts):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return ctypes.c_long.from_buffer(facts).value in (_TMPFS, _RAMFS)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the space of a byte range back; it reads as zeros afterwards.

    False where the file system of the store cannot do that: nobody names the range any more, so the only
    loss is its space.
    """
    while _fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise OSError(code, os.strerror(code))
    return True


def dirty_bytes(path: str) -> int | None:
    """Bytes of a file that are in the page cache only; None when the kernel does not tell."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return cachestat.dirty_bytes(fd)
    finally:
        os.close(fd)


def is_open_elsewhere(path: str) -> bool:
    """Has anybody else a file open, the kernel on somebody's behalf included? True where that cannot be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # A write lease is given to the only one who has it open, and is gone with the descriptor.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """pwrite(2) of the whole of ``data``, or OSError (ENOSPC, EDQUOT, EFBIG, EIO ...)."""
    done = os.pwrite(fd, data, offset)
    if done == len(data):
        return
    view = memoryview(data)
    while done < len(view):
        written = os.pwrite(fd, view[done:], offset + done)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """pread(2) of ``length`` bytes; fewer only at the end of the file."""
    parts: list[bytes] = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def read_into(fd: int, target: memoryview, offset: int) -> None:
    """pread(2) into all of ``target``, which has bytes; what lies behind the end of the file is left as it was."""
    while len(target) and (done := os.preadv(fd, [target], offset)):
        target = target[done:]
        offset += done


def data_extents(fd: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Byte ranges of a file that are not holes, by SEEK_DATA and SEEK_HOLE."""
    end = os.fstat(fd).st_size
    while start < end:
        try:
            low = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        start = os.lseek(fd, low, os.SEEK_HOLE)
        yield low, start


def stored_pages(fd: int) -> Mask:
    """Which pages of a layer file are there, wholly or in part."""
    stored = np.zeros((os.fstat(fd).st_size + PAGE - 1) >> PAGE_SHIFT, np.bool_)
    for start, stop in data_extents(fd):
        stored[start >> PAGE_SHIFT : (stop + PAGE - 1) >> PAGE_SHIFT] = True
    return stored


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> None:
    """Copy bytes between two files of one store inside the kernel (which shares extents where it can)."""
    while length:
        try:
            done = os.copy_file_range(source, target, length, source_offset, target_offset)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV):
                raise
            data = read_exactly(source, min(length, 1 << 20), source_offset)
            write_all(target, data, target_offset)
            done = len(data)
        if done == 0:
            raise OSError(errno.EIO, "a layer file is shorter than its pages")
        source_offset += done
        target_offset += done
        length -= done


def sync_data(path: str) -> None:
    """Make what a file holds durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Make the names of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
