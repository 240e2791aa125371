"""Layer files: raw pages, sparse, each at its own offset.

    state     takes writes   named by         digests
    live      of one image   that image       none
    sealed    never again    any image        made in the background, once
    arriving  from a source  any image        those of its source's manifest, if that has one; else when it is sealed

An *alias* is a sealed layer without a file: it names the pages of another layer's file, ``shift`` pages
further on. Aliases exist because page i of an image is page i of its layer: when copy_file_range moves
pages to another place of a file, the pages stay and the name moves.
"""

import contextlib
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ramfs.errors import StoreDamaged
from ramfs.image.digest import DIGEST, digest_pages
from ramfs.image.pages import Buffer
from ramfs.store.behind import Behind, HandedMarks, Marks
from ramfs.store.catalog import ARRIVING_VERSION, Catalog, settle_version
from ramfs.store.files import (
    data_extents,
    is_memory,
    is_open_elsewhere,
    punch_hole,
    read_exactly,
    sync_directory,
    write_all,
)
from ramfs.store.presence import Presence, make_kept
from ramfs.units import LOST, MAX_FILE_SIZE, PAGE, PAGE_SHIFT, LayerId, pages

#: Layer files kept open and mapped at most; the least recently used are closed beyond it.
OPEN_LAYERS: Final = 2048
#: Bytes of layer files mapped at most, as there are 128 TiB of addresses. A layer is mapped in the size of its
#: image, so a thousand generations of a large guest come to that.
MAPPED: Final = 32 << 40
Places = NDArray[np.uint64]
#: Columns of Layers.places; `struct place` of the extension.
BASE, LIMIT, MARKS, SHIFT, HERE = range(5)
_DIGEST_BATCH: Final = 128  # pages hashed before other threads get their turn: about 60 us


