import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from storekit import Kit

from ramfs.errors import FileError, StoreDamaged
from ramfs.image.table import CHUNK
from ramfs.store.images import HEADER, Header, load_table, pack_header, table_length, unpack_header
from ramfs.units import MAX_FILE_SIZE, PAGE


def test_headers(tmp_path: Path) -> None:
    header = Header(12345, -1, 1 << 62)
    data = pack_header(header)
    assert unpack_header(data.ljust(HEADER, b"\0"), "x") == header
    for bad in (b"", data[:-1], b"X" + data[1:], data[:8] + b"\2" + data[9:], data[:-1] + b"\0\0"[:1]):
        if bad != data:
            with pytest.raises(StoreDamaged):
                unpack_header(bad, "x")
    with pytest.raises(StoreDamaged):
        unpack_header(pack_header(Header(MAX_FILE_SIZE + 1, 0, 0)), "x")


def test_a_table_has_the_length_of_its_size(tmp_path: Path) -> None:
    assert [table_length(size) for size in (0, 1, PAGE * 1024, PAGE * 1024 + 1)] == [4096, 8192, 8192, 12288]
    with Kit(tmp_path / "s") as kit:
        image = kit.create("f")
        for size in (0, 5, PAGE * 1024 + 1, PAGE * 5000):
            kit.pager.truncate(image, size)
            assert os.path.getsize(image.path) == table_length(size)
        kit.sync("f")
        assert os.path.getsize(kit.store.images.path(image.id, "durable")) == table_length(PAGE * 5000)
        kit.copy("f", "g")
        assert os.path.getsize(kit.image("g").path) >= table_length(PAGE * 5000)


def test_a_copy_is_independent(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"a" * 10 * PAGE)
        with kit.store.catalog.transaction():
            frozen = kit.store.images.copy(kit.image("f"), frozen=True)
        assert kit.image("f").live is None
        kit.write("f", 3 * PAGE, b"b" * PAGE)
        assert kit.pager.copy_out(frozen, 0, frozen.size) == b"a" * 10 * PAGE
        assert kit.read("f") == b"a" * 3 * PAGE + b"b" * PAGE + b"a" * 6 * PAGE
        with pytest.raises(FileError) as refused:
            kit.pager.write(frozen, 0, b"x")
        assert refused.value.errno == errno.EROFS
        kit.store.images.release(frozen)


def test_a_copy_that_is_rolled_back(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"a" * PAGE)
        live, tables = kit.image("f").live, sorted(os.listdir(tmp_path / "s/tables"))
        assert live is not None
        with pytest.raises(RuntimeError), kit.store.catalog.transaction():  # noqa: PT012 - what it holds is the point
            kit.store.images.copy(kit.image("f"), frozen=True)
            kit.store.images.create()
            raise RuntimeError
        assert sorted(os.listdir(tmp_path / "s/tables")) == tables
        assert kit.image("f").live is live
        assert not live.sealed
        kit.write("f", 0, b"b" * PAGE)
        assert kit.layer_of("f") == live.id


def test_the_first_write_of_a_page_takes_all_of_it(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"a" * 2 * PAGE)
        kit.copy("f", "g")
        kit.write("g", 100, b"g")
        assert kit.read("g") == b"a" * 100 + b"g" + b"a" * (2 * PAGE - 101)
        assert kit.read("f") == b"a" * 2 * PAGE
        assert kit.layer_of("g", 0) != kit.layer_of("f", 0)
        assert kit.layer_of("g", 1) == kit.layer_of("f", 1)


def test_zero_pages_are_stored_nowhere(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, bytes(100 * PAGE))
        assert kit.table("f").resident() == 0
        assert os.listdir(tmp_path / "s/layers") == []
        kit.write("f", 0, b"x" * 3 * PAGE)
        kit.write("f", PAGE, bytes(PAGE))
        layer = kit.layer_of("f", 0)
        assert kit.table("f").entries[:4].tolist() == [layer, 0, layer, 0]
        assert kit.layer_file(layer).stat().st_blocks * 512 == 2 * PAGE


