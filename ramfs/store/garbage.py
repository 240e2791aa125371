"""Space comes back: pages that no table names are punched, layers that no table names are removed, and the
many small layers of one long-lived image are merged.

A pass alternates between the loop, where nothing else happens meanwhile, and a worker thread, which reads
only files. Where it says so the caller holds the sync lock, so that no durable table changes:

    begin    loop, locked     what to look at; from here on new users of a layer, and syncs, are noted
    settle   thread, locked   sync everything
    scan     thread           read all tables that may name a candidate, current and durable
    rescan   thread, locked   read those again that were synced since
    decide   loop, locked     leave out what got a new user since; drop rows of layers without any user;
                              punch live layers, page by page checked against the table as it is now
    reclaim  thread           make that durable, then unlink and punch; copy pages of layers that are merged
    finish   loop             let tables name the merged layer

A page of a sealed layer that no table names can never be named again, for a table entry is only ever made
by writing to a live layer or by copying another entry; and the copying is noted.
"""

import contextlib
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ramfs.image.digest import DIGEST
from ramfs.image.table import CHUNK_SHIFT, Mask, PageTable, runs_of
from ramfs.store.files import copy_range, data_extents, punch_hole
from ramfs.store.images import Image, read_table
from ramfs.store.store import Store
from ramfs.units import PAGE, PAGE_SHIFT, ImageId, LayerId

#: An image with more sealed layers of its own than this gets them merged into one.
COLLAPSE_ABOVE: Final = 32
#: Table entries looked at in one go: about a millisecond in which the loop waits for the interpreter.
_SLICE: Final = 1 << 16
#: Pages of layers looked at in one pass, two bytes of memory for each; what is over waits for the next.
_AT_ONCE: Final = 1 << 26
_NOWHERE: Final = -(1 << 62)
#: Pages that get or lack that memory together: a file of terabytes with a few pages in it takes next to none.
_CHUNK_SHIFT: Final = 12
_CHUNK: Final = 1 << _CHUNK_SHIFT


