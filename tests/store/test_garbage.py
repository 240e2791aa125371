"""Space comes back when the last user of a page is gone, and not before."""

import os
from pathlib import Path

import pytest
import trio
from storekit import Kit, steps_of

from ramfs.image.digest import DIGEST, digest_pages
from ramfs.store.garbage import Pass
from ramfs.store.repair import check_store
from ramfs.units import PAGE


def stored(kit: Kit) -> int:
    """Pages that the layers take on the disk."""
    os.sync()
    return sum(path.stat().st_blocks * 512 for path in (kit.directory / "layers").glob("*.ram")) // PAGE


@pytest.fixture
def directory(shm: Path) -> Path:
    return shm / "store"  # tmpfs tells exactly what is stored


def test_the_last_name_takes_the_space_with_it(directory: Path) -> None:
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(100 * PAGE))
        kit.copy("f", "g")
        kit.write("g", 0, os.urandom(10 * PAGE))
        assert stored(kit) == 110
        kit.unlink("f")
        kit.collect()
        assert stored(kit) == 100
        kit.unlink("g")
        kit.collect(2)
        assert stored(kit) == 0
        assert os.listdir(directory / "layers") == os.listdir(directory / "tables") == []


def test_a_snapshot_keeps_what_it_froze(directory: Path) -> None:
    with Kit(directory) as kit:
        good = os.urandom(20 * PAGE)
        kit.write("f", 0, good)
        kit.snapshot("s")
        kit.write("f", 0, os.urandom(20 * PAGE))
        kit.collect(2)
        assert kit.read(".snap/s/f") == good
        assert stored(kit) == 40
        kit.delete_snapshot("s")
        kit.collect(2)
        assert stored(kit) == 20


def test_a_deleted_file_is_kept_by_its_clone(directory: Path) -> None:
    with Kit(directory) as kit:
        good = os.urandom(30 * PAGE)
        kit.write("parent", 0, good)
        kit.copy("parent", "clone")
        kit.unlink("parent")
        kit.collect(3)
        assert kit.read("clone") == good


def test_pages_that_were_cut_off_or_shared_over(directory: Path) -> None:
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(30 * PAGE))
        kit.pager.truncate(kit.image("f"), 10 * PAGE)
        kit.collect()
        assert stored(kit) == 10
        kit.write("g", 0, os.urandom(10 * PAGE))
        kit.pager.share(kit.image("f"), 0, kit.image("g"), 0, 10 * PAGE)
        kit.collect(2)
        assert stored(kit) == 10
        assert kit.read("g") == kit.read("f")


def test_shifted_names_keep_pages(directory: Path) -> None:
    with Kit(directory) as kit:
        good = os.urandom(20 * PAGE)
        kit.write("f", 0, good)
        kit.pager.share(kit.image("f"), 15 * PAGE, kit.create("g"), 0, 3 * PAGE)
        kit.unlink("f")
        kit.collect(2)
        assert kit.read("g") == good[15 * PAGE : 18 * PAGE]
        assert stored(kit) == 3
        kit.unlink("g")
        kit.collect(3)
        assert stored(kit) == 0
        assert not kit.store.layers.by_id


def test_a_zeroed_page_is_free_at_once(directory: Path) -> None:
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(30 * PAGE))
        kit.write("f", 5 * PAGE, bytes(10 * PAGE))
        assert stored(kit) == 20


def test_an_open_file_without_a_name_stays(directory: Path) -> None:
    with Kit(directory) as kit:
        good = os.urandom(5 * PAGE)
        kit.write("f", 0, good)
        inode = kit.space.lookup(kit.space.get_root().ino, b"f")
        inode.lookups = 1
        kit.unlink("f")
        kit.collect(2)
        assert kit.pager.copy_out(inode.file, 0, 5 * PAGE) == good
        kit.space.forget(inode.ino, 1)
        kit.collect(2)
        assert stored(kit) == 0


def test_garbage_of_a_closed_store_is_collected_in_the_next(directory: Path) -> None:
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(5 * PAGE))
        kit.unlink("f")
        kit.forget()
    with Kit(directory) as kit:
        assert kit.pager.has_garbage()
        kit.collect(2)
        assert stored(kit) == 0
    with Kit(directory) as kit:
        assert not kit.pager.has_garbage()


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("what", ["write and snapshot", "write and copy", "copy and unlink", "zero", "truncate"])
def test_whatever_happens_between_two_steps(directory: Path, what: str, step: int) -> None:
    """A layer that had garbage when the pass looked may take pages there and be sealed before it punches."""
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(20 * PAGE))
        kit.pager.truncate(kit.image("f"), 10 * PAGE)  # leaves garbage in the live layer
        kit.write("sealed", 0, os.urandom(20 * PAGE))
        kit.copy("sealed", "copy")
        kit.write("copy", 0, os.urandom(5 * PAGE))
        kit.write("sealed", 0, os.urandom(10 * PAGE))
        work = Pass(kit.store, collapse_above=1)
        frozen = None
        for number, part in enumerate(steps_of(work)):
            part()
            if number != step:
                continue
            if what.startswith("write"):
                kit.write("f", 12 * PAGE, os.urandom(5 * PAGE))
            if what == "write and snapshot":
                frozen = kit.space.freeze(kit.space.get_root(), b"s")
            elif what == "write and copy":
                kit.copy("f", "g")
            elif what == "copy and unlink":
                kit.copy("sealed", "h")
                kit.unlink("sealed")
            elif what == "zero":
                kit.write("f", 0, bytes(5 * PAGE))
            else:
                kit.pager.truncate(kit.image("sealed"), 3 * PAGE)
        work.close()
        names = [os.fsdecode(name) for _, name, _ in kit.space.names(kit.space.get_root().ino)]
        good = {name: kit.read(name) for name in names}
        for name, data in good.items():
            pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
            entries = kit.table(name).entries
            assert all(any(page) for page, entry in zip(pages, entries, strict=False) if entry), name
        if frozen is not None:
            trio.run(kit.pager.sync, frozen.images)
            frozen.commit()
            assert kit.read(".snap/s/f") == good["f"]
    assert not check_store(str(directory)).damaged
    with Kit(directory) as kit:
        kit.collect(3)
        assert {name: kit.read(name) for name in names} == good
        used = {
            (kit.store.layers[int(entry)].base, page + kit.store.layers[int(entry)].shift)  # type: ignore[index]
            for path in [*names, *([".snap/s/" + name for name in names] if frozen is not None else [])]
            if path != ".snap/s/g"
            for page, entry in enumerate(kit.table(path).entries.tolist())
            if entry
        }
        assert stored(kit) == len(used)  # and nothing is left over


