"""Open files and directories."""

import errno
from dataclasses import dataclass

from ramfs.errors import FileError
from ramfs.fuse.jobs import Job
from ramfs.fuse.virtual import Opened
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
    """An open virtual file: who opened it, what it is for him, and what he asked for by writing."""

    id: HandleId
    ino: InodeNumber
    uid: int
    gid: int
    pid: int
    opened: Opened
    job: Job | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        manifest = self.opened.manifest
        return len(self.opened.data) if manifest is None else manifest.size

    def read(self, offset: int, length: int) -> bytes:
        """What it reads as."""
        manifest = self.opened.manifest
        if manifest is not None:
            if manifest.fd < 0:
                raise FileError(errno.EIO, "the text of a manifest is gone")
            return manifest.read(offset, length)
        text = self.opened.data if self.job is None else self.job.text
        return text[offset : offset + length]
