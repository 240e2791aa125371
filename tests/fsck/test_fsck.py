"""Every damage that can be planted is found and named; what can be repaired is; what is lost never reads as zeros."""

import errno
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from storekit import Kit

from ramfs.cli import main
from ramfs.cli.fsck import fsck
from ramfs.errors import StoreDamaged
from ramfs.store.check import KINDS, Report
from ramfs.store.images import HEADER
from ramfs.store.repair import check_store
from ramfs.units import LOST, PAGE, ROOT, SNAP_BIT


@contextmanager
def catalog(store: Path) -> Iterator[sqlite3.Connection]:
    """The catalog, without anybody who minds references."""
    db = sqlite3.connect(store / "catalog.sqlite", isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def tree_of(store: Path) -> dict[str, bytes]:
    """A copy of all bytes of a store's directory, to see that nothing was written."""
    return {str(path): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def damage(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings if finding.damage}


def found(store: Path, *expected: str) -> Report:
    """Check: exactly the expected kinds of damage are found, and nothing is written."""
    before = tree_of(store)
    report = check_store(str(store))
    assert damage(report) == {kind for kind in expected if KINDS[kind].damage}, report
    assert set(expected) <= kinds(report)
    after = tree_of(store)
    after[str(store / "lock")] = before.setdefault(str(store / "lock"), b"")
    assert after == before
    return report


def mended(store: Path, *expected: str) -> Report:
    """Check, repair, and check again: clean."""
    found(store, *expected)
    report = check_store(str(store), repair=True)
    assert set(expected) <= {finding.kind for finding in report.repaired}
    assert not report.damaged, report
    assert not damage(check_store(str(store)))
    return report


def layer_of(store: Path, path: str, page: int = 0) -> int:
    with Kit(store) as kit:
        return kit.layer_of(path, page)


def image_of(store: Path, path: str) -> int:
    with Kit(store) as kit:
        return kit.image(path).id


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


def set_entry(path: Path, page: int, layer: int) -> None:
    with path.open("r+b") as file:
        file.seek(HEADER + page * 4)
        file.write(struct.pack("<I", layer))


def lost_pages(kit: Kit, path: str) -> set[int]:
    """The pages of a file that cannot be read."""
    image = kit.image(path)
    lost = set()
    for page in range(image.pages):
        try:
            kit.pager.copy_out(image, page * PAGE, PAGE)
        except StoreDamaged:
            lost.add(page)
    return lost


def test_a_good_store_is_clean(store: Path) -> None:
    report = found(store)
    assert report.findings == []
    assert report.notes == []


def test_an_empty_store_is_clean(tmp_path: Path) -> None:
    Kit(tmp_path / "new").close()
    assert found(tmp_path / "new").findings == []


def test_a_flipped_bit(store: Path) -> None:
    """One page of a sealed layer, which three files name."""
    with Kit(store) as kit:
        layer = kit.layer_of("vm/.snap/one/ram", 3)
        good = kit.read("vm/ram")
    flip(store / "layers" / f"{layer:08x}.ram", 3 * PAGE + 77)
    report = found(store, "page-digest")
    assert sorted(f.where for f in report.findings) == ["/clone", "/vm/.snap/one/ram", "/vm/ram"]
    assert all(f.detail == f"page 3 in layer {layer}" for f in report.findings)
    mended(store, "page-digest")
    with Kit(store) as kit:
        for path in ("clone", "vm/ram", "vm/.snap/one/ram"):
            assert lost_pages(kit, path) == {3}
        image = kit.image("vm/ram")
        assert kit.pager.copy_out(image, 0, 3 * PAGE) == good[: 3 * PAGE]
        assert kit.pager.copy_out(image, 4 * PAGE, 16 * PAGE) == good[4 * PAGE :]
        kit.write("vm/ram", 3 * PAGE, good[3 * PAGE : 4 * PAGE])  # overwritten as a whole, it is there again
        assert kit.read("vm/ram") == good
    assert kinds(found(store)) == {"page-lost"}


def test_a_missing_layer_file(store: Path) -> None:
    layer = layer_of(store, "clone", 0)
    (store / "layers" / f"{layer:08x}.ram").unlink()
    mended(store, "layer-file", "page-beyond")
    with Kit(store) as kit:
        assert lost_pages(kit, "clone") == {0}
        assert lost_pages(kit, "vm/ram") == set()


def test_a_truncated_layer_file(store: Path) -> None:
    layer = layer_of(store, "vm/.snap/one/ram", 19)
    os.truncate(store / "layers" / f"{layer:08x}.ram", 18 * PAGE + 5)
    mended(store, "page-beyond")
    with Kit(store) as kit:
        for path in ("clone", "vm/ram", "vm/.snap/one/ram"):
            assert lost_pages(kit, path) == {18, 19}


@pytest.mark.parametrize("live", [False, True])
def test_a_named_page_that_is_a_hole(store: Path, live: bool) -> None:
    path, page = ("vm/ram", 1) if live else ("vm/.snap/one/ram", 9)
    with Kit(store) as kit:
        layer = kit.layer_of(path, page)
        assert (kit.image(path).live is not None) == live
        kit.store.layers.file(kit.store.layers[layer]).punch(page, page + 1)
    mended(store, "page-hole")
    with Kit(store) as kit:
        assert lost_pages(kit, path) == {page}


def test_a_page_zeroed_in_place_is_no_damage(store: Path) -> None:
    with Kit(store) as kit:
        kit.write("vm/ram", PAGE, bytes(100))
        kit.write("vm/ram", PAGE + 100, bytes(PAGE - 100))
        assert kit.layer_of("vm/ram", 1)
    assert found(store).findings == []
    with Kit(store) as kit:
        kit.snapshot("two", "vm")
        kit.digest()
        layer = kit.layer_of("vm/ram", 1)
        kit.store.layers.file(kit.store.layers[layer]).punch(1, 2)  # as a copy of the store by a frugal tool does
    assert found(store).findings == []


@pytest.mark.parametrize("how", ["missing", "cut off", "holes"])
def test_digests_that_are_gone(store: Path, how: str) -> None:
    layer = layer_of(store, "vm/.snap/one/ram", 3)
    path = store / "layers" / f"{layer:08x}.xxh3"
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        os.truncate(path, 16 * 7)
    else:
        data = path.read_bytes()
        path.write_bytes(data[:32] + bytes(16) + data[48:])
    report = mended(store, "digests-missing")
    assert "nothing tells whether" in KINDS["digests-missing"].meaning
    assert report.repaired
    with Kit(store) as kit:
        assert [waiting.id for waiting in kit.pager.undigested()] == [layer]
        kit.digest()
    assert found(store).findings == []


def test_digests_of_another_layer(store: Path) -> None:
    """Nobody can tell whether the pages or their digests are wrong: nothing is thrown away."""
    layer = layer_of(store, "vm/.snap/one/ram", 3)
    path = store / "layers" / f"{layer:08x}.xxh3"
    path.write_bytes(os.urandom(path.stat().st_size))
    found(store, "digests-foreign")
    assert check_store(str(store), repair=True).damaged
    with Kit(store) as kit:
        assert lost_pages(kit, "vm/ram") == set()
    path.unlink()  # what the finding advises
    mended(store, "digests-missing")


@pytest.mark.parametrize("layer", [77, 0xFFFFFFF0])
def test_an_entry_that_names_no_layer(store: Path, layer: int) -> None:
    path = store / "tables" / f"{image_of(store, 'vm/.snap/one/ram'):08x}.map"
    set_entry(path, 4, layer)
    mended(store, "page-unknown")
    with Kit(store) as kit:
        assert lost_pages(kit, "vm/.snap/one/ram") == {4}
        assert kit.layer_of("vm/.snap/one/ram", 4) == LOST


def test_entries_behind_the_end(store: Path) -> None:
    image = image_of(store, "vm/.snap/one/state")
    set_entry(store / "tables" / f"{image:08x}.map", 7, 1)
    mended(store, "table-beyond")
    with Kit(store) as kit:
        assert kit.read("vm/.snap/one/state") == b"device state"


@pytest.mark.parametrize("how", ["missing", "empty", "magic", "checksum", "version", "short"])
@pytest.mark.parametrize("path", ["vm/ram", "vm/.snap/one/ram"])
def test_a_damaged_table(store: Path, path: str, how: str) -> None:
    """A file has another copy of its table, a snapshot has none: that file is lost, and says so."""
    with Kit(store) as kit:
        good, number = kit.read(path), kit.image(path).id
    table = store / "tables" / f"{number:08x}.map"
    if how == "missing":
        table.unlink()
    elif how == "empty":
        os.truncate(table, 0)
    elif how == "short":
        os.truncate(table, HEADER + 8)
    else:
        flip(table, {"magic": 0, "version": 8, "checksum": 20}[how])
    kind = {"missing": "table-missing", "short": "table-short"}.get(how, "table-header")
    report = mended(store, kind)
    assert [f.where for f in report.repaired if f.kind == kind] == ["/" + path]
    with Kit(store) as kit:
        if path == "vm/ram":
            assert kit.read(path) == good
        else:
            image = kit.image(path)
            assert lost_pages(kit, path) == set(range(image.pages)) != set()
            kit.delete_snapshot("one", "vm")  # nothing stands in the way of removing it


def test_a_durable_copy_that_differs(store: Path) -> None:
    """Nobody reads it now, but after a power loss it would be what counts."""
    table = store / "tables" / f"{image_of(store, 'clone'):08x}.durable"
    set_entry(table, 2, 0)
    mended(store, "durable-differs")
    table.unlink()
    mended(store, "durable-differs")
    kit = Kit(store)
    good = kit.read("clone")
    kit.power_loss()
    with Kit(store) as kit:
        assert kit.read("clone") == good


def test_a_record_that_lacks_a_layer(store: Path) -> None:
    """A garbage pass would take the layer for unused, and its pages away."""
    image = image_of(store, "clone")
    with catalog(store) as db:
        db.execute("UPDATE images SET layers = x'' WHERE id = ?", (image,))
    with_good = tree_of(store)
    assert with_good
    mended(store, "table-record")
    with Kit(store) as kit:
        good = kit.read("clone")
        kit.unlink("vm/ram")
        kit.collect(2)
        assert kit.read("clone") == good


def test_two_images_with_one_live_layer(store: Path) -> None:
    with Kit(store) as kit:
        ram, clone, layer = kit.image("vm/ram"), kit.image("clone"), kit.layer_of("vm/ram", 1)
        good, other = kit.read("vm/ram"), clone.id
        assert ram.live is not None
        assert ram.live.id == layer
    with catalog(store) as db:
        db.execute("UPDATE images SET live = ? WHERE id = ?", (layer, other))
    mended(store, "live-shared", "live-foreign", "layer-unused")
    with Kit(store) as kit:
        kit.write("clone", PAGE, b"mine" * 1024)
        assert kit.read("vm/ram") == good


def test_a_live_layer_that_is_sealed(store: Path) -> None:
    layer = layer_of(store, "vm/ram", 1)
    with catalog(store) as db:
        db.execute("UPDATE layers SET sealed = 1 WHERE id = ?", (layer,))
    mended(store, "live-sealed")


def test_a_live_layer_of_another_image(store: Path) -> None:
    layer = layer_of(store, "vm/ram", 1)
    for suffix in ("map", "durable"):
        set_entry(store / "tables" / f"{image_of(store, 'clone'):08x}.{suffix}", 1, layer)
    mended(store, "live-foreign", "table-record")
    with Kit(store) as kit:
        before = kit.read("clone")
        kit.write("vm/ram", PAGE, b"new " * 1024)
        assert kit.read("clone") == before


# --- the catalog ---


def test_no_catalog(store: Path) -> None:
    os.truncate(store / "catalog.sqlite", 0)
    report = check_store(str(store), repair=True)
    assert damage(report) == {"catalog-missing"}
    (store / "catalog.sqlite").unlink()
    assert damage(check_store(str(store), repair=True)) == {"catalog-missing"}


def test_a_catalog_that_is_no_database(store: Path) -> None:
    (store / "catalog.sqlite").write_bytes(os.urandom(20000))
    report = check_store(str(store), repair=True)
    assert damage(report) == {"catalog-unreadable"}
    assert report.findings[0].fix is None


@pytest.mark.parametrize("prepare", [None, "ALTER TABLE inodes DROP COLUMN btime"])
def test_a_catalog_with_a_damaged_index_is_rebuilt(store: Path, prepare: str | None) -> None:
    with Kit(store) as kit:
        good = {path: kit.read(path) for path in ("vm/ram", "clone", "vm/.snap/one/ram", "vm/.snap/one/state")}
    with catalog(store) as db:
        if prepare is not None:
            db.execute(prepare)  # a catalog of before, whose tables have fewer columns than ours
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'names_by_ino'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (store / "catalog.sqlite").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(os.urandom(size))
    report = check_store(str(store), repair=True)
    assert not report.damaged, report
    assert {finding.kind for finding in report.repaired} == {"catalog-unreadable"}
    with Kit(store) as kit:
        assert {path: kit.read(path) for path in good} == good
    assert list(store.glob("catalog.sqlite.damaged-*"))


def test_a_catalog_with_a_damaged_table_keeps_what_is_readable(store: Path) -> None:
    with catalog(store) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'names'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (store / "catalog.sqlite").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(os.urandom(size))
    report = check_store(str(store), repair=True)
    assert not report.damaged, report
    with Kit(store) as kit:
        lost = kit.space.lookup(kit.space.get_root().ino, b"lost+found")
        snap = [name for _, name, _ in kit.space.names(ROOT | SNAP_BIT)]
        assert [name for _, name, _ in kit.space.names(lost.ino)]
        assert snap


PLANTED: dict[str, tuple[str, ...]] = {
    "DELETE FROM inodes WHERE ino = (SELECT ino FROM names WHERE name = x'636c6f6e65')": ("name-broken",),
    "UPDATE names SET parent = 4711 WHERE name = x'636c6f6e65'": ("name-astray", "inode-unreachable"),
    "UPDATE names SET name = x'2e2e' WHERE name = x'636c6f6e65'": ("name-impossible", "inode-unreachable"),
    "UPDATE names SET name = x'612f62' WHERE name = x'636c6f6e65'": ("name-impossible", "inode-unreachable"),
    "UPDATE inodes SET nlink = 5 WHERE image IS NOT NULL AND NOT frozen": ("inode-links",),
    "UPDATE inodes SET nlink = 9 WHERE ino = 1": ("inode-links",),
    "DELETE FROM names WHERE name = x'636c6f6e65'": ("inode-unreachable",),
    "DELETE FROM names WHERE name = x'766d'": ("inode-unreachable", "inode-links"),
    "DELETE FROM names WHERE name = x'6f6e65'": ("inode-unreachable",),
    "UPDATE names SET parent = ino WHERE name = x'766d'": ("inode-unreachable", "inode-links"),
    "UPDATE inodes SET parent = 4711 WHERE ino = (SELECT ino FROM names WHERE name = x'766d')": ("directory-parent",),
    "INSERT INTO names (parent, name, ino) SELECT 1, x'61', ino FROM names WHERE name = x'766d'": (
        "directory-names", "inode-links",
    ),
    "UPDATE inodes SET image = NULL WHERE ino = (SELECT ino FROM names WHERE name = x'636c6f6e65')": (
        "inode-image", "image-unused",
    ),
    "DELETE FROM images WHERE id = (SELECT image FROM inodes JOIN names USING (ino) WHERE name = x'636c6f6e65')": (
        "inode-image",
    ),
    "UPDATE inodes SET image = (SELECT image FROM inodes JOIN names USING (ino) WHERE name = x'636c6f6e65' LIMIT 1)"
    " WHERE ino = (SELECT ino FROM names WHERE name = x'72616d' LIMIT 1)": ("image-shared",),
    "UPDATE inodes SET image = 1 WHERE ino = 1": ("inode-image",),
    "UPDATE inodes SET frozen = 0 WHERE frozen": ("frozen-mixed",),
    "UPDATE images SET frozen = 0 WHERE frozen": ("frozen-mixed",),
    "UPDATE inodes SET frozen = 1 WHERE ino = (SELECT ino FROM names WHERE name = x'766d')": ("frozen-mixed",),
    "INSERT INTO xattrs VALUES (4711, x'61', x'62')": ("catalog-reference",),
    "UPDATE images SET live = 4711 WHERE live IS NOT NULL": ("catalog-reference",),
    "INSERT INTO layers (sealed, digested, base, shift) VALUES (1, 1, 4711, 3)": ("catalog-reference",),
    "INSERT INTO layers DEFAULT VALUES": ("layer-unused",),
    "INSERT INTO images (created) VALUES (1)": ("image-unused",),
    "DELETE FROM inodes WHERE ino = 1": ("root-missing",),
}  # fmt: skip


@pytest.mark.parametrize("statement", PLANTED)
def test_rows_that_contradict_each_other(store: Path, statement: str) -> None:
    with catalog(store) as db:
        assert db.execute(statement).rowcount > 0
    first = check_store(str(store))
    assert set(PLANTED[statement]) <= kinds(first), first
    report = check_store(str(store), repair=True)
    assert not report.damaged, report
    assert report.repaired
    with Kit(store) as kit:
        kit.mkdir("afterwards")
        kit.collect(3)
    assert not damage(check_store(str(store)))


def test_what_has_no_path_is_found_again(store: Path) -> None:
    with Kit(store) as kit:
        good = kit.read("vm/ram"), kit.read("clone"), kit.read("vm/.snap/one/ram")
        vm, clone = kit.space.lookup(ROOT, b"vm").ino, kit.space.lookup(ROOT, b"clone").ino
        one = kit.space.lookup(vm | SNAP_BIT, b"one").ino
    with catalog(store) as db:
        db.execute("DELETE FROM names WHERE name IN (x'766d', x'636c6f6e65', x'6f6e65')")
    mended(store, "inode-unreachable", "inode-links")
    with Kit(store) as kit:
        assert kit.read(f"lost+found/#{vm}/ram") == good[0]
        assert kit.read(f"lost+found/#{clone}") == good[1]
        assert kit.read(f".snap/#{one}/ram") == good[2]


# --- files ---


def test_leftovers_are_told_and_removed(store: Path) -> None:
    for name in ("layers/000000aa.ram", "layers/000000aa.xxh3", "tables/000000ab.map", "tables/000000ab.durable.new"):
        (store / name).write_bytes(b"?")
    (store / "layers" / "README").write_bytes(b"?")
    report = found(store)
    assert kinds(report) == {"file-leftover", "file-foreign"}
    report = check_store(str(store), repair=True)
    assert kinds(report) == {"file-foreign"}
    assert not (store / "layers/000000aa.ram").exists()
    assert (store / "layers/README").exists()


def test_a_missing_directory(store: Path) -> None:
    shutil.rmtree(store / "layers")
    first = check_store(str(store))
    assert {"parts-missing", "layer-file"} <= damage(first)
    report = check_store(str(store), repair=True)
    assert not report.damaged, report
    with Kit(store) as kit:
        assert lost_pages(kit, "vm/ram") == set(range(20))


# --- how it ends ---


def test_a_killed_daemon_is_no_damage(store: Path) -> None:
    kit = Kit(store)
    kit.write("vm/ram", 9 * PAGE, os.urandom(3 * PAGE))
    kit.write("new", 0, os.urandom(3 * PAGE))
    kit.unlink("clone")
    kit.space.freeze(kit.space.get_root(), b"unfinished")
    good = kit.read("vm/ram"), kit.read("new")
    kit.kill()
    report = found(store)
    assert "was killed" in report.notes[0]
    with Kit(store) as kit:
        assert (kit.read("vm/ram"), kit.read("new")) == good
    assert found(store).findings == []


def test_a_power_loss_is_no_damage(store: Path) -> None:
    kit = Kit(store)
    kit.write("vm/ram", 9 * PAGE, os.urandom(3 * PAGE))
    kit.sync("vm/ram")
    good = kit.read("vm/ram")
    kit.write("vm/ram", 10 * PAGE, bytes(PAGE))  # punched at once, while the durable table names it
    kit.power_loss()
    report = found(store)
    assert "went down" in report.notes[0]
    with Kit(store) as kit:
        assert kit.read("vm/ram") == good[: 10 * PAGE] + bytes(PAGE) + good[11 * PAGE :]
    assert found(store).findings == []


def test_a_damaged_table_of_a_killed_daemon_comes_from_the_last_sync(store: Path) -> None:
    kit = Kit(store)
    kit.write("clone", 3 * PAGE, b"synced".ljust(PAGE))
    kit.sync("clone")
    good, number = kit.read("clone"), kit.image("clone").id
    kit.write("clone", 7 * PAGE, b"not synced".ljust(PAGE))
    kit.kill()
    flip(store / "tables" / f"{number:08x}.map", 3)
    mended(store, "table-header")
    with Kit(store) as kit:
        assert kit.read("clone") == good


# --- the command ---


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(fsck, list(arguments), standalone_mode=False)
    assert result.exception is None, result.exception
    return int(result.return_value), result.stdout, result.stderr


def test_exit_codes(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", str(store)]) == 0
    assert capfd.readouterr().out == f"{store}: clean\n"
    layer = layer_of(store, "vm/.snap/one/ram", 6)
    flip(store / "layers" / f"{layer:08x}.ram", 6 * PAGE)
    assert main(["fsck", str(store)]) == 4
    out = capfd.readouterr().out
    assert (
        f"damage: page-digest: /vm/.snap/one/ram: a page is not what its digest says (page 6 in layer {layer})" in out
    )
    assert "--repair can mend it" in out
    assert main(["fsck", "--repair", str(store)]) == 1
    out = capfd.readouterr().out
    assert "repaired: the page is marked lost" in out
    assert main(["fsck", str(store)]) == 0
    assert "note: page-lost: /vm/.snap/one/ram" in capfd.readouterr().out


def test_json(store: Path) -> None:
    path = store / "tables" / f"{image_of(store, 'vm/.snap/one/ram'):08x}.map"
    set_entry(path, 4, 99)
    code, out, _ = run("--json", str(store))
    report = json.loads(out)
    assert code == report["exit"] == 4
    assert report["findings"] == [
        {
            "kind": "page-unknown",
            "where": "/vm/.snap/one/ram",
            "meaning": KINDS["page-unknown"].meaning,
            "detail": "page 4 in layer 99",
            "damage": True,
            "repairable": True,
            "state": "found",
        }
    ]


@pytest.mark.parametrize("arguments", [[], ["--nonsense", "x"], ["a", "b"]])
def test_wrong_usage(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", *arguments]) == 16
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_what_cannot_be_checked(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "file", "empty"):
        assert main(["fsck", str(tmp_path / path)]) == 8
        message = capfd.readouterr().err
        assert len(message.splitlines()) == 1
        assert "Traceback" not in message
    with catalog(store) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'version'")
    assert main(["fsck", str(store)]) == 8
    assert "format version 99" in capfd.readouterr().err


def test_a_mounted_store_is_refused(opened: Callable[[], Kit], capfd: pytest.CaptureFixture[str]) -> None:
    with opened() as kit:
        before = kit.read("vm/ram")
        assert main(["fsck", "--repair", str(kit.directory)]) == 8
        assert f"process {os.getpid()}" in capfd.readouterr().err
        assert kit.read("vm/ram") == before


def test_an_unreadable_page(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(store, "vm/.snap/one/ram", 9)
    inode = (store / "layers" / f"{layer:08x}.ram").stat().st_ino
    real = os.pread

    def broken(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode and offset <= 9 * PAGE < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", broken)
    report = check_store(str(store))
    assert {(f.kind, f.detail) for f in report.findings} == {("page-unreadable", f"page 9 in layer {layer}")}
    report = check_store(str(store), repair=True)
    assert not report.damaged
    with Kit(store) as kit:
        assert lost_pages(kit, "vm/ram") == {9}
