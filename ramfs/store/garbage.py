"""Space comes back: pages that no table names are punched, layers that no table names are removed, and the
many small layers of one long-lived image are merged.

A pass alternates between the loop, where nothing else happens meanwhile, and a worker thread, which reads
only files. The caller holds the sync lock throughout, so durable tables stand still:

    begin   loop     what to look at; from here on new users of a layer are noted
    scan    thread   sync everything; read all tables that may name a candidate, current and durable
    decide  loop     leave out what got a new user since; drop rows of layers without any user
    reclaim thread   make that durable, then unlink and punch; copy pages of layers that are merged
    finish  loop     live layers, page by page checked against the table as it is now; swing merged entries

A page of a sealed layer that no table names can never be named again, for a table entry is only ever made
by writing to a live layer or by copying another entry; and the copying is noted.
"""

import os
from typing import Final

import numpy as np

from ramfs.image.digest import DIGEST
from ramfs.image.lineage import exclusive_layers
from ramfs.image.table import Mask, runs_of
from ramfs.store.files import copy_range, punch_hole, stored_pages
from ramfs.store.images import load_table
from ramfs.store.layers import Layer
from ramfs.store.store import Store
from ramfs.units import PAGE, PAGE_SHIFT, ImageId, LayerId

#: An image with more sealed layers of its own than this gets them merged into one.
COLLAPSE_ABOVE: Final = 32
_SLICE: Final = 1 << 16  # table entries looked at in one go


