"""What a write or a sync that fails in the middle leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramfs.image.pages import Buffer
from ramfs.pager import Pager
from ramfs.store import images
from ramfs.store.images import Image
from ramfs.store.layers import LayerFile
from ramfs.store.store import Store
from ramfs.units import PAGE


@pytest.fixture
def store(shm: Path) -> Iterator[Store]:
    store = Store(str(shm / "store"), create=True)
    yield store
    store.close()


def _image(store: Store, contents: bytes = b"") -> Image:
    with store.catalog.transaction():
        image = store.images.create()
    Pager(store).write(image, 0, contents)
    return image


def _full_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let the disk be full after some more writes to layers."""
    left = [writes]
    write = LayerFile.write

    def limited(self: LayerFile, offset: int, data: Buffer) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, offset, data)

    monkeypatch.setattr(LayerFile, "write", limited)


def test_what_a_failed_write_left_behind_the_end_does_not_show(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pages were written, the ragged end was not."""
    pager, image = Pager(store), _image(store, b"old")
    with monkeypatch.context() as patch:
        _full_after(patch, 1)
        with pytest.raises(OSError, match="No space"):
            pager.write(image, PAGE, b"x" * (3 * PAGE + 5))
    assert image.size == 3
    pager.truncate(image, 8 * PAGE)
    assert pager.copy_out(image, 0, 8 * PAGE) == b"old".ljust(8 * PAGE, b"\0")
    assert not image.table.entries[1:8].any()
    with open(image.path, "rb") as file:
        assert not any(file.read()[images.HEADER + images.ENTRY :])
    store.images.release(image)


def test_what_a_failed_copy_left_behind_the_end_does_not_show(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of a table, of which a later one does not fit on the disk."""
    chunk = 1024 * PAGE
    pager, source, target = Pager(store), _image(store), _image(store)
    for part in (0, 2, 4):
        pager.write(source, part * chunk, b"x" * PAGE)
    put, left = Image.put_entries, [1]

    def limited(self: Image, first: int, entries: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, first, entries)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Image, "put_entries", limited)
        with pytest.raises(OSError, match="No space"):
            pager.share(source, 0, target, 0, source.size)
    pager.truncate(target, source.size)
    assert pager.copy_out(target, 0, target.size) == bytes(target.size)
    with open(target.path, "rb") as file:
        assert not any(file.read()[images.HEADER :])
    for image in (source, target):
        store.images.release(image)


def test_a_file_that_is_closed_during_a_sync_that_fails_is_synced_by_the_next(store: Store) -> None:
    pager, image = Pager(store), _image(store, b"x" * PAGE)
    number = image.id
    job = store.sync_all()
    store.images.release(image)
    job.failed()
    job.close()
    assert [image.id for image in store.images.open_images()] == [number]
    job = store.sync_all()
    job.run()
    job.close()
    store.images.trim()
    assert os.path.exists(store.images.path(number, "durable"))
    assert store.images.open_images() == []
    image = store.images.acquire(number)
    assert pager.copy_out(image, 0, PAGE) == b"x" * PAGE
    store.images.release(image)


def test_a_sync_that_cannot_begin_counts_nothing_as_synced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor short: the files that were looked at before it must be looked at again."""
    image = _image(store, b"x" * PAGE)

    def short(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(store.layers, "path", short)
        with pytest.raises(OSError, match="Too many"):
            store.sync_all()
    assert image.header_stale
    assert image.users == 1
    store.images.release(image)


def test_a_file_that_is_deleted_during_its_sync_is_not_synced_again(store: Store) -> None:
    image = _image(store, b"x" * PAGE)
    job = store.sync_all()
    store.images.release(image)
    with store.catalog.transaction():
        store.images.delete(image.id)
    job.failed()
    job.close()
    assert store.images.open_images() == []
