"""How an image becomes direct (store/direct.py): its live layer's file is made to read as the image does.

An image whose pages lie in its live layer alone has that file already, but for pages that lost their names. A clone
has pages in other layers: it gets a new layer, which shares their blocks.
"""

import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from ramfs.image.table import Entries, equal_runs, runs_of
from ramfs.store.catalog import DIRECT_VERSION
from ramfs.store.files import punch_hole, sync_directory
from ramfs.store.flat import Flatten
from ramfs.store.images import Image, pack_layers
from ramfs.store.layers import Layer
from ramfs.store.reflink import stored_extents
from ramfs.store.store import Store
from ramfs.units import PAGE, PAGE_SHIFT, ZERO, LayerId

#: Runs of pages in other layers that an image may have to become direct: each takes some 20 us, for which its opener
#: waits. One with more is served by the daemon, which has no such wait.
MOST_RUNS: Final = 4096


class Entry:
    """An image on its way to being direct. Call the methods in this order, and ``close`` whatever came of it:

        prepare  thread   look what the layer's file has beside the image; or copy all of it into a new file
        (the caller syncs the image, if it ``needs_sync``)
        publish  loop     remove what is too much, or make the layer
        settle   thread   make its file durable
        commit   loop     let the file be the image
        (the caller syncs the catalog in a thread, before anybody may write)

    Those of the loop tell by False that the image has changed meanwhile.
    """

    def __init__(self, store: Store, image: Image) -> None:
        self.store = store
        self.image = image
        self.needs_sync = False
        """after ``prepare``: what is to be removed may be in the durable table"""
        self._size = image.size
        self._live = image.live
        self._parts = self._look()
        named = {LayerId(n) for _, entries in self._parts for n in np.unique(entries).tolist()} - {ZERO}
        self._own = named <= ({image.live.id} if image.live is not None else set())
        runs = 0 if self._own else sum(len(equal_runs(entries)) for _, entries in self._parts)
        known = [store.layers.by_id.get(number) for number in named]  # LOST is none
        here = all(layer is not None and layer.presence is None for layer in known)
        self.possible = runs <= MOST_RUNS and here
        self._copy = None if self._own or not self.possible else Flatten(store, image)
        self._strays: list[tuple[int, int]] = []
        self._settled = True
        self._layer: Layer | None = None

    def _look(self) -> list[tuple[int, Entries]]:
        image = self.image
        return [
            (first, image.table.entries[first:stop].copy()) for first, stop in image.table.regions(stop=image.pages)
        ]

    def _changed(self) -> bool:
        image = self.image
        if image.live is not self._live or image.size != self._size or image.frozen or image.direct is not None:
            return True
        if not self.store.images.exists(image.id):
            return True
        now = self._look()
        return len(now) != len(self._parts) or not all(
            a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(now, self._parts, strict=True)
        )

    def prepare(self) -> None:
        """Thread. Raises OSError."""
        if self._copy is not None:
            while self._copy.step():
                pass
            os.truncate(self._copy.path, self._size)
        elif self._live is not None:
            fd = os.open(self.store.layers.path(self._live.id), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._strays = list(self._find_strays(stored_extents(fd)))
                self._settled = not self._strays and os.fstat(fd).st_size == self._size
            finally:
                os.close(fd)
            self.needs_sync = bool(self._strays) or (self._size % PAGE != 0 and not self._settled)

    def _find_strays(self, extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The pages of the layer that its image does not name."""
        named = np.zeros(max((stop for _, stop in extents), default=0), np.bool_)
        for first, entries in self._parts:
            part = named[first : first + len(entries)]
            part[:] = entries[: len(part)] != ZERO
        for first, stop in extents:
            for a, b in runs_of(~named[first:stop]):
                yield first + a, first + b

    def publish(self) -> bool:
        """Loop. Raises OSError."""
        if self._changed():
            return False
        store, image = self.store, self.image
        if self._copy is not None:
            with store.catalog.transaction():
                self._layer = store.layers.adopt(self._copy.path)
                store.images.name_layers(image, {self._layer.id})
            self._copy.layer = self._layer.id
            return True
        self._layer = self._live = store.images.live_layer(image)
        store.layers.let_go(self._layer.id)
        fd = os.open(store.layers.path(self._layer.id), os.O_RDWR | os.O_CLOEXEC)
        try:
            for first, stop in self._strays:
                punch_hole(fd, first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT)
            os.ftruncate(fd, self._size)
        finally:
            os.close(fd)
        return True

    def settle(self) -> None:
        """Thread: a mark on disk never lacks its file, nor that its length. Raises OSError."""
        assert self._layer is not None
        path = self.store.layers.path(self._layer.id)
        if not self._own or not self._settled:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        if not self._own or self._layer.id in self.store.layers.unsynced_names:
            sync_directory(self.store.layers.directory)

    def commit(self) -> bool:
        """Loop. Raises OSError."""
        if self._changed():
            return False
        assert self._layer is not None
        store, image, layer = self.store, self.image, self._layer
        path = store.layers.path(layer.id)
        store.layers.let_go(layer.id)
        os.utime(path, ns=(image.mtime, image.mtime))
        before = image.layers
        with store.catalog.transaction():
            if not self._own:
                store.images.seal(image)
                store.layers.unseal(layer)
            store.catalog.execute(
                "UPDATE images SET live = ?, layers = ?, direct = 1 WHERE id = ?",
                layer.id, pack_layers({layer.id}), image.id,
            )  # fmt: skip
            store.catalog.set_meta("version", DIRECT_VERSION)
        image.live, image.layers, image.direct = layer, {layer.id}, path
        image.reload()
        image.header_stale = image.doubtful = False
        store.images.doubtful.discard(image.id)
        store.images.direct.add(image.id)
        store.images.unsynced.discard(layer.id)
        store.layers.unsynced_names.discard(layer.id)
        store.images.replaced |= before - {layer.id}
        return True

    def close(self) -> None:
        """Loop; leaves nothing that is not named."""
        if self._copy is not None:
            self._copy.close()