class LayerFile:
    """An open layer file, mapped for reading.

    Writes go through pwrite(2), never through the mapping, so a full disk is an error and not a signal. The
    mapping is only ever handed to the kernel (writev), for which an unreadable page is EFAULT.
    """

    __slots__ = ("end", "fd", "handed", "mapped_as", "marks", "path", "size", "view", "writable", "written")

    def __init__(self, path: str, *, writable: bool, create: bool = False, marks: bool = False) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        if create:
            flags |= os.O_CREAT | os.O_TRUNC
        self.path = path
        self.writable = writable
        try:
            self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as exc:
            raise StoreDamaged(f"layer file {path} is missing; run `ramfs fsck` on the store") from exc
        self.size = os.fstat(self.fd).st_size
        if writable and self.size % PAGE:  # until a moment ago it was a direct image's (store/direct.py)
            self.extend(pages(self.size) << PAGE_SHIFT)
        self.end = self.size
        """nothing was ever written behind this byte"""
        self.view: memoryview | None = None
        self.mapped_as: set[LayerId] = set()
        """layers whose place (Layers.places) is in the mapping"""
        self.marks = marks
        """is it noted which pages the kernel was handed, and gave?"""
        self.handed: HandedMarks | None = None
        """pages that were read from the mapping; set by the extension"""
        self.written: Marks | None = None
        """pages that were written since the last sync began"""

    def map(self, end: int) -> memoryview:
        """The file's bytes as memory, at least up to byte ``end``.

        Raises StoreDamaged when the file ends before: a table names pages that are not there, and zeros
        must not stand in for them.
        """
        if self.view is None or end > len(self.view):
            self.size = os.fstat(self.fd).st_size
            if end > self.size:
                raise StoreDamaged(f"layer file {self.path} is shorter than its pages; run `ramfs fsck`")
            self.view = memoryview(mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ))
            if self.marks:
                before = None if self.handed is None else self.handed.marks
                self.handed = HandedMarks(Marks(pages(self.size), before))
        return self.view

    def extend(self, size: int) -> None:
        """Make a live layer's sparse file at least ``size`` bytes long, so that its mapping can stay."""
        if size > self.size:
            os.ftruncate(self.fd, size)
            self.size = size

    def settle(self, size: int) -> None:
        """A live layer is sealed: give its file the length of its image, unless something was written behind that."""
        size = max(size, self.end)
        if size != self.size:
            os.ftruncate(self.fd, size)
            self.size = size

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes; the layer must be live. OSError on a full or broken disk."""
        end = offset + len(data)
        if end > self.size:
            self.extend(min(max(end, 2 * self.size), MAX_FILE_SIZE))
        self.end = max(self.end, end)
        if self.marks:
            stop = pages(end)
            if self.written is None or stop > len(self.written):
                self.written = Marks(pages(self.size), self.written)
            self.written.set(offset >> PAGE_SHIFT, stop)
        write_all(self.fd, data, offset)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of bytes. OSError when the disk cannot read them, StoreDamaged beyond the end of the file."""
        data = read_exactly(self.fd, length, offset)
        if len(data) != length:
            raise StoreDamaged(f"layer file {self.path} is shorter than its pages; run `ramfs fsck`")
        return data

    def punch(self, first: int, stop: int) -> None:
        """Give the space of pages ``[first, stop)`` back."""
        fd = self.fd if self.writable else os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            punch_hole(fd, first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT)
        finally:
            if not self.writable:
                os.close(fd)

    def close(self) -> None:
        """Close the descriptor; the mapping goes when its last user does."""
        self.view = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Layer:
    """A layer of the catalog: its number, state, and where its pages lie. An arriving one counts as sealed."""

    __slots__ = ("base", "copied", "digested", "id", "presence", "promised", "sealed", "shift")

    def __init__(
        self, number: LayerId, sealed: bool, digested: bool, base: LayerId | None, shift: int, copied: bool = False
    ) -> None:
        self.id = number
        self.sealed = sealed
        self.digested = digested
        self.base = number if base is None else base
        self.shift = shift
        self.copied = copied
        """was it made of pages that other layers have too (a flat copy, a clone)? Then names do not tell what is new"""
        self.presence: Presence | None = None
        """of an arriving layer: which pages of its file are here"""
        self.promised = False
        """of an arriving layer: are its digests those of a manifest, with which each page is compared?"""

    @property
    def is_alias(self) -> bool:
        """Has it no file of its own?"""
        return self.base != self.id


