"""Open files and directories."""

from dataclasses import dataclass

from ramfs.fuse.flattening import Flattening
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
    """An open file of ``.ramfs``: its text as of the open, who opened it, and what he asked for by writing."""

    id: HandleId
    ino: InodeNumber
    data: bytes
    uid: int
    gid: int
    pid: int
    job: Flattening | None = None

    @property
    def text(self) -> bytes:
        """What it reads as."""
        return self.data if self.job is None else self.job.text