def test_growing_shows_nothing_of_what_was_cut_off(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * 3 * PAGE)
        kit.pager.truncate(kit.image("f"), PAGE + 10)
        kit.pager.truncate(kit.image("f"), 3 * PAGE)
        assert kit.read("f") == b"x" * (PAGE + 10) + bytes(2 * PAGE - 10)


@pytest.mark.parametrize("grow", ["truncate", "write", "share"])
def test_growing_shows_nothing_of_a_write_that_was_cut_short(tmp_path: Path, grow: str) -> None:
    """A daemon killed after the data and before the new size leaves bytes behind the end."""
    kit = Kit(tmp_path / "s")
    kit.write("f", 0, b"x" * 10)
    kit.write("g", 0, b"g" * PAGE)
    kit.store.layers.file(kit.image("f").live).write(10, b"beyond")  # type: ignore[arg-type]
    kit.image("f").table.fill(1, 3, kit.layer_of("f"))
    kit.image("f").store_entries(1, 3)
    kit.kill()
    with Kit(tmp_path / "s") as kit:
        image = kit.image("f")
        if grow == "truncate":
            kit.pager.truncate(image, 2 * PAGE)
        elif grow == "write":
            kit.pager.write(image, 2 * PAGE - 1, b"\0")
        else:
            kit.pager.share(kit.image("g"), 0, image, PAGE, PAGE)
        expected = b"x" * 10 + bytes(PAGE - 10) + (b"g" * PAGE if grow == "share" else bytes(PAGE))
        assert kit.read("f") == expected
    with Kit(tmp_path / "s") as kit:
        assert kit.read("f") == expected


# --- syncs ---


def durable(kit: Kit, path: str) -> tuple[int, list[int]]:
    """What a power loss would leave of a file: its size and its first entries."""
    name = kit.store.images.path(kit.image(path).id, "durable")
    fd = os.open(name, os.O_RDONLY)
    try:
        header, table = load_table(fd, name)
        return header.size, table.entries[:4].tolist()
    finally:
        os.close(fd)


def test_a_sync_writes_what_changed(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
        kit.write("other", 0, b"y" * PAGE)
        kit.sync("f")
        layer = kit.layer_of("f")
        assert durable(kit, "f") == (PAGE, [layer, 0, 0, 0])
        assert not kit.store.images.is_stale(kit.image("f"))
        assert not os.path.exists(kit.store.images.path(kit.image("other").id, "durable"))
        kit.write("f", 2 * PAGE, b"z" * PAGE)
        assert kit.store.images.is_stale(kit.image("f"))
        assert durable(kit, "f") == (PAGE, [layer, 0, 0, 0])
        kit.sync()
        assert durable(kit, "f") == (3 * PAGE, [layer, 0, layer, 0])
        assert durable(kit, "other")[0] == PAGE


def test_a_sync_writes_only_chunks_that_changed(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
        kit.write("f", 10 * CHUNK * PAGE, b"x" * PAGE)
        kit.sync()
        kit.write("f", 10 * CHUNK * PAGE, bytes(PAGE))
        job = kit.store.images.sync_job([kit.image("f")])
        ((_, _, _, parts),) = job.writes
        assert [(offset, len(data)) for offset, data in parts][1:] == [(HEADER + 10 * CHUNK * 4, CHUNK * 4)]
        job.run()
        job.close()


def test_an_in_place_write_is_synced_too(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
        kit.sync("f")
        kit.pager._write_within(kit.image("f"), 5, b"y")
        job = kit.store.images.sync_job([kit.image("f")])
        assert [layer.id for layer, _ in job.layers] == [kit.layer_of("f")]
        job.run()
        job.close()


def test_what_a_shared_page_needs_is_synced_with_it(tmp_path: Path) -> None:
    """The clone's fsync must flush the layer that its source wrote, also through an alias."""
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * 4 * PAGE)
        kit.pager.share(kit.image("f"), 2 * PAGE, kit.create("g"), 0, PAGE)
        job = kit.store.images.sync_job([kit.image("g")])
        assert [layer.id for layer, _ in job.layers] == [kit.layer_of("f")]
        job.run()
        job.close()


@pytest.mark.parametrize("call", ["fdatasync", "open", "rename"])
def test_a_sync_that_fails_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
        kit.snapshot("s")
        kit.write("f", PAGE, b"y" * PAGE)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _failing(getattr(os, call)))
            with pytest.raises(OSError, match="Input/output"):
                kit.sync("f")
        assert kit.store.images.is_stale(kit.image("f"))
        kit.sync("f")
        layers = [kit.layer_of("f", page) for page in (0, 1)]
        assert durable(kit, "f") == (2 * PAGE, [*layers, 0, 0])
        assert not kit.store.images.is_stale(kit.image("f"))


def _failing(real: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **more: object) -> object:
        first = args[0] if isinstance(args[0], str) else os.readlink(f"/proc/self/fd/{args[0]}")
        if "/layers/" in first or "/tables/" in first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **more)

    return call


