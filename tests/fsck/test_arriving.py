"""A store with arriving layers: what is absent is no damage, and what is damaged comes again."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from arrival.inside import ArrivingKit, Shelf
from mount.posix import page_of

from ramfs.store.repair import check_store
from ramfs.units import PAGE

COUNT = 30
DATA = b"".join(page_of(n + 1) for n in range(COUNT)) + b"ragged"
SHELF = {"ram": DATA, "state": b"device state"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Closed: pages 0 to 9 are here and synced, one is overwritten; a snapshot, and a copy at another place."""
    kit = ArrivingKit(tmp_path / "store", Shelf(SHELF))
    kit.pull("vm", verified=True)
    assert kit.layer_of("vm/ram") == 1
    kit.fetch(kit.arriving("vm/ram"), 0, 10)
    kit.write("vm/ram", 5 * PAGE, b"w" * PAGE)
    kit.snapshot("s", "vm")
    kit.pager.share(kit.image("vm/ram"), 8 * PAGE, kit.create("moved"), 0, 4 * PAGE)
    kit.close()
    return tmp_path / "store"


def change(store: Path, *statements: str) -> list[int]:
    """Do something to the catalog; the first columns of what the last statement found."""
    db = sqlite3.connect(store / "catalog.sqlite", isolation_level=None)
    try:
        for statement in statements[:-1]:
            db.execute(statement)
        return [row[0] for row in db.execute(statements[-1])]
    finally:
        db.close()


def file_of(store: Path, suffix: str) -> Path:
    return store / "layers" / f"00000001.{suffix}"


def kinds(store: Path) -> list[str]:
    return [finding.kind for finding in check_store(str(store)).findings]


def mended(store: Path, kind: str) -> None:
    """Exactly that is found, and mended; then all arrives as it should be."""
    assert kinds(store) == [kind]
    report = check_store(str(store), repair=True)
    assert [finding.kind for finding in report.repaired] == [kind]
    assert not report.findings, report
    arrives(store)


def arrives(store: Path) -> ArrivingKit:
    kit = ArrivingKit(store, Shelf(SHELF))
    kit.arrive()
    expected = DATA[: 5 * PAGE] + b"w" * PAGE + DATA[6 * PAGE :]
    assert kit.read("vm/ram") == kit.read("vm/.snap/s/ram") == expected
    assert kit.read("vm/state") == b"device state"
    assert kit.read("moved") == expected[8 * PAGE : 12 * PAGE]
    kit.close()
    assert kinds(store) == []
    return kit


def test_absent_pages_are_no_damage(store: Path) -> None:
    assert kinds(store) == []
    arrives(store)


@pytest.mark.parametrize("end", ["kill", "power_loss"])
def test_nor_after_any_end(store: Path, end: str) -> None:
    kit = ArrivingKit(store, Shelf(SHELF))
    kit.fetch(kit.arriving("vm/ram"), 10, 20)
    getattr(kit, end)()
    assert kinds(store) == []
    assert arrives(store).shelf.fetched["ram", 15] == (1 if end == "power_loss" else 0)


def test_after_power_loss_what_was_synced_counts(store: Path) -> None:
    kit = ArrivingKit(store, Shelf(SHELF))
    kit.fetch(kit.arriving("vm/ram"), 10, 20)
    kit.power_loss()
    with file_of(store, "ram").open("r+b") as file:
        file.truncate(10 * PAGE)
        file.truncate((COUNT + 1) * PAGE)
    file_of(store, "here").unlink()
    assert kinds(store) == []
    file_of(store, "kept").write_bytes(b"\1")
    mended(store, "arriving-states")


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path) -> None:
    path.write_bytes(b"\7" * path.stat().st_size)


@pytest.mark.parametrize("how", [remove, shorten, spoil])
def test_states_that_nobody_knows(store: Path, how: Callable[[Path], None]) -> None:
    how(file_of(store, "here"))
    mended(store, "arriving-states")


def test_of_states_that_nobody_knows_those_count_that_were_synced(store: Path) -> None:
    file_of(store, "here").unlink()
    check_store(str(store), repair=True)
    assert not arrives(store).shelf.fetched["ram", 3]


def test_states_that_nobody_knows_at_all(store: Path) -> None:
    file_of(store, "here").unlink()
    file_of(store, "kept").unlink()
    mended(store, "arriving-states")


@pytest.mark.parametrize("how", [remove, shorten])
def test_the_file_of_pages(store: Path, how: Callable[[Path], None]) -> None:
    how(file_of(store, "ram"))
    mended(store, "arriving-file")


def test_a_page_that_is_not_there(store: Path) -> None:
    file_of(store, "here").write_bytes(b"\1" * (COUNT + 1))
    report = check_store(str(store))
    assert "pages 10-30" in report.findings[0].detail
    mended(store, "arriving-page")


def test_a_page_that_is_not_what_its_digest_says(store: Path) -> None:
    with file_of(store, "ram").open("r+b") as file:
        file.seek(3 * PAGE)
        file.write(b"?")
    mended(store, "arriving-page")


@pytest.mark.parametrize("how", [remove, shorten])
def test_digests_that_were_promised(store: Path, how: Callable[[Path], None]) -> None:
    how(file_of(store, "xxh3"))
    mended(store, "digests-missing")


def test_a_pull_that_is_lost(store: Path) -> None:
    change(store, "DELETE FROM pulls")
    assert set(kinds(store)) == {"arriving-source"}
    assert not check_store(str(store), repair=True).findings
    kit = ArrivingKit(store, Shelf(SHELF))
    (pull,) = kit.pulls.running
    assert (pull.uri, len(pull.arrivals)) == ("file:/unknown", 2)
    kit.close()
    arrives(store)


def test_a_layer_that_is_lost(store: Path) -> None:
    change(store, "INSERT INTO arriving VALUES (99, 1, 'gone', 4096, 0, 0)")
    mended(store, "catalog-reference")


def test_a_catalog_that_is_rebuilt_knows_what_arrives(store: Path) -> None:
    (page,) = change(store, "SELECT rootpage FROM sqlite_master WHERE name = 'names_in_order'")
    (size,) = change(store, "PRAGMA page_size")
    with (store / "catalog.sqlite").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * 100)
    assert kinds(store) == ["catalog-unreadable"]
    assert not check_store(str(store), repair=True).findings
    arrives(store)


def test_files_of_a_layer_that_is_complete(store: Path) -> None:
    arrives(store)
    file_of(store, "kept").write_bytes(b"\1")
    change(store, "UPDATE meta SET value = 0 WHERE key = 'garbage'")
    assert kinds(store) == ["file-leftover"]
    assert not check_store(str(store), repair=True).findings
    assert not file_of(store, "kept").exists()