# --- merging ---


def chain(kit: Kit, generations: int) -> bytes:
    """A file whose pages lie in many layers of its own."""
    kit.write("f", 0, os.urandom(64 * PAGE))
    for number in range(generations):
        kit.snapshot("s")
        kit.write("f", (number % 64) * PAGE, os.urandom(PAGE))
        kit.delete_snapshot("s")
    kit.snapshot("last")
    kit.delete_snapshot("last")
    kit.digest()
    return kit.read("f")


def test_many_layers_become_one(directory: Path) -> None:
    with Kit(directory) as kit:
        good = chain(kit, 40)
        before = len(list((directory / "layers").glob("*.ram")))
        assert before > 33
        kit.collect(2)
        assert kit.read("f") == good
        assert len(list((directory / "layers").glob("*.ram"))) == 1
        layer = kit.layer_of("f")
        assert set(kit.table("f").entries[:64].tolist()) == {layer}
        assert stored(kit) == 64
        digests = kit.layer_file(layer, "xxh3").read_bytes()
        assert digests[: 64 * DIGEST] == digest_pages(good)
    assert check_store(str(directory)).findings == []


def test_a_pass_by_itself_merges_only_above_its_bound(directory: Path) -> None:
    with Kit(directory) as kit:
        good = chain(kit, 10)
        kit.collect(4)
        assert len(list((directory / "layers").glob("*.ram"))) > 5
        assert kit.read("f") == good


def test_layers_that_others_use_are_left_alone(directory: Path) -> None:
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(16 * PAGE))
        for number in range(6):
            kit.copy("f", f"g{number}")
            kit.write("f", number * PAGE, os.urandom(PAGE))
        kit.digest()
        good = {name: kit.read(name) for name in ("f", *(f"g{n}" for n in range(6)))}
        for _ in range(3):
            kit.merge()
        assert {name: kit.read(name) for name in good} == good
    assert check_store(str(directory)).findings == []


def test_a_frozen_image_can_be_merged(directory: Path) -> None:
    with Kit(directory) as kit:
        chain(kit, 8)
        good = kit.read("f")
        kit.snapshot("kept")
        kit.unlink("f")
        kit.collect(2)
        kit.digest()
        kit.merge()
        kit.collect(2)
        assert kit.read(".snap/kept/f") == good
        assert len(list((directory / "layers").glob("*.ram"))) == 1
    assert check_store(str(directory)).findings == []
    with Kit(directory) as kit:
        assert kit.read(".snap/kept/f") == good


@pytest.mark.parametrize("step", range(6))
def test_a_clone_in_the_middle_of_a_merge(directory: Path, step: int) -> None:
    with Kit(directory) as kit:
        good = chain(kit, 8)
        work = Pass(kit.store, collapse_above=1)
        for number, part in enumerate(steps_of(work)):
            part()
            if number == step:
                kit.copy("f", "g")
                kit.write("f", 3 * PAGE, b"changed".ljust(PAGE))
        work.close()
        changed = good[: 3 * PAGE] + b"changed".ljust(PAGE) + good[4 * PAGE :]
        for _ in range(3):
            assert kit.read("g") == good
            assert kit.read("f") == changed
            kit.collect()
        assert stored(kit) == 65
    assert check_store(str(directory)).findings == []


def test_a_pass_that_fails_is_made_up_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Kit(directory) as kit:
        kit.write("f", 0, os.urandom(10 * PAGE))
        kit.write("g", 0, os.urandom(10 * PAGE))
        kit.unlink("f")
        kit.forget()
        for step in ("settle", "scan", "rescan", "decide", "reclaim", "finish"):
            with monkeypatch.context() as patch:
                patch.setattr(Pass, step, lambda self: (_ for _ in ()).throw(OSError(5, "broken")))
                with pytest.raises(OSError, match="broken"):
                    trio.run(kit.pager.collect)
            assert kit.pager.has_garbage() or stored(kit) == 10
        kit.collect(2)
        assert stored(kit) == 10
        assert len(os.listdir(directory / "layers")) == 1