class Layers:
    """All layers of a store, and those of their files that are open."""

    def __init__(self, directory: str, catalog: Catalog) -> None:
        self.directory = directory
        self.catalog = catalog
        self.by_id: dict[LayerId, Layer] = {}
        self.arriving: set[LayerId] = set()
        """those whose pages are not all here, and their aliases"""
        self.held: set[LayerId] = set()
        """sealed layers that processes may still have mapped through a mount whose daemon was killed: they must stay"""
        self.making: set[str] = set()
        """files that will be layers, and have no row yet"""
        self.unsynced_names: set[LayerId] = set()
        """layers whose files are new since the directory was last synced"""
        self._aliases: dict[tuple[LayerId, int], Layer] = {}
        self._files: OrderedDict[LayerId, LayerFile] = OrderedDict()
        self.places: Places = np.zeros((64, 5), np.uint64)
        """for each layer: BASE, the address of its page 0 in memory, 0 if it is not mapped; LIMIT, the number of pages
        from 0 on that its mapping reaches; MARKS, the address of its file's LayerFile.handed, 0 if there is none;
        SHIFT, how much further on a page lies in that file (int64); HERE, the address of its file's Presence.states,
        0 if all pages are here"""
        self.retired: list[memoryview | HandedMarks | Presence | None] = []
        """mappings and marks that were replaced during a read, which may have addresses in them: kept until the next"""
        self.drops = not is_memory(directory)
        """can pages leave the page cache of the store? (On tmpfs they are nowhere else.)"""
        self._behind: dict[LayerId, Behind] = {}
        """pages on disk that the kernel keeps for the mount"""
        self._dropped: dict[LayerId, Marks] = {}
        """those of open files that were taken the last time: who reads on has the disk bring some back"""
        self.native: Collection[LayerId] = ()
        """layers that the kernel serves by itself: it has their pages nowhere else"""
        self.undroppable: set[LayerId] = set()
        """layers of which a page may be right in memory and wrong on disk, for its sync failed"""
        self._mapped = 0
        """bytes of files that are mapped, without the retired"""
        for row in catalog.execute("SELECT * FROM layers"):
            state = bool(row["sealed"]), bool(row["digested"])
            self._add(Layer(row["id"], *state, row["base"], row["shift"], bool(row["copied"])))
        for row in catalog.execute("SELECT layer, size, promised FROM arriving"):
            layer = self.by_id[row["layer"]]
            layer.promised = bool(row["promised"])
            self._arrive(layer, Presence(self.path(layer.id, "here"), pages(row["size"])))

    def _arrive(self, layer: Layer, presence: Presence | None) -> None:
        for number in self.names_of(layer):
            self.by_id[number].presence = presence
            (self.arriving.discard if presence is None else self.arriving.add)(number)

    def _add(self, layer: Layer) -> Layer:
        self.by_id[layer.id] = layer
        if layer.is_alias:
            self._aliases[layer.base, layer.shift] = layer
        if layer.presence is not None:
            self.arriving.add(layer.id)
        return layer

    def __getitem__(self, layer: LayerId) -> Layer:
        try:
            return self.by_id[layer]
        except KeyError:
            if layer == LOST:
                raise StoreDamaged("the page was lost; `ramfs fsck` marked it so") from None
            raise StoreDamaged(f"a page table names layer {layer}, which does not exist; run `ramfs fsck`") from None

    def names_of(self, layer: Layer) -> dict[LayerId, int]:
        """What tables may call the pages of a layer's own file: the layer and its aliases, each with its shift."""
        return {number: each.shift for number, each in self.by_id.items() if each.base == layer.id}

    def path(self, layer: LayerId, suffix: str = "ram") -> str:
        """Path of the layer's pages, or with ``suffix`` "xxh3" of its digests."""
        return os.path.join(self.directory, f"{layer:08x}.{suffix}")

    def create(self, size: int) -> Layer:
        """A new live layer with an empty, sparse file of ``size`` bytes. Call in a transaction."""
        number = LayerId(self.catalog.insert("INSERT INTO layers DEFAULT VALUES"))
        file = LayerFile(self.path(number), writable=True, create=True, marks=self.drops)
        self._files[number] = file
        self.unsynced_names.add(number)
        layer = self._add(Layer(number, False, False, None, 0))
        self.catalog.on_rollback(lambda: self.remove_files(number))
        self.catalog.on_rollback(lambda: self._drop(layer))
        file.extend(size)
        self._trim()
        return layer

    def adopt(self, path: str) -> Layer:
        """Make a file of copied pages, complete and on disk, a sealed layer; it takes its place. In a transaction."""
        number = LayerId(self.catalog.insert("INSERT INTO layers (sealed, copied) VALUES (1, 1)"))
        os.rename(path, self.path(number))
        layer = self._add(Layer(number, True, False, None, 0, copied=True))
        self.catalog.on_rollback(lambda: self.remove_files(number))
        self.catalog.on_rollback(lambda: self._drop(layer))
        return layer

    def create_arriving(self, size: int, digests: str | None = None) -> Layer:
        """A new arriving layer for ``size`` bytes, none of them here. Call in a transaction that adds it there.

        ``digests`` is a file on disk with the digests that its pages will have; it takes its place.
        """
        layer = self.create(pages(size) << PAGE_SHIFT)
        self.catalog.execute("UPDATE layers SET sealed = 1 WHERE id = ?", layer.id)
        layer.sealed = True
        make_kept(self.path(layer.id, "kept"), pages(size))
        if digests is not None:
            os.rename(digests, self.path(layer.id, "xxh3"))
            layer.promised = True
        self._arrive(layer, Presence(self.path(layer.id, "here"), pages(size), create=True))
        self.catalog.set_meta("version", ARRIVING_VERSION)
        return layer

    def promise(self, layer: Layer) -> None:
        """The digests of an arriving layer, which are on disk, are those that its pages will have. In a transaction."""
        self.catalog.execute("UPDATE arriving SET promised = 1 WHERE layer = ?", layer.id)
        self.catalog.on_rollback(lambda: setattr(layer, "promised", False))
        layer.promised = True

    def complete(self, layer: Layer) -> None:
        """All that tables name of an arriving layer is here, and on disk. Call in a transaction.

        Its digests, if they were promised, are those of what came: each page was compared.
        """
        presence, digested = layer.presence, layer.digested
        self._forget_arriving(layer)
        self._arrive(layer, None)
        self.catalog.on_rollback(lambda: self._arrive(layer, presence))
        if layer.promised:
            self.catalog.execute("UPDATE layers SET digested = 1 WHERE id = ?", layer.id)
            layer.digested = True
            self.catalog.on_rollback(lambda: setattr(layer, "digested", digested))

    def _forget_arriving(self, layer: Layer) -> None:
        if layer.id not in self.arriving or layer.is_alias:
            return
        self.catalog.execute("DELETE FROM arriving WHERE layer = ?", layer.id)
        settle_version(self.catalog)

    def forget_presence(self, layer: Layer, presence: Presence) -> None:
        """Let go of what told which pages are here, in the step after the commit of :meth:`complete`."""
        for number in self.names_of(layer):
            if number < len(self.places):
                self.places[number, HERE] = 0
        self.retired.append(presence)  # a read under way may have its address
        presence.close()

    def unlink_presence(self, layer: LayerId) -> None:
        """Remove the files that told it, once it is durable that the layer is complete (any thread)."""
        for suffix in ("here", "kept"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(layer, suffix))

    def seal(self, layer: Layer, size: int | None = None) -> None:
        """Let nothing be written to the layer any more. Call in a transaction.

        ``size`` are the bytes of all pages of its image: a file of that length can be flat (store/flat.py).
        """
        if size is not None:
            with contextlib.suppress(OSError):  # it is good at any length that it has
                self.file(layer).settle(size)
        self.catalog.execute("UPDATE layers SET sealed = 1 WHERE id = ?", layer.id)
        layer.sealed = True
        self.catalog.on_rollback(lambda: setattr(layer, "sealed", False))

    def alias(self, layer: Layer, shift: int) -> Layer:
        """The layer that names, at page i, what ``layer`` has at page ``i + shift``. Call in a transaction."""
        shift += layer.shift
        if shift == 0:
            return self[layer.base]
        known = self._aliases.get((layer.base, shift))
        if known is not None:
            return known
        number = LayerId(
            self.catalog.insert(
                "INSERT INTO layers (sealed, digested, base, shift) VALUES (1, 1, ?, ?)", layer.base, shift
            )
        )
        alias = Layer(number, True, True, layer.base, shift)
        alias.presence = layer.presence
        self._add(alias)
        self.catalog.on_rollback(lambda: self._drop(alias))
        return alias

    def file(self, layer: Layer) -> LayerFile:
        """The open file that has the layer's pages."""
        file = self._files.get(layer.base)
        if file is None:
            path = self.path(layer.base)
            file = self._files[layer.base] = LayerFile(
                path, writable=not layer.sealed or layer.presence is not None, marks=self.drops
            )
            self._trim()
        else:
            self._files.move_to_end(layer.base)
        return file

    def map(self, number: LayerId, page: int) -> int:
        """Map a layer, at least up to ``page``; returns the address of that page. Raises StoreDamaged, OSError."""
        layer = self[number]
        file = self.file(layer)
        before, marks = file.view, file.handed
        view = file.map((page + layer.shift + 1) << PAGE_SHIFT)
        if before is not view:
            self._mapped += len(view)
            self._unmap(file)
            self.retired.append(marks)
            if before is not None:
                self._retire(before)
            self._limit_mapped(file)
        file.mapped_as.add(number)
        if number >= len(self.places):
            self.places = np.concatenate([self.places, np.zeros((number, 5), np.uint64)])
        address = np.frombuffer(view, np.uint8).ctypes.data + (layer.shift << PAGE_SHIFT)
        place = self.places[number]
        place[BASE] = address
        place[LIMIT] = (len(view) >> PAGE_SHIFT) - layer.shift
        place[MARKS] = 0 if file.handed is None else file.handed.address
        place[SHIFT] = layer.shift & (1 << 64) - 1
        place[HERE] = 0 if layer.presence is None else layer.presence.address
        return address + (page << PAGE_SHIFT)

    def _unmap(self, file: LayerFile) -> None:
        for number in file.mapped_as:
            self.places[number, [BASE, MARKS]] = 0
        file.mapped_as.clear()

    def _retire(self, view: memoryview) -> None:
        self._mapped -= len(view)
        self.retired.append(view)

    def _drop_mapping(self, file: LayerFile) -> None:
        self._unmap(file)
        self.retired.append(file.handed)
        if file.view is not None:
            self._retire(file.view)
            file.view = None

    def _limit_mapped(self, kept: LayerFile) -> None:
        """Let go of the mappings of files that were not looked for longest."""
        for file in self._files.values():
            if self._mapped <= MAPPED:
                return
            if file is not kept:
                self._drop_mapping(file)

    def _trim(self) -> None:
        while len(self._files) > OPEN_LAYERS:
            number, oldest = next(iter(self._files.items()))
            self._drop_mapping(oldest)  # perhaps in the middle of a read
            self.close_file(number)

    def close_file(self, number: LayerId) -> None:
        """Close the file of a layer, if it is open."""
        file = self._files.pop(number, None)
        if file is not None:
            self._unmap(file)
            self._dropped.pop(number, None)
            self._mapped -= 0 if file.view is None else len(file.view)
            if file.written is not None and number in self.by_id:
                self.undroppable.add(number)  # it is forgotten which pages are not on disk
            file.close()

    def let_go(self, number: LayerId) -> None:
        """Have no descriptor and no mapping of a layer's file any more; not during a read."""
        self.close_file(number)
        self._behind.pop(number, None)
        self.retired.clear()

    def unseal(self, layer: Layer) -> None:
        """Let a layer that nothing names yet take writes. Call in a transaction."""
        self.catalog.execute("UPDATE layers SET sealed = 0, digested = 0 WHERE id = ?", layer.id)
        before = layer.sealed, layer.digested
        layer.sealed = layer.digested = False

        def undo() -> None:
            layer.sealed, layer.digested = before

        self.catalog.on_rollback(undo)

    def forget(self, layer: Layer) -> None:
        """Remove the row of a layer that no table names. In a transaction; :meth:`unlink_files` once it is durable."""
        self._forget_arriving(layer)
        self.catalog.execute("DELETE FROM layers WHERE id = ?", layer.id)
        self._drop(layer)
        self.catalog.on_rollback(lambda: self._add(layer))

    def _drop(self, layer: Layer) -> None:
        del self.by_id[layer.id]
        self.undroppable.discard(layer.id)
        self._behind.pop(layer.id, None)
        self.arriving.discard(layer.id)
        if layer.is_alias:
            del self._aliases[layer.base, layer.shift]
        elif layer.presence is not None:
            layer.presence.close()

    def remove_files(self, layer: LayerId) -> None:
        """Remove the files of a layer whose row is gone."""
        self.close_file(layer)
        self.unlink_files(layer)

    def find_held(self) -> None:
        """Note the sealed layers that somebody has open, before we have one open ourselves."""
        self.held = {
            n for n, layer in self.by_id.items()
            if layer.sealed and not layer.is_alias and is_open_elsewhere(self.path(n))
        }  # fmt: skip

    def unlink_files(self, layer: LayerId) -> None:
        """Remove the files of a layer that is closed (any thread)."""
        self.unsynced_names.discard(layer)
        for suffix in ("ram", "xxh3", "here", "kept"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(layer, suffix))

    # -- drop-behind

    def take_written(self, number: LayerId) -> Behind | None:
        """The pages that were written since this was last called: droppable once they are on disk."""
        file = self._files.get(number)
        if file is None or file.written is None:
            return None
        written, file.written = file.written, None
        return Behind(number, file.path, file.view, written)

    def note_behind(self, new: Behind) -> None:
        """These pages are on disk, and the store's page cache need not have them."""
        known = self._behind.get(new.layer)
        if known is not None:
            marks = Marks(max(len(new.marks), len(known.marks)), known.marks)
            marks.add(new.marks)
            new = new._replace(marks=marks)
        self._behind[new.layer] = new

    def take_behind(self, shared: Callable[[set[LayerId]], set[LayerId]]) -> list[Behind]:
        """What may leave the store's page cache now. Call while no sync runs.

        ``shared`` tells which of some sealed layers are read by more than one image: these stay. So does what
        is still to be digested.
        """
        for number, file in self._files.items():
            taken = None if file.handed is None else file.handed.take()
            if taken is not None:
                self.note_behind(Behind(number, file.path, file.view, taken))
        there = {number: self[number] for number in self._behind if number in self.by_id}
        sealed = {number for number, layer in there.items() if layer.sealed}
        kept = shared(sealed) if sealed else set()
        kept |= {number for number in sealed if not there[number].digested} | set(self.native)
        found = []
        for each in [self._behind.pop(number) for number in there if number not in kept | self.undroppable]:
            open_file = self._files.get(each.layer)
            if open_file is None:
                found.append(each._replace(view=None))
                continue
            again, self._dropped[each.layer] = self._dropped.get(each.layer), each.marks
            for marks in (each.marks, again):
                if marks is not None and open_file.written is not None:
                    marks.remove(open_file.written)  # on disk when their own sync has succeeded
            found.append(each._replace(view=open_file.view, again=again))
        return found

    def write_digests(self, layer: LayerId) -> Behind:
        """Hash every stored page of a sealed layer into its digest file (any thread; gives way often).

        Returns which pages it has read.
        """
        temporary = self.path(layer, "xxh3") + ".new"
        source = os.open(self.path(layer), os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(source).st_size
                read = Marks(pages(size))
                os.ftruncate(target, ((size + PAGE - 1) >> PAGE_SHIFT) * DIGEST)
                for start, stop in data_extents(source):
                    read.set(start >> PAGE_SHIFT, pages(stop))
                    for at in range(start, stop, _DIGEST_BATCH * PAGE):
                        data = read_exactly(source, min(_DIGEST_BATCH * PAGE, stop - at), at)
                        write_all(target, digest_pages(data), (at >> PAGE_SHIFT) * DIGEST)
                os.fdatasync(target)
            finally:
                os.close(target)
            os.rename(temporary, self.path(layer, "xxh3"))
            sync_directory(self.directory)  # before the catalog says that they are there
        finally:
            os.close(source)
        return Behind(layer, self.path(layer), None, read)

    def close(self) -> None:
        """Close all files."""
        self.retired.clear()
        for number in list(self._files):
            self.close_file(number)
        for layer in self.by_id.values():
            if layer.presence is not None:
                layer.presence.close()
