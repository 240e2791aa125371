"""``.guest`` of each directory: the memory of its guest as tools want it. Not listed, not in the catalog.

    .guest/layout.json   which file lies where in the guest's physical memory (ramfs/inspect/layout.py); may be written
    .guest/physmem       all of it: the offset is the physical address
    .guest/vmcore        an ELF core of it
    .guest/ranges/NAME   one range, NAME is IDSTR@GPA

A view (ramfs/inspect/views.py) is a list of pieces of files, made when it is opened. A READ gathers them as READs of
the files would. Where a guest may have dirty pages of a file, which only the kernel has, these are written back before;
so a view shows what was stored before it was read. It is not cached then, nor while pages of it arrive.

A snapshot has its layout also as ``ramfs.layout`` beside its files, for servers that export these alone; with it goes
where the note of the guest's kernel is, which is looked for then.

Where a directory has a file ``.guest`` of its own, from before there were views, that one is seen.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import trio

from ramfs.arrival.fetch import Arrivals
from ramfs.errors import FileError
from ramfs.fuse.extension import pyfuse3
from ramfs.fuse.flush import Flusher
from ramfs.fuse.layouts import LAYOUT_XATTR, NOTE_XATTR, remember_note
from ramfs.fuse.virtual import VIEW, Kind, Opened
from ramfs.inspect import vmcore, vmcoreinfo
from ramfs.inspect.layout import NAME, Layout, compose, derive, parse, records, to_text
from ramfs.inspect.views import Bytes, Gap, Piece, View, core, of_range, physmem
from ramfs.namespace import GUEST, Inode, Namespace
from ramfs.pager import MOST_ZEROS, Absent, Pager, Plan
from ramfs.store.images import Image
from ramfs.store.stored import Stored
from ramfs.units import PAGE, PAGE_SHIFT, ImageId, InodeNumber

log = logging.getLogger(__name__)

#: Where in the number, above that of the directory, it is told what of ``.guest`` is meant.
_SHIFT: Final = 40
_KIND_MASK: Final = (1 << 18) - 1
_TOP, _LAYOUT, _PHYSMEM, _VMCORE, _RANGES, _EXPORT = range(6)
#: ... and from here on the ranges, in the order of addresses.
_FIRST_RANGE: Final = 16
_NAMES: Final = {b"layout.json": _LAYOUT, b"physmem": _PHYSMEM, b"vmcore": _VMCORE, b"ranges": _RANGES}
#: Seconds that the kernel may keep what never changes, and what does.
_KEEP: Final = 300.0
_KEEP_LIVE: Final = 1.0
#: Bytes of ``ramfs.layout`` besides the layout: its size is known before the note is found.
_ROOM: Final = 2048
_EXPORT_NAME: Final = NAME.encode()
#: How often what is written back is looked for under a new name.
_ATTEMPTS: Final = 10


def _kind(ino: int) -> int:
    return ino >> _SHIFT & _KIND_MASK


def _number(directory: int, kind: int) -> InodeNumber:
    return InodeNumber(VIEW | kind << _SHIFT | directory)


#: A layout is asked for with each name and each attribute.
_composed = functools.lru_cache(16)(lambda items: compose(dict(items)))
_derived = functools.lru_cache(16)(lambda items: derive(dict(items)))


@dataclass(slots=True, eq=False)
class OpenView:
    """A view that is open, and the files that it reads, by their numbers."""

    view: View
    files: dict[int, Inode]

    def image(self, piece: Piece) -> Image:
        """What a piece is of. Raises EIO if it is gone."""
        inode = self.files.get(piece.file)
        if inode is None or inode.image is None:
            raise FileError(errno.EIO, "a file of the view was removed")
        return inode.image

    def dirty(self, offset: int, length: int) -> Iterator[tuple[Inode, Piece]]:
        """What of a range only the kernel may have."""
        for part in self.view.parts(offset, length):
            if isinstance(part, Piece):
                inode = self.files.get(part.file)
                if inode is not None and may_be_dirty(inode):
                    yield inode, part


def may_be_dirty(inode: Inode) -> bool:
    """May the kernel have pages of it that we have not?"""
    return inode.is_written and inode.image is not None and inode.image.direct is None


class Views(Kind):
    """The views of a mount."""

    bit = VIEW
    entrances = (GUEST, _EXPORT_NAME)

    def __init__(self, pager: Pager, namespace: Namespace, flusher: Flusher, arrivals: Arrivals) -> None:
        self._pager = pager
        self._namespace = namespace
        self._flusher = flusher
        self._arrivals = arrivals
        self._without_note: set[ImageId] = set()
        """frozen images that were searched in vain"""

    # -- names

    def find(self, parent: InodeNumber, name: bytes) -> InodeNumber | None:
        """The ``.guest``, or ``ramfs.layout``, that a name of a directory leads to; None if it leads to none."""
        space = self._namespace
        if parent >= 1 << _SHIFT or space.has(parent, name):
            return None
        directory = space.get(parent)
        if name == _EXPORT_NAME:
            return _number(parent, _EXPORT) if space.is_snapshot(directory) else None
        return _number(parent, _TOP) if directory.is_dir else None

    def names(self, ino: int) -> list[tuple[bytes, InodeNumber]]:
        """What a listing of such a directory shows. Raises ENOTDIR."""
        directory = self.directory(ino).ino
        if _kind(ino) == _TOP:
            return [(name, _number(directory, kind)) for name, kind in _NAMES.items()]
        if _kind(ino) != _RANGES:
            raise FileError(errno.ENOTDIR)
        layout = self.layout(self.directory(ino))
        return [(each.name, _number(directory, _FIRST_RANGE + i)) for i, each in enumerate(layout.ranges)]

    def is_frozen(self, ino: int) -> bool:
        """Is its directory? Raises ENOENT."""
        return self.directory(ino).frozen

    def is_layout(self, parent: int, name: bytes) -> bool:
        """Is a name in ``.guest`` that of its ``layout.json``? Raises ENOENT, ENOTDIR."""
        return self.is_writable(self.lookup(InodeNumber(parent), name))

    def is_writable(self, ino: int) -> bool:
        """Is it a ``layout.json``?"""
        return _kind(ino) == _LAYOUT

    def directory(self, ino: int) -> Inode:
        """The directory whose memory it is. Raises ENOENT."""
        return self._namespace.get(InodeNumber(ino & ((1 << _SHIFT) - 1)))

    # -- the layout

    def layout(self, directory: Inode) -> Layout:
        """The layout of a directory: what its files remember, or if none does what they look like."""
        files = self._namespace.memory_files(directory.ino, LAYOUT_XATTR)
        told = tuple((name, record) for name, (_, record) in files.items() if record is not None)
        if told:
            layout: Layout = _composed(told)
        else:
            layout = _derived(tuple((name, self._size(ino)) for name, (ino, _) in files.items()))
        return layout

    def _size(self, ino: InodeNumber) -> int:
        known = self._namespace.inodes.get(ino)
        inode = known or self._namespace.get(ino)
        try:
            if inode.image is not None:
                inode.image.refresh()
            return inode.size
        finally:
            if known is None:
                self._namespace.let_go(inode)

    def _numbers(self, directory: Inode) -> dict[bytes, InodeNumber]:
        return {name: ino for name, (ino, _) in self._namespace.memory_files(directory.ino, LAYOUT_XATTR).items()}

    def write_layout(self, ino: int, written: bytearray) -> bool:
        """Set the layout to what was written so far, if that is all of it. Raises EINVAL if it cannot be, EROFS."""
        try:
            json.loads(written)
        except (ValueError, RecursionError):
            return False
        directory = self.directory(ino)
        files = self._namespace.memory_files(directory.ino, LAYOUT_XATTR)
        try:
            layout = parse(bytes(written), {name: self._size(number) for name, (number, _) in files.items()})
        except FileError as exc:
            log.info("%s of inode %d is refused: %s", "layout.json", directory.ino, exc)
            raise
        with self._namespace.catalog.transaction():
            self._remember(directory, records(layout))
            remember_note(self._namespace, layout, {name: number for name, (number, _) in files.items()})
        return True

    def clear_layout(self, ino: int) -> None:
        """Forget the layout: it is derived from now on. Raises EROFS."""
        self._remember(self.directory(ino), {})

    def _remember(self, directory: Inode, told: dict[bytes, bytes]) -> None:
        space = self._namespace
        files = space.memory_files(directory.ino, LAYOUT_XATTR)
        changed = [(name, ino) for name, (ino, before) in files.items() if told.get(name) != before]
        frozen = directory.frozen or any(
            space.catalog.number("SELECT frozen FROM inodes WHERE ino = ?", ino) for _, ino in changed
        )
        if frozen:  # files of a dense clone are those of the snapshot
            raise FileError(errno.EROFS)
        with space.catalog.transaction():
            for name, ino in changed:
                space.remember(ino, LAYOUT_XATTR, told.get(name))

    # -- what stat tells

    def attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        """Attributes. Who may read a view may read all files that it shows. Raises ENOENT."""
        directory, kind = self.directory(ino), _kind(ino)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_uid, entry.st_gid = directory.uid, directory.gid
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = directory.atime, directory.mtime, directory.ctime
        keep = _KEEP if directory.frozen else _KEEP_LIVE
        # Another layout gives the numbers of ranges to others.
        entry.attr_timeout, entry.entry_timeout = keep, 0 if kind >= _FIRST_RANGE and not directory.frozen else keep
        if kind in (_TOP, _RANGES):
            entry.st_mode = stat.S_IFDIR | directory.mode & 0o555
            entry.st_nlink = 3 if kind == _TOP else 2
            return entry
        layout = self.layout(directory)
        if kind in (_LAYOUT, _EXPORT):
            entry.st_mode = stat.S_IFREG | directory.mode & (0o444 if directory.frozen else 0o666)
            entry.st_size = len(self.text(ino)) if kind == _LAYOUT else _export_size(layout)
            entry.st_blocks = (entry.st_size + 511) // 512
            return entry
        view = self._view(kind, layout, self._numbers(directory))
        files = self._files(view)
        entry.st_mode, entry.st_uid, entry.st_gid = stat.S_IFREG | _mode(files), *_owner(files, directory)
        entry.st_mtime_ns = entry.st_ctime_ns = max((_mtime(file) for file in files), default=directory.mtime)
        for file in files:
            self._namespace.let_go(file)
        entry.st_size = view.size
        entry.st_blocks = (len(view.head) + sum(piece.length for piece in view.pieces) + 511) // 512
        return entry

    def made(self, ino: int) -> int:
        """When its directory was made, ns since the epoch."""
        return self.directory(ino).btime

    def _files(self, view: View) -> list[Inode]:
        return [self._namespace.get(InodeNumber(number)) for number in {piece.file for piece in view.pieces}]

    def _view(self, kind: int, layout: Layout, numbers: dict[bytes, InodeNumber], note: bytes = b"") -> View:
        if kind == _PHYSMEM:
            return physmem(layout, numbers)
        if kind == _VMCORE:
            return core(layout, numbers, note)
        try:
            return of_range(layout.ranges[kind - _FIRST_RANGE], numbers)
        except IndexError:
            raise FileError(errno.ENOENT) from None

    # -- opening

    def text(self, ino: int) -> bytes:
        """``layout.json``."""
        directory = self.directory(ino)
        layout = self.layout(directory)
        hints = self._namespace.memory_files(directory.ino, NOTE_XATTR)
        for name in sorted({each.file for each in layout.ranges}):
            _, hint = hints[name]
            if hint is not None:
                return to_text(replace(layout, note=(name, int(hint) << PAGE_SHIFT)))
        return to_text(layout)

    async def open(self, ino: int) -> Opened:
        """A layout, as it is now, or a view; :meth:`close` that. Raises FileError, SourceError, OSError."""
        directory, kind = self.directory(ino), _kind(ino)
        if kind == _LAYOUT:
            text = self.text(ino)
            return Opened(text, text, written=bytearray())
        layout = self.layout(directory)
        view = self._pin(self._view(_PHYSMEM if kind == _EXPORT else kind, layout, self._numbers(directory)))
        try:
            note = await self._note(view) if kind in (_EXPORT, _VMCORE) else b""
        except BaseException:
            self.close(view)
            raise
        if kind == _EXPORT:
            self.close(view)
            text = self.text(ino).ljust(_export_size(layout))
            return Opened(text, text)
        if kind == _VMCORE:
            ranges = [(each.gpa, each.size) for each in layout.ranges]
            view.view = View(view.view.size, view.view.pieces, vmcore.header(ranges, note))
        return Opened(kept=view.view.pack(), view=view, keeps=self._keeps(view))

    def reopen(self, ino: int, kept: bytes) -> Opened:
        """One that is open since the daemon before."""
        if _kind(ino) in (_LAYOUT, _EXPORT):
            return Opened(kept, kept, written=bytearray() if _kind(ino) == _LAYOUT else None)
        return Opened(kept=kept, view=self._pin(View.unpack(kept)))

    def _pin(self, view: View) -> OpenView:
        opened = OpenView(view, {})
        for number in {piece.file for piece in view.pieces}:
            with contextlib.suppress(FileError):  # removed: reading it is an error
                inode = self._namespace.get(InodeNumber(number))
                inode.views += 1
                opened.files[number] = inode
        return opened

    def close(self, opened: OpenView) -> None:
        """It is not read any more."""
        for inode in opened.files.values():
            inode.views -= 1
            self._namespace.let_go(inode)

    def _keeps(self, opened: OpenView) -> bool:
        """May the kernel keep what it has read of a view? It never changes, then, and all of it is here."""
        arriving = self._pager.layers.arriving
        return all(
            inode.frozen and (inode.image is None or arriving.isdisjoint(inode.image.layers))
            for inode in opened.files.values()
        )

    # -- reading

    def gather(self, opened: OpenView, offset: int, length: int) -> Plan | bytes:
        """Bytes of a view, or where they are. Raises Absent, OSError."""
        parts = list(opened.view.parts(offset, length))
        if len(parts) == 1 and isinstance(part := parts[0], Piece):
            image = opened.image(part)
            if image.direct is None and part.offset + part.length <= image.size:
                plan = self._pager.plan(image, part.offset, part.length)
                if plan is not None:
                    return plan
        if len(parts) == 1 and isinstance(parts[0], Gap) and parts[0].length <= MOST_ZEROS:
            return self._pager.zeros(parts[0].length)
        return self.copy_out(opened, offset, length)

    def copy_out(self, opened: OpenView, offset: int, length: int) -> bytes:
        """A copy of bytes of a view. Raises Absent, OSError."""
        found = []
        for part in opened.view.parts(offset, length):
            if isinstance(part, Bytes):
                found.append(part.data)
            elif isinstance(part, Gap):
                found.append(bytes(part.length))
            else:  # what a file lacks by now, for it was made shorter, reads as a gap does
                found.append(
                    self._pager.copy_out(opened.image(part), part.offset, part.length).ljust(part.length, b"\0")
                )
        return b"".join(found)

    def absent(self, opened: OpenView, offset: int, length: int) -> list[Absent]:
        """What of a range is not here."""
        found: list[Absent] = []
        for part in opened.view.parts(offset, length):
            if isinstance(part, Piece):
                found += self._pager.absent(opened.image(part), part.offset, part.length)
        return found

    async def have(self, opened: OpenView, offset: int, length: int) -> None:
        """Have what is dirty of a range written back, and what is absent brought. Raises SourceError, OSError."""
        for inode, piece in opened.dirty(offset, length):
            await self._write_back(inode, piece.offset, piece.length)
        await self._arrivals.bring_all(self.absent(opened, offset, length))

    async def _write_back(self, inode: Inode, offset: int, length: int) -> None:
        """Have what the kernel has dirty of a range. What has no name any more stays as it is in the store."""
        path = b""
        for _ in range(_ATTEMPTS):
            try:
                path = self._namespace.path_of(inode.ino)
            except FileError:
                return
            if self._flusher.can_write_back:
                if await self._flusher.write_back(inode.ino, path, offset, length):
                    return
            elif inode.ino in await self._flusher.flush([path]):
                return
        raise FileError(errno.EBUSY, f"{os.fsdecode(path)} is renamed all the time")

    # -- the note of the guest's kernel

    async def _note(self, opened: OpenView) -> bytes:
        """VMCOREINFO, if it is found."""
        hints = {
            inode.ino: self._namespace.catalog.row(
                "SELECT value FROM xattrs WHERE ino = ? AND name = ?", inode.ino, NOTE_XATTR
            )
            for inode in opened.files.values()
        }
        for number, hint in hints.items():
            if hint is not None and (note := await self._note_at(opened.files[number], int(hint["value"]))):
                return note
        for inode in list(opened.files.values()):
            page = await self._search(inode)
            if page is not None and (note := await self._note_at(inode, page)):
                with contextlib.suppress(sqlite3.Error):  # it is only found anew
                    self._namespace.remember(inode.ino, NOTE_XATTR, b"%d" % page)
                return note
        return b""

    async def _note_at(self, inode: Inode, page: int) -> bytes:
        opened = OpenView(View(inode.size, (Piece(0, inode.size, inode.ino, 0),)), {inode.ino: inode})
        offset = page << PAGE_SHIFT
        await self.have(opened, offset, vmcoreinfo.MAX_NOTE)
        try:
            return vmcoreinfo.note_in(self.copy_out(opened, offset, vmcoreinfo.MAX_NOTE))
        except Absent:  # what was here went meanwhile, for something else that is not
            return b""

    async def _search(self, inode: Inode) -> int | None:
        """The page of a file that has the note. Of what arrives only the pages that are here are looked at."""
        image = inode.image
        if image is None or image.id in self._without_note:
            return None
        if may_be_dirty(inode):
            await self._write_back(inode, 0, image.size)
        image.refresh()
        stored = Stored(image, self._pager.layers)
        runs = (run for low, high in vmcoreinfo.likely_first(image.pages) for run in stored.runs(low, high))

        def look() -> int | None:
            try:
                return vmcoreinfo.search(runs, stored.read)
            finally:
                stored.close()

        page = await trio.to_thread.run_sync(look)
        if page is None and image.frozen and self._pager.layers.arriving.isdisjoint(image.layers):
            self._without_note.add(image.id)
        return page


def _export_size(layout: Layout) -> int:
    return (len(to_text(layout)) + _ROOM + PAGE - 1) & -PAGE


def _mode(files: Iterable[Inode]) -> int:
    """Permissions of a view: those that all of its files give. Nobody writes to it."""
    files = list(files)
    mode = 0o444
    for file in files:
        mode &= file.mode
    # What the owner of one file may read is not for the owner of another.
    one_owner = len({(file.uid, file.gid) for file in files}) <= 1
    return mode if one_owner or mode & 0o004 else 0o400


def _owner(files: Iterable[Inode], directory: Inode) -> tuple[int, int]:
    owners = {(file.uid, file.gid) for file in files}
    if len(owners) > 1:
        return 0, 0
    return next(iter(owners), (directory.uid, directory.gid))


def _mtime(file: Inode) -> int:
    if file.image is None:
        return file.mtime
    file.image.refresh()
    return file.image.mtime
