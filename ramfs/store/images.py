"""Images: the contents of files. A header, a page table, and the layers that the table names.

A writable image has two table files:

    ID.map       the table as it is now. Written at once with every change, so it outlives a killed daemon.
    ID.durable   the table as of the last sync, and then only with entries whose pages were on disk before.

The kernel may write ``.map`` to disk before the pages that it names, so after power loss (another boot, see
store.py) ``.durable`` counts; its pages are never punched before a later table replaced it. A frozen image
never changes: its one ``.map`` is synced before the catalog names it. Of a *direct* image neither counts, but what
the file of its live layer reads as (store/direct.py).
"""

import contextlib
import errno
import itertools
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import xxhash

from ramfs.errors import FileError, StoreDamaged
from ramfs.image.table import ENTRY, Entries, PageTable, as_bytes
from ramfs.image.working_set import RECORD, Records, empty
from ramfs.store.behind import Behind
from ramfs.store.catalog import Catalog
from ramfs.store.files import data_extents, read_exactly, read_into, sync_data, sync_directory, write_all
from ramfs.store.layers import Layer, Layers
from ramfs.store.presence import write_kept
from ramfs.store.reflink import Cloned, entries_of
from ramfs.units import MAX_FILE_SIZE, PAGE, PAGE_SHIFT, ZERO, ImageId, LayerId, pages

#: Images that are synced at a time after a takeover.
_AT_ONCE: Final = 16

MAGIC: Final = b"RAMFSMAP"
VERSION: Final = 1
#: Bytes before the first table entry; the header proper is its start, the rest is zero.
HEADER: Final = PAGE
#: Table files kept open at most; a tree of many small files would else use up the descriptors.
OPEN_TABLES: Final = 2048
_FIELDS: Final = struct.Struct("<8sIIQqq")
_CHECK: Final = struct.Struct("<Q")


class Header(NamedTuple):
    """What the header of a table file says: size in bytes, times in ns since the epoch."""

    size: int
    mtime: int
    ctime: int


def pack_header(header: Header) -> bytes:
    """The header's bytes, ending with their xxh3_64."""
    fields = _FIELDS.pack(MAGIC, VERSION, 0, *header)
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))


def table_length(size: int) -> int:
    """The least length of the table file of ``size`` bytes: one that is shorter has lost entries."""
    return HEADER + (pages(pages(size) * ENTRY) << PAGE_SHIFT)


def unpack_header(data: bytes, path: str) -> Header:
    """Check and take apart the start of a table file. Raises StoreDamaged."""
    fields = data[: _FIELDS.size]
    if len(data) < _FIELDS.size + _CHECK.size:
        raise StoreDamaged(f"{path} is too short for a table header; run `ramfs fsck` on the store")
    magic, version, _, size, mtime, ctime = _FIELDS.unpack(fields)
    (check,) = _CHECK.unpack_from(data, _FIELDS.size)
    if magic != MAGIC or version != VERSION or check != xxhash.xxh3_64_intdigest(fields) or size > MAX_FILE_SIZE:
        raise StoreDamaged(f"{path} has no valid table header; run `ramfs fsck` on the store")
    return Header(size, mtime, ctime)


