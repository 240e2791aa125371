"""Direct images: writable ones that *are* a file, that of their live layer, byte for byte and to the last one.

The kernel serves such a file from the store by itself, and lets guests write to it (fuse/passthrough.py). So nobody
tells the daemon of a write, and no table can be kept. While ``images.direct`` is set

- the contents, size and mtime of the image are those of the layer's file; a hole means zeros;
- neither ``.map`` nor ``.durable`` counts (of ``.map`` the ctime does), and the image's record names that layer alone;
- the layer is not sealed: copies and snapshots get a clone of the file (store/reflink.py).

The mark is on disk before the first byte is written, so after a killed daemon or a power loss the file counts, as it
does on any file system. It goes when nobody has the file open or mapped any more, which a lease tells, for a
mapping outlives both the handle and the connection. The store has another format version meanwhile.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

import numpy as np

from ramfs.errors import FileError, StoreDamaged
from ramfs.image.pages import Buffer
from ramfs.image.table import ENTRY
from ramfs.store.catalog import settle_version
from ramfs.store.files import is_open_elsewhere, punch_hole, read_exactly, sync_directory, write_all
from ramfs.store.images import HEADER, Header, Image, Images, pack_header, table_length
from ramfs.store.reflink import allocated_extents, shared_extents, stored_extents
from ramfs.units import MAX_FILE_SIZE, pages


class Leaving:
    """A direct image on its way back to a table. Nobody may have it open, or open it before the end.

        prepare  thread   write the table that goes with the file, both copies of it
        commit   loop     let it count
        (then the caller syncs the catalog in a thread)
        finish   loop     go on with it

    At every step either the mark is there and the file counts, or it is not, and the table is right and on disk.
    """

    def __init__(self, images: Images, image: Image) -> None:
        assert image.direct is not None
        assert image.live is not None
        self.images = images
        self.image = image
        self._path = image.direct
        self._layer = image.live.id
        image.refresh()
        image.close()
        images.layers.let_go(self._layer)

    @property
    def possible(self) -> bool:
        """Has nobody the file open or mapped? A lease tells. (And can a table speak of all of it?)"""
        return self.image.size <= MAX_FILE_SIZE and not is_open_elsewhere(self._path)

    def prepare(self) -> None:
        """Thread. Raises OSError."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
            told, extents = os.fstat(fd), allocated_extents(fd)
        finally:
            os.close(fd)
        images = self.images
        header = pack_header(Header(told.st_size, told.st_mtime_ns, max(self.image.ctime, told.st_ctime_ns)))
        for suffix in ("durable", "map"):
            path = images.path(self.image.id, suffix)
            with open(path + ".new", "wb", buffering=0) as file:
                write_all(file.fileno(), header, 0)
                for first, stop in extents:
                    entries = np.full(stop - first, self._layer, "<u4").tobytes()
                    write_all(file.fileno(), entries, HEADER + first * ENTRY)
                os.ftruncate(file.fileno(), table_length(told.st_size))
                os.fdatasync(file.fileno())
            os.rename(path + ".new", path)
        sync_directory(images.directory)

    def commit(self) -> bool:
        """Loop. False if the image was deleted meanwhile."""
        catalog, image = self.images.catalog, self.image
        if not self.images.exists(image.id):
            return False
        with catalog.transaction():
            catalog.execute("UPDATE images SET direct = 0 WHERE id = ?", image.id)
            settle_version(catalog)
        return True

    def finish(self) -> None:
        """Loop. Raises OSError, StoreDamaged."""
        image = self.image
        image.direct = None
        self.images.direct.discard(image.id)
        image.replace_file()
        image.header_stale, image.synced_name = False, True
        if image.live is not None:
            self.images.layers.file(image.live)  # which gives it whole pages

    def at_once(self) -> bool:
        """All of it, where nobody waits (a store that is opened or closed). Raises OSError."""
        if not self.possible:
            return False
        self.prepare()
        if not self.commit():
            return False
        self.images.catalog.sync()
        self.finish()
        return True


# -- the file itself: short calls on a path, so that the daemon has no descriptor that a lease would meet


@contextlib.contextmanager
def _opened(image: Image, flags: int) -> Iterator[int]:
    assert image.direct is not None
    fd = os.open(image.direct, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read(image: Image, offset: int, length: int) -> bytes:
    """A copy of bytes, fewer only at the end of the file."""
    with _opened(image, os.O_RDONLY) as fd:
        return read_exactly(fd, length, offset)


def write(image: Image, offset: int, data: Buffer) -> None:
    """Write bytes."""
    with _opened(image, os.O_RDWR) as fd:
        write_all(fd, data, offset)
    image.refresh()


def truncate(image: Image, size: int) -> None:
    """Set the size."""
    assert image.direct is not None
    os.truncate(image.direct, size)
    image.refresh()


def punch(image: Image, offset: int, length: int) -> None:
    """Let bytes read as zeros, and give the space of whole pages back."""
    with _opened(image, os.O_RDWR) as fd:
        if not punch_hole(fd, offset, length):
            raise FileError(errno.EOPNOTSUPP)


def seek(image: Image, offset: int, whence: int) -> int:
    """SEEK_DATA or SEEK_HOLE. Raises ENXIO."""
    with _opened(image, os.O_RDONLY) as fd:
        try:
            return os.lseek(fd, offset, whence)
        except OSError as exc:
            raise FileError(exc.errno or errno.EIO) from None


def stored(path: str, first: int = 0, stop: int = pages(MAX_FILE_SIZE)) -> int:
    """Number of pages within ``[first, stop)`` that are stored (any thread)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sum(max(0, min(high, stop) - max(low, first)) for low, high in stored_extents(fd))
    finally:
        os.close(fd)


def stored_and_shared(path: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The ranges of pages that are stored, and those of them in blocks that other files have too (any thread)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return stored_extents(fd), shared_extents(fd)
    finally:
        os.close(fd)


def leave_all(images: Images, tell: Callable[[str], None]) -> None:
    """Let no image be direct, where nobody waits; those that somebody has mapped stay so, and those that fail."""
    for number in sorted(images.direct):
        try:
            image = images.acquire(number)
            try:
                Leaving(images, image).at_once()
            finally:
                images.release(image)
        except (OSError, StoreDamaged) as exc:
            tell(f"image {number} stays the file of its layer: {exc}")
