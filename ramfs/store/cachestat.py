"""What the page cache has of a file: cachestat(2), which Python does not know. Commands use it: it imports little."""

import ctypes
from typing import Final

from ramfs.units import PAGE

_CACHESTAT: Final = 451

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


def cachestat(fd: int) -> CacheStat | None:
    """What the page cache has of a file; None on kernels before 6.5, which do not tell."""
    whole, answer = _Range(0, 0), CacheStat()
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(whole), ctypes.byref(answer), 0):
        return None
    return answer


def dirty_bytes(fd: int) -> int | None:
    """Bytes of a file that are in the page cache only; None when the kernel does not tell."""
    found = cachestat(fd)
    return None if found is None else (int(found.dirty) + int(found.writeback)) * PAGE
