"""Direct images: live ones that are the file of their layer, which somebody else writes to. On real XFS and btrfs."""

from __future__ import annotations

import itertools
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from disk import reflink_disk
from storekit import Kit

import ramfs.pager
from ramfs.store.direct import Leaving
from ramfs.store.entering import Entry
from ramfs.store.images import Image
from ramfs.store.repair import check_store
from ramfs.units import PAGE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts disk images")
PAGES = 64


def page(number: int) -> bytes:
    return number.to_bytes(8, "little") * (PAGE // 8)


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, module_shm: Path) -> Iterator[Path]:
    with reflink_disk(module_shm, request.param) as point:
        yield point


@pytest.fixture
def directory(disk: Path, tmp_path: Path) -> Path:
    return disk / tmp_path.name


@pytest.fixture
def kit(directory: Path) -> Iterator[Kit]:
    with Kit(directory) as kit:
        yield kit
    report = check_store(str(directory))
    assert not report.findings, report


def enter(kit: Kit, path: str = "f") -> Image:
    image = kit.image(path)
    assert trio.run(kit.pager.enter, image)
    assert image.direct is not None
    return image


def leave(kit: Kit, path: str = "f") -> None:
    assert trio.run(kit.pager.leave, kit.image(path))
    assert kit.image(path).direct is None


def store_to(image: Image, offset: int, data: bytes, how: str) -> None:
    """What a guest does, of whom nobody is told: pwrite, or a store into mapped memory where the file is so long."""
    assert image.direct is not None
    fd = os.open(image.direct, os.O_RDWR)
    size = os.fstat(fd).st_size
    if how == "map" and offset + len(data) <= size:
        with mmap.mmap(fd, size) as memory:
            memory[offset : offset + len(data)] = data
    else:
        os.pwrite(fd, data, offset)
    os.close(fd)


def read(kit: Kit, path: str) -> bytes:
    kit.image(path).refresh()
    return kit.read(path)


def version(kit: Kit) -> int:
    found = kit.store.catalog.meta("version")
    assert isinstance(found, int)
    return found


def reopened(kit: Kit, how: str) -> Kit:
    {"close": kit.close, "kill": kit.kill, "power": kit.power_loss}[how]()
    report = check_store(str(kit.directory))
    assert not report.damaged, report
    return Kit(kit.directory)


# --- against a model ---


