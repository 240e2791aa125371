"""Which pages of layers may leave the store's page cache: those that are on disk, and no other."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from storekit import Kit

from ramfs.image.table import CHUNK
from ramfs.store.behind import Marks, drop
from ramfs.units import PAGE

DATA = b"x" * PAGE


def taken(kit: Kit) -> list[list[int]]:
    """Pages that may be dropped, for each layer."""
    layers = kit.store.layers
    return [np.flatnonzero(each.marks.pages).tolist() for each in layers.take_behind(kit.store.images.shared)]


def test_what_was_written_since_the_sync_waits_for_the_next(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.write("f", 0, 3 * DATA)
        assert taken(kit) == []
        kit.sync()
        kit.write("f", PAGE, DATA)
        assert taken(kit) == [[0, 2]]
        assert taken(kit) == []
        kit.write("f", 5000 * PAGE + 1, DATA)  # the layer's file grows, and parts of pages count
        kit.sync()
        assert taken(kit) == [[1, 5000, 5001]]


def test_what_could_not_be_synced_is_right_in_memory_alone(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.write("f", 0, DATA)
        job = kit.store.images.sync_job([kit.image("f")])
        job.failed()
        job.close()
        kit.sync()
        kit.write("f", PAGE, DATA)
        kit.sync()
        assert taken(kit) == []
        kit.write("g", 0, DATA)  # of another layer
        kit.sync()
        assert taken(kit) == [[0]]


def test_a_layer_waits_for_its_digests_and_for_its_other_readers(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.write("f", 0, 2 * DATA)
        kit.copy("f", "g")
        kit.sync()
        assert taken(kit) == []
        kit.digest()
        assert taken(kit) == []
        kit.unlink("f")
        kit.forget()
        assert taken(kit) == [[0, 1]]


def test_frozen_images_that_nobody_has_open_read_nothing(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.write("f", 0, DATA)
        kit.snapshot("s")
        assert taken(kit) == []  # the digests would have to read it again
        kit.digest()
        held = kit.image("/.snap/s/f")
        kit.store.images.acquire(held.id)
        assert taken(kit) == []
        kit.store.images.release(held)
        kit.forget()
        assert taken(kit) == [[0]]


def test_a_layer_that_is_gone_is_no_error(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.write("f", 0, DATA)
        kit.sync()
        found = kit.store.layers.take_behind(kit.store.images.shared)
        kit.unlink("f")
        kit.collect(passes=2)
        assert not list((tmp_path / "store" / "layers").glob("*.ram"))
        assert drop(found) == (0, [])


def test_what_somebody_holds_goes_later(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        apart = 1 << 10  # or the kernel has them in one folio
        for page in range(3):
            kit.write("f", page * apart * PAGE, DATA)
        kit.sync()
        (path,) = (tmp_path / "store" / "layers").glob("*.ram")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            memory.madvise(mmap.MADV_RANDOM)
            assert memory[apart * PAGE] == DATA[0]
            dropped, left = drop(kit.store.layers.take_behind(kit.store.images.shared))
            assert [np.flatnonzero(each.marks.pages).tolist() for each in left] == [[apart]]
            assert dropped == 2
        assert drop(left) == (1, [])


def test_what_comes_back_goes_with_what_is_dropped_next(tmp_path: Path) -> None:
    def look() -> int:
        dropped, left = drop(kit.store.layers.take_behind(kit.store.images.shared))
        assert left == []
        return dropped

    def read(*which: int) -> None:
        """Have the disk read pages of which nobody is handed anything."""
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert [os.pread(file.fileno(), PAGE, page * PAGE) for page in which] == [DATA] * len(which)

    with Kit(tmp_path / "store") as kit:
        kit.write("f", 0, 3000 * DATA)
        kit.sync()
        (path,) = (tmp_path / "store" / "layers").glob("*.ram")
        assert look() == 3000
        read(7, 2000)
        assert look() == 0  # nothing was noted of the layer
        kit.write("f", 5 * PAGE, DATA)
        kit.write("f", 2000 * PAGE, DATA)
        kit.sync()
        kit.write("f", 2000 * PAGE, DATA)  # not on disk yet
        assert look() == 2
        read(7)
        kit.sync()
        assert look() == 1  # page 7 was looked at once more
        read(2000)
        kit.write("f", 9000 * PAGE, DATA)
        kit.sync()
        assert look() == 2


ranges = st.lists(st.tuples(st.integers(0, 3 * CHUNK - 1), st.integers(1, CHUNK)), max_size=4)


@given(ranges, ranges, ranges, st.integers(CHUNK, 5 * CHUNK))
def test_marks(
    some: list[tuple[int, int]], more: list[tuple[int, int]], less: list[tuple[int, int]], room: int
) -> None:
    def made(parts: list[tuple[int, int]], room: int) -> tuple[Marks, set[int]]:
        marks, model = Marks(room), set[int]()
        for first, length in parts:
            stop = min(first + length, room)
            if first < stop:
                marks.set(first, stop)
                model |= set(range(first, stop))
        return marks, model

    one, model = made(some, room)
    other, added = made(more, room)
    third, removed = made(less, 2 * CHUNK)
    one.add(other)
    one.remove(third)
    grown = Marks(room + CHUNK, one)
    assert set(np.flatnonzero(grown.pages).tolist()) == (model | added) - removed
    inside = {page for first, stop in grown.regions() for page in range(first, stop)}
    assert inside >= (model | added) - removed
    for first, stop in grown.regions():
        grown.keep(first, (np.arange(first, stop) % 3 == 0).astype(np.uint8))
    rest = {page for page in (model | added) - removed if page % 3 == 0}
    assert set(np.flatnonzero(grown.pages).tolist()) == rest
    assert set(np.flatnonzero(grown.chunks).tolist()) == {page // CHUNK for page in rest}
