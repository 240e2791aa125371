"""Flat images: what becomes of them beside garbage collection and merging, step by step."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from storekit import Kit

import ramfs.store.images
from ramfs.errors import FileError
from ramfs.store.flat import Flatten, sole_layer
from ramfs.store.repair import check_store
from ramfs.units import PAGE

PAGES = 2048
FROZEN = ".snap/last/f"


def page(number: int) -> bytes:
    return number.to_bytes(8, "little") * (PAGE // 8)


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    with Kit(tmp_path / "store") as kit:
        yield kit
    report = check_store(str(tmp_path / "store"))
    assert not report.findings, report


@pytest.fixture
def contents(kit: Kit) -> bytes:
    """A file in four layers that a snapshot alone has, with digests, so that they may be merged."""
    kit.write("f", 0, b"".join(page(number + 1) for number in range(64)))
    for generation in range(3):
        kit.snapshot(f"g{generation}")
        kit.write("f", (generation * 700 + 10) * PAGE, page(1000 + generation) * 20)
    kit.pager.truncate(kit.image("f"), PAGES * PAGE)
    kit.snapshot("last")
    for generation in range(3):
        kit.delete_snapshot(f"g{generation}")
    kit.unlink("f")
    kit.collect(2)
    kit.digest()
    contents = kit.read(FROZEN)
    assert len(contents) == PAGES * PAGE
    assert len(kit.table(FROZEN).layers()) == 4
    return contents


def copied(kit: Kit) -> Flatten:
    work = Flatten(kit.store, kit.image(FROZEN))
    while work.step():
        pass
    assert work.done == work.total
    return work


def finish(work: Flatten) -> bool:
    work.publish()
    work.settle()
    done = work.swing()
    work.close()
    return done


def test_one_layer_and_no_other_is_left(kit: Kit, contents: bytes) -> None:
    work = copied(kit)
    assert finish(work)
    assert kit.read(FROZEN) == contents
    assert sole_layer(kit.image(FROZEN), kit.pager.layers) == work.layer
    kit.collect(2)
    assert kit.read(FROZEN) == contents
    assert [path.name for path in (kit.directory / "layers").glob("*.ram")] == [f"{work.layer:08x}.ram"]


def test_what_was_merged_meanwhile_is_copied_again(kit: Kit, contents: bytes) -> None:
    """A page that went to another layer may have been punched where it was copied from."""
    work = copied(kit)
    kit.merge(above=1)
    assert len(kit.table(FROZEN).layers()) == 1
    assert not finish(work)
    assert kit.read(FROZEN) == contents
    trio.run(kit.pager.flatten, kit.image(FROZEN), lambda work: None)
    assert kit.read(FROZEN) == contents
    assert sole_layer(kit.image(FROZEN), kit.pager.layers) is not None
    kit.collect(2)
    assert kit.read(FROZEN) == contents


def test_merging_leaves_a_flat_image_alone(kit: Kit, contents: bytes) -> None:
    """Its record names the old layers still, and they are its own: but none of their pages are."""
    work = copied(kit)
    assert finish(work)
    assert work.layer is not None
    kit.digest()
    file = kit.layer_file(work.layer)
    before, inode = file.read_bytes(), file.stat().st_ino
    for _ in range(3):
        kit.merge(above=1)
        assert (file.read_bytes(), file.stat().st_ino) == (before, inode)
        assert kit.read(FROZEN) == contents
        assert kit.table(FROZEN).layers() == {work.layer}


def test_garbage_is_looked_for_between_all_steps(kit: Kit, contents: bytes) -> None:
    work = copied(kit)
    kit.collect()
    work.publish()
    kit.store.images.replaced |= {layer.base for layer in work._sources}
    kit.collect(2)
    work.settle()
    kit.collect(2)
    assert work.swing()
    work.close()
    kit.collect(2)
    assert kit.read(FROZEN) == contents


def test_an_image_that_is_deleted(kit: Kit, contents: bytes) -> None:
    work = copied(kit)
    image = kit.store.images.acquire(work.image.id)
    kit.delete_snapshot("last")
    with pytest.raises(FileError) as caught:
        work.publish()
    assert caught.value.errno == errno.ENOENT
    work.close()
    kit.store.images.release(image)
    kit.collect(2)
    assert os.listdir(kit.directory / "layers") == []


def test_a_table_that_cannot_be_written(kit: Kit, contents: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and file agree on what has swung, for garbage collection believes the file."""
    work = copied(kit)
    real, calls = ramfs.store.images.write_all, []

    def write_all(fd: int, data: bytes, offset: int) -> None:
        calls.append(offset)
        if len(calls) > 1:
            real(fd, data[: len(data) // 8 // 4 * 4], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd, data, offset)

    work.publish()
    work.settle()
    image = kit.store.images.acquire(work.image.id)
    # In two parts, so that one is written, and little of the other.
    (first, entries), *rest = work._parts
    work._parts = [(first, entries[:1024]), (first + 1024, entries[1024:]), *rest]
    with monkeypatch.context() as patch:
        patch.setattr(ramfs.store.images, "write_all", write_all)
        with pytest.raises(OSError, match="Input/output"):
            work.swing()
    work.close()
    kit.collect(2)
    assert kit.pager.copy_out(image, 0, image.size) == contents
    kit.store.images.release(image)
    assert kit.read(FROZEN) == contents
