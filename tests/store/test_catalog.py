import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramfs.errors import StoreBusy, StoreDamaged, StoreVersion
from ramfs.store.catalog import ARRIVING_VERSION, FORMAT_VERSION, Catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(str(tmp_path / "catalog.sqlite"), create=True)
    yield catalog
    catalog.close()


def test_a_catalog_of_before_gets_the_columns_it_lacks(tmp_path: Path) -> None:
    path = str(tmp_path / "old.sqlite")
    catalog = Catalog(path, create=True)
    catalog.execute("INSERT INTO inodes (mode, uid, gid, nlink, atime, mtime, ctime) VALUES (1, 2, 3, 4, 5, 6, 7)")
    catalog.execute("ALTER TABLE inodes DROP COLUMN btime")
    catalog.close()
    for _ in range(2):
        catalog = Catalog(path, create=False)
        row = catalog.row("SELECT ctime, btime FROM inodes")
        assert row is not None
        assert tuple(row) == (7, 0)
        assert catalog.meta("version") == FORMAT_VERSION
        catalog.close()


def test_a_transaction_happens_as_a_whole(catalog: Catalog) -> None:
    with catalog.transaction():
        catalog.set_meta("a", 1)
        catalog.set_meta("b", 2)
    with pytest.raises(RuntimeError), catalog.transaction():  # noqa: PT012 - what it holds is the point
        catalog.set_meta("a", 10)
        raise RuntimeError
    assert (catalog.meta("a"), catalog.meta("b"), catalog.meta("c")) == (1, 2, None)


def test_the_outermost_transaction_commits(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog.transaction():  # noqa: PT012 - what it holds is the point
        with catalog.transaction():
            catalog.set_meta("inner", 1)
        raise RuntimeError
    assert catalog.meta("inner") is None


def test_what_is_in_memory_goes_back_latest_first(catalog: Catalog) -> None:
    steps: list[int] = []
    with catalog.transaction():
        catalog.on_rollback(lambda: steps.append(0))
    assert steps == []
    with pytest.raises(RuntimeError), catalog.transaction():  # noqa: PT012 - what it holds is the point
        catalog.on_rollback(lambda: steps.append(1))
        with catalog.transaction():
            catalog.on_rollback(lambda: steps.append(2))
        raise RuntimeError
    assert steps == [2, 1]
    with catalog.transaction():  # and is forgotten then
        pass
    assert steps == [2, 1]


def test_outside_a_transaction_nothing_can_go_back(catalog: Catalog) -> None:
    with pytest.raises(AssertionError):
        catalog.on_rollback(lambda: None)


def test_a_commit_that_fails_rolls_back(catalog: Catalog) -> None:
    undone: list[bool] = []
    with pytest.raises(sqlite3.IntegrityError), catalog.transaction():  # noqa: PT012 - what it holds is the point
        catalog.on_rollback(lambda: undone.append(True))
        catalog.execute("INSERT INTO xattrs VALUES (77, x'00', x'00')")
    assert undone == [True]
    with catalog.transaction():
        catalog.set_meta("usable", 1)
    assert catalog.meta("usable") == 1


def test_sync_from_another_thread(catalog: Catalog) -> None:
    catalog.set_meta("x", 1)
    failed: list[BaseException] = []

    def sync() -> None:
        try:
            catalog.sync()
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=sync)
    thread.start()
    thread.join()
    assert failed == []


def test_a_killed_daemon_keeps_what_it_committed(tmp_path: Path) -> None:
    path = str(tmp_path / "catalog.sqlite")
    catalog = Catalog(path, create=True)
    catalog.set_meta("x", 1)
    kept = tmp_path / "kept"
    kept.mkdir()
    for suffix in ("", "-wal"):  # as it is in the page cache
        (kept / f"catalog.sqlite{suffix}").write_bytes((tmp_path / f"catalog.sqlite{suffix}").read_bytes())
    catalog.close()
    again = Catalog(str(kept / "catalog.sqlite"), create=False)
    assert again.meta("x") == 1
    again.close()


def test_missing_empty_and_foreign(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with pytest.raises(StoreDamaged, match="is missing"):
        Catalog(str(path), create=False)
    path.write_bytes(b"")
    with pytest.raises(StoreDamaged, match="is empty"):
        Catalog(str(path), create=False)
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StoreDamaged, match="not readable"):
        Catalog(str(path), create=False)
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE other (x)").connection.close()
    with pytest.raises(StoreDamaged, match="ramfs fsck"):
        Catalog(str(path), create=False)


@pytest.mark.parametrize("version", [ARRIVING_VERSION + 1, 0, None, "one"])
def test_another_version_is_refused(tmp_path: Path, version: object) -> None:
    path = str(tmp_path / "catalog.sqlite")
    catalog = Catalog(path, create=True)
    catalog.set_meta("version", version)
    catalog.close()
    with pytest.raises(StoreVersion, match=f"format version {version}"):
        Catalog(path, create=False)


def test_a_locked_catalog_is_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "catalog.sqlite")
    Catalog(path, create=True).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy, match="locked by another process"):
        Catalog(path, create=False, timeout=0.05)
    other.execute("ROLLBACK")
    other.close()
    Catalog(path, create=False).close()


def test_the_lock_is_held_from_the_start(catalog: Catalog) -> None:
    other = sqlite3.connect(catalog.path, timeout=0.05, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM meta")
    other.close()
