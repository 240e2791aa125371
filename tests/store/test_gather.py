"""Digests of an image, gathered by its table: after all that can happen to tables and layers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import trio
from source.cases import file_of
from storekit import Kit

from ramfs.image.digest import DIGEST, KNOWN_LOST
from ramfs.store.gather import Gathering, Moved
from ramfs.units import LOST, PAGE

SIZE = 40


def gathered(kit: Kit, path: str) -> np.ndarray:
    image = kit.image(path)
    gathering = Gathering(trio.run(kit.pager.digest_images, [image.id]))
    try:
        whole = b"".join(gathering.digests(image.path, image.size))
    finally:
        gathering.close()
    return np.frombuffer(whole, np.uint8).reshape(-1, DIGEST)


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Kit(tmp_path / "store") as kit:
        kit.mkdir("d")
        kit.create("d/a")
        kit.create("d/b")
        taken = 0
        for step in range(80):
            one, other = rng.sample(["d/a", "d/b"], 2)
            page = rng.randrange(SIZE)
            match rng.randrange(9):
                case 0 | 1 | 2:
                    data = rng.choice([rng.randbytes(PAGE * 3), bytes(PAGE * 2), rng.randbytes(700), bytes(900)])
                    kit.write(one, page * PAGE + rng.choice([0, 0, 300]), data)
                case 3:
                    image, target = kit.image(one), kit.image(other)
                    length = rng.choice([3 * PAGE, 7 * PAGE + 100, 500])
                    if image.size > page * PAGE:
                        kit.pager.share(image, page * PAGE, target, rng.randrange(SIZE) * PAGE, length)
                case 4:
                    kit.pager.truncate(kit.image(one), rng.randrange(SIZE * PAGE))
                case 5 | 6:
                    kit.snapshot(f"{taken}", "d")
                    taken += 1
                case 7:
                    kit.merge()
                case 8 if taken > 2:
                    kit.forget()
                    name = f"{rng.randrange(taken)}"
                    if any(entry == name.encode() for _, entry, _ in kit.space.names(kit._directory(b"d/.snap"))):
                        kit.delete_snapshot(name, "d")
            if step % 10 == 9:
                kit.collect()
        kit.snapshot("last", "d")
        for _, name, _ in list(kit.space.names(kit._directory(b"d/.snap"))):
            for file in ("a", "b"):
                path = f"d/.snap/{name.decode()}/{file}"
                assert (gathered(kit, path) == file_of(kit.read(path)).digests).all(), path
                kit.forget()


def test_the_last_page_and_stored_zeros(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.mkdir("d")
        kit.write("d/a", 0, bytes(range(1, 256)) * 20 * 5)
        kit.write("d/a", PAGE, b"x" * PAGE)
        kit.write("d/a", PAGE + 100, bytes(PAGE - 100))
        kit.write("d/a", PAGE, bytes(100))  # ends as a page that is stored, and zero
        image = kit.image("d/a")
        # Ends in the same ragged page, which lies elsewhere.
        kit.pager.share(image, PAGE, kit.create("d/b"), 0, image.size - PAGE)
        kit.snapshot("s", "d")
        frozen = kit.image("d/.snap/s/a")
        assert frozen.size % PAGE
        for path in ("d/.snap/s/a", "d/.snap/s/b"):
            expected = file_of(kit.read(path)).digests
            # What a write left that a crash cut short: bytes behind the end of the file.
            layer = kit.layer_file(kit.pager.layers[kit.layer_of("d/.snap/s/a")].base)
            with layer.open("r+b") as file:
                file.seek(frozen.size)
                file.write(b"behind the end")
            assert (gathered(kit, path) == expected).all()
        assert not gathered(kit, "d/.snap/s/a")[1].any()


def test_what_is_not_there_any_more(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.mkdir("d")
        kit.write("d/a", 0, b"a" * 3 * PAGE)
        kit.snapshot("s", "d")
        image = kit.image("d/.snap/s/a")
        places = trio.run(kit.pager.digest_images, [image.id])
        for missing in (lambda: Gathering({}).digests(image.path, image.size),
                        lambda: Gathering(places).digests(str(tmp_path / "gone"), image.size)):  # fmt: skip
            with pytest.raises(Moved):
                list(missing())
        digests = kit.layer_file(kit.layer_of("d/.snap/s/a"), "xxh3")
        contents = digests.read_bytes()
        digests.unlink()
        gathering = Gathering(places)
        with pytest.raises(Moved):
            list(gathering.digests(image.path, image.size))
        gathering.close()
        digests.write_bytes(contents)


def test_lost_pages_and_holes_are_told(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.mkdir("d")
        kit.write("d/a", 0, b"a" * 3 * PAGE + b"rest")
        kit.snapshot("s", "d")
        path = "d/.snap/s/a"
        gathered(kit, path)
        digests = kit.layer_file(kit.layer_of(path), "xxh3")
        with digests.open("r+b") as file:
            file.seek(DIGEST)
            file.write(bytes(DIGEST))  # as of a page that was a hole when the layer was digested
        image = kit.image(path)
        image.table.entries[2] = LOST
        image.store_entries(0, 3)
        expected = file_of(kit.read("d/a")).digests
        found = gathered(kit, path)
        assert found[1].tobytes() == found[2].tobytes() == KNOWN_LOST
        assert (found[[0, 3]] == expected[[0, 3]]).all()
