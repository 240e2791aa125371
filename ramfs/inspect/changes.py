"""Which pages of a file are others than in another generation of it: the attribute ``user.ramfs.changed``.

A page never moves, and what is written goes to a new place. So the tables of two images tell it, and no page is read.
Three kinds of layers make that harder, for they have pages that others have too (``Layer.copied``): flat copies, clones
of direct images, and direct images, which have no table at all. Of a page in one of them

- the file system of the store tells whether it is the same block, where it shares blocks (FIEMAP);
- elsewhere the digests of the two are compared, and a page that was written with equal bytes counts as the same.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import trio
from numpy.typing import NDArray

from ramfs.errors import StoreDamaged
from ramfs.image.lineage import Places, differing
from ramfs.image.table import ENTRY, Entries, Mask, runs_of
from ramfs.store.files import data_extents, read_exactly
from ramfs.store.gather import Gathering, LayerPlace, Moved
from ramfs.store.images import HEADER, Image, unpack_header
from ramfs.store.layers import Layers
from ramfs.store.reflink import blocks_of, can_reflink
from ramfs.units import LOST, PAGE, PAGE_SHIFT, ZERO, InodeNumber, LayerId, pages

#: Pages compared in one go: some milliseconds.
_SLICE: Final = 1 << 18
#: Runs told in one answer: an attribute has 64 KiB at most, and a page number here 10 digits.
_RUNS: Final = 2500
_QUESTION: Final = re.compile(rb"user\.ramfs\.changed\.(\d{1,19})(\.content)?(?:\.(\d{1,11})(?:-(\d{1,11}))?)?")
#: How often it is begun anew when layers change meanwhile.
_ATTEMPTS: Final = 10

#: Known of a directory once: it is a question to its file system.
_shares_blocks: Final = functools.cache(can_reflink)


@dataclass(frozen=True, slots=True)
class _Side:
    """What is known of one of the two images."""

    table: str
    direct: str | None
    live: LayerId
    """of a direct image, whose pages are all in that layer"""


class _Opened:
    """One of them, open. Close it."""

    def __init__(self, side: _Side) -> None:
        self._side = side
        try:
            self._fd = os.open(side.direct or side.table, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Moved from None
        try:
            if side.direct is None:
                self.size = unpack_header(read_exactly(self._fd, HEADER, 0), side.table).size
            else:
                self.size = os.fstat(self._fd).st_size
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    def used(self) -> Mask:
        """For each slice of pages: may there be anything but zeros?"""
        count = -(-pages(self.size) // _SLICE)
        found = np.zeros(count, np.bool_)
        at, unit = (0, _SLICE << PAGE_SHIFT) if self._side.direct is not None else (HEADER, _SLICE * ENTRY)
        for low, high in data_extents(self._fd, at):
            found[(low - at) // unit : -(-(high - at) // unit)] = True
        return found

    def entries(self, first: int, stop: int) -> Entries:
        """Of pages ``[first, stop)``; zero behind the end of the file."""
        found = np.zeros(stop - first, np.uint32)
        stop = min(stop, pages(self.size))
        if first < stop:
            if self._side.direct is not None:
                found[: stop - first] = self._side.live
            else:
                data = read_exactly(self._fd, (stop - first) * ENTRY, HEADER + first * ENTRY)
                found[: len(data) // ENTRY] = np.frombuffer(data, "<u4")
        return found


class Comparison:
    """Two images that are compared, in any thread; made on the loop."""

    def __init__(self, mine: Image, theirs: Image, layers: Layers, *, content: bool) -> None:
        """With ``content`` pages that were written and hold the same bytes are the same, whatever they cost to read."""
        self._sides = [self._side(image) for image in (mine, theirs)]
        self._content = content
        self._directory = layers.directory
        named = [layers.by_id[n] for image in (mine, theirs) for n in image.layers if n in layers.by_id]
        named += [image.live for image in (mine, theirs) if image.live is not None]
        moved = {layer.base for layer in named if layer.is_alias}
        self._aliases: Places = {each.id: (each.base, each.shift) for each in named if each.base in moved}
        self._copied = {each.id for each in named if layers[each.base].copied} | {side.live for side in self._sides}
        self._copied.discard(ZERO)
        looks = content or bool(self._copied)  # at more than the tables
        self._places = {each.id: self._place(layers, each.id) for each in named} if looks else {}

    @staticmethod
    def _side(image: Image) -> _Side:
        live = image.live.id if image.direct is not None and image.live is not None else ZERO
        return _Side(image.path, image.direct, live)

    @staticmethod
    def _place(layers: Layers, number: LayerId) -> LayerPlace:
        layer = layers[number]
        base = layers[layer.base]
        known = base.digested or (base.presence is not None and base.promised)
        pages_path = None if base.presence else layers.path(base.id)
        return LayerPlace(pages_path, layers.path(base.id, "xxh3") if known else None, layer.shift)

    def slices(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Mask]]:
        """Whether pages ``[start, end)`` have changed, slice by slice: the first page, and what is so.

        Raises Moved, StoreDamaged, OSError.
        """
        gathering = Gathering(self._places)
        opened: list[_Opened] = []
        try:
            opened.extend(map(_Opened, self._sides))
            mine, theirs = opened
            used = [each.used() for each in opened]
            total = max(pages(each.size) for each in opened)
            total = total if end is None else min(end, total)
            for number in range(start // _SLICE, -(-total // _SLICE)):
                first, stop = max(start, number * _SLICE), min((number + 1) * _SLICE, total)
                if any(number < len(each) and each[number] for each in used):
                    a, b = mine.entries(first, stop), theirs.entries(first, stop)
                    found = differing(a, b, first, self._aliases)
                    self._look(found, first, (a, b), (mine.size, theirs.size), gathering)
                    yield first, found
        finally:
            gathering.close()
            for each in opened:
                each.close()

    def _look(
        self, found: Mask, first: int, entries: tuple[Entries, Entries], sizes: tuple[int, int], gathering: Gathering
    ) -> None:
        """Take from the pages that were ``found`` those that are the same after all."""
        doubtful = found
        if not self._content:
            doubtful = found & (self._is_copied(entries[0]) | self._is_copied(entries[1]))
        doubtful = doubtful & self._known(entries[0]) & self._known(entries[1])
        if not doubtful.any():
            return
        if self._copied and _shares_blocks(self._directory):
            here, there = (self._blocks(part, first, doubtful) for part in entries)
            found &= ~(doubtful & (here == there) & (here & 1 == 0))
            if not self._content:
                return
            doubtful = doubtful & found
        a, b = (gathering.pick(part, first, doubtful) for part in entries)
        same = (a == b).all(axis=1)
        for page in {size >> PAGE_SHIFT for size in sizes if size % PAGE} & set(range(first, first + len(found))):
            # Behind the end of a file its last page may have anything.
            if doubtful[page - first]:
                lasts = [
                    gathering.of_last(LayerId(int(part[page - first])), page, min(PAGE, size - (page << PAGE_SHIFT)))
                    for part, size in zip(entries, sizes, strict=True) if size > page << PAGE_SHIFT
                ]  # fmt: skip
                same[page - first] = len(lasts) == 2 and bool((lasts[0] == lasts[1]).all())
        found &= ~(doubtful & same)

    def _is_copied(self, entries: Entries) -> Mask:
        found = np.zeros(len(entries), np.bool_)
        for number in self._copied:
            found |= entries == number
        return found

    def _known(self, entries: Entries) -> Mask:
        """Which pages have digests, or are here so that these can be made?"""
        found: Mask = entries != LOST
        for number, place in self._places.items():
            if place.digests is None and place.pages is None:
                found &= entries != number
        return found

    def _blocks(self, entries: Entries, first: int, wanted: Mask) -> NDArray[np.int64]:
        """Where the pages that are wanted lie on the disk."""
        found = np.zeros(len(entries), np.int64)
        for number in np.unique(entries[wanted]).tolist():
            place = self._places.get(LayerId(number))
            if place is None or place.pages is None:
                continue
            where = np.flatnonzero((entries == number) & wanted)
            low, high = int(where[0]), int(where[-1]) + 1
            try:
                fd = os.open(place.pages, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Moved from None
            try:
                blocks = blocks_of(fd, first + low + place.shift, first + high + place.shift)
            finally:
                os.close(fd)
            found[where] = blocks[where - low]
        return found


class Question(NamedTuple):
    """What is asked by the name of the attribute: ``user.ramfs.changed.INO[.content][.FIRST[-STOP]]``."""

    ino: InodeNumber
    """of the file that it is compared with"""
    content: bool
    first: int | None
    """tell the runs of pages that changed from here on, some thousand of them; None: how many there are in all"""
    stop: int | None
    """or how many there are from the first one up to here"""


def parse_question(name: bytes) -> Question | None:
    """The question that the name of an attribute asks, None if it asks none."""
    match = _QUESTION.fullmatch(name)
    if match is None:
        return None
    first, stop = (None if number is None else int(number) for number in match.groups()[2:])
    return Question(InodeNumber(int(match[1])), bool(match[2]), first, stop)


async def answer(mine: Image, theirs: Image, layers: Layers, question: Question) -> bytes:
    """The value of the attribute: JSON. Raises StoreDamaged, OSError."""
    for _ in range(_ATTEMPTS):
        for image in (mine, theirs):
            image.refresh()
        comparison = Comparison(mine, theirs, layers, content=question.content)
        with contextlib.suppress(Moved):
            told = await trio.to_thread.run_sync(_told, comparison, question.first, question.stop)
            return json.dumps(told, separators=(",", ":")).encode()
    raise StoreDamaged("layers are missing; run `ramfs fsck` on the store")


def _told(comparison: Comparison, start: int | None, stop: int | None) -> dict[str, object]:
    if start is None or stop is not None:
        slices = comparison.slices(start or 0, stop)
        return {"changed": sum(int(np.count_nonzero(found)) for _, found in slices)}
    runs: list[list[int]] = []
    for first, found in comparison.slices(start):
        for a, b in runs_of(found):
            if runs and runs[-1][1] == first + a:
                runs[-1][1] = first + b
            elif len(runs) == _RUNS:
                return {"runs": runs, "next": first + a}
            else:
                runs.append([first + a, first + b])
    return {"runs": runs, "next": None}
