"""What the page cache has of a file: cachestat(2), which Python does not know. Commands use it: it imports little."""

import ctypes
import os
import re
import time
from typing import Final

from ramfs.units import PAGE

_CACHESTAT: Final = 451
#: Pages that are looked at in one go, and then their halves: what is not in the cache costs nothing.
_STEP: Final = 1 << 9

#: The first Linux that calls a page of FUSE clean when its WRITE was answered. Those before copy it, and do so at once.
_ANSWERED_SINCE: Final = (6, 16)

Runs = list[tuple[int, int]]
"""of pages: the first, and the one behind the last"""

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class CacheStat(ctypes.Structure):
    """Pages of a file in the page cache."""

    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


def cachestat(fd: int, first: int = 0, count: int = 0) -> CacheStat | None:
    """What the page cache has of a file's pages from ``first`` on, of all of them if ``count`` is 0.

    None on kernels before 6.5, which do not tell.
    """
    part, answer = _Range(first * PAGE, count * PAGE), CacheStat()
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(part), ctypes.byref(answer), 0):
        return None
    return answer


def clean_is_answered() -> bool:
    """Has the daemon what the kernel calls clean, and does who waits for writeback wait for its answers?"""
    return tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2]) >= _ANSWERED_SINCE


def dirty_bytes(fd: int) -> int | None:
    """Bytes of a file that are in the page cache only; None when the kernel does not tell."""
    found = cachestat(fd)
    return None if found is None else _dirty(found) * PAGE


def dirty_runs(fd: int, count: int, patience: float) -> tuple[Runs, Runs] | None:
    """Runs of the first ``count`` pages of a file that are in the page cache only, and of those of which that is not
    known after ``patience`` seconds. None when the kernel does not tell.
    """
    if not clean_is_answered():
        return None
    end = time.monotonic() + patience
    dirty: Runs = []
    left = [(first, min(first + _STEP, count)) for first in range(0, count, _STEP)]
    while left and time.monotonic() < end:
        mixed: Runs = []
        for first, stop in left:
            told = cachestat(fd, first, stop - first)
            if told is None:
                return None
            if _dirty(told) >= stop - first:
                dirty.append((first, stop))
            elif _dirty(told):
                middle = (first + stop) // 2
                mixed += (first, middle), (middle, stop)
        left = mixed
    return sorted(dirty), left


def _dirty(found: CacheStat) -> int:
    return int(found.dirty) + int(found.writeback)
