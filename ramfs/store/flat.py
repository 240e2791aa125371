"""Flat images: those of which one layer's file reads as the image does, byte for byte and to the last one.

The kernel can serve such a file from the layer without asking anybody (fuse/passthrough.py). What makes an image flat:

- its table names one sealed layer and nothing else, no alias, no lost page;
- where an entry is 0 the layer has a hole, or zeros;
- the layer's file is as long as the image.

An image that was written by one guest since it was made, and then frozen, is flat. A sealed layer gets no more
data, so what was found once stays true while the table names that layer alone.
"""

import os
from typing import Final

from ramfs.image.pages import is_zero
from ramfs.image.table import runs_of
from ramfs.store.files import data_extents, read_exactly
from ramfs.store.images import Image, read_table
from ramfs.store.layers import Layers
from ramfs.units import PAGE_SHIFT, ZERO, LayerId, pages

_PIECE: Final = 1 << 20


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
    return layer.id if layer is not None and layer.sealed and not layer.is_alias else None


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
