"""Flat images: those of which one layer's file reads as the image does, byte for byte and to the last one.

The kernel can serve such a file from the layer without asking anybody (fuse/passthrough.py). What makes an image flat:

- its table names one sealed layer and nothing else, no alias, no lost page;
- where an entry is 0 the layer has a hole, or zeros;
- the layer's file is as long as the image.

An image that was written by one guest since it was made, and then frozen, is flat. A sealed layer gets no more
data, so what was found once stays true while the table names that layer alone. Others can be made flat:
:class:`Flatten` copies all pages of a frozen image into a new layer.
"""

import contextlib
import errno
import os
import time
from collections.abc import Generator
from typing import Final

import numpy as np

from ramfs.errors import FileError
from ramfs.image.pages import is_zero
from ramfs.image.table import runs_of
from ramfs.store.files import copy_range, data_extents, read_exactly, sync_directory
from ramfs.store.images import Image, read_table
from ramfs.store.layers import Layers
from ramfs.store.store import Store
from ramfs.units import LOST, PAGE_SHIFT, ZERO, LayerId, pages

#: Bytes looked at in one go.
_PIECE: Final = 1 << 20
#: Bytes copied in one go, and seconds of copying after which it is looked whether to go on.
_COPIED: Final = 16 << 20
_TURN: Final = 0.05


def sole_layer(image: Image, layers: Layers) -> LayerId | None:
    """The sealed layer that has all stored pages of an image; None if there is none, or more than one."""
    found = ZERO
    for first, stop in image.table.regions(stop=image.pages):
        entries = image.table.entries[first:stop]
        highest = LayerId(int(entries.max()))
        if highest == ZERO:
            continue
        if found not in (ZERO, highest) or not ((entries == highest) | (entries == ZERO)).all():
            return None
        found = highest
    layer = layers.by_id.get(found)  # neither ZERO nor LOST is there
    fit = layer is not None and layer.sealed and layer.presence is None and not layer.is_alias
    return layer.id if layer is not None and fit else None


def reads_alike(table_path: str, layer_path: str, size: int) -> bool:
    """Does a layer's file read as the image of ``size`` bytes whose table names that layer alone? (Any thread.)

    Raises OSError, StoreDamaged.
    """
    table = read_table(table_path)
    if table is None:
        return False
    fd = os.open(layer_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != size:
            return False  # a read beyond the end of the image would find something, or a fault before it nothing
        for low, high in data_extents(fd):
            first = low >> PAGE_SHIFT
            unnamed = table.entries[first : pages(high)] == ZERO
            for a, b in runs_of(unnamed):
                for at in range((first + a) << PAGE_SHIFT, (first + b) << PAGE_SHIFT, _PIECE):
                    if not is_zero(read_exactly(fd, min(_PIECE, ((first + b) << PAGE_SHIFT) - at), at)):
                        return False
        return True
    finally:
        os.close(fd)


class Flatten:
    """A frozen image on its way into a layer of its own. Call the methods in this order:

        step     thread   copy pages into a file that has no row yet, until it returns False
        publish  loop     the file becomes a sealed layer
        settle   thread   make the layer durable, file, name and row
        swing    loop     let the table name it
        close    loop     whatever came of it

    The file system of the store shares the extents where it can (XFS, btrfs). Each entry is valid before and after
    it swings, and so a daemon may be killed at any step; what it leaves is swept at the next mount, or is garbage.
    """

    def __init__(self, store: Store, image: Image) -> None:
        """Raises FileError (EIO) for an image with lost pages."""
        self.store = store
        self.image = image
        self.path = os.path.join(store.layers.directory, f"{image.id:08x}.ram.new")
        self.done = 0
        """bytes that were copied"""
        self.layer: LayerId | None = None
        self._parts = [
            (first, image.table.entries[first:stop].copy()) for first, stop in image.table.regions(stop=image.pages)
        ]
        self.total = sum(int(np.count_nonzero(entries)) for _, entries in self._parts) << PAGE_SHIFT
        """bytes that are to be copied"""
        named = {LayerId(n) for _, entries in self._parts for n in np.unique(entries).tolist()} - {ZERO}
        if LOST in named:
            raise FileError(errno.EIO, "pages of it are lost; `ramfs fsck` names them")
        self._sources = [store.layers[number] for number in sorted(named)]
        if any(layer.presence is not None for layer in self._sources):
            raise FileError(errno.EBUSY, "it is still arriving; wait until it is here")
        self._copying = self._copy()
        store.layers.making.add(self.path)

    def _copy(self) -> Generator[None, None, None]:
        """Copy piece by piece (thread)."""
        target = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(target, self.image.pages << PAGE_SHIFT)
            for layer in self._sources:
                source = os.open(self.store.layers.path(layer.base), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    for first, entries in self._parts:
                        for a, b in runs_of(entries == layer.id):
                            for low in range((first + a) << PAGE_SHIFT, (first + b) << PAGE_SHIFT, _COPIED):
                                length = min(_COPIED, ((first + b) << PAGE_SHIFT) - low)
                                copy_range(source, low + (layer.shift << PAGE_SHIFT), target, low, length)
                                self.done += length
                                yield
                finally:
                    os.close(source)
            os.fdatasync(target)
        finally:
            os.close(target)

    def step(self) -> bool:
        """Copy for a moment (thread). Is there more to do? Raises OSError."""
        until = time.monotonic() + _TURN
        return any(time.monotonic() > until for _ in self._copying)

    def publish(self) -> None:
        """Make the file a sealed layer that the image may name (loop). Raises FileError (ENOENT) if it is gone."""
        store = self.store
        self._check_there()
        with store.catalog.transaction():
            layer = store.layers.adopt(self.path)
            store.images.name_layers(self.image, {layer.id})
        self.layer = layer.id

    def settle(self) -> None:
        """Before a table on disk names the layer, its row and its name are there (thread)."""
        sync_directory(self.store.layers.directory)
        self.store.catalog.sync()

    def swing(self) -> bool:
        """Let the table name the layer (loop). False if pages were merged meanwhile, and it is not flat yet.

        Raises FileError (ENOENT) if the image is gone, OSError.
        """
        assert self.layer is not None
        image, complete = self.image, True
        self._check_there()
        image.synced_name = False  # a frozen table is synced in place
        try:
            for first, entries in self._parts:
                now = image.table.entries[first : first + len(entries)]
                now[(now == entries) & (entries != ZERO)] = self.layer
                complete &= bool(((now == self.layer) | (now == ZERO)).all())
                image.table.mark(first, first + len(entries))
                image.store_entries(first, first + len(entries))
        except OSError:
            image.reload()  # some have swung, in the file: what garbage collection looks at
            raise
        image.alike = self.layer if complete else None
        return complete

    def _check_there(self) -> None:
        if not self.store.images.exists(self.image.id):
            raise FileError(errno.ENOENT, "it was deleted meanwhile")

    def close(self) -> None:
        """Leave nothing that is not named (loop); always call it."""
        self._copying.close()
        self.store.layers.making.discard(self.path)
        if self.layer is not None:
            self.store.images.replaced |= {layer.base for layer in self._sources} | {self.layer}
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
