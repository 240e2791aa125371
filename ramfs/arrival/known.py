"""What is known of a file before it arrives, by its digests in a manifest. For any thread: reads and writes only files.

    digest of a page          what becomes of it
    zeros (KNOWN_ZERO)        it is named zero
    KNOWN_LOST                it is named lost: its source has lost it, and nobody can have it
    that of a page held here  it is named where it is
    any other                 it arrives, and is compared

The digests are written beside the layers, where the new layer finds them: from then on nobody needs the manifest.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from ramfs.image.digest import DIGEST, KNOWN_LOST, ZERO_DIGEST
from ramfs.image.table import Mask
from ramfs.source.manifest import Digests
from ramfs.store.files import read_exactly, write_all
from ramfs.store.images import Image
from ramfs.units import PAGE_SHIFT

#: Pages looked at in one go: about a millisecond in which the loop waits for the interpreter.
_SLICE: Final = 1 << 15
_LOST: Final = np.frombuffer(KNOWN_LOST, np.uint64)
_ZERO: Final = np.frombuffer(ZERO_DIGEST, np.uint64)
#: Numbers of files in the making, from above: layers are numbered from below.
_numbers = itertools.count(1)


class Known(NamedTuple):
    """What is known of a file that is to arrive. Pages in none of the masks are zeros."""

    digests: str
    """a file with the digests of all pages, which becomes that of the layer"""
    wanted: Mask
    """pages that are to arrive"""
    lost: Mask
    """... that are lost at the source"""
    held: Mask
    """... that ``local``, a frozen image in use, has at the same place"""
    local: Image | None


def new_path(directory: str) -> str:
    """Where digests can be written for a layer that has no number yet."""
    return os.path.join(directory, f"{0xFFFFFFFF - next(_numbers):08x}.xxh3.new")


def look(
    digests: Digests, size: int, path: str, local: Image | None = None, held: Iterator[bytes] | None = None
) -> Known:
    """Write the digests of a file of ``size`` bytes to ``path``, on disk, and tell what is known of it.

    ``held`` are the digests of a frozen local image. Raises OSError, gather.Moved.
    """
    count = len(digests)
    wanted, lost, taken = (np.zeros(count, np.bool_) for _ in range(3))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for first in range(0, count, _SLICE):
            part = slice(first, min(first + _SLICE, count))
            given = np.ascontiguousarray(digests[part]).view(np.uint64).copy()
            lost[part] = (given == _LOST).all(axis=1)
            given[lost[part] | (given == _ZERO).all(axis=1)] = 0
            wanted[part] = given.any(axis=1)
            if wanted[part].any():
                write_all(fd, given.data.cast("B"), first * DIGEST)
        os.ftruncate(fd, count * DIGEST)
        os.fdatasync(fd)
        if local is not None and held is not None:
            # Behind the end of a file its last page may hold what a killed daemon left there (Pager._clear_tail).
            most = local.pages if local.size == size else local.size >> PAGE_SHIFT
            _compare(fd, wanted[:most], taken[:most], held)
    finally:
        os.close(fd)
    return Known(path, wanted, lost, taken, local)


def _compare(fd: int, wanted: Mask, taken: Mask, held: Iterator[bytes]) -> None:
    """Find in ``taken`` what of the pages ``wanted`` is held, and take it out of these."""
    at = 0
    for known in held:
        here = np.frombuffer(known, np.uint64).reshape(-1, 2)[: len(wanted) - at]
        given = np.frombuffer(read_exactly(fd, len(here) * DIGEST, at * DIGEST), np.uint64).reshape(-1, 2)
        part = slice(at, at + len(here))
        taken[part] = wanted[part] & (here == given).all(axis=1)
        at += len(here)
        if at >= len(wanted):
            break
    wanted &= ~taken
