"""Arriving layers in the store: ends of any kind, copies made meanwhile, deletion."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from arrival.inside import ArrivingKit, Shelf
from mount.posix import page_of
from storekit import steps_of

from ramfs.arrival.layer import complete
from ramfs.errors import FileError
from ramfs.image.table import runs_of
from ramfs.pager import Absent
from ramfs.store.garbage import Pass
from ramfs.store.layers import HERE
from ramfs.store.presence import ABSENT, STORED, ZEROS
from ramfs.store.repair import check_store
from ramfs.units import PAGE

COUNT = 40
#: Pages of the source that hold only zeros.
EMPTY = range(10, 14)
DATA = b"".join(bytes(PAGE) if n in EMPTY else page_of(n + 1) for n in range(COUNT)) + b"ragged"


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[ArrivingKit]:
    kit = ArrivingKit(tmp_path / "store", Shelf({"ram": DATA}))
    kit.shelf.allowed = 0
    kit.pull("vm")
    yield kit
    kit.store.close()
    report = check_store(str(kit.directory))
    assert not report.damaged, report


def states(kit: ArrivingKit, path: str = "vm/ram") -> list[int]:
    presence = kit.arriving(path).presence
    assert presence is not None
    return list(presence.states.tolist())


def test_it_arrives_each_page_once_and_known_zeros_never(kit: ArrivingKit) -> None:
    kit.arrive()
    assert kit.read("vm/ram") == DATA
    assert set(kit.shelf.fetched.values()) == {1}
    assert {page for _, page in kit.shelf.fetched} == set(range(COUNT + 1)) - set(EMPTY)
    assert not any(kit.table("vm/ram").entries[n] for n in EMPTY)
    assert not list((kit.directory / "layers").glob("*.here"))
    assert not list((kit.directory / "layers").glob("*.kept"))
    assert kit.store.catalog.meta("version") == 1


def test_zeros_that_the_source_does_not_know_of_are_holes(kit: ArrivingKit) -> None:
    kit.shelf.zeros_known = False
    kit.arrive()
    assert set(kit.shelf.fetched.values()) == {1}
    assert not any(kit.table("vm/ram").entries[n] for n in EMPTY)


# --- ends ---


def test_after_power_loss_a_page_is_here_that_was_synced_and_the_others_come_again(kit: ArrivingKit) -> None:
    kit.shelf.allowed = None
    kit.fetch(kit.arriving("vm/ram"), 0, 5)
    kit.sync()
    kit.fetch(kit.arriving("vm/ram"), 5, 10)
    kit.power_loss()
    kit.reopen()
    assert states(kit)[:10] == [STORED] * 5 + [ABSENT] * 5
    assert (kit.table("vm/ram").entries[: COUNT + 1] != 0).all(), "absent pages became zeros"
    with pytest.raises(Absent):
        kit.read("vm/ram")
    kit.arrive()
    assert kit.read("vm/ram") == DATA
    assert [kit.shelf.fetched["ram", page] for page in (0, 4, 5, 9, 14)] == [1, 1, 2, 2, 1]


def test_a_snapshot_of_pages_that_just_arrived_outlives_power_loss(kit: ArrivingKit) -> None:
    kit.shelf.allowed = None
    kit.fetch(kit.arriving("vm/ram"), 0, 5)
    kit.snapshot("s", "vm")
    kit.power_loss()
    kit.reopen()
    assert states(kit, "vm/.snap/s/ram")[:6] == [STORED] * 5 + [ABSENT]
    kit.arrive()
    assert kit.read("vm/.snap/s/ram") == DATA
    assert kit.shelf.fetched["ram", 3] == 1


def test_a_pull_that_was_never_synced_is_an_empty_file_after_power_loss(kit: ArrivingKit) -> None:
    kit.power_loss()
    kit.reopen()
    assert kit.read("vm/ram") == b""
    kit.arrive()
    assert not kit.shelf.fetched
    kit.collect()
    assert not kit.store.layers.by_id


@pytest.mark.parametrize("end", ["kill", "take_over"])
def test_what_a_killed_daemon_did_not_sync_is_kept_by_the_next(kit: ArrivingKit, end: str) -> None:
    kit.sync()
    kit.shelf.allowed = None
    kit.fetch(kit.arriving("vm/ram"), 0, 5)
    getattr(kit, end)()
    if end == "kill":
        kit.reopen()
    else:
        kit.settle()
    kit.sync()
    kit.power_loss()
    kit.reopen()
    assert states(kit)[:6] == [STORED] * 5 + [ABSENT]
    kit.arrive()
    assert set(kit.shelf.fetched.values()) == {1}


def test_files_of_a_layer_that_was_completed_go_with_the_next_mount(
    kit: ArrivingKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit.store.layers, "unlink_presence", lambda number: None)
    kit.arrive()
    assert len(list((kit.directory / "layers").glob("*.*e*"))) == 2
    kit.kill()
    kit.reopen()
    assert not list((kit.directory / "layers").glob("*.*e*"))
    assert kit.read("vm/ram") == DATA


def test_a_disk_that_fails_when_it_is_complete(kit: ArrivingKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is complete all the same, and nobody looks any more at what told which pages are here."""
    layer = kit.arriving("vm/ram")
    kit.store.layers.map(layer.id, 0)
    assert kit.store.layers.places[layer.id, HERE]
    kit.shelf.allowed = None
    kit.fetch(layer, 0, COUNT + 1)

    def fail() -> None:
        if layer.presence is None:
            raise OSError(errno.EIO, "the disk is gone")

    sync = kit.store.catalog.sync
    monkeypatch.setattr(kit.store.catalog, "sync", lambda: fail() or sync())
    with pytest.raises(OSError, match="the disk is gone"):
        trio.run(complete, kit.pager, layer)
    assert not kit.store.layers.places[layer.id, HERE]
    monkeypatch.undo()
    kit.arrive()
    assert kit.read("vm/ram") == DATA


