"""The note VMCOREINFO, which a Linux kernel keeps in its memory for those who look into it.

It says where the kernel's page table is, how far the kernel was moved (KASLR), and what its structures look like:
without it drgn and crash know nothing of a core. The kernel puts it at the beginning of a page when it boots, and
never moves it. So it is found by the first bytes of pages, and once found it is known where it is.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from ramfs.image.table import Mask
from ramfs.units import PAGE, PAGE_SHIFT

_NOTE: Final = struct.Struct("<III")
_NAME: Final = b"VMCOREINFO\0"
_BEGINS: Final = b"OSRELEASE="
#: Header and name of the note, the latter up to a multiple of four bytes.
_HEAD: Final = _NOTE.size + 12
#: Bytes of the longest note: its text has at most a page.
MAX_NOTE: Final = _HEAD + PAGE
#: What the first six words of its page are, but for the second, the length of the text.
_WORDS: Final = np.frombuffer(_NOTE.pack(len(_NAME), 0, 0) + _NAME.ljust(12, b"\0"), "<u4")
#: Pages that are looked at in one go.
AT_ONCE: Final = 256
#: The most that is looked at for a note, in pages.
MOST: Final = 1 << 19
#: Pages at either end of the memory where it is most likely: a kernel that boots takes memory from there.
_PART: Final = 1 << 16


def note_in(data: bytes) -> bytes:
    """The note at the start of ``data``; nothing if there is none."""
    if len(data) < _HEAD + len(_BEGINS):
        return b""
    name, length, kind = _NOTE.unpack_from(data)
    if (name, kind) != (len(_NAME), 0) or data[_NOTE.size : _HEAD] != _NAME.ljust(12, b"\0"):
        return b""
    end = _HEAD + length
    if not len(_BEGINS) <= length <= PAGE or end > len(data) or not data.startswith(_BEGINS, _HEAD):
        return b""
    return data[:end].ljust((end + 3) & -4, b"\0")


def pages_with_note(data: bytes | memoryview) -> list[int]:
    """Of whole pages: those that begin as the note does."""
    words = np.frombuffer(data, "<u4").reshape(-1, PAGE // 4)[:, : len(_WORDS)]
    same: Mask = words == _WORDS
    same[:, 1] = True
    return [int(page) for page in np.flatnonzero(same.all(axis=1))]


def likely_first(pages: int) -> Iterator[tuple[int, int]]:
    """All of that many pages, as ranges ``[first, stop)`` in the order in which they are worth looking at."""
    high = max(pages - _PART, 0)
    low = min(_PART, high)
    yield high, pages
    yield 0, low
    for stop in range(high, low, -_PART):
        yield max(stop - _PART, low), stop


def search(runs: Iterable[tuple[int, int]], read: Callable[[int, int], bytes]) -> int | None:
    """The first page that begins with a note, of runs of pages ``[first, stop)``; None if there is none.

    ``read(offset, length)`` gives bytes. Raises what that does.
    """
    left = MOST
    for first, stop in runs:
        for low in range(first, stop, AT_ONCE):
            high = min(low + AT_ONCE, stop)
            data = read(low << PAGE_SHIFT, (high - low) << PAGE_SHIFT)
            for page in pages_with_note(data[: len(data) & -PAGE]):
                if note_in(read((low + page) << PAGE_SHIFT, MAX_NOTE)):
                    return low + page
            left -= high - low
            if left <= 0:
                return None
    return None
