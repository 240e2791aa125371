"""Open files and directories."""

import errno
from dataclasses import dataclass

from ramfs.errors import FileError
from ramfs.fuse.jobs import Job
from ramfs.fuse.manifests import Text
from ramfs.fuse.views import OpenView
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
    """An open file of ``.ramfs``: its text as of the open, who opened it, and what he asked for by writing.

    Or an open manifest, a view of a guest's memory, or its layout, which may be being written.
    """

    id: HandleId
    ino: InodeNumber
    data: bytes
    uid: int
    gid: int
    pid: int
    job: Job | None = None
    manifest: Text | None = None
    view: OpenView | None = None
    written: bytearray | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data) if self.manifest is None else self.manifest.size

    def read(self, offset: int, length: int) -> bytes:
        """What it reads as."""
        if self.manifest is not None:
            if self.manifest.fd < 0:
                raise FileError(errno.EIO, "the text of a manifest is gone")
            return self.manifest.read(offset, length)
        text = self.data if self.job is None else self.job.text
        return text[offset : offset + length]