@pytest.mark.parametrize("seed", range(3))
def test_random_work(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    kit = Kit(directory)
    serial = itertools.count(1)
    model: dict[str, bytearray] = {"f": bytearray()}
    frozen: dict[str, dict[str, bytes]] = {}
    kit.create("f")

    def check() -> None:
        for name, data in model.items():
            assert read(kit, name) == data, name
        for name, files in frozen.items():
            for file, data in files.items():
                assert kit.read(f".snap/{name}/{file}") == data, (name, file)

    for step in range(140):
        name = rng.choice(list(model))
        image, data = kit.image(name), model[name]
        image.refresh()
        match rng.choices(
            ["write", "truncate", "punch", "enter", "leave", "copy", "snapshot", "reopen", "house", "part", "unlink"],
            [30, 8, 10, 14, 8, 6, 6, 4, 6, 6, 2],
        )[0]:
            case "write":
                first = rng.randrange(PAGES)
                new = b"".join(page(next(serial)) for _ in range(rng.randrange(1, 6)))[: rng.choice((9, 5000, 1 << 20))]
                at = first * PAGE + rng.choice((0, 0, 77))
                if image.direct is None:
                    kit.pager.write(image, at, new)
                else:
                    store_to(image, at, new, rng.choice(("write", "map")))
                data.extend(bytes(max(0, at - len(data))))
                data[at : at + len(new)] = new
            case "truncate":
                size = rng.choice((rng.randrange(PAGES) * PAGE, rng.randrange(PAGES * PAGE)))
                kit.pager.truncate(image, size)
                data.extend(bytes(max(0, size - len(data))))
                del data[size:]
            case "punch":
                at, length = rng.randrange(PAGES * PAGE), rng.randrange(1, 9 * PAGE)
                list(kit.pager.zero(image, at, length, keep_size=True))
                stop = min(at + length, len(data))
                data[at:stop] = bytes(max(0, stop - at))
            case "enter" if image.direct is None:
                enter(kit, name)
            case "leave" if image.direct is not None:
                leave(kit, name)
            case "copy" if len(model) < 5:
                target = f"c{step}"
                if data:
                    kit.copy(name, target)
                else:
                    kit.create(target)
                model[target] = bytearray(data)
            case "part" if len(data) > 2 * PAGE:
                other = rng.choice([file for file in model if file != name] or [name])
                if other == name:
                    continue
                at, to = rng.randrange(len(data) // PAGE) * PAGE, rng.randrange(PAGES) * PAGE
                to += rng.choice((0, 0, 0, 5))
                done = kit.pager.share(image, at, kit.image(other), to, rng.randrange(1, 30 * PAGE))
                assert done > 0
                model[other].extend(bytes(max(0, to - len(model[other]))))
                model[other][to : to + done] = data[at : at + done]
            case "snapshot":
                kit.snapshot(f"s{step}")
                frozen[f"s{step}"] = {file: bytes(contents) for file, contents in model.items()}
                if len(frozen) > 3:
                    gone = rng.choice(list(frozen))
                    kit.delete_snapshot(gone)
                    del frozen[gone]
            case "reopen":
                how = rng.choice(("close", "kill", "power", "take over"))
                if how == "power":
                    kit.sync()  # what is not direct counts as of its last sync
                if how == "take over":
                    kit.take_over()
                    kit.settle()
                else:
                    kit = reopened(kit, how)
            case "house":
                kit.digest()
                kit.merge()
            case "unlink" if len(model) > 2:
                kit.unlink(name)
                kit.forget()
                del model[name]
        if step % 10 == 0:
            check()
    check()
    kit.close()
    report = check_store(str(directory))
    assert not report.findings, report


def test_large_ranges_get_a_layer_of_their_own(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, but for the bytes that are worth it: test_random_work stays below them."""
    monkeypatch.setattr(ramfs.pager, "CLONE_FROM", 4 * PAGE)
    kit.write("f", 0, b"".join(page(number + 1) for number in range(PAGES)) + b"end")
    image = enter(kit)
    contents = bytearray(read(kit, "f"))
    before = len(kit.pager.layers.by_id)
    kit.copy("f", "whole")
    assert len(kit.pager.layers.by_id) == before + 1
    target = kit.create("part")
    kit.write("part", 0, page(9000) * 20)
    expected = bytearray(page(9000) * 20)
    for start, at, length in ((3, 7, 10 * PAGE), (50, 2, 14 * PAGE + 3), (0, 15, 6 * PAGE + 100), (60, 40, 1 << 30)):
        done = kit.pager.share(image, start * PAGE, target, at * PAGE, length)
        assert done == min(length, len(contents) - start * PAGE)
        expected.extend(bytes(max(0, at * PAGE - len(expected))))
        expected[at * PAGE : at * PAGE + done] = contents[start * PAGE : start * PAGE + done]
        assert kit.read("part") == expected
    store_to(image, 0, page(7) * PAGES, "map")
    assert kit.read("whole") == contents
    assert kit.read("part") == expected


# --- every step may be the last ---


def steps_in(kit: Kit, image: Image) -> list[Callable[[], object]]:
    work = Entry(kit.store, image)
    sync = lambda: trio.run(kit.pager.sync, [image])  # noqa: E731
    return [work.prepare, sync, work.publish, work.settle, work.commit, work.close, kit.store.catalog.sync]


def steps_out(kit: Kit, image: Image) -> list[Callable[[], object]]:
    work = Leaving(kit.store.images, image)
    return [work.prepare, work.commit, kit.store.catalog.sync, work.finish]


@pytest.mark.parametrize("how", ["kill", "power"])
def test_an_end_at_each_step(directory: Path, how: str) -> None:
    """Of a clone (in several layers), of an image with stray pages behind holes, and of a new one; in, and out."""
    for number, (steps, of) in enumerate(itertools.product((steps_in, steps_out), ("clone", "strays", "new"))):
        for last in (2, 3, 4, 6) if steps is steps_in else range(4):
            kit = Kit(directory)
            name = f"{number}.{last}"
            if of == "new":
                kit.create(name)
            else:
                kit.write(name, 0, b"".join(page(n + 1) for n in range(20)) + b"ragged")
                kit.sync(name)
                kit.pager.truncate(kit.image(name), 15 * PAGE + 5)
                kit.pager.truncate(kit.image(name), 20 * PAGE + 5)
            if of == "clone":
                kit.copy(name, name + "c")
                name += "c"
                kit.write(name, 3 * PAGE, page(77))
            if steps is steps_out:
                image = enter(kit, name)
                store_to(image, 5 * PAGE, page(99), "map" if of == "clone" else "write")
            if how == "power":
                kit.sync()
            expected = read(kit, name)
            for step in steps(kit, kit.image(name))[: last + 1]:
                assert step() is not False
            kit = reopened(kit, how)
            assert read(kit, name) == expected, (name, last)
            assert kit.image(name).direct is None
            kit.collect(2)
            assert read(kit, name) == expected, (name, last)
            kit.close()
    report = check_store(str(directory))
    assert not report.findings, report


def test_a_store_that_has_some_is_not_for_older_programs(directory: Path) -> None:
    kit = Kit(directory)
    kit.write("f", 0, page(1))
    assert version(kit) == 1
    image = enter(kit)
    assert version(kit) == 2
    holder = os.open(image.direct or "", os.O_RDONLY)
    kit.close()  # somebody has it open, so it stays what it is
    kit = Kit(directory)
    assert version(kit) == 2
    assert kit.image("f").direct == image.direct
    store_to(kit.image("f"), 2 * PAGE, b"more", "write")
    assert len(read(kit, "f")) == 2 * PAGE + 4
    os.close(holder)
    kit.kill()
    with Kit(directory) as kit:
        assert version(kit) == 1
        assert kit.read("f") == page(1) + bytes(PAGE) + b"more"


def test_after_a_takeover_it_is_settled(kit: Kit) -> None:
    kit.write("f", 0, page(1) * 3)
    kit.write("g", 0, page(2))
    kit.take_over()
    enter(kit)
    kit.settle()
    assert not kit.store.images.doubtful
    leave(kit)
    assert kit.read("f") == page(1) * 3


# --- space ---


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_holes_and_old_layers_give_their_space_back(kit: Kit) -> None:
    kit.write("f", 0, b"".join(page(number + 1) for number in range(PAGES)))
    kit.snapshot("s")
    kit.write("f", 0, page(5) * 3)
    image = enter(kit)
    layer = Path(image.direct or "")
    assert len(kit.pager.layers.by_id) == 3
    os.sync()
    kit.collect(2)
    assert len(kit.pager.layers.by_id) == 2  # the snapshot's, and the file
    list(kit.pager.zero(kit.image("f"), 0, PAGES * PAGE, keep_size=True))
    os.sync()
    assert used(layer) == 0
    kit.delete_snapshot("s")
    kit.collect(2)
    assert [path.name for path in (kit.directory / "layers").glob("*.ram")] == [layer.name]
    assert read(kit, "f") == bytes(PAGES * PAGE)


def test_what_is_set_aside_for_copies_on_write_is_no_page(kit: Kit) -> None:
    """XFS allocates more than the page that is copied, and calls that data for a while."""
    kit.create("f")
    image = enter(kit)
    kit.pager.truncate(image, PAGES * PAGE)
    store_to(image, 10 * PAGE, page(1), "map")
    kit.snapshot("s")
    store_to(image, 10 * PAGE, page(2), "map")
    leave(kit)
    assert kit.table("f").resident() == 1
    assert kit.read("f") == bytes(10 * PAGE) + page(2) + bytes((PAGES - 11) * PAGE)
    assert kit.read(".snap/s/f") == bytes(10 * PAGE) + page(1) + bytes((PAGES - 11) * PAGE)


def test_garbage_is_looked_for_at_any_time(kit: Kit) -> None:
    kit.write("f", 0, b"".join(page(number + 1) for number in range(PAGES)))
    kit.copy("f", "g")
    kit.write("g", 0, page(1000) * 7)
    expected = kit.read("g")
    before = set(kit.pager.layers.by_id)
    image = kit.store.images.acquire(kit.image("g").id)
    for step in steps_in(kit, image):
        assert step() is not False
        kit.store.images.replaced |= before
        kit.collect()
        assert read(kit, "g") == expected
    kit.store.images.replaced |= set(kit.pager.layers.by_id)
    kit.merge()
    assert read(kit, "g") == expected
    for step in steps_out(kit, image):
        assert step() is not False
        kit.store.images.replaced |= set(kit.pager.layers.by_id)
        kit.collect()
        assert read(kit, "g") == expected
    kit.store.images.release(image)


def test_too_scattered(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write("f", 0, b"".join(page(number + 1) for number in range(PAGES)))
    kit.snapshot("s")
    for number in range(0, PAGES, 2):
        kit.write("f", number * PAGE, page(100 + number))
    monkeypatch.setattr("ramfs.store.entering.MOST_RUNS", PAGES - 1)
    assert not trio.run(kit.pager.enter, kit.image("f"))
    monkeypatch.setattr("ramfs.store.entering.MOST_RUNS", PAGES)
    enter(kit)


def test_an_image_that_changes_meanwhile(kit: Kit) -> None:
    """Frozen, deleted, or cut while it is prepared: it stays as it is, and nothing is left."""
    for number, change in enumerate(("freeze", "delete", "cut")):
        for stop in (1, 4):  # before publish, before commit
            name = f"f{number}{stop}"
            kit.write(name, 0, page(1) * 8)
            kit.copy(name, name + "c")
            image = kit.store.images.acquire(kit.image(name + "c").id)
            steps = steps_in(kit, image)
            for step in steps[:stop]:
                assert step() is not False
            if change == "freeze":
                kit.write(name + "c", 0, page(2))
                kit.snapshot(f"s{name}")
            elif change == "delete":
                kit.unlink(name + "c")
                kit.forget()
            else:
                kit.pager.truncate(image, PAGE)
            assert steps[2 if stop == 1 else 4]() is False
            steps[5]()
            assert image.direct is None
            kit.store.images.release(image)
            kit.collect(2)
            if change != "delete":
                assert len(kit.read(name + "c")) == (PAGE if change == "cut" else 8 * PAGE)


# --- damage ---


@pytest.mark.parametrize("damage", ["no file", "sealed", "frozen"])
def test_without_its_layer(directory: Path, damage: str) -> None:
    kit = Kit(directory)
    kit.write("f", 0, page(1) * 8)
    kit.write("g", 0, page(2))
    image = enter(kit)
    store_to(image, 3 * PAGE, page(3), "write")
    if damage == "sealed":
        kit.store.catalog.execute("UPDATE layers SET sealed = 1")
    elif damage == "frozen":
        kit.store.catalog.execute("UPDATE images SET frozen = 1 WHERE direct")
    kit.kill()
    if damage == "no file":
        os.unlink(image.direct or "")
    report = check_store(str(directory))
    assert "direct-file" in {finding.kind for finding in report.findings}, report
    report = check_store(str(directory), repair=True)
    assert not report.damaged, report
    with Kit(directory) as kit:
        assert kit.read("g") == page(2)
        if damage == "no file":
            with pytest.raises(Exception, match="lost"):
                kit.read("f")
        else:
            assert kit.read("f") == page(1) * 3 + page(3) + page(1) * 4
