"""A type for every kind of integer, so that a page index is never taken for a byte offset."""

from typing import Final, NewType

InodeNumber = NewType("InodeNumber", int)
ImageId = NewType("ImageId", int)
LayerId = NewType("LayerId", int)
PageIndex = NewType("PageIndex", int)
HandleId = NewType("HandleId", int)

PAGE_SHIFT: Final = 12
#: Bytes in a page, everywhere: in layers, tables and requests.
PAGE: Final = 1 << PAGE_SHIFT

#: The largest file: the largest file that ext4 with 4 KiB blocks can hold, since page i of a file
#: lies at the same offset of its layer.
MAX_FILE_SIZE: Final = (1 << 44) - PAGE

#: The table entry of a page that holds only zeros and is stored nowhere.
ZERO: Final = LayerId(0)

#: What stands in a table for a page whose contents ``ramfs fsck`` found lost. No layer ever has this number,
#: so whoever reads the page gets an error, and never zeros.
LOST: Final = LayerId(0xFFFFFFFF)

ROOT: Final = InodeNumber(1)
#: Set in the inode number of a directory's ``.snap``.
SNAP_BIT: Final = 1 << 62

#: Bytes in the longest file name.
MAX_NAME: Final = 255
#: Bytes in the longest path.
MAX_PATH: Final = 4096


def pages(size: int) -> int:
    """Number of pages that ``size`` bytes touch."""
    return (size + PAGE - 1) >> PAGE_SHIFT


def is_path(path: bytes) -> bool:
    """Can it be the path of a file below a directory?"""
    parts = path.split(b"/")
    return b"\0" not in path and all(part not in (b"", b".", b"..") and len(part) <= MAX_NAME for part in parts)