class Pass:
    """One search for garbage. Call the methods in the order of the module's table."""

    def __init__(self, store: Store, *, collapse_above: int = COLLAPSE_ABOVE) -> None:
        self.store = store
        self.collapse_above = collapse_above
        self.job = store.sync_all()
        images, layers = store.images, store.layers
        self.candidates = {layers[n].base for n in images.replaced if n in layers.by_id}
        images.replaced = set()
        images.shared_meanwhile = set()
        self.doomed_images = images.doomed
        images.doomed = set()
        # Every alias of a candidate names the candidate's pages too.
        self.names: dict[LayerId, Layer] = {
            layer.id: layer for layer in layers.by_id.values() if layer.base in self.candidates
        }
        self.users = store.users_of(set(self.names))
        self.used: dict[LayerId, Mask] = {}
        self.named: set[LayerId] = set()
        self.garbage: dict[LayerId, list[tuple[int, int]]] = {}
        self.sealed: set[LayerId] = set()
        self.doomed: set[LayerId] = set()
        self.merge: Merge | None = None

    # -- thread

    def scan(self) -> None:
        """Sync, then find the stored pages of the candidates that no table names."""
        self.job.run()
        for layer in self.candidates:
            try:
                size = os.path.getsize(self.store.layers.path(layer))
            except FileNotFoundError:
                size = 0  # fsck's to tell: here it has nothing to give back
            self.used[layer] = np.zeros(size >> PAGE_SHIFT, np.bool_)
        for image in sorted(set().union(*self.users.values())):
            for suffix in ("map", "durable"):
                self._scan_table(self.store.images.path(image, suffix))
        for number, used in self.used.items():
            if not len(used):
                self.garbage[number] = []
                continue
            fd = os.open(self.store.layers.path(number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                stored = stored_pages(fd)[: len(used)]
            finally:
                os.close(fd)
            self.garbage[number] = list(runs_of(stored & ~used[: len(stored)]))

    def _scan_table(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # no durable copy yet, or a frozen image, or deleted since
        try:
            _, table = load_table(fd, path)
        finally:
            os.close(fd)
        for first, stop in table.regions():
            for low in range(first, stop, _SLICE):
                entries = table.entries[low : min(low + _SLICE, stop)]
                for number in np.unique(entries).tolist():
                    layer = self.names.get(number)
                    if layer is None:
                        continue
                    self.named.add(number)
                    where = np.flatnonzero(entries == number) + (low + layer.shift)
                    used = self.used[layer.base]
                    used[where[where < len(used)]] = True

    # -- loop

    def decide(self) -> None:
        """Drop what got a new user since; forget layers that nobody names."""
        store, images = self.store, self.store.images
        shared = {store.layers[n].base for n in images.shared_meanwhile or () if n in store.layers.by_id}
        for number in shared & self.candidates:
            del self.garbage[number]
            images.replaced.add(number)
        named_bases = {self.names[n].base for n in self.named} | shared
        doomed = [
            layer
            for layer in self.names.values()
            if layer.sealed and layer.base not in shared and layer.id not in self.named
            and (layer.is_alias or layer.base not in named_bases)
        ]  # fmt: skip
        doomed.sort(key=lambda layer: not layer.is_alias)  # rows of aliases refer to their base's
        with store.catalog.transaction():
            for layer in doomed:
                if not layer.is_alias and any(
                    other.base == layer.id and other is not layer for other in store.layers.by_id.values()
                ):
                    continue
                store.layers.forget(layer)
                if not layer.is_alias:
                    self.doomed.add(layer.id)
                    self.garbage.pop(layer.id, None)
            # One that is sealed from now on may meanwhile have taken pages where garbage was found.
            self.sealed = {number for number in self.garbage if store.layers[number].sealed}
            images.forget_layers({layer.id for layer in doomed if layer.id not in store.layers.by_id}, self.users)
        self.merge = Merge.find(store, self.collapse_above)

    # -- thread

    def reclaim(self) -> None:
        """Give the space back on disk."""
        store = self.store
        store.catalog.sync()
        for number in self.doomed_images:
            store.images.unlink_files(number)
        for layer in self.sealed:
            runs = self.garbage[layer]
            if runs:
                fd = os.open(store.layers.path(layer), os.O_RDWR | os.O_CLOEXEC)
                try:
                    for first, stop in runs:
                        punch_hole(fd, first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT)
                finally:
                    os.close(fd)
        if self.merge is not None:
            self.merge.copy()

    # -- loop

    def finish(self) -> None:
        """Remove files of forgotten layers, punch live layers, let tables name the merged layer."""
        store = self.store
        for number in self.doomed:
            store.layers.remove_files(number)
        for layer in self.garbage.keys() - self.sealed:
            if self.garbage[layer]:
                self._punch_live(layer)
        if self.merge is not None:
            self.merge.swing(store.images.shared_meanwhile or set())
        store.images.shared_meanwhile = None

    def _punch_live(self, live: LayerId) -> None:
        images, layers = self.store.images, self.store.layers
        row = self.store.catalog.row("SELECT id FROM images WHERE live = ?", live)
        if row is None:
            images.replaced.add(live)  # sealed since the pass began: the next one looks at it
            return
        image = images.acquire(row["id"])
        try:
            file = layers.file(layers[live])
            for first, stop in self.garbage[live]:
                unnamed = np.ones(stop - first, np.bool_)
                now = image.table.entries[first:stop]
                unnamed[: len(now)] = now != live
                for a, b in runs_of(unnamed):
                    file.punch(first + a, first + b)
        finally:
            images.release(image)

    def give_up(self) -> None:
        """After an exception in any step: nothing counts as looked at."""
        images = self.store.images
        self.job.failed()
        images.replaced |= self.candidates
        images.doomed |= self.doomed_images
        images.shared_meanwhile = None

    def close(self) -> None:
        """Close what the pass opened; always call it."""
        self.job.close()


class Merge:
    """The sealed layers of one image alone, on their way into the largest of them.

    The pages are copied first; entries swing after that, one by one valid at any time. The emptied layers
    are garbage for the next pass, when the durable table no longer names them either.
    """

    def __init__(self, store: Store, image: ImageId, layers: list[LayerId]) -> None:
        self.store = store
        self.image = image
        self.target = max(layers, key=lambda n: os.stat(store.layers.path(n)).st_blocks)
        self.sources = [n for n in layers if n != self.target]

    @classmethod
    def find(cls, store: Store, above: int) -> "Merge | None":
        """An image worth it, if there is one."""
        users = store.users_of({n for n, layer in store.layers.by_id.items() if layer.sealed and layer.digested})
        shifted = {layer.base for layer in store.layers.by_id.values() if layer.is_alias}
        for image in sorted({min(images) for images in users.values() if len(images) == 1}):
            mine = exclusive_layers(users, image) - shifted
            mine = {n for n in mine if not store.layers[n].is_alias}
            if len(mine) > above:
                return cls(store, image, sorted(mine))
        return None

    def copy(self) -> None:
        """Copy the pages that the table names in the sources to their places in the target (thread)."""
        store = self.store
        path = store.images.path(self.image)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _, table = load_table(fd, path)
        finally:
            os.close(fd)
        opened: list[int] = []

        def open_file(number: LayerId, suffix: str, flags: int) -> int:
            opened.append(os.open(store.layers.path(number, suffix), flags | os.O_CLOEXEC))
            return opened[-1]

        try:
            target = open_file(self.target, "ram", os.O_RDWR)
            digests = open_file(self.target, "xxh3", os.O_RDWR)
            for number in self.sources:
                source, hashes = open_file(number, "ram", os.O_RDONLY), open_file(number, "xxh3", os.O_RDONLY)
                for first, stop in table.regions():
                    for a, b in runs_of(table.entries[first:stop] == number):
                        low, count = first + a, b - a
                        copy_range(source, low * PAGE, target, low * PAGE, count * PAGE)
                        copy_range(hashes, low * DIGEST, digests, low * DIGEST, count * DIGEST)
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
        if not shared.isdisjoint([self.target, *self.sources]) or self.image in images.doomed:
            images.replaced.add(self.target)  # which has got pages that no table names
            return
        if self.store.catalog.row("SELECT id FROM images WHERE id = ?", self.image) is None:
            return
        image = images.acquire(self.image)
        try:
            sources = np.array(self.sources, np.uint32)
            for first, stop in image.table.regions():
                part = image.table.entries[first:stop]
                moved = np.isin(part, sources)
                if moved.any():
                    part[moved] = self.target
                    image.table.mark(first, stop)
                    image.store_entries(first, stop)
            image.synced_name = image.synced_name and not image.frozen  # a frozen table is synced in place
            images.replaced |= set(self.sources)
        finally:
            images.release(image)
