"""Bytes of images: read, write, truncate, share. Resolves a page by its table entry, then its layer.

All but :meth:`Pager.sync` and the background passes happen on the loop without an await, so every request
is atomic towards every other: a snapshot never sees half of one.

A write puts the data into the live layer first and the table entry after it. A killed daemon leaves either
the old entry or the new one, never an entry without its page.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, TypeVar

import numpy as np
import trio

from ramfs.errors import FileError, StoreDamaged
from ramfs.image.pages import Buffer, is_zero, nonzero_pages, span
from ramfs.image.table import Entries, equal_runs, runs_of
from ramfs.store import behind, direct
from ramfs.store.direct import Leaving
from ramfs.store.entering import Entry
from ramfs.store.files import punch_hole, sync_data
from ramfs.store.flat import Flatten, reads_alike, sole_layer
from ramfs.store.garbage import Pass
from ramfs.store.gather import Gathering, LayerPlace, Moved
from ramfs.store.images import Image, SyncJob, unpack_layers
from ramfs.store.layers import Layer, Places
from ramfs.store.presence import ZEROS
from ramfs.store.reflink import Cloned, clone_range, entries_of
from ramfs.store.store import Store
from ramfs.units import MAX_FILE_SIZE, PAGE, PAGE_SHIFT, ZERO, ImageId, LayerId, pages

T = TypeVar("T")

#: The most that one request copies byte by byte (copy_file_range may answer with less than was asked).
COPY_AT_ONCE: Final = 8 << 20
#: Pages that become a hole in one go: 64 MiB, for which a tmpfs needs 15 ms.
_ZERO_AT_ONCE: Final = 1 << 14
#: Pages that the first and the last of many short runs are apart, at most, if their entries are changed together.
_CLOSE: Final = 1 << 14
#: Table entries that are looked at, or set, in one go: about a millisecond.
ENTRIES_AT_ONCE: Final = 1 << 18
#: Bytes of a direct image that are worth a layer of their own when they are copied from it; fewer are copied.
CLONE_FROM: Final = 1 << 20
#: How often digests are gathered anew when tables and layers change meanwhile.
_GATHERINGS: Final = 10
#: Runs of pages that get into a direct image in one go.
_RUNS_AT_ONCE: Final = 256


#: Bytes that :meth:`Pager.zeros` has at most: those of the largest READ.
MOST_ZEROS: Final = 1 << 20
_ZEROS: Final = np.zeros(MOST_ZEROS >> PAGE_SHIFT, np.uint32)


class Absent(Exception):
    """Pages ``[first, stop)`` of an arriving layer's file are needed, and not here.

    Whoever asked has them brought (arrival/) and asks again, from the start.
    """

    def __init__(self, layer: LayerId, first: int, stop: int, name: LayerId | None = None, shift: int = 0) -> None:
        super().__init__(f"pages {first} to {stop} of layer {layer} are not here yet")
        self.layer = layer
        self.first = first
        self.stop = stop
        self.name = layer if name is None else name
        """what the table calls the layer, and how much further on its pages lie in the file than in the image"""
        self.shift = shift


#: Table entries of the pages that a range touches, the range's first and last byte, and where layers are mapped.
Plan = tuple[Entries, int, int, Places]


class Pager:
    """Reads and writes the images of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.images = store.images
        self.layers = store.layers
        self._sync_lock = trio.Lock()
        self._digest_lock = trio.Lock()

    # -- reading

    def plan(self, image: Image, offset: int, length: int) -> Plan | None:
        """Where the bytes ``[offset, offset + length)`` are, cut at the end of the file; None beyond it.

        The extension follows the entries to the mapped layers and hands the memory to the kernel: no page
        costs a step of Python. Not to be kept: the next write may change what it names.
        """
        end = min(offset + length, image.size)
        if end <= offset:
            return None
        layers = self.layers
        layers.retired.clear()
        return image.table.entries[offset >> PAGE_SHIFT : pages(end)], offset, end, layers.places

    def zeros(self, length: int) -> Plan:
        """A plan of zeros that lie nowhere, at most MOST_ZEROS bytes."""
        return _ZEROS[: pages(length)], 0, length, self.layers.places

    def copy_out(self, image: Image, offset: int, length: int) -> bytes:
        """A copy of the bytes, by pread(2): an unreadable page is OSError here, not a signal."""
        if image.direct is not None:
            return direct.read(image, offset, length)
        end = min(offset + length, image.size)
        if end <= offset:
            return b""
        first = offset >> PAGE_SHIFT
        parts: list[bytes] = []
        for a, b, number in equal_runs(image.table.entries[first : pages(end)]):
            low = max(offset, (first + a) << PAGE_SHIFT)
            count = min(end, (first + b) << PAGE_SHIFT) - low
            if number == ZERO:
                parts.append(bytes(count))
            else:
                layer = self._here(number, first + a, first + b)
                parts.append(self.layers.file(layer).read(low + (layer.shift << PAGE_SHIFT), count))
        return b"".join(parts)

    # -- writing

    def write(self, image: Image, offset: int, data: Buffer) -> int:
        """Write ``data``; the file grows if need be. Returns its length; raises OSError and nothing half-named."""
        length = len(data)
        if length == 0:
            return 0
        self._check_writable(image, offset + length)
        if image.direct is not None:
            direct.write(image, offset, data)
            return length
        self._check_ragged(image, offset, offset + length)
        image.table.resize(pages(offset + length))
        if offset > image.size:
            self._clear_tail(image)
        try:
            self._write_parts(image, offset, data)
        except BaseException:
            self._take_back(image)
            raise
        image.size = max(image.size, offset + length)
        image.touch()
        return length

    def write_runs(self, image: Image, runs: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Write runs of whole pages ``(offset, length)`` within the file, whose bytes lie one behind the other.

        Raises FileError (EINVAL where they are not so), and OSError, with some of the runs written.
        """
        self._check_writable(image, 0)
        if not runs or sum(length for _, length in runs) != len(data):
            raise FileError(errno.EINVAL)
        if any((offset | length) % PAGE or offset + length > image.size or length == 0 for offset, length in runs):
            raise FileError(errno.EINVAL)
        view = memoryview(data)
        ends = list(accumulate(length for _, length in runs))
        parts = [(offset, view[end - length : end]) for (offset, length), end in zip(runs, ends, strict=True)]
        if image.direct is not None:
            for offset, part in parts:
                direct.write(image, offset, part)
            return
        if not self._write_close(image, parts, data):
            for offset, part in parts:
                self._write_pages(image, offset >> PAGE_SHIFT, (offset + len(part)) >> PAGE_SHIFT, part)
        image.touch()

    def _write_close(self, image: Image, parts: list[tuple[int, memoryview]], data: Buffer) -> bool:
        """Write parts of whole pages, near each other and none of them zeros, with one change of the table.

        False if they are not so, and nothing was done.
        """
        first = min(offset for offset, _ in parts) >> PAGE_SHIFT
        stop = max(offset + len(part) for offset, part in parts) >> PAGE_SHIFT
        if stop - first > _CLOSE or not nonzero_pages(data).all():
            return False
        live = self.images.live_layer(image)
        self.images.unsynced.add(live.id)
        file = self.layers.file(live)
        entries = image.table.entries[first:stop].copy()
        for offset, part in parts:
            file.write(offset, part)
            page = (offset >> PAGE_SHIFT) - first
            entries[page : page + (len(part) >> PAGE_SHIFT)] = live.id
        self.set_entries(image, first, stop, entries)
        return True

    def _check_ragged(self, image: Image, start: int, stop: int) -> None:
        """Before bytes ``[start, stop)`` change: the rest of their first and last page must be here. Raises Absent."""
        if self.layers.arriving.isdisjoint(image.layers):
            return
        for at in {start, stop, min(start, image.size)}:
            page = at >> PAGE_SHIFT
            if at & (PAGE - 1) and page < image.pages and (entry := int(image.table.entries[page])) != ZERO:
                self._here(LayerId(entry), page, page + 1)

    def _take_back(self, image: Image) -> None:
        """Something that would have made the file grow has failed: let nothing of it stay behind the end."""
        if image.live is not None:
            self.images.replaced.add(image.live.id)
        image.forget_beyond()

    def _write_parts(self, image: Image, offset: int, data: Buffer) -> None:
        """Write a ragged head, whole pages and a ragged tail."""
        length = len(data)
        view = memoryview(data)
        head, first, stop, tail = span(offset, length)
        if head[0] < head[1]:
            self._write_within(image, head[0], view[: head[1] - head[0]])
        if first < stop:
            low = (first << PAGE_SHIFT) - offset
            self._write_pages(image, first, stop, view[low : low + ((stop - first) << PAGE_SHIFT)])
        if tail[0] < tail[1]:
            self._write_within(image, tail[0], view[length - (tail[1] - tail[0]) :])

    def _check_writable(self, image: Image, end: int) -> None:
        if image.frozen:
            raise FileError(errno.EROFS)
        if end > MAX_FILE_SIZE:
            raise FileError(errno.EFBIG)

    def _write_within(self, image: Image, start: int, data: Buffer) -> None:
        """Write part of one page: in place where the page is the image's own, else to a merged copy of it."""
        page = start >> PAGE_SHIFT
        entry = LayerId(int(image.table.entries[page]))
        if image.live is not None and entry == image.live.id:
            self.images.unsynced.add(entry)
            self.layers.file(image.live).write(start, data)
            return
        merged = bytearray(self._page(page, entry))
        merged[start & (PAGE - 1) : (start & (PAGE - 1)) + len(data)] = data
        self._write_pages(image, page, page + 1, merged)

    def _page(self, page: int, entry: LayerId) -> bytes:
        if entry == ZERO:
            return bytes(PAGE)
        layer = self._here(entry, page, page + 1)
        return self.layers.file(layer).read((page + layer.shift) << PAGE_SHIFT, PAGE)

    def _here(self, number: LayerId, first: int, stop: int) -> Layer:
        """The layer that pages ``[first, stop)`` of an image are in. Raises Absent."""
        layer = self.layers[number]
        if layer.presence is not None and not layer.presence.here(first + layer.shift, stop + layer.shift):
            raise Absent(layer.base, first + layer.shift, stop + layer.shift, layer.id, layer.shift)
        return layer

    def _check_here(self, image: Image, offset: int, length: int) -> None:
        for absent in self.absent(image, offset, length):
            raise absent

    def absent(self, image: Image, offset: int, length: int) -> list[Absent]:
        """What of the bytes ``[offset, offset + length)`` is not here."""
        first, stop = offset >> PAGE_SHIFT, pages(min(offset + length, image.size))
        found: list[Absent] = []
        if image.direct is not None:
            return found
        for a, b, number in equal_runs(image.table.entries[first:stop]) if first < stop else ():
            if number != ZERO:
                try:
                    self._here(number, first + a, first + b)
                except Absent as absent:
                    found.append(absent)
        return found

    def around(self, image: Image, absent: Absent, reach: int) -> tuple[int, int]:
        """Those pages of the same layer's file around absent ones, within ``reach`` pages, that the image names too."""
        first, stop = absent.first - absent.shift, absent.stop - absent.shift
        low, high = first // reach * reach, min((stop + reach - 1) // reach * reach, image.pages)
        other = image.table.entries[low:high] != absent.name
        before, behind = np.flatnonzero(other[: first - low]), np.flatnonzero(other[stop - low :])
        low, high = (
            (low + int(before[-1]) + 1 if len(before) else low),
            (stop + int(behind[0]) if len(behind) else high),
        )
        return low + absent.shift, high + absent.shift

    def _write_pages(self, image: Image, first: int, stop: int, data: Buffer) -> None:
        """Write whole pages: zero pages are named zero, the others go to the live layer."""
        old = image.table.entries[first:stop]
        kept = nonzero_pages(data)
        all_kept = bool(kept.all())
        if not all_kept and not kept.any():
            self._zero_pages(image, first, stop)
            return
        live = self.images.live_layer(image)
        self.images.unsynced.add(live.id)
        file = self.layers.file(live)
        if all_kept:
            file.write(first << PAGE_SHIFT, data)
            if (old == live.id).all():
                return
            self.set_entries(image, first, stop, live.id)
            return
        view = memoryview(data)
        for a, b in runs_of(kept):
            file.write((first + a) << PAGE_SHIFT, view[a << PAGE_SHIFT : b << PAGE_SHIFT])
        emptied = ~kept & (old == live.id)
        self.set_entries(image, first, stop, np.where(kept, np.uint32(live.id), np.uint32(0)))
        for a, b in runs_of(emptied):
            file.punch(first + a, first + b)

    def _zero_pages(self, image: Image, first: int, stop: int) -> None:
        """Name pages zero. Those that the live layer had give back their space at once.

        One call punches all of the range: after it no entry names the live layer there. A durable table may
        still do so; it then reads zeros, which is what was written.
        """
        old = image.table.entries[first:stop]
        if not old.any():
            return
        emptied = image.live is not None and bool((old == image.live.id).any())
        self.set_entries(image, first, stop, np.uint32(0))
        if emptied and image.live is not None:
            self.layers.file(image.live).punch(first, stop)

    def _zero_within(self, image: Image, start: int, stop: int) -> None:
        """Write zeros to part of one page, if anything is stored there."""
        if image.table.entries[start >> PAGE_SHIFT] != ZERO:
            self._write_within(image, start, bytes(stop - start))

    def set_entries(self, image: Image, first: int, stop: int, entries: Entries | np.uint32 | LayerId) -> None:
        """Set table entries and store them; note the layers that they named before. Raises OSError, and sets none."""
        table = image.table
        table.mark(first, stop)
        part = table.entries[first:stop]
        before = part.copy()
        self._note_replaced(image, before)
        part[:] = entries
        try:
            image.store_entries(first, stop)
        except OSError:
            part[:] = before  # a full disk: the pages that were just written stay unnamed
            with contextlib.suppress(OSError):
                image.store_entries(first, stop)  # what there was room for is taken back
            raise

    def _note_replaced(self, image: Image, old: Entries) -> None:
        first = old[0]
        if (old == first).all():  # usual; and sorting costs more than all else of a small write
            if first == ZERO:
                return
            lost = {LayerId(int(first))}
        else:
            lost = {LayerId(n) for n in np.unique(old).tolist()}
        lost.discard(ZERO)
        if image.live is not None:
            lost.discard(image.live.id)
        self.images.replaced |= lost

    # -- size

    def truncate(self, image: Image, size: int) -> None:
        """Set the size. What is cut off is gone: growing again shows zeros."""
        if size < 0:
            raise FileError(errno.EINVAL)
        self._check_writable(image, size)
        if image.direct is not None:
            direct.truncate(image, size)
            return
        if size < image.size:
            self._cut(image, size)
        elif size > image.size:
            image.table.resize(pages(size))
            self._clear_tail(image)
        image.size = size
        image.touch()

    def _clear_tail(self, image: Image) -> None:
        """Before a file grows beyond its last page: show nothing of what lies there behind its end.

        Only a write that a crash cut short leaves something there: its bytes, without the new size.
        """
        page, within = divmod(image.size, PAGE)
        if within:
            entry = LayerId(int(image.table.entries[page]))
            if entry != ZERO and not is_zero(self._page(page, entry)[within:]):
                self._write_within(image, image.size, bytes(PAGE - within))

    def _cut(self, image: Image, size: int) -> None:
        within = size & (PAGE - 1)
        if within:
            self._zero_within(image, size, size - within + PAGE)
        for first, stop in image.table.regions(first=pages(size), stop=image.pages):
            lost = set(np.unique(image.table.entries[first:stop]).tolist())
            lost.discard(ZERO)
            if lost:
                self.images.replaced |= lost  # also the live layer: a durable table may name its pages
                image.table.fill(first, stop, ZERO)
                image.store_entries(first, stop)

    # -- holes

    def zero(self, image: Image, offset: int, length: int, *, keep_size: bool) -> Iterator[None]:
        """Let a range read as zeros, and give its space back; without ``keep_size`` the file may grow.

        Of pages that the range covers in part the bytes are overwritten: from these alone can ENOSPC come, and
        they are the first. The others go in parts of some milliseconds each, between which it yields.
        """
        end = offset + length
        self._check_writable(image, end)
        image.refresh()
        if image.direct is not None:
            for low in range(offset, min(end, image.size), _ZERO_AT_ONCE << PAGE_SHIFT):
                if low > offset:
                    yield
                direct.punch(image, low, min(end - low, _ZERO_AT_ONCE << PAGE_SHIFT))
        elif offset < image.size:
            # What lies behind the end in its last page is never shown: the page goes as a whole.
            whole = image.pages << PAGE_SHIFT if end >= image.size else end
            self._check_ragged(image, offset, whole)
            head, first, stop, tail = span(offset, whole - offset)
            for start, until in (head, tail):
                if start < until:
                    self._zero_within(image, start, until)
            begun = False
            for low, high in image.table.regions(first=first, stop=stop):
                for a in range(low, high, _ZERO_AT_ONCE):
                    if begun:
                        yield
                    begun = True
                    self._zero_pages(image, a, min(a + _ZERO_AT_ONCE, high))
        self._grown(image, end, keep_size)

    def allocate(self, image: Image, offset: int, length: int, *, keep_size: bool) -> None:
        """Tell by ENOSPC if the store has no room for the pages of a range that are not stored yet.

        Memory stays sparse: nothing is reserved, so somebody else may take the room before it is written to.
        Without ``keep_size`` the file may grow.
        """
        end = offset + length
        self._check_writable(image, end)
        first, stop = offset >> PAGE_SHIFT, pages(end)
        space = self.store.statvfs()
        image.refresh()
        there = image.table.resident(first, stop) if image.direct is None else direct.stored(image.direct, first, stop)
        lacking = (stop - first - there) << PAGE_SHIFT
        if space.f_blocks and lacking > space.f_bavail * space.f_frsize:  # a tmpfs without a limit has no blocks
            raise FileError(errno.ENOSPC)
        self._grown(image, end, keep_size)

    def _grown(self, image: Image, end: int, keep_size: bool) -> None:
        if end > image.size and not keep_size:
            self.truncate(image, end)
        elif image.direct is None:
            image.touch()

    def seek(self, image: Image, offset: int, whence: int) -> tuple[int, int]:
        """SEEK_DATA or SEEK_HOLE: the next byte from ``offset`` on that is stored, or is not; else the size.

        Also how far the table was looked at: whoever changes something from there on does not change the
        answer. Raises ENXIO at the end of the file.
        """
        if image.direct is not None:
            found = direct.seek(image, offset, whence)
            image.refresh()
            return found, image.size
        size = image.size
        if not 0 <= offset < size:
            raise FileError(errno.ENXIO)
        at = self._find(image, offset >> PAGE_SHIFT, stored=whence == os.SEEK_DATA)
        end = at + 1 if whence == os.SEEK_DATA else self._find(image, at, stored=True)
        return min(max(at << PAGE_SHIFT, offset), size), min(end << PAGE_SHIFT, size)

    def _find(self, image: Image, first: int, *, stored: bool) -> int:
        """The first page from ``first`` on that is stored, or that is not; else the number of pages.

        Absent pages count as stored, unless they are known to be zeros.
        """
        table, stop = image.table, image.pages
        if self.layers.arriving.isdisjoint(image.layers):
            return table.find(first, stop, stored=stored)
        for low in range(first, stop, ENTRIES_AT_ONCE):
            entries = table.entries[low : min(low + ENTRIES_AT_ONCE, stop)]
            there = entries != ZERO
            for number in image.layers:
                layer = self.layers[number]
                if layer.presence is not None:
                    states = layer.presence.at(low + layer.shift, low + layer.shift + len(entries))
                    there &= (entries != number) | (states != ZEROS)
            found = np.flatnonzero(there == stored)
            if len(found):
                return low + int(found[0])
        return stop

    # -- sharing

    def share(self, source: Image, source_offset: int, target: Image, target_offset: int, length: int) -> int:
        """Let ``target`` have the source's bytes: whole pages by naming them, ragged ends by copying.

        Returns how many bytes were shared or copied, which may be fewer than asked. The pages of the two
        ranges must not overlap within one image (the kernel sees to that). Offsets that differ by less than
        a page let nothing be shared: then the bytes are copied, some megabytes for each call.
        """
        source.refresh()
        length = min(length, source.size - source_offset)
        if length <= 0:
            return 0
        self._check_writable(target, target_offset + length)
        if target.direct is not None:
            return self._share_into(source, source_offset, target, target_offset, length)
        if source.direct is not None and not self.is_cloned(source_offset, target_offset, length):
            return self._copy(source, source_offset, target, target_offset, min(length, COPY_AT_ONCE))
        if (target_offset - source_offset) % PAGE:
            return self._copy(source, source_offset, target, target_offset, min(length, COPY_AT_ONCE))
        end = target_offset + length
        if target_offset > target.size:
            self._clear_tail(target)
        head, first, stop, tail = span(target_offset, length)
        if tail[0] < tail[1] and end >= target.size and source_offset + length == source.size:
            stop, tail = stop + 1, (end, end)  # the last page of both: beyond their ends it is zeros
        self._check_ragged(target, target_offset, end)
        for start, until in (head, tail):
            if start < until:
                self._check_here(source, start - target_offset + source_offset, until - start)
        for start, until in (head, tail):
            if start < until:
                self._copy(source, start - target_offset + source_offset, target, start, until - start)
        if first < stop:
            try:
                if source.direct is not None:
                    self._share_clone(source, source_offset, target, first, stop)
                else:
                    self._share_pages(source, target, first, stop, (source_offset - target_offset) >> PAGE_SHIFT)
            except BaseException:
                self._take_back(target)
                raise
        target.size = max(target.size, end)
        target.touch()
        return length

    def _copy(self, source: Image, source_offset: int, target: Image, target_offset: int, length: int) -> int:
        done = 0
        while done < length:
            data = self.copy_out(source, source_offset + done, min(length - done, 1 << 20))
            done += self.write(target, target_offset + done, data)
        return done

    def _share_pages(self, source: Image, target: Image, first: int, stop: int, shift: int) -> None:
        """Let target pages ``[first, stop)`` name what the source has ``shift`` pages further on."""
        regions = list(source.table.regions(first=first + shift, stop=stop + shift))
        parts = [(low - shift, source.table.entries[low:high]) for low, high in regions]
        if shift or source is target:  # else they are written to the target's table from where they are
            parts = [(low, entries.copy()) for low, entries in parts]
        live = source.live
        with self.store.catalog.transaction():
            if source.frozen and first == 0 == shift:
                self.images.set_parent(target, source)
            if live is not None and any((entries == live.id).any() for _, entries in parts):
                self.images.seal(source)
            # All layers of the source: looking which of them the range really names would cost more than it saves.
            named = source.layers if shift == 0 else self._shift(parts, shift)
            if parts:
                self.images.name_layers(target, named)
        self._name_parts(target, first, stop, parts)

    def _name_parts(self, target: Image, first: int, stop: int, parts: list[tuple[int, Entries]]) -> None:
        """Let pages ``[first, stop)`` name what the parts say, and nothing between them."""
        if not target.is_loaded and first >= target.pages:
            for low, entries in parts:
                target.put_entries(low, entries)
            return
        # The target's own live pages that lose their name are found by the next garbage pass, not punched
        # here: until the next sync its durable table names them.
        if target.live is not None:
            self.images.replaced.add(target.live.id)
        target.table.resize(stop)
        done = first
        for low, entries in [*parts, (stop, np.zeros(0, np.uint32))]:
            for a, b in target.table.regions(first=done, stop=low):
                self.set_entries(target, a, b, np.uint32(0))
            if len(entries):
                self.set_entries(target, low, low + len(entries), entries)
            done = low + len(entries)

    def _shift(self, parts: list[tuple[int, Entries]], shift: int) -> set[LayerId]:
        """Let entries name aliases, for pages that are to be found at other places than where they lie."""
        named: set[LayerId] = set()
        for _, entries in parts:
            known = np.unique(entries)
            known = known[known != ZERO]
            aliases = np.array([self.layers.alias(self.layers[n], shift).id for n in known.tolist()], np.uint32)
            stored = entries != ZERO
            entries[stored] = aliases[np.searchsorted(known, entries[stored])]
            named.update(LayerId(n) for n in aliases.tolist())
        return named

    def freeze(self, image: Image) -> Image:
        """A frozen image of the same contents. Call in a transaction."""
        return self.images.copy(image, frozen=True)

    # -- direct images

    @staticmethod
    def is_cloned(source_offset: int, target_offset: int, length: int) -> bool:
        """Is a range that is copied from a direct image to be cloned, rather than copied byte by byte?"""
        return length >= CLONE_FROM and source_offset % PAGE == 0 and target_offset % PAGE == 0

    async def clone_range(self, source: Image, source_offset: int, target_offset: int, length: int) -> Cloned:
        """What :meth:`share` from a direct image needs, made in a thread: give it by ``Images.with_clones``."""
        assert source.direct is not None
        whole = pages(length) << PAGE_SHIFT
        return await trio.to_thread.run_sync(
            Cloned.make, source.direct, self.images.clone_path(), source_offset, whole, target_offset
        )

    def _share_clone(self, source: Image, source_offset: int, target: Image, first: int, stop: int) -> None:
        """Let target pages ``[first, stop)`` be in a clone of the source, which starts at ``source_offset``."""
        length = (stop - first) << PAGE_SHIFT
        cloned = self.images.cloned.pop(source.id, None)
        if cloned is None:
            cloned = self.images.clone(source, source_offset, length, first << PAGE_SHIFT)
        parts: list[tuple[int, Entries]] = []
        extents = [(low, min(high, stop)) for low, high in cloned.extents if low < stop]
        if extents:
            with self.store.catalog.transaction():
                layer = self.images.adopt(cloned)
                self.images.name_layers(target, {layer.id})
            parts = entries_of(extents, layer.id)
        else:
            self.images.discard([cloned])
        self._name_parts(target, first, stop, parts)

    def _share_into(self, source: Image, source_offset: int, target: Image, target_offset: int, length: int) -> int:
        """Into a direct image: whole pages share their blocks, of other ranges some megabytes are copied."""
        assert target.direct is not None
        self._check_here(source, source_offset, length)
        target.refresh()
        ends = source_offset + length == source.size and target_offset + length >= target.size
        whole = length if ends else length & -PAGE
        if source_offset % PAGE or target_offset % PAGE or whole == 0:
            return self._copy(source, source_offset, target, target_offset, min(length, COPY_AT_ONCE))
        done, most = 0, min(whole, _ZERO_AT_ONCE << PAGE_SHIFT)
        fd = os.open(target.direct, os.O_RDWR | os.O_CLOEXEC)
        try:
            for at, size, path, place in self._runs(source, source_offset, most):
                self._clone_run(fd, target_offset + at, size, path, place)
                done = min(at + size, most)
        except OSError:
            if not done:
                return self._copy(source, source_offset, target, target_offset, min(length, COPY_AT_ONCE))
        finally:
            with contextlib.suppress(OSError):
                if target_offset + done >= target.size:
                    os.ftruncate(fd, max(target.size, target_offset + done))
            os.close(fd)
        target.refresh()
        return done

    def _runs(self, source: Image, offset: int, length: int) -> Iterator[tuple[int, int, str | None, int]]:
        """Where a range lies: bytes from its start, length, path of a file (None: zeros) and offset in that."""
        if source.direct is not None:
            yield 0, length, source.direct, offset
            return
        first = offset >> PAGE_SHIFT
        for a, b, number in equal_runs(source.table.entries[first : pages(offset + length)])[:_RUNS_AT_ONCE]:
            size = min((b - a) << PAGE_SHIFT, length - (a << PAGE_SHIFT))
            if number == ZERO:
                yield a << PAGE_SHIFT, size, None, 0
            else:
                layer = self.layers[number]
                yield (
                    a << PAGE_SHIFT, pages(size) << PAGE_SHIFT, self.layers.path(layer.base),
                    (first + a + layer.shift) << PAGE_SHIFT,
                )  # fmt: skip

    @staticmethod
    def _clone_run(target: int, at: int, length: int, path: str | None, offset: int) -> None:
        if path is None:
            punch_hole(target, at, length)
            return
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            clone_range(source, offset, target, at, length)
        finally:
            os.close(source)

    async def clone_direct(self, numbers: Iterable[ImageId]) -> dict[ImageId, Cloned]:
        """Clones of direct images, for copies of them (``Images.with_clones``). Raises OSError, and leaves nothing."""
        made: dict[ImageId, Cloned] = {}
        try:
            for number in numbers:
                image = self.images.acquire(number)
                try:
                    if image.direct is not None:
                        path = self.images.clone_path()
                        made[number] = await trio.to_thread.run_sync(Cloned.make, image.direct, path)
                finally:
                    self.images.release(image)
        except BaseException:
            self.images.discard(made.values())
            raise
        return made

    async def enter(self, image: Image) -> bool:
        """Let a writable image that nobody has open be direct; False if it cannot be now. Raises OSError."""
        in_thread = trio.to_thread.run_sync
        work = Entry(self.store, image)
        try:
            if not work.possible:
                return False
            await in_thread(work.prepare)
            if work.needs_sync:
                await self.sync([image])
            if not work.publish():
                return False
            await in_thread(work.settle)
            if not work.commit():
                return False
        finally:
            work.close()
        await in_thread(self.store.catalog.sync)
        return True

    async def leave(self, image: Image) -> bool:
        """Let a direct image that is open to nobody have a table again; False if somebody has it mapped. OSError."""
        in_thread = trio.to_thread.run_sync
        work = Leaving(self.images, image)
        if not work.possible:
            return False
        await in_thread(work.prepare)
        if not work.commit():
            return False
        await in_thread(self.store.catalog.sync)
        work.finish()
        return True

    async def write_out(self, image: Image) -> None:
        """Have the pages of a direct image on disk, so that little is left to do when it leaves (any state)."""
        if image.direct is not None:
            await trio.to_thread.run_sync(sync_data, image.direct)

    # -- flat images

    async def is_flat(self, image: Image) -> bool:
        """Does one layer's file read as a frozen image does? Compares them the first time.

        Raises OSError, StoreDamaged.
        """
        layer = sole_layer(image, self.layers)
        if layer is not None and image.alike != layer:
            path = self.layers.path(layer)
            if await trio.to_thread.run_sync(reads_alike, image.path, path, image.size):
                image.alike = layer
        return layer is not None and image.alike == layer

    async def flatten(self, image: Image, watch: Callable[[Flatten], None]) -> None:
        """Copy all pages of a frozen image into a layer of its own; ``watch`` is told when it begins.

        Readers see the same bytes throughout. Cancelled or failed, it leaves nothing. Raises FileError, OSError.
        """
        image.users += 1
        try:
            while True:
                work = Flatten(self.store, image)
                watch(work)
                try:
                    while await trio.to_thread.run_sync(work.step):
                        pass
                    work.publish()
                    with trio.CancelScope(shield=True):  # what is copied may as well be used
                        await trio.to_thread.run_sync(work.settle)
                        done = work.swing()
                finally:
                    work.close()
                if done:
                    return await self.sync([image])
        finally:
            self.images.release(image)

    # -- background

    async def sync(self, images: Iterable[Image] | None = None) -> None:
        """Make images (all that changed, by default) durable as they are now. Raises OSError."""
        if images is not None:
            images = list(images)
            own = [image for image in images if image.direct is not None]
            for image in own:
                await self.write_out(image)
            if own:
                await trio.to_thread.run_sync(self.store.catalog.sync)
                images = [image for image in images if image not in own]
                if not images:
                    return
        async with self._sync_lock:
            if images is None:
                self.store.reserve.make_room()
            await self._run(self.store.sync_all() if images is None else self.images.sync_job(images))
            self.images.trim()

    async def sync_layers(self, layers: Iterable[LayerId]) -> None:
        """Make what was written to layers durable as it is now. Raises OSError."""
        async with self._sync_lock:
            await self._run(self.images.sync_job([], layers))

    @staticmethod
    async def _run(job: SyncJob) -> None:
        try:
            await trio.to_thread.run_sync(job.run)
        except BaseException:
            job.failed()
            raise
        finally:
            job.close()

    async def settle(self) -> None:
        """After taking over from another daemon: sync what that one may not have synced, remove what it left lying.

        Few images at a time, so that guests hardly notice. Until it is done nothing counts as garbage.
        """
        in_thread = trio.to_thread.run_sync
        while self.images.doubtful:
            with self.images.some_doubtful() as images:
                await self.sync(images)
        files = await in_thread(self.store.list_files)
        await in_thread(self.store.catalog.sync)
        async with self._sync_lock:  # a ".new" file may be in the making
            self.store.remove_strays(files)

    async def drop_behind(self) -> int:
        """Let what the kernel keeps for the mount leave the store's page cache; the number of pages."""
        if self.images.doubtful:  # written by a daemon that was killed, and perhaps not on disk
            return 0
        async with self._sync_lock:  # while one runs, nobody knows whether what it took reaches the disk
            found = self.layers.take_behind(self.images.shared)
        if not found:
            return 0
        dropped, left = await trio.to_thread.run_sync(behind.drop, found)
        for each in left:
            self.layers.note_behind(each)
        return dropped

    def has_garbage(self) -> bool:
        """Is there something for :meth:`collect` to look at?"""
        return bool(self.images.replaced or self.images.doomed) and not self.images.doubtful

    async def collect(self) -> None:
        """One garbage pass (store/garbage.py). Syncs wait for the short parts of it only."""
        in_thread = trio.to_thread.run_sync
        async with self._sync_lock:
            self.store.reserve.make_room()
            work = Pass(self.store)
            try:
                await in_thread(work.settle)
            except BaseException:
                work.give_up()
                raise
            finally:
                work.close()
        try:
            await in_thread(work.scan)
            async with self._sync_lock:
                await in_thread(work.rescan)
                work.decide()
            await in_thread(work.reclaim)
            work.finish()
        except BaseException:
            work.give_up()
            raise
        self.images.trim()

    def undigested(self) -> list[Layer]:
        """Sealed layers whose digests are still to be made."""
        layers = self.layers.by_id.values()
        return [layer for layer in layers if layer.sealed and not layer.digested and layer.presence is None]

    async def digest(self, layer: Layer) -> None:
        """Make the digests of a sealed layer, unless they are there."""
        async with self._digest_lock:
            if layer.digested or layer.id not in self.layers.by_id:
                return
            read = await trio.to_thread.run_sync(self.layers.write_digests, layer.id)
            if layer.id in self.layers.by_id:
                with self.store.catalog.transaction():
                    self.store.catalog.execute("UPDATE layers SET digested = 1 WHERE id = ?", layer.id)
                layer.digested = True
                if self.layers.drops:
                    self.layers.note_behind(read)

    async def digest_images(self, numbers: Collection[ImageId]) -> dict[LayerId, LayerPlace]:
        """Make the digests that the layers of frozen images still lack; where these are, then.

        Raises ENOENT, and EBUSY while something arrives whose digests nobody knows.
        """
        while True:
            named: set[LayerId] = set()
            for number in numbers:
                row = self.store.catalog.row("SELECT layers FROM images WHERE id = ?", number)
                if row is None:
                    raise FileError(errno.ENOENT)
                named |= unpack_layers(row["layers"])
            known, path = self.layers.by_id, self.layers.path
            layers = [known[number] for number in named if number in known]
            bases = {layer.base for layer in layers}
            if any(known[base].presence is not None and not known[base].promised for base in bases):
                raise FileError(errno.EBUSY, "it is still arriving, without digests; wait until it is here")
            lacking = [layer for layer in self.undigested() if layer.id in bases]
            if not lacking:
                return {
                    n.id: LayerPlace(None if n.presence else path(n.base), path(n.base, "xxh3"), n.shift)
                    for n in layers
                }
            for layer in lacking:
                await self.digest(layer)

    async def gather(self, numbers: Collection[ImageId], work: Callable[[Gathering], T]) -> T:
        """Do something in a thread with the digests of frozen images; again, while tables and layers change under it.

        Raises as :meth:`digest_images` and ``work`` do, and StoreDamaged.
        """
        for _ in range(_GATHERINGS):
            gathering = Gathering(await self.digest_images(numbers))
            try:
                return await trio.to_thread.run_sync(work, gathering)
            except Moved:
                await trio.lowlevel.checkpoint()
            finally:
                gathering.close()
        raise StoreDamaged("digests of layers are missing; run `ramfs fsck` on the store")
