"""What is stored of an image, for a thread: of a table, and of a direct image's file."""

from __future__ import annotations

import os
from pathlib import Path

from storekit import Kit

from ramfs.store.stored import Stored
from ramfs.units import PAGE

A, B = b"a" * PAGE, b"b" * PAGE


def pages_of(stored: Stored, first: int, stop: int) -> dict[int, bytes]:
    runs = list(stored.runs(first, stop))
    assert all(first <= low < high <= stop for low, high in runs)
    return {page: stored.read(page * PAGE, PAGE) for low, high in runs for page in range(low, high)}


def test_pages_of_several_layers(tmp_path: Path) -> None:
    with Kit(tmp_path) as kit:
        kit.create("file")
        kit.write("file", 3 * PAGE, A * 4)
        kit.snapshot("s")
        kit.write("file", 5 * PAGE, B)
        kit.write("file", 5000 * PAGE, B)
        stored = Stored(kit.image("file"), kit.pager.layers)
        kit.write("file", 3 * PAGE, B)  # what it had named is still there
        assert pages_of(stored, 0, 6000) == {3: A, 4: A, 5: B, 6: A, 5000: B}
        assert pages_of(stored, 4, 6) == {4: A, 5: B}
        assert pages_of(stored, 7, 5000) == {}
        assert stored.read(4 * PAGE + 10, 5) == b"aaaaa"
        os.unlink(kit.layer_file(kit.layer_of("file", 4)))
        stored.close()
        assert stored.read(4 * PAGE, PAGE) == b""


def test_a_file_that_is_the_image(tmp_path: Path) -> None:
    with Kit(tmp_path / "store") as kit:
        kit.create("file")
        image, path = kit.image("file"), tmp_path / "direct"
        with open(path, "wb") as file:
            os.pwrite(file.fileno(), A * 2, 8 * PAGE)
            os.pwrite(file.fileno(), B, 1000 * PAGE)
        image.direct = str(path)
        image.refresh()
        stored = Stored(image, kit.pager.layers)
        assert pages_of(stored, 0, 2000) == {8: A, 9: A, 1000: B}
        assert pages_of(stored, 9, 1000) == {9: A}
        stored.close()
        image.direct = None
