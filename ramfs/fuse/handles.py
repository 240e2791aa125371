"""Open files and directories."""

from dataclasses import dataclass

from ramfs.namespace import Inode
from ramfs.store.images import Image
from ramfs.units import HandleId, InodeNumber


@dataclass(slots=True)
class FileHandle:
    """An open regular file."""

    id: HandleId
    inode: Inode
    image: Image


@dataclass(slots=True)
class VirtualHandle:
    """An open file of ``.ramfs``: its text as of the open, and what answers a write."""

    id: HandleId
    ino: InodeNumber
    data: bytes
    uid: int
    gid: int
    pid: int
