"""What `Store` makes of directories that are no stores, busy, full, or made by others."""

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from storekit import Kit

from ramfs.errors import StoreBusy, StoreDamaged, StoreError, StoreVersion
from ramfs.store.repair import check_store
from ramfs.store.store import Store
from ramfs.units import PAGE


def refused(directory: Path, kind: type[StoreError], words: str, *, create: bool = True) -> None:
    with pytest.raises(kind, match=words) as error:
        Store(str(directory), create=create)
    assert "\n" not in str(error.value)
    assert type(error.value) is kind


def test_a_new_store(tmp_path: Path) -> None:
    Store(str(tmp_path / "a/b/new"), create=True).close()
    assert {"catalog.sqlite", "layers", "lock", "tables"} <= set(os.listdir(tmp_path / "a/b/new"))
    assert (tmp_path / "a/b/new").stat().st_mode & 0o77 == 0
    Store(str(tmp_path / "a/b/new")).close()


def test_an_empty_directory_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()  # the root of a fresh ext4
    Store(str(tmp_path), create=True).close()


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "new", StoreError, "does not exist", create=False)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", StoreError, "not a ramfs store", create=False)
    assert os.listdir(tmp_path / "empty") == []


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", StoreError, "not a directory")
    refused(tmp_path / "file", StoreError, "not a directory", create=False)
    refused(tmp_path / "file" / "below", StoreError, "not a directory")


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_bytes(b"x")
    refused(tmp_path, StoreError, "not empty")
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_two_at_once(tmp_path: Path) -> None:
    with Kit(tmp_path / "s"):
        refused(tmp_path / "s", StoreBusy, f"process {os.getpid()}")
    Store(str(tmp_path / "s")).close()


def test_another_process_names_itself(tmp_path: Path) -> None:
    code = (
        "import sys; from ramfs.store.store import Store; s = Store(sys.argv[1], create=True, purpose='mounted at /x')"
    )
    command = [sys.executable, "-c", f"{code}; print(flush=True); sys.stdin.read()", str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        refused(tmp_path / "s", StoreBusy, rf"process {process.pid} \(mounted at /x\)")
        process.kill()
    Store(str(tmp_path / "s")).close()  # the lock went with the process


def test_another_version(tmp_path: Path) -> None:
    Store(str(tmp_path / "s"), create=True).close()
    db = sqlite3.connect(tmp_path / "s/catalog.sqlite")
    db.execute("UPDATE meta SET value = 3 WHERE key = 'version'")
    db.commit()
    db.close()
    refused(tmp_path / "s", StoreVersion, "format version 3")
    Store(str(tmp_path / "t"), create=True).close()


def test_a_locked_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(str(tmp_path / "s"), create=True).close()
    db = sqlite3.connect(tmp_path / "s/catalog.sqlite", isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    refused(tmp_path / "s", StoreBusy, "locked by another process")
    db.execute("ROLLBACK")
    db.close()
    Store(str(tmp_path / "s")).close()


def test_a_lost_catalog_or_part(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
    (tmp_path / "s/catalog.sqlite").rename(tmp_path / "kept")
    refused(tmp_path / "s", StoreDamaged, "lost its catalog")
    (tmp_path / "kept").rename(tmp_path / "s/catalog.sqlite")
    (tmp_path / "s/layers").rename(tmp_path / "layers")
    refused(tmp_path / "s", StoreDamaged, "layers is missing")
    (tmp_path / "layers").rename(tmp_path / "s/layers")
    with Kit(tmp_path / "s") as kit:
        assert kit.read("f") == b"x" * PAGE


def test_a_store_that_moves(tmp_path: Path) -> None:
    with Kit(tmp_path / "s") as kit:
        kit.write("f", 0, b"x" * PAGE)
    (tmp_path / "s").rename(tmp_path / "t")
    with Kit(tmp_path / "t") as kit:
        assert kit.read("f") == b"x" * PAGE


# --- full ---


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with room for a store and about a hundred pages."""
    if os.geteuid() != 0:
        pytest.skip("mounts a tmpfs")
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", point], check=True)
    yield point
    subprocess.run(["umount", "-l", point], check=True)  # a test that failed has files open


def fill(kit: Kit, path: str) -> bytes:
    """Write until the disk is full; returns what was acknowledged."""
    done = bytearray()
    while True:
        data = os.urandom(4 * PAGE)
        try:
            kit.write(path, len(done), data)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            return bytes(done)
        done += data


def test_a_full_store_keeps_what_it_acknowledged(small: Path) -> None:
    kit = Kit(small / "s")
    kit.write("old", 0, b"old" * 1000)
    done = fill(kit, "f")
    assert len(done) > 50 * PAGE
    assert kit.read("f")[: len(done)] == done
    assert kit.read("old") == b"old" * 1000
    kit.write("f", 0, b"in place" * 512)  # an own page takes no space
    kit.kill()
    assert not check_store(str(small / "s")).damaged
    kit = Kit(small / "s")
    assert kit.read("f")[PAGE : len(done)] == done[PAGE:]
    assert kit.read("old") == b"old" * 1000
    kit.unlink("f")
    kit.collect(2)
    again = fill(kit, "g")
    assert len(again) >= len(done) - 20 * PAGE
    kit.kill()


def test_a_copy_on_a_full_store(small: Path) -> None:
    """Whatever fails, the source is as it was."""
    kit = Kit(small / "s")
    good = fill(kit, "f")
    for number in range(200):
        try:
            kit.snapshot(f"s{number}")
        except (OSError, sqlite3.OperationalError):
            break
    assert kit.read("f")[: len(good)] == good
    kit.kill()
    assert not check_store(str(small / "s")).damaged
    kit = Kit(small / "s")
    assert kit.read("f")[: len(good)] == good
    kit.kill()


def test_a_full_store_can_be_checked(small: Path) -> None:
    with Kit(small / "s") as kit:
        fill(kit, "f")
    assert check_store(str(small / "s")).findings == []
