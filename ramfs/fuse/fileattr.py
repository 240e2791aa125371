"""The ioctls by which lsattr and chattr ask for a file's flags and set them: frozen is shown as immutable."""

import errno
import struct
import sys
from typing import Final

from ramfs.errors import FileError
from ramfs.fuse.extension import native

#: struct fsxattr: the flags, and what no file here has.
_FSXATTR: Final = struct.Struct("=I24x")


def answer(command: int, given: bytes, room: int, *, immutable: bool) -> bytes | int:
    """What an ioctl gives back, in at most ``room`` bytes; -ENOTTY if it is none that we know.

    A flag that would change is refused: EROFS where the file is frozen, EOPNOTSUPP elsewhere.
    """
    if command in (native.FS_IOC_GETFLAGS, native.FS_IOC_SETFLAGS):
        # A long by its name, an int by custom: the kernel says which it has room for.
        flags = (native.FS_IMMUTABLE_FL if immutable else 0).to_bytes(room or len(given), sys.byteorder)
    elif command in (native.FS_IOC_FSGETXATTR, native.FS_IOC_FSSETXATTR):
        flags = _FSXATTR.pack(native.FS_XFLAG_IMMUTABLE if immutable else 0)
    else:
        return -errno.ENOTTY  # no error of anybody's: each program that asks whether a file is a terminal gets it
    if command in (native.FS_IOC_GETFLAGS, native.FS_IOC_FSGETXATTR):
        return flags
    if given != flags:
        raise FileError(errno.EROFS if immutable else errno.EOPNOTSUPP)
    return b""