def load_table(fd: int, path: str) -> tuple[Header, PageTable]:
    """Read a table file: its header and entries, zero where the file has holes."""
    header = unpack_header(read_exactly(fd, _FIELDS.size + _CHECK.size, 0), path)
    count = pages(header.size)
    table = PageTable(count)
    extents = list(data_extents(fd, HEADER))
    if sum(stop - start for start, stop in extents) >= count * ENTRY // 8 * 7:
        table.expect_all()
    for start, stop in extents:
        low = (start - HEADER) // ENTRY
        high = min((stop - HEADER) // ENTRY, count)
        if low < high:
            read_into(fd, as_bytes(table.entries[low:high]), start)
            table.mark(low, high)
    table.stale[:] = False
    return header, table


def read_table(path: str) -> PageTable | None:
    """The table in a file (any thread); None if there is no such file (any more)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return load_table(fd, path)[1]
    finally:
        os.close(fd)


def pack_layers(layers: Iterable[LayerId]) -> bytes:
    """The ``images.layers`` blob."""
    return np.array(sorted(layers), "<u4").tobytes()


def unpack_layers(blob: bytes) -> set[LayerId]:
    """The layers of an ``images.layers`` blob."""
    return {LayerId(layer) for layer in np.frombuffer(blob, "<u4").tolist()}


class Image:
    """The contents of one file: size, times, page table, and where the bytes of the pages are.

    One object for each image that is in use; :class:`Images` hands it out and counts its users.
    """

    __slots__ = (
        "_ahead", "_fd", "_length", "_owner", "_table", "alike", "ctime", "direct", "doubtful", "frozen",
        "header_stale", "id", "layers", "live", "mtime", "path", "size", "synced_name", "users",
    )  # fmt: skip

    def __init__(
        self, number: ImageId, frozen: bool, live: Layer | None, layers: set[LayerId], path: str,
        owner: "Images",
    ) -> None:  # fmt: skip
        self.id = number
        self.frozen = frozen
        self.live = live
        self.layers = layers
        """superset of the layers that the table names, as the catalog has it"""
        self.path = path
        self._owner = owner
        self._fd = -1
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size, self.mtime, self.ctime = unpack_header(read_exactly(fd, HEADER, 0), path)
            self._length = os.fstat(fd).st_size
        finally:
            os.close(fd)
        self._table: PageTable | None = None
        self._ahead = False
        """entries were written to the file while the table was not in memory"""
        self.alike: LayerId | None = None
        """the layer whose file was found to read as a frozen image does (store/flat.py)"""
        self.direct: str | None = None
        """of a direct image the path of the file that it is; then there is no table, and :meth:`refresh` tells size
        and times"""
        self.users = 0
        self.header_stale = False
        self.synced_name = True
        self.doubtful = False
        """what its durable table says is not known (see Images.doubtful)"""

    @property
    def fd(self) -> int:
        """The table file, opened on first use: most files of a tree are only looked at from outside."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            opened = self._owner.opened
            opened[self.id] = self
            if len(opened) > OPEN_TABLES:
                next(iter(opened.values()))._close_file()
        return self._fd

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._owner.opened[self.id]

    @property
    def table(self) -> PageTable:
        """The page table, read on first use. Has at least ``pages(size)`` entries."""
        if self._table is None:
            _, self._table = load_table(self.fd, self.path)
            if self._ahead:
                self._table.stale[:] = self._table.touched
                self._ahead = False
        return self._table

    @property
    def is_loaded(self) -> bool:
        """Is the table in memory?"""
        return self._table is not None

    def put_entries(self, first: int, entries: Entries) -> None:
        """Write entries where there were none, while the table is not in memory: most clones never need it there."""
        self._write_entries(first, entries)
        self._ahead = True

    @property
    def pages(self) -> int:
        """Number of pages of the file, the last one perhaps partial."""
        return pages(self.size)

    def write_header(self) -> None:
        """Store size and times."""
        self.header_stale = True
        length = table_length(self.size)
        if length > self._length:
            os.ftruncate(self.fd, length)
            self._length = length
        os.pwrite(self.fd, pack_header(Header(self.size, self.mtime, self.ctime)), 0)

    def refresh(self) -> None:
        """Of a direct image: learn size and times, which the kernel changes by itself. Raises StoreDamaged."""
        if self.direct is None:
            return
        try:
            told = os.stat(self.direct)
        except FileNotFoundError as exc:
            raise StoreDamaged(f"layer file {self.direct} is missing; run `ramfs fsck` on the store") from exc
        self.size, self.mtime = told.st_size, told.st_mtime_ns
        self.ctime = max(self.ctime, told.st_ctime_ns)

    def set_mtime(self, mtime: int) -> None:
        """Set mtime alone; :meth:`write_header` stores it."""
        self.mtime = mtime
        if self.direct is not None:
            os.utime(self.direct, ns=(mtime, mtime))

    def touch(self, now: int | None = None) -> None:
        """Contents changed: set mtime and ctime, and store them with the size."""
        self.mtime = self.ctime = time.time_ns() if now is None else now
        self.write_header()

    def store_entries(self, first: int, stop: int) -> None:
        """Write entries ``[first, stop)`` to ``.map``, after the pages that they name."""
        self._write_entries(first, self.table.entries[first:stop])

    def _write_entries(self, first: int, entries: Entries) -> None:
        self._owner.changes += 1
        try:
            write_all(self.fd, as_bytes(entries), HEADER + first * ENTRY)
        except OSError:
            # What was written beyond the end of the file must not be there when the file grows.
            os.ftruncate(self.fd, self._length)
            raise

    def forget_beyond(self) -> None:
        """Name nothing behind the end: what a write that failed has named there would show when the file grows."""
        self._owner.changes += 1
        os.ftruncate(self.fd, HEADER + self.pages * ENTRY)
        os.ftruncate(self.fd, self._length)
        if self._table is not None:
            for first, stop in self._table.regions(first=self.pages):
                self._table.fill(first, stop, ZERO)

    def reload(self) -> None:
        """Take the table from its file again."""
        self._table = None

    def replace_file(self) -> None:
        """The table file was replaced by another of the same name: forget all that is known of the old one."""
        self._owner.changes += 1
        self.close()
        self._ahead = False
        with open(self.path, "rb", buffering=0) as file:
            self.size, self.mtime, _ = unpack_header(read_exactly(file.fileno(), HEADER, 0), self.path)
            self._length = os.fstat(file.fileno()).st_size

    def close(self) -> None:
        """Close the table file and let go of the table."""
        self._table = None
        self._close_file()


@dataclass
class SyncJob:
    """All that must reach the disk so that some images are durable as they were when the job was made.

    :meth:`run` does it, in any thread; on an exception call :meth:`failed` on the loop, and nothing counts as
    synced that was not. Two jobs must not run at once: the older could write over the newer.
    """

    owner: "Images"
    catalog: Catalog
    layers: list[tuple[Layer, str]] = field(default_factory=list)
    """with the paths of their files: there may be more than there are descriptors"""
    kept: list[tuple[str, list[tuple[int, bytes]]]] = field(default_factory=list)
    """of arriving layers: what is here of them, and is to be written where"""
    layer_names: str | None = None
    """the directory of the layers, when there are new ones"""
    table_names: str | None = None
    """the directory of the tables, when there are new ones"""
    writes: list[tuple[str, bool, int, list[tuple[int, bytes]]]] = field(default_factory=list)
    """table files: path, whether to make it anew, least length, and what to write at which offsets"""
    undo: list[Callable[[], None]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    """in use until the end: were one closed meanwhile, nobody would know that it is not synced if this fails"""
    written: list[Behind] = field(default_factory=list)
    """pages that are on disk when it has succeeded"""
    done: bool = False

    def run(self) -> None:
        """First the pages, then the catalog, then the tables, which name layers that must be there by then.

        (Were a row of ``layers`` lost, its number would be given again, and the table name another's pages.)
        """
        for _, path in self.layers:
            # One that is gone was removed as garbage meanwhile.
            with contextlib.suppress(FileNotFoundError):
                sync_data(path)
        for path, parts in self.kept:
            with contextlib.suppress(FileNotFoundError):
                write_kept(path, parts)
        if self.layer_names is not None:
            sync_directory(self.layer_names)
        self.catalog.sync()
        for path, anew, length, parts in self.writes:
            # The first durable copy appears complete or not at all: what is there counts after power loss.
            fresh = anew or not os.path.exists(path)
            if fresh and not parts:
                continue  # a frozen one that was deleted meanwhile
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if fresh else 0)
            fd = os.open(path + ".new" if fresh else path, flags, 0o600)
            try:
                if os.fstat(fd).st_size < length:
                    os.ftruncate(fd, length)
                for offset, data in parts:
                    write_all(fd, data, offset)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            if fresh:
                os.rename(path + ".new", path)
        if self.table_names is not None:
            sync_directory(self.table_names)
        self.done = True

    def close(self) -> None:
        """Let go of the images; always call it, on the loop."""
        for written in self.written if self.done else ():
            self.owner.layers.note_behind(written)
        for image in self.images:
            self.owner.release(image)

    def failed(self) -> None:
        """Mark everything as not synced again.

        A page that could not be written counts as clean for the kernel, though the disk has another: only memory
        has it right, and there it stays.
        """
        self.owner.layers.undroppable.update(layer.id for layer, _ in self.layers)
        for step in self.undo:
            step()


class Images:
    """All images of a store; hands out one :class:`Image` object for each that is in use."""

    def __init__(self, directory: str, catalog: Catalog, layers: Layers) -> None:
        self.directory = directory
        self.catalog = catalog
        self.layers = layers
        self.unsynced: set[LayerId] = set()
        """layers that were written to since their last fdatasync"""
        self.sharings = 0
        """grows whenever a table gets entries of arriving layers"""
        self.shared_meanwhile: set[LayerId] | None = None
        """while garbage is being looked for: layers that got a new user since the search began"""
        self.replaced: set[LayerId] = set()
        """layers that lost a user: where garbage may be"""
        self.synced_meanwhile: set[ImageId] | None = None
        """while garbage is being looked for: images whose durable table was, or is being, replaced"""
        self.doomed: set[ImageId] = set()
        """deleted images whose files are still there; they go once the deletion is durable"""
        self.doubtful: set[ImageId] = set()
        """writable images that a daemon had which was killed, and not synced since: its knowledge of what was
        newer than the durable table is lost, so that table is made anew. Until then nothing is garbage"""
        self.direct: set[ImageId] = {
            ImageId(row["id"]) for row in catalog.execute("SELECT id FROM images WHERE direct AND NOT frozen")
        }
        """direct images"""
        self.cloned: dict[ImageId, Cloned] = {}
        """clones of direct images, for the copies that are made next (:meth:`with_clones`)"""
        self._clone_numbers = itertools.count(0xF0000000)
        self._open: dict[ImageId, Image] = {}
        self.opened: dict[ImageId, Image] = {}
        """the images whose table file is open, the first opened first"""
        self.changes = 0
        """grows whenever what some table names becomes another, and when an image goes"""

    def path(self, image: ImageId, suffix: str = "map") -> str:
        """Path of an image's table file, or of its ``durable`` copy."""
        return os.path.join(self.directory, f"{image:08x}.{suffix}")

    def acquire(self, number: ImageId) -> Image:
        """The image, for use until :meth:`release`. Raises StoreDamaged."""
        image = self._open.get(number)
        if image is None:
            row = self.catalog.row("SELECT frozen, live, layers, direct FROM images WHERE id = ?", number)
            if row is None:
                raise StoreDamaged(f"image {number} is not in the catalog; run `ramfs fsck` on the store")
            live = None if row["live"] is None else self.layers[row["live"]]
            try:
                layers = unpack_layers(row["layers"])
                image = Image(number, bool(row["frozen"]), live, layers, self.path(number), self)
            except FileNotFoundError as exc:
                raise StoreDamaged(f"table {self.path(number)} is missing; run `ramfs fsck` on the store") from exc
            if number in self.direct and live is not None:
                image.direct = self.layers.path(live.id)
                image.refresh()
            self._open[number] = image
            if number in self.doubtful:
                image.doubtful = image.header_stale = True
                image.synced_name = False
        image.users += 1
        return image

    def exists(self, number: ImageId) -> bool:
        """Is there such an image? (One that was deleted may still be in use.)"""
        return self.catalog.row("SELECT id FROM images WHERE id = ?", number) is not None

    def direct_layers(self) -> set[LayerId]:
        """The layers whose files are direct images."""
        return {LayerId(row["live"]) for row in self.catalog.execute("SELECT live FROM images WHERE direct")}

    def release(self, image: Image) -> None:
        """One user of the image less."""
        image.users -= 1
        if image.users == 0 and (image.id in self.doomed or not self.is_stale(image)):
            self._open.pop(image.id, None)
            image.close()

    @contextlib.contextmanager
    def some_doubtful(self) -> Iterator[list[Image]]:
        """A few of the doubtful images, in use for as long as it takes to sync them: each is a table to read."""
        images: list[Image] = []
        try:
            for number in list(itertools.islice(self.doubtful, _AT_ONCE)):
                try:
                    images.append(self.acquire(number))
                except StoreDamaged:  # its table is gone, and was before
                    self.doubtful.discard(number)
            yield images
        finally:
            for image in images:
                self.release(image)

    def is_stale(self, image: Image) -> bool:
        """Is something of the image newer than its last sync? (Then it stays open, and is synced later.)"""
        if image.direct is not None:
            return False  # nothing that the kernel does not write back by itself
        if image.frozen:
            return not image.synced_name
        return (
            image.header_stale
            or (image._table is not None and bool(image._table.stale.any()))
            or not self.unsynced.isdisjoint(image.layers)
        )

    def open_images(self) -> list[Image]:
        """The images in use or not synced yet."""
        return list(self._open.values())

    def create(self, size: int = 0, parent: ImageId | None = None) -> Image:
        """A new empty image of ``size`` zero bytes. Call in a transaction."""
        number, image = self._make(Header(size, now := time.time_ns(), now), False, set(), parent)
        self._open[number] = image
        image.users += 1
        self.catalog.on_rollback(lambda: self.remove_files(number))
        return image

    def copy(self, source: Image, *, frozen: bool) -> Image:
        """A new image of the same contents: the source's table, its live layer sealed.

        Call in a transaction. Raises OSError (ENOSPC ...); then the source is as before.
        """
        if source.direct is not None:
            return self._copy_direct(source, frozen=frozen)
        self.seal(source)
        number, image = self._make(
            Header(source.size, source.mtime, source.ctime), frozen, set(source.layers), source.id
        )
        try:
            for first, stop in source.table.regions(stop=source.pages):
                image.put_entries(first, source.table.entries[first:stop])
        except BaseException:
            image.close()
            os.unlink(image.path)
            raise
        self.note_shared(source.layers)
        self._open[number] = image
        image.users += 1
        self.catalog.on_rollback(lambda: self.remove_files(number))
        return image

    def _copy_direct(self, source: Image, *, frozen: bool) -> Image:
        """The same of a direct image, whose file stays what it is: the copy gets a clone of it. In a transaction."""
        cloned = self.cloned.pop(source.id, None) or self.clone(source)
        if cloned.size > MAX_FILE_SIZE:  # the kernel has let it grow beyond what a table can tell of
            self.discard([cloned])
            raise FileError(errno.EFBIG)
        extents, layers = cloned.extents, set[LayerId]()
        header = Header(cloned.size, cloned.mtime, max(source.ctime, cloned.ctime))
        if extents:
            layers = {self.adopt(cloned).id}
        else:
            self.discard([cloned])
        number, image = self._make(header, frozen, layers, source.id)
        try:
            for layer in layers:
                for first, entries in entries_of(extents, layer):
                    image.put_entries(first, entries)
        except BaseException:
            image.close()
            os.unlink(image.path)
            raise
        self._open[number] = image
        image.users += 1
        self.catalog.on_rollback(lambda: self.remove_files(number))
        return image

    def clone(self, source: Image, offset: int = 0, length: int = 0, at: int = 0) -> Cloned:
        """A range of a direct image as it is at one moment: see Cloned.make. Takes long if much is dirty."""
        assert source.direct is not None
        return Cloned.make(source.direct, self.clone_path(), offset, length, at)

    def clone_path(self) -> str:
        """A new path for a clone, which will be a layer, or is discarded."""
        path = os.path.join(self.layers.directory, f"{next(self._clone_numbers):08x}.ram.new")
        self.layers.making.add(path)
        return path

    def discard(self, clones: Iterable[Cloned]) -> None:
        """Remove clones that nobody needs."""
        for cloned in clones:
            cloned.discard()
            self.layers.making.discard(cloned.path)

    def adopt(self, cloned: Cloned) -> Layer:
        """Let a clone be a sealed layer. Call in a transaction."""
        layer = self.layers.adopt(cloned.path)
        self.layers.making.discard(cloned.path)
        self.layers.unsynced_names.add(layer.id)
        self.unsynced.add(layer.id)
        self.note_shared({layer.id})
        return layer

    @contextlib.contextmanager
    def with_clones(self, cloned: dict[ImageId, Cloned]) -> Iterator[None]:
        """Copies of direct images that are made in this block, which must not await, are of these clones."""
        self.cloned = cloned
        try:
            yield
        finally:
            self.cloned = {}
            self.discard(cloned.values())
            cloned.clear()

    def _make(
        self, header: Header, frozen: bool, layers: set[LayerId], parent: ImageId | None
    ) -> tuple[ImageId, Image]:
        number = ImageId(
            self.catalog.insert(
                "INSERT INTO images (frozen, layers, parent, created) VALUES (?, ?, ?, ?)",
                frozen,
                pack_layers(layers),
                parent,
                time.time_ns(),
            )
        )
        path = self.path(number)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, pack_header(header), 0)
            os.ftruncate(fd, table_length(header.size))
        finally:
            os.close(fd)
        image = Image(number, frozen, None, layers, path, self)
        image.header_stale = not frozen
        image.synced_name = False
        return number, image

    def seal(self, image: Image) -> None:
        """Let the image's live layer take no more writes; the next write begins a new one. In a transaction."""
        assert image.direct is None
        live = image.live
        if live is not None:
            self.layers.seal(live, image.pages << PAGE_SHIFT)
            self.catalog.execute("UPDATE images SET live = NULL WHERE id = ?", image.id)
            image.live = None
            self.catalog.on_rollback(lambda: setattr(image, "live", live))

    def live_layer(self, image: Image) -> Layer:
        """The layer that takes the image's writes, made now if there is none."""
        if image.live is None:
            with self.catalog.transaction():
                layer = self.layers.create(image.pages * PAGE)
                self._name_layers(image, {layer.id}, live=layer.id)
            image.live = layer
        return image.live

    def name_layers(self, image: Image, layers: set[LayerId]) -> None:
        """Record that the image's table may name these layers, before it does. Call in a transaction."""
        if not layers <= image.layers:
            self._name_layers(image, layers, live=None if image.live is None else image.live.id)
        self.note_shared(layers)

    def _name_layers(self, image: Image, layers: set[LayerId], live: LayerId | None) -> None:
        self.catalog.execute(
            "UPDATE images SET layers = ?, live = ? WHERE id = ?", pack_layers(image.layers | layers), live, image.id
        )
        before = image.layers
        image.layers = before | layers
        self.catalog.on_rollback(lambda: setattr(image, "layers", before))

    def note_shared(self, layers: set[LayerId]) -> None:
        """Tell a garbage search under way, and who looks for users of what arrives, that these layers got a new one."""
        self.sharings += not self.layers.arriving.isdisjoint(layers)
        if self.shared_meanwhile is not None:
            self.shared_meanwhile |= layers

    def delete(self, number: ImageId) -> None:
        """Forget an image. In a transaction; its files go with the next garbage pass."""
        row = self.catalog.row("SELECT layers, live FROM images WHERE id = ?", number)
        if row is None:
            return
        self.changes += 1
        self.catalog.execute("DELETE FROM images WHERE id = ?", number)
        if number in self.doubtful:
            self.doubtful.discard(number)
            self.catalog.on_rollback(lambda: self.doubtful.add(number))
        live = self.layers.by_id.get(row["live"])
        if live is not None:
            self.layers.seal(live)  # only sealed layers are garbage
        self.replaced |= unpack_layers(row["layers"])
        self.doomed.add(number)
        self.catalog.on_rollback(lambda: self.doomed.discard(number))
        if number in self.direct:
            self.direct.discard(number)
            self.catalog.on_rollback(lambda: self.direct.add(number))
        image = self._open.get(number)
        if image is not None and image.users == 0:
            del self._open[number]
            image.close()

    # -- working sets

    def set_parent(self, image: Image, parent: Image) -> None:
        """Record that an image begins as what another is. In a transaction."""
        self.catalog.execute("UPDATE images SET parent = ? WHERE id = ?", parent.id, image.id)

    def working_set(self, number: ImageId) -> Records | None:
        """What guests that begin with an image ask for first, if that is known."""
        row = self.catalog.row("SELECT records FROM working_sets WHERE image = ?", number)
        return None if row is None else np.frombuffer(row["records"], RECORD)

    def beginning(self, image: Image) -> tuple[ImageId, Records] | None:
        """The image whose working set is that of ``image``, as nothing was written to it yet; and that set, as known.

        That is itself, for it was pulled with one, or the one that it was copied from. None if that keeps none.
        """
        known = self.working_set(image.id)
        if known is not None:
            return image.id, known
        row = self.catalog.row(
            "SELECT id, frozen FROM images WHERE id = (SELECT parent FROM images WHERE id = ?)", image.id
        )
        if row is None:
            return None
        known = self.working_set(row["id"])
        if known is None and not row["frozen"]:
            return None
        return row["id"], empty() if known is None else known

    def keep_working_set(self, number: ImageId, records: Records) -> None:
        """Keep the working set of an image, unless that is gone; none if it is empty."""
        if len(records):
            self.catalog.execute(
                "INSERT INTO working_sets SELECT id, ? FROM images WHERE id = ?"
                " ON CONFLICT DO UPDATE SET records = excluded.records",
                records.tobytes(), number,
            )  # fmt: skip
        else:
            self.catalog.execute("DELETE FROM working_sets WHERE image = ?", number)

    def records(self) -> list[tuple[ImageId, Entries]]:
        """For each image, the layers that its table may name.

        Those that are alike, as generations and clones of one image are, follow each other: so that who reads their
        tables finds little new in each.
        """
        rows = self.catalog.execute("SELECT id, layers FROM images ORDER BY layers, id").fetchall()
        return [(row["id"], np.frombuffer(row["layers"], "<u4")) for row in rows]

    def naming(self, layers: Collection[LayerId]) -> list[ImageId]:
        """The images whose tables may name one of ``layers``."""
        records = self.records()
        wanted = np.zeros(max((int(record.max(initial=0)) for _, record in records), default=0) + 1, np.bool_)
        wanted[[number for number in layers if number < len(wanted)]] = True
        return [image for image, record in records if wanted[record].any()]

    def shared(self, layers: set[LayerId]) -> set[LayerId]:
        """Those of some layers that more than one image may name, of the images that take writes or are open."""
        rows = self.catalog.execute("SELECT layers FROM images WHERE NOT frozen").fetchall()
        records = [row["layers"] for row in rows]
        records += [pack_layers(image.layers) for image in self._open.values() if image.frozen and image.users]
        numbers, users = np.unique(np.frombuffer(b"".join(records), "<u4"), return_counts=True)
        named = Counter[LayerId]()
        for number, count in zip(numbers.tolist(), users.tolist(), strict=True):
            layer = self.layers.by_id.get(number)
            if layer is not None and layer.base in layers:
                named[layer.base] += count
        return {number for number, count in named.items() if count > 1}

    def forget_layers(self, gone: set[LayerId], users: Iterable[ImageId]) -> None:
        """Strike layers that no table names from the records of ``users``. In a transaction."""
        for number in users if gone else ():
            row = self.catalog.row("SELECT layers FROM images WHERE id = ?", number)
            layers = set() if row is None else unpack_layers(row["layers"])
            if not layers.isdisjoint(gone):
                layers -= gone
                self.catalog.execute("UPDATE images SET layers = ? WHERE id = ?", pack_layers(layers), number)
                if number in self._open:
                    self._open[number].layers = layers

    def trim(self) -> None:
        """Close images that only a missing sync kept open."""
        for image in self.open_images():
            if image.users == 0 and not self.is_stale(image):
                del self._open[image.id]
                image.close()

    def unlink_files(self, number: ImageId) -> None:
        """Remove the table files of an image that is gone (any thread)."""
        for suffix in ("map", "durable"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(number, suffix))

    def remove_files(self, number: ImageId) -> None:
        """Take back the making of an image."""
        image = self._open.pop(number, None)
        if image is not None:
            image.close()
        self.unlink_files(number)

    def sync_job(self, images: Iterable[Image], layers: Iterable[LayerId] = ()) -> SyncJob:
        """Collect what must be written to make ``images``, and ``layers``, durable as they are now."""
        job = SyncJob(self, self.catalog)
        try:
            self._fill(job, images, set(layers))
        except BaseException:
            job.failed()
            job.close()
            raise
        return job

    def _fill(self, job: SyncJob, images: Iterable[Image], wanted: set[LayerId]) -> None:
        for image in images:
            image.users += 1
            job.images.append(image)
            wanted |= image.layers
            if self.synced_meanwhile is not None:
                self.synced_meanwhile.add(image.id)
            if image.frozen:
                self._collect_frozen(job, image)
            elif image.direct is None and (
                image.header_stale or (image._table is not None and image._table.stale.any())
            ):
                self._collect(job, image)
        for number in {self.layers[n].base for n in wanted if n in self.layers.by_id} & self.unsynced:
            layer = self.layers[number]
            job.layers.append((layer, self.layers.path(number)))
            self.unsynced.discard(number)
            if layer.presence is not None:
                taken = layer.presence.take_unkept()
                job.kept.append((self.layers.path(number, "kept"), taken))
                job.undo.append(lambda presence=layer.presence, taken=taken: presence.put_back(taken))  # type: ignore[misc]
            written = self.layers.take_written(number)
            if written is not None:
                job.written.append(written)
            job.undo.append(lambda number=number: self.unsynced.add(number))  # type: ignore[misc]
            if number in self.layers.unsynced_names:
                job.layer_names = self.layers.directory
                self.layers.unsynced_names.discard(number)
                job.undo.append(lambda number=number: self.layers.unsynced_names.add(number))  # type: ignore[misc]

    def _collect(self, job: SyncJob, image: Image) -> None:
        parts = [(0, pack_header(Header(image.size, image.mtime, image.ctime)))]
        table = image.table
        stale = table.stale.copy()
        for first, stop in table.regions(table.touched if image.doubtful else stale):
            parts.append((HEADER + first * ENTRY, bytes(as_bytes(table.entries[first:stop]))))
        table.stale[:] = False
        image.header_stale = False
        job.writes.append((self.path(image.id, "durable"), image.doubtful, table_length(image.size), parts))
        if not image.synced_name:
            job.table_names = self.directory
            image.synced_name = True

        doubtful = image.doubtful
        if doubtful:
            image.doubtful = False
            self.doubtful.discard(image.id)

        def undo() -> None:
            if doubtful:
                image.doubtful = True
                self.doubtful.add(image.id)
            image.header_stale = True
            image.synced_name = False
            table.stale[: len(stale)] |= stale

        job.undo.append(undo)

    def _collect_frozen(self, job: SyncJob, image: Image) -> None:
        if not image.synced_name:
            job.writes.append((image.path, False, table_length(image.size), []))
            job.table_names = self.directory
            image.synced_name = True
            job.undo.append(lambda: setattr(image, "synced_name", False))

    def close(self) -> None:
        """Close all table files."""
        for image in self._open.values():
            image.close()
        self._open.clear()