def test_a_catalog_without_room_ends_nothing(
    kit: ArrivingKit, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("database or disk is full; trying again")
    failures = iter([True, False, True, False])
    real, finished = kit.store.layers.complete, kit.pulls.finished

    def fail(work: Callable[..., None], *args: object) -> None:
        if next(failures):
            raise sqlite3.OperationalError("database or disk is full")
        work(*args)

    monkeypatch.setattr(kit.store.layers, "complete", lambda layer: fail(real, layer))
    monkeypatch.setattr(kit.pulls, "finished", lambda pull: fail(finished, pull))
    kit.shelf.allowed = None

    async def long() -> None:
        await trio.sleep(20)

    kit.run(long)
    assert not kit.pulls.running
    assert not list(failures)
    assert kit.read("vm/ram") == DATA


# --- copies ---


def test_a_clone_keeps_it_arriving(kit: ArrivingKit) -> None:
    """Of a page that its first owner has overwritten, somebody else is still in want."""
    layer = kit.arriving("vm/ram")
    kit.copy("vm/ram", "clone")
    kit.write("vm/ram", 0, b"w" * len(DATA) + bytes(PAGE))
    kit.shelf.allowed = None
    kit.fetch(layer, 3, 4)
    assert trio.run(complete, kit.pager, layer) is False
    assert layer.presence is not None
    kit.arrive()
    assert kit.read("clone") == DATA


def test_copies_made_while_it_is_completed(kit: ArrivingKit) -> None:
    """A table that was done with gets pages again that are zeros: it must not name them when all is complete."""
    layer = kit.arriving("vm/ram")
    kit.copy("vm/ram", "later")
    kit.shelf.allowed = None
    kit.shelf.zeros_known = False
    kit.fetch(layer, 0, COUNT + 1)
    first, second = kit.image("vm/ram"), kit.image("later")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(complete, kit.pager, layer)
            while first.table.entries[EMPTY[0]]:
                await trio.lowlevel.checkpoint()
            assert second.table.entries[EMPTY[0]], "the test comes too late"
            kit.pager.share(second, 8 * PAGE, first, 8 * PAGE, 4 * PAGE)
            kit.pager.share(second, 8 * PAGE, first, 20 * PAGE, 4 * PAGE)

    trio.run(main)
    assert layer.presence is None
    for image in (first, second):
        assert not image.table.entries[list(EMPTY)].any()
    assert not first.table.entries[22:24].any()
    kit.arrive()
    assert kit.read("vm/ram") == DATA[: 20 * PAGE] + DATA[8 * PAGE : 12 * PAGE] + DATA[24 * PAGE :]


def test_pages_at_another_place(kit: ArrivingKit) -> None:
    """Before and behind where they lie in the layer, also in a file that names nothing else."""
    image = kit.image("vm/ram")
    for name, at, to, count in (("back", 8, 2, 8), ("ahead", 4, 30, 10)):
        kit.pager.share(image, at * PAGE, kit.create(name), to * PAGE, count * PAGE)
    ahead = kit.image("ahead")
    kit.shelf.allowed = None
    with pytest.raises(Absent):
        kit.pager.write(ahead, 31 * PAGE + 5, b"part" * 2000)
    assert not any(kit.store.layers.file(kit.arriving("vm/ram")).read(0, PAGE))
    assert ahead.live is None, "something was written before all was here"
    kit.fetch(kit.arriving("vm/ram"), 10, 14)
    assert kit.pager.seek(ahead, 30 * PAGE, os.SEEK_HOLE)[0] == 36 * PAGE, "known zeros are holes"
    kit.pager.truncate(ahead, 20 * PAGE)
    assert kit.pager.seek(ahead, 0, os.SEEK_DATA)[0] == 20 * PAGE
    kit.pager.share(image, 4 * PAGE, ahead, 30 * PAGE, 10 * PAGE)
    kit.arrive()
    assert kit.read("back") == bytes(2 * PAGE) + DATA[8 * PAGE : 16 * PAGE]
    assert kit.read("ahead") == bytes(30 * PAGE) + DATA[4 * PAGE : 14 * PAGE]
    assert kit.store.layers.arriving == set()
    assert [(a + 30, b + 30) for a, b in runs_of(ahead.table.entries[30:40] != 0)] == [(30, 36)]


def test_no_manifest_of_what_nobody_knows(kit: ArrivingKit) -> None:
    kit.snapshot("s", "vm")
    number = kit.image("vm/.snap/s/ram").id
    with pytest.raises(FileError, match="still arriving"):
        trio.run(kit.pager.digest_images, [number])
    kit.arrive()
    assert trio.run(kit.pager.digest_images, [number])


def test_promised_digests_are_durable_with_the_pull(tmp_path: Path) -> None:
    kit = ArrivingKit(tmp_path / "store", Shelf({"ram": DATA}))
    kit.shelf.allowed = 0
    kit.pull("vm", verified=True)
    trio.run(kit.pager.sync)
    kit.power_loss()
    kit.reopen()
    assert kit.pulls.running[0].verified
    kit.arrive()
    assert kit.read("vm/ram") == DATA
    kit.close()


# --- deletion ---


def test_deleted_while_somebody_waits_for_it(kit: ArrivingKit) -> None:
    """Its source may never come back, and nobody needs it."""
    layer = kit.arriving("vm/ram")
    woken = []

    async def work() -> None:
        async def wait() -> None:
            await kit.pulls.arrivals.bring(Absent(layer.id, 7, 9))
            woken.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(1)
            kit.unlink("vm/ram")
            kit.forget()
            await kit.pager.collect()
            kit.pulls.tidy()

    kit.run(work)
    assert woken
    assert not kit.pulls.running
    assert not list((kit.directory / "layers").iterdir())
    assert kit.store.catalog.meta("version") == 1
    assert not kit.store.catalog.number("SELECT count(*) FROM arriving")


def test_a_deletion_that_is_rolled_back(kit: ArrivingKit, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = kit.arriving("vm/ram")
    kit.unlink("vm/ram")
    kit.forget()
    work = Pass(kit.store)
    *before, decide, _, _ = steps_of(work)
    for step in before:
        step()
    monkeypatch.setattr(kit.store.images, "forget_layers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decide()
    work.give_up()
    work.close()
    monkeypatch.undo()
    assert layer.id in kit.store.layers.arriving
    kit.shelf.allowed = None
    kit.fetch(layer, 0, 3)
    assert layer.presence is not None
    assert layer.presence.here(0, 3)
    assert kit.store.catalog.meta("version") == 2
    kit.collect()
    kit.arrive()


def test_a_frozen_image_that_is_gone_is_not_made_again_by_a_sync(kit: ArrivingKit) -> None:
    kit.snapshot("s", "vm")
    image = kit.image("vm/.snap/s/ram")
    image.users += 1
    image.synced_name = False
    kit.delete_snapshot("s", "vm")
    os.unlink(image.path)
    trio.run(kit.pager.sync, [image])
    assert not os.path.exists(image.path)
    kit.store.images.release(image)
    kit.arrive()


def test_each_page_is_fetched_once_whoever_wants_it(kit: ArrivingKit) -> None:
    """Readers of overlapping ranges, and the stream."""
    kit.pulls.running[0].arrivals[0]._most = 4
    layer = kit.arriving("vm/ram")
    kit.shelf.zeros_known = False
    kit.shelf.allowed = None

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for first in range(0, COUNT - 20, 3):
                nursery.start_soon(kit.pulls.arrivals.bring, Absent(layer.id, first, first + 20))

    kit.run(work)
    assert kit.read("vm/ram") == DATA
    assert set(kit.shelf.fetched.values()) == {1}


def test_zeros_are_told_apart(kit: ArrivingKit) -> None:
    kit.shelf.allowed = None
    kit.fetch(kit.arriving("vm/ram"), 8, 12)
    assert states(kit)[8:13] == [STORED, STORED, ZEROS, ZEROS, ABSENT]
    kit.arrive()
