"""``ramfs.manifest`` of each frozen directory: not listed, not in the catalog, made when somebody opens it.

Its text is a file in the store while somebody has it open: it may be large, many may read it at the same time, and it
outlives the daemon. Where the directory has a file of that name of its own, that one is seen.
"""

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import trio
import xxhash

from ramfs.errors import FileError
from ramfs.fuse.extension import pyfuse3
from ramfs.fuse.virtual import MANIFEST, Kind, Opened
from ramfs.namespace import Inode, Namespace
from ramfs.pager import Pager
from ramfs.source.manifest import NAME, Layout, lay_out
from ramfs.store.files import read_exactly, write_all
from ramfs.store.gather import Gathering
from ramfs.store.images import HEADER, unpack_header
from ramfs.units import MAX_PATH, ImageId, InodeNumber

_NAME: Final = NAME.encode()
#: Layouts that are remembered, so that a stat costs nothing.
_REMEMBERED: Final = 16
#: Seconds that the kernel may keep attributes that never change.
_KEEP: Final = 300.0


@dataclass(slots=True)
class Outline:
    """What is known of a manifest without any digest."""

    layout: Layout
    images: list[tuple[ImageId, int]]
    """with their bytes, in the order of their digests"""
    mode: int
    """permissions: nobody reads digests of what he may not read"""


@dataclass(slots=True)
class Text:
    """A manifest that is open, or being made."""

    path: str
    users: int = 0
    fd: int = -1
    making: trio.Lock = field(default_factory=trio.Lock)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of it."""
        return os.pread(self.fd, length, offset)


class Manifests(Kind):
    """The manifests of a mount."""

    bit = MANIFEST
    entrances = (_NAME,)

    def __init__(self, pager: Pager, namespace: Namespace) -> None:
        self._pager = pager
        self._namespace = namespace
        self._texts: dict[InodeNumber, Text] = {}
        self._outlines: OrderedDict[InodeNumber, Outline] = OrderedDict()

    def find(self, parent: InodeNumber, name: bytes) -> InodeNumber | None:
        """The manifest that a name leads to; None if it leads to none."""
        space = self._namespace
        if not space.is_snapshot(space.get(parent)) or space.has(parent, name):
            return None
        return InodeNumber(parent | MANIFEST)

    def _top(self, ino: InodeNumber) -> Inode:
        return self._namespace.get(InodeNumber(ino & ~MANIFEST))

    # -- what stat tells

    async def prepare(self, ino: InodeNumber) -> None:
        """Look at the files of the directory, so that :meth:`attributes` need not."""
        if ino not in self._outlines:
            files = list(self._namespace.frozen_files(self._top(ino)))
            self._remember(ino, await trio.to_thread.run_sync(self._outline_of, files))

    def _outline(self, ino: InodeNumber) -> Outline:
        if ino not in self._outlines:
            self._remember(ino, self._outline_of(list(self._namespace.frozen_files(self._top(ino)))))
        return self._outlines[ino]

    def _remember(self, ino: InodeNumber, outline: Outline) -> None:
        self._outlines[ino] = outline
        if len(self._outlines) > _REMEMBERED:
            self._outlines.popitem(last=False)

    def _outline_of(self, files: list[tuple[bytes, ImageId, int]]) -> Outline:
        """Of files ``(path, image, mode)`` (any thread). Raises FileError."""
        sizes = {image: self._size(image) for _, image, _ in files}
        mode = 0o444
        for _, _, each in files:
            mode &= each
        layout = lay_out([(path, sizes[image], image) for path, image, _ in files if len(path) <= MAX_PATH])
        images = [(ImageId(key), place.size) for key, place in layout.places.items()]
        return Outline(layout, images, mode)

    def _size(self, image: ImageId) -> int:
        path = self._pager.images.path(image)
        try:
            with open(path, "rb", buffering=0) as table:
                return unpack_header(read_exactly(table.fileno(), HEADER, 0), path).size
        except FileNotFoundError:
            raise FileError(errno.ENOENT) from None  # the snapshot was deleted

    def attributes(self, ino: InodeNumber) -> pyfuse3.EntryAttributes:
        """As those of its directory. Raises ENOENT."""
        top, outline = self._top(ino), self._outline(ino)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_mode = stat.S_IFREG | top.mode & outline.mode
        entry.st_uid, entry.st_gid = top.uid, top.gid
        entry.st_size = outline.layout.size
        entry.st_blocks = (entry.st_size + 511) // 512
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = top.atime, top.mtime, top.ctime
        entry.attr_timeout = entry.entry_timeout = _KEEP
        return entry

    def made(self, ino: InodeNumber) -> int:
        """When its directory was made, ns since the epoch."""
        return self._top(ino).btime

    # -- what read gives

    async def open(self, ino: InodeNumber) -> Opened:
        """The text, which is made if nobody has it open; :meth:`close` it. Raises FileError, OSError, StoreDamaged."""
        text = self._text(ino)
        try:
            async with text.making:
                if text.fd < 0:
                    await self._make(ino, text)
        except BaseException:
            self.close(ino)
            raise
        return Opened(manifest=text)

    def reopen(self, ino: InodeNumber, kept: bytes) -> Opened:
        """A text that is open since the daemon before. (Without its file, reading it is an error.)"""
        text = self._text(ino)
        if text.fd < 0:
            with contextlib.suppress(FileNotFoundError):
                text.fd = os.open(text.path, os.O_RDONLY | os.O_CLOEXEC)
        return Opened(manifest=text)

    def _text(self, ino: InodeNumber) -> Text:
        if ino not in self._texts:
            name = f"{ino & ~MANIFEST:08x}.manifest.new"  # as what is swept when nobody makes it
            self._texts[ino] = text = Text(os.path.join(self._pager.images.directory, name))
            self._pager.layers.making.add(text.path)
        text = self._texts[ino]
        text.users += 1
        return text

    def close(self, ino: InodeNumber) -> None:
        """One user of a text less."""
        text = self._texts[ino]
        text.users -= 1
        if text.users:
            return
        del self._texts[ino]
        if text.fd >= 0:
            os.close(text.fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(text.path)
        self._pager.layers.making.discard(text.path)

    def close_all(self) -> None:
        """The mount is gone, and so is whoever had one open."""
        for ino, text in list(self._texts.items()):
            text.users = 1
            self.close(ino)

    async def _make(self, ino: InodeNumber, text: Text) -> None:
        await self.prepare(ino)
        outline = self._outline(ino)
        images = [image for image, _ in outline.images]
        text.fd = await self._pager.gather(images, lambda gathering: self._write(text.path, outline, gathering))

    def _write(self, path: str, outline: Outline, gathering: Gathering) -> int:
        """Write a manifest (any thread); returns the descriptor. Raises Moved, OSError."""
        layout = outline.layout
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, layout.size)
            checksum, at = xxhash.xxh3_128(layout.head), len(layout.head)
            for image, size in outline.images:
                for digests in gathering.digests(self._pager.images.path(image), size):
                    checksum.update(digests)
                    write_all(fd, digests, at)
                    at += len(digests)
            write_all(fd, layout.sealed_head(checksum.digest()), 0)
        except BaseException:
            os.close(fd)
            raise
        return fd