class _Marks:
    """Which pages have a name; by their places, that is the pages of all candidates in a row.

    A place is some chunk's, and the chunk has a slot in the array if something was stored in it at first.
    Slot 0 is for all the others, and nobody reads it.
    """

    def __init__(self, end: int, extents: list[tuple[int, int]]) -> None:
        chunks = np.zeros(end >> _CHUNK_SHIFT, np.bool_)
        for start, stop in extents:
            chunks[start >> _CHUNK_SHIFT : ((stop - 1) >> _CHUNK_SHIFT) + 1] = True
        self._slots = np.where(chunks, np.cumsum(chunks), 0)
        self._named: Mask = np.zeros((int(np.count_nonzero(chunks)) + 1) << _CHUNK_SHIFT, np.bool_)

    def name(self, places: NDArray[np.int64]) -> None:
        """Some table names these."""
        self._named[(self._slots[places >> _CHUNK_SHIFT] << _CHUNK_SHIFT) + (places & (_CHUNK - 1))] = True

    def unnamed(self, start: int, stop: int, extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The runs within ``[start, stop)``, which are whole chunks, that lie in ``extents`` and have no name."""
        first = start >> _CHUNK_SHIFT
        slots = self._slots[first : stop >> _CHUNK_SHIFT]
        found: list[tuple[int, int]] = []
        at = 0
        for a, b in runs_of(slots > 0):
            low, high = (first + a) << _CHUNK_SHIFT, (first + b) << _CHUNK_SHIFT
            stored = np.zeros(high - low, np.bool_)
            while at < len(extents) and extents[at][0] < high:
                stored[max(extents[at][0] - low, 0) : max(min(extents[at][1], high) - low, 0)] = True
                if extents[at][1] > high:
                    break  # goes on in chunks that were empty, and perhaps beyond
                at += 1
            base = int(slots[a]) << _CHUNK_SHIFT
            stored &= ~self._named[base : base + len(stored)]
            found += [(low + c, low + d) for c, d in runs_of(stored)]
        return found


class Pass:
    """One search for garbage. Call the methods in the order of the module's table."""

    def __init__(self, store: Store, *, collapse_above: int = COLLAPSE_ABOVE) -> None:
        self.store = store
        self.collapse_above = collapse_above
        images, layers = store.images, store.layers
        self.job = store.sync_all()
        self.candidates: dict[LayerId, tuple[int, int]] = {}
        """files to look at: the places of their pages, from and to"""
        waiting = {layers[n].base for n in images.replaced if n in layers.by_id} - layers.held
        # What a direct image's file has is what the image has.
        waiting -= images.direct_layers()
        images.replaced = self._take(waiting)
        images.shared_meanwhile = set()
        images.synced_meanwhile = set()
        self.doomed_images = images.doomed
        images.doomed = set()
        # Every alias of a candidate names the candidate's pages too.
        self.names = {n: layer for n, layer in layers.by_id.items() if layer.base in self.candidates}
        highest = max(layers.by_id, default=0) + 1
        self._named = np.zeros(highest, np.bool_)
        self._start: NDArray[np.int64] = np.full(highest, _NOWHERE)
        self._stop: NDArray[np.int64] = np.zeros(highest, np.int64)
        for number, layer in self.names.items():
            start, stop = self.candidates[layer.base]
            self._start[number], self._stop[number] = start + layer.shift, stop
        self.users = images.naming(self.names)
        self._before = PageTable()
        self.garbage: dict[LayerId, list[tuple[int, int]]] = {}
        self.sealed: set[LayerId] = set()
        self.doomed: set[LayerId] = set()
        self.merge: Merge | None = None

    def _take(self, waiting: set[LayerId]) -> set[LayerId]:
        """Take as many candidates as fit, at least one; returns the others."""
        end = memory = 0
        for number in sorted(waiting):
            try:
                told = os.stat(self.store.layers.path(number))
                chunks = ((told.st_size >> PAGE_SHIFT) + _CHUNK - 1) >> _CHUNK_SHIFT
                memory += min(chunks, (told.st_blocks << 9 >> PAGE_SHIFT) + 1) << _CHUNK_SHIFT
            except FileNotFoundError:
                chunks = 0  # fsck's to tell: here it has nothing to give back
            if self.candidates and memory > _AT_ONCE:
                break
            self.candidates[number] = (end, end + (chunks << _CHUNK_SHIFT))
            end += chunks << _CHUNK_SHIFT
        return waiting - self.candidates.keys()

    # -- thread

    def settle(self) -> None:
        """Make everything durable, so that durable tables name little that current ones do not."""
        self.job.run()

    def scan(self) -> None:
        """Find the stored pages of the candidates that no table names."""
        end = max((stop for _, stop in self.candidates.values()), default=0)
        self.marks = _Marks(end, [extent for number in self.candidates for extent in self._extents(number)])
        for image in self.users:
            self._scan_image(image)

    def rescan(self) -> None:
        """Look again at the images that were synced during the scan: their durable tables are others now."""
        for image in (self.store.images.synced_meanwhile or set()).intersection(self.users):
            self._scan_image(image)
        for number, (start, stop) in self.candidates.items():
            if start < stop:
                runs = self.marks.unnamed(start, stop, self._extents(number))
                self.garbage[number] = [(a - start, b - start) for a, b in runs]

    def _extents(self, number: LayerId) -> list[tuple[int, int]]:
        """The places of a candidate where something is stored, a page in part too."""
        start, stop = self.candidates[number]
        if start == stop:
            return []
        fd = os.open(self.store.layers.path(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            runs = [
                (start + (low >> PAGE_SHIFT), min(start + ((high + PAGE - 1) >> PAGE_SHIFT), stop))
                for low, high in data_extents(fd)
            ]
        finally:
            os.close(fd)
        return [(low, high) for low, high in runs if low < high]

    def _scan_image(self, image: ImageId) -> None:
        for suffix in ("map", "durable"):  # a durable table is missing until the first sync, or frozen for good
            table = read_table(self.store.images.path(image, suffix))
            if table is None:
                continue
            for first, stop in table.regions():
                for low in range(first, stop, _SLICE):
                    self._scan_entries(low, table.entries[low : min(low + _SLICE, stop)])
            self._before = table

    def _scan_entries(self, low: int, entries: NDArray[np.uint32]) -> None:
        # What the table that was looked at last names at the same places has been marked: most, between generations.
        known = self._before.entries[low : low + len(entries)]
        new = np.append(entries[: len(known)] != known, np.ones(len(entries) - len(known), np.bool_))
        where = np.flatnonzero(new)
        entries = entries[where]
        entries = np.where(entries < len(self._named), entries, 0)  # made since the pass began: no candidates
        self._named[entries] = True
        places = self._start[entries] + (where + low)
        self.marks.name(places[(places >= 0) & (places < self._stop[entries])])

    # -- loop

    def decide(self) -> None:
        """Drop what got a new user since; forget layers that nobody names; punch live layers."""
        store, images = self.store, self.store.images
        shared = {store.layers[n].base for n in images.shared_meanwhile or () if n in store.layers.by_id}
        for number in shared & self.candidates.keys():
            self.garbage.pop(number, None)
            images.replaced.add(number)
        used_files = {layer.base for n, layer in self.names.items() if self._named[n]} | shared
        doomed = [
            layer
            for n, layer in self.names.items()
            if layer.sealed and layer.base not in shared and not self._named[n]
            and (layer.is_alias or layer.base not in used_files)
        ]  # fmt: skip
        kept_aliases = {layer.base for layer in store.layers.by_id.values() if layer.is_alias} - {
            layer.base for layer in doomed if not layer.is_alias
        }
        with store.catalog.transaction():
            for layer in sorted(doomed, key=lambda layer: not layer.is_alias):  # aliases refer to their base's row
                if layer.id in kept_aliases:
                    continue
                store.layers.forget(layer)
                if not layer.is_alias:
                    self.doomed.add(layer.id)
                    store.layers.close_file(layer.id)
                    self.garbage.pop(layer.id, None)
            images.forget_layers({layer.id for layer in doomed} - store.layers.by_id.keys(), self.users)
        # One that is sealed from now on may meanwhile have taken pages where garbage was found.
        self.sealed = {number for number in self.garbage if store.layers[number].sealed}
        for number in self.garbage.keys() - self.sealed:
            self._punch_live(number)
        images.synced_meanwhile = None
        self.merge = Merge.find(store, self.collapse_above)

    def _punch_live(self, live: LayerId) -> None:
        images, layers = self.store.images, self.store.layers
        row = self.store.catalog.row("SELECT id FROM images WHERE live = ?", live)
        if row is None or not self.garbage[live]:
            return
        image = images.acquire(row["id"])
        try:
            if image.direct is not None:  # since then
                return
            file = layers.file(layers[live])
            for first, stop in self.garbage[live]:
                unnamed = np.ones(stop - first, np.bool_)
                now = image.table.entries[first:stop]
                unnamed[: len(now)] = now != live
                for a, b in runs_of(unnamed):
                    file.punch(first + a, first + b)
        finally:
            images.release(image)

    # -- thread

    def reclaim(self) -> None:
        """Give the space back on disk."""
        store = self.store
        store.catalog.sync()
        for image in self.doomed_images:
            store.images.unlink_files(image)
        for number in self.doomed:
            store.layers.unlink_files(number)
        for layer in self.sealed:
            if self.garbage[layer]:
                fd = os.open(store.layers.path(layer), os.O_RDWR | os.O_CLOEXEC)
                try:
                    for first, stop in self.garbage[layer]:
                        punch_hole(fd, first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT)
                finally:
                    os.close(fd)
        if self.merge is not None:
            self.merge.copy()

    # -- loop

    def finish(self) -> None:
        """Let tables name the merged layer."""
        images = self.store.images
        if self.merge is not None:
            self.merge.swing(images.shared_meanwhile or set())
        images.shared_meanwhile = None

    def give_up(self) -> None:
        """After an exception in any step: nothing counts as looked at."""
        images = self.store.images
        self.job.failed()
        images.replaced |= self.candidates.keys()
        images.doomed |= self.doomed_images
        images.shared_meanwhile = images.synced_meanwhile = None
        for number in self.doomed - self.store.layers.by_id.keys():  # without a row no later pass would find them
            with contextlib.suppress(OSError):
                self.store.layers.unlink_files(number)

    def close(self) -> None:
        """Close what the pass opened; always call it."""
        self.job.close()


class Merge:
    """The sealed layers of one image alone, on their way into the largest of them.

    Pages are copied first; entries swing after that, one by one valid at any time. Only pages move that the
    current and the durable table find in the same source: no table finds anything at their new places yet.
    The emptied layers are garbage for the next pass, when the durable table no longer names them either.
    """

    def __init__(self, store: Store, image: ImageId, layers: list[LayerId]) -> None:
        self.store = store
        self.image = image
        self.target = max(layers, key=lambda n: os.stat(store.layers.path(n)).st_blocks)
        self.sources = [n for n in layers if n != self.target]
        self.copied: list[tuple[NDArray[np.int64], LayerId]] = []
        """page numbers, and the source that they were copied from"""

    @classmethod
    def find(cls, store: Store, above: int) -> "Merge | None":
        """An image worth it, if there is one."""
        layers = store.layers.by_id.values()
        records = store.images.records()
        named = np.concatenate([np.zeros(0, np.uint32), *(record for _, record in records)])
        highest = max(int(named.max(initial=0)), *store.layers.by_id, 0) + 1
        alone = np.bincount(named, minlength=highest) == 1
        fit = np.zeros(highest, np.bool_)
        fit[[layer.id for layer in layers if layer.sealed and layer.digested]] = True
        fit[list(store.layers.held)] = False
        fit[[n for layer in layers if layer.is_alias for n in (layer.id, layer.base)]] = False
        for image, record in records:
            mine = record[(alone & fit)[record]]
            if len(mine) > above:
                return cls(store, image, [LayerId(n) for n in mine.tolist()])
        return None

    def copy(self) -> None:
        """Copy pages to their places in the target (thread)."""
        layers, images = self.store.layers, self.store.images
        table = read_table(images.path(self.image))
        if table is None:
            return
        durable = read_table(images.path(self.image, "durable"))
        settled = np.ones(table.capacity, np.bool_)
        if durable is not None:
            shorter = min(table.capacity, durable.capacity)
            settled[:shorter] = table.entries[:shorter] == durable.entries[:shorter]
            settled[shorter:] = False
        opened: list[int] = []

        def open_file(number: LayerId, suffix: str, flags: int) -> int:
            opened.append(os.open(layers.path(number, suffix), flags | os.O_CLOEXEC))
            return opened[-1]

        try:
            target = open_file(self.target, "ram", os.O_RDWR)
            digests = open_file(self.target, "xxh3", os.O_RDWR)
            for number in self.sources:
                source, hashes = open_file(number, "ram", os.O_RDONLY), open_file(number, "xxh3", os.O_RDONLY)
                for first, stop in table.regions():
                    moved = (table.entries[first:stop] == number) & settled[first:stop]
                    for a, b in runs_of(moved):
                        low, count = first + a, b - a
                        copy_range(source, low * PAGE, target, low * PAGE, count * PAGE)
                        copy_range(hashes, low * DIGEST, digests, low * DIGEST, count * DIGEST)
                    self.copied.append((np.flatnonzero(moved) + first, number))
                os.close(opened.pop())
                os.close(opened.pop())
            os.fdatasync(target)
            os.fdatasync(digests)
        finally:
            for fd in opened:
                os.close(fd)

    def swing(self, shared: set[LayerId]) -> None:
        """Let the table name the target (loop), unless one of the layers got another user meanwhile."""
        images = self.store.images
        images.replaced |= {self.target, *self.sources}  # pages without a name: in these if it is done, else in it
        if not shared.isdisjoint([self.target, *self.sources]):
            return
        if not images.exists(self.image):
            return
        image = images.acquire(self.image)
        try:
            if image.direct is None:
                self._swing(image)
        finally:
            images.release(image)

    def _swing(self, image: Image) -> None:
        table = image.table
        changed = np.zeros_like(table.touched)
        for pages, source in self.copied:
            moved = pages[table.entries[pages] == source]
            table.entries[moved] = self.target
            changed[moved >> CHUNK_SHIFT] = True
        for first, stop in table.regions(changed):
            table.mark(first, stop)
            image.store_entries(first, stop)
        image.synced_name = image.synced_name and not image.frozen  # a frozen table is synced in place
