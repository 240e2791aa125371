"""Many files and large ones: descriptors and addresses do not run out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Mount

from ramfs.pager import Pager
from ramfs.store import images
from ramfs.store.store import Store
from ramfs.units import MAX_FILE_SIZE, PAGE


def test_the_layers_of_a_large_file_are_more_than_there_are_addresses_for(mounted: Mount) -> None:
    """Each is mapped in the size of the file: eight of 16 TiB are all that a process can have."""
    directory = mounted.path / "vm"
    directory.mkdir()
    with open(directory / "ram", "wb", buffering=0) as file:
        file.truncate(MAX_FILE_SIZE)
        for generation in range(1, 13):
            os.pwrite(file.fileno(), bytes([generation]) * PAGE, generation << 30)
            (directory / ".snap" / str(generation)).mkdir()
    mounted.restart()
    with open(directory / "ram", "rb", buffering=0) as file:
        for _ in range(2):
            for generation in range(1, 13):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(file.fileno(), PAGE, generation << 30) == bytes([generation]) * PAGE


def test_tables_of_many_files_are_not_all_open(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "OPEN_TABLES", 4)
    store = Store(str(shm / "store"), create=True)
    pager = Pager(store)
    with store.catalog.transaction():
        made = [store.images.create() for _ in range(20)]
        for number, image in enumerate(made):
            pager.write(image, 0, bytes([number + 1]) * PAGE)
        made += [store.images.copy(image, frozen=True) for image in made]
    tables = f"{shm}/store/tables/"
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    job = store.sync_all()
    job.run()
    job.close()
    assert sum(link.startswith(tables) for link in links) <= 4
    for number, image in enumerate(made):
        assert pager.copy_out(image, 0, PAGE) == bytes([number % 20 + 1]) * PAGE
        store.images.release(image)
    store.close()
