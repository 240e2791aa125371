"""STATX, which libfuse has no word for: the one request that asks when an inode was made (btime).

The layout is that of linux/fuse.h since Linux 6.6, which the headers of the machine may be too old for. A kernel
that is older never asks.
"""

import os
import struct
from typing import Final

from ramfs.fuse.extension import pyfuse3

OPCODE: Final = 52
_BASIC_STATS: Final = 0x7FF
_BTIME: Final = 0x800
_SECOND: Final = 1_000_000_000
#: struct fuse_statx_out: how long it counts; mask to ino; size, blocks, no attribute flags; four times; the device.
_REPLY: Final = struct.Struct("=QI4x16x II8xIIIH2xQ QQ8x qI4xqI4xqI4xqI4x II8x112x".replace(" ", ""))


def reply(entry: pyfuse3.EntryAttributes, btime: int) -> bytes:
    """The reply that tells the attributes of an inode, and when it was made (ns since the epoch, 0: not known)."""
    seconds = int(entry.attr_timeout)
    return _REPLY.pack(
        seconds, int((entry.attr_timeout - seconds) * _SECOND),
        _BASIC_STATS | (_BTIME if btime else 0), entry.st_blksize, entry.st_nlink, entry.st_uid, entry.st_gid,
        entry.st_mode, entry.st_ino, entry.st_size, entry.st_blocks,
        *divmod(entry.st_atime_ns, _SECOND), *divmod(btime, _SECOND), *divmod(entry.st_ctime_ns, _SECOND),
        *divmod(entry.st_mtime_ns, _SECOND), os.major(entry.st_rdev), os.minor(entry.st_rdev),
    )  # fmt: skip
