"""What is stored of an image at one moment, for a thread that looks for something in it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from ramfs.image.table import Entries, equal_runs
from ramfs.store.files import data_extents
from ramfs.store.images import Image
from ramfs.store.layers import Layers
from ramfs.store.presence import STORED
from ramfs.units import PAGE_SHIFT, ZERO, LayerId, pages

#: Entry of a page that is not here, in a copy of a table.
_SKIPPED: Final = ZERO


class Stored:
    """The pages of an image that are here, as its table names them now.

    A page that changes meanwhile may read as either, or as zeros; one whose layer goes is not read.
    """

    def __init__(self, image: Image, layers: Layers) -> None:
        """On the loop."""
        self._direct = image.direct
        self._size = image.size
        self._parts: list[tuple[int, Entries]] = []
        self._places: dict[LayerId, tuple[str, int]] = {}
        """paths of layers' files, and how many pages further on the image's pages lie there"""
        self._files: dict[str, int] = {}
        if image.direct is not None:
            return
        table = image.table
        for low, high in table.regions(stop=image.pages):
            entries = table.entries[low:high].copy()
            for number in image.layers & layers.arriving:
                layer = layers[number]
                if layer.presence is not None:
                    states = layer.presence.at(low + layer.shift, high + layer.shift)
                    entries[(entries == number) & (states != STORED)] = _SKIPPED
            self._parts.append((low, entries))
        for number in image.layers & layers.by_id.keys():
            layer = layers.by_id[number]
            self._places[number] = layers.path(layer.base), layer.shift

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs of stored pages within ``[first, stop)``; each lies in one file."""
        if self._direct is not None:
            for start, end in data_extents(self._file(self._direct), first << PAGE_SHIFT):
                if start >> PAGE_SHIFT >= stop:
                    return
                yield start >> PAGE_SHIFT, min(pages(end), stop)
        for low, entries in self._parts:
            start, end = max(low, first), min(low + len(entries), stop)
            for a, b, number in equal_runs(entries[start - low : end - low]) if start < end else ():
                if number != ZERO and number in self._places:
                    yield start + a, start + b

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of one run, or of what lies behind it in its file. Raises OSError."""
        if self._direct is not None:
            return os.pread(self._file(self._direct), length, offset)
        page = offset >> PAGE_SHIFT
        at = np.searchsorted([low for low, _ in self._parts], page, "right") - 1
        low, entries = self._parts[int(at)]
        path, shift = self._places[LayerId(int(entries[page - low]))]
        try:
            fd = self._file(path)
        except FileNotFoundError:
            return b""
        return os.pread(fd, length, offset + (shift << PAGE_SHIFT))

    def _file(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._files.clear()
