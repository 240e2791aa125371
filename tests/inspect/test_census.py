"""Pages of related images are counted in one go, and what was found holds until a table changes."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import trio
from storekit import Kit

from ramfs.image.lineage import PageCounts, count_alone, count_pages
from ramfs.image.table import Entries
from ramfs.inspect import census
from ramfs.inspect.census import Census
from ramfs.store.images import Image, read_table
from ramfs.units import PAGE


def counted(kit: Kit, counts: Census, image: Image) -> PageCounts | None:
    async def ask() -> PageCounts | None:
        return await counts.counts(image)

    return trio.run(ask)


def expected(kit: Kit, image: Image) -> PageCounts:
    """Of one image alone, by the tables of all the others."""
    own = read_table(image.path)
    others = [
        read_table(kit.store.images.path(number)) for number, _ in kit.store.images.records() if number != image.id
    ]
    assert own is not None
    return count_pages(own, image.pages, [each for each in others if each is not None], {})


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_each_image_alone(shm: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "_AT_ONCE", 8192)  # more than one span of tables
    draw = random.Random(seed)
    size = 3000
    with Kit(shm / "store") as kit:
        kit.write("f0", 0, os.urandom(400 * PAGE))
        kit.write("alone", 5 * PAGE, os.urandom(7 * PAGE))
        counts, names = Census(kit.store), ["f0", "alone"]
        for step in range(25):
            name = draw.choice(names)
            first = draw.randrange(size)
            match draw.randrange(6):
                case 0:
                    kit.snapshot(f"s{step}")
                    names += [f".snap/s{step}/{each}" for each in names if "/" not in each]
                case 1 if "/" not in name:
                    kit.copy(name, f"f{step}")
                    names.append(f"f{step}")
                case 2 if "/" not in name:
                    kit.pager.truncate(kit.image(name), first * PAGE)
                case 3 if "/" not in name and len(names) > 2:
                    kit.unlink(name)
                    names.remove(name)
                case _ if "/" not in name:
                    kit.write(name, first * PAGE, os.urandom(draw.randrange(1, 40) * PAGE))
            for each in draw.sample(names, min(len(names), 4)):
                assert counted(kit, counts, kit.image(each)) == expected(kit, kit.image(each)), (step, each)


def test_tables_are_read_once_for_all(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = census._read

    def counting(path: str, first: int, count: int) -> Entries:
        reads.append(path)
        return read(path, first, count)

    monkeypatch.setattr(census, "_read", counting)
    with Kit(shm / "store") as kit:
        counts = Census(kit.store)
        kit.write("f", 0, os.urandom(20 * PAGE))
        for number in range(5):
            kit.write("f", number * PAGE, os.urandom(PAGE))
            kit.snapshot(str(number))
        images = [kit.image("f"), *(kit.image(f".snap/{number}/f") for number in range(5))]
        found = [counted(kit, counts, image) for image in images]
        assert [each.owned for each in found if each] == [0, 1, 0, 0, 0, 0]  # what was written after the first one
        assert len(reads) == len(images)
        kit.write("f", 0, os.urandom(PAGE))
        assert counted(kit, counts, images[0]) == PageCounts(1, 19, 0, 0, 20)
        assert len(reads) == 2 * len(images)


def test_pages_with_several_places_are_not_counted_so(shm: Path) -> None:
    with Kit(shm / "store") as kit:
        kit.write("f", 0, os.urandom(20 * PAGE))
        kit.create("g")
        assert kit.pager.share(kit.image("f"), 0, kit.image("g"), 3 * PAGE, 20 * PAGE) == 20 * PAGE
        assert counted(kit, Census(kit.store), kit.image("f")) is None
        assert counted(kit, Census(kit.store), kit.image("g")) is None


def test_rows_that_alternate() -> None:
    a, b = np.array([1, 0, 2, 3], np.uint32), np.array([4, 0, 0, 3], np.uint32)
    assert count_alone([a, b, a]) == [0, 1, 0]
    assert count_alone([b, a]) == [1, 2]
    assert count_alone([a]) == [3]
    assert count_alone([]) == []
    assert count_alone([np.zeros(4, np.uint32)]) == [0]