def test_an_image_that_is_not_synced_stays_open(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
        kit.forget()
        (image,) = kit.store.images.open_images()
        assert image.users == 0
        kit.sync()
        assert kit.store.images.open_images() == []


def test_two_syncs_wait_for_each_other(tmp_path: Path) -> None:
    async def both(kit: Kit) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                kit.pager.write(kit.image("f"), 0, os.urandom(PAGE))
                nursery.start_soon(kit.pager.sync, [kit.image("f")])
                await trio.lowlevel.checkpoint()

    with Kit(tmp_path / "s") as kit:
        kit.create("f")
        trio.run(both, kit)
        assert not kit.store.images.is_stale(kit.image("f"))


# --- sharing ---


@pytest.mark.parametrize("shift", [0, 1, 3, -2])
def test_sharing_within_one_file(tmp_path: Path, shift: int) -> None:
    with Kit(tmp_path / "s") as kit:
        data = b"".join(bytes([65 + i]) * PAGE for i in range(8))
        kit.write("f", 0, data)
        image = kit.image("f")
        low, count = 4, 2
        if abs(shift) >= count:
            kit.pager.share(image, low * PAGE, image, (low - shift) * PAGE, count * PAGE)
            expected = bytearray(data)
            expected[(low - shift) * PAGE : (low - shift + count) * PAGE] = data[low * PAGE : (low + count) * PAGE]
            assert kit.read("f") == expected
        kit.write("f", low * PAGE, b"w" * PAGE)
        assert kit.read("f")[(low + 1) * PAGE :] == bytes(kit.read("f"))[(low + 1) * PAGE :]


def test_sharing_copies_no_page(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, os.urandom(64 * PAGE))
        before = set(os.listdir(tmp_path / "s/layers"))
        kit.copy("f", "g")
        assert set(os.listdir(tmp_path / "s/layers")) == before
        assert kit.read("g") == kit.read("f")


def test_ragged_ends_are_copied(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        data = os.urandom(10 * PAGE)
        kit.write("f", 0, data)
        kit.write("g", 0, b"g" * 10 * PAGE)
        kit.pager.share(kit.image("f"), 100, kit.image("g"), PAGE + 100, 5 * PAGE)
        assert kit.read("g") == b"g" * (PAGE + 100) + data[100 : 100 + 5 * PAGE] + b"g" * (4 * PAGE - 100)
        assert kit.layer_of("g", 2) != kit.layer_of("g", 1)


def test_sizes_at_the_limit(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        image = kit.create("f")
        for size in (MAX_FILE_SIZE + 1, (1 << 63) - 1):
            with pytest.raises(FileError) as refused:
                kit.pager.truncate(image, size)
            assert refused.value.errno == errno.EFBIG
        with pytest.raises(FileError) as refused:
            kit.pager.truncate(image, -1)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(FileError):
            kit.pager.write(image, MAX_FILE_SIZE - 1, b"xx")
        assert image.size == 0
