"""SEEK_DATA and SEEK_HOLE. The table knows the answer, but for pages that only the kernel has.

docs/concurrency.md tells how these are brought, and who holds which lock meanwhile.
"""

import errno
import logging
import os
from typing import Final

import trio

from ramfs.errors import FileError, RamfsError
from ramfs.fuse.flush import Flusher
from ramfs.fuse.handles import FileHandle, VirtualHandle
from ramfs.fuse.views import OpenView, may_be_dirty
from ramfs.inspect.views import Gap, Piece
from ramfs.namespace import Inode, Namespace
from ramfs.pager import Pager
from ramfs.store.images import Image

log = logging.getLogger(__name__)

#: How long an LSEEK waits for the dirty pages that its answer depends on, seconds.
_PATIENCE: Final = 5.0


class Seeking:
    """Answers LSEEK. ``whence`` is SEEK_DATA or SEEK_HOLE."""

    def __init__(self, pager: Pager, namespace: Namespace, flusher: Flusher) -> None:
        self._pager = pager
        self._namespace = namespace
        self._flusher = flusher

    def at_once(self, file: FileHandle | VirtualHandle, offset: int, whence: int) -> int | None:
        """The offset, or None if it takes :meth:`later`. Raises FileError: ENXIO behind the end, EINVAL."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FileError(errno.EINVAL)
        if isinstance(file, VirtualHandle):
            if file.opened.view is not None:
                return None
            if not 0 <= offset < file.size:
                raise FileError(errno.ENXIO)
            return offset if whence == os.SEEK_DATA else file.size
        found, _ = self._pager.seek(file.image, offset, whence)
        return None if may_be_dirty(file.inode) else _sought(found, file.image.size, whence)

    async def later(self, file: FileHandle | VirtualHandle, offset: int, whence: int) -> int:
        """The offset. Raises FileError."""
        if isinstance(file, FileHandle):
            return await self._in_file(file.inode, file.image, offset, whence)
        assert file.opened.view is not None
        return await self._in_view(file.opened.view, offset, whence)

    async def _in_file(self, inode: Inode, image: Image, offset: int, whence: int) -> int:
        """Of a file that may have dirty pages.

        These are written back as far as the answer depends on them. Where that does not succeed everything
        counts as data, which is never wrong.
        """
        seek, clean = self._pager.seek, offset if may_be_dirty(inode) else image.size
        with trio.move_on_after(_PATIENCE if self._flusher.can_write_back or clean != offset else 0):
            while True:
                found, end = seek(image, offset, whence)
                if found < clean or clean >= image.size:
                    return _sought(found, image.size, whence)
                try:
                    path = self._namespace.path_of(inode.ino)
                    if await self._flusher.write_back(inode.ino, path, offset, end - offset):
                        clean = end
                except (OSError, RamfsError) as exc:  # the file has no name any more, for instance
                    log.debug("inode %d: nothing was written back for an lseek: %s", inode.ino, exc)
                    break
        seek(image, offset, whence)  # raises ENXIO: it may have become shorter
        return offset if whence == os.SEEK_DATA else image.size

    async def _in_view(self, view: OpenView, offset: int, whence: int) -> int:
        """Of a view: gaps are holes, and so is what is one in its file."""
        size = view.view.size
        if not 0 <= offset < size:
            raise FileError(errno.ENXIO)
        for part in view.view.parts(offset, size - offset):
            if isinstance(part, Piece):
                try:
                    found = await self._in_file(view.files[part.file], view.image(part), part.offset, whence)
                except FileError as exc:
                    if exc.errno != errno.ENXIO:
                        raise
                    found = part.offset + (part.length if whence == os.SEEK_DATA else 0)
                if found < part.offset + part.length:
                    return part.start + found - part.offset
            elif isinstance(part, Gap) == (whence == os.SEEK_HOLE):
                return part.start
        return _sought(size, size, whence)


def _sought(found: int, size: int, whence: int) -> int:
    """The answer to an LSEEK: there is a hole at the end of the file, but no data. Raises ENXIO."""
    if found >= size and whence == os.SEEK_DATA:
        raise FileError(errno.ENXIO)
    return found
