"""The store is taken away, held by others, or cut short under the daemon."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault.conftest import fsck
from harness import Mount, MountFailed
from mount.posix import errno_of, fails, opened, pattern, read

MB = 1 << 20


def mount_command(store: Path, mountpoint: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ramfs", "mount", *more, str(store), str(mountpoint)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60)


def test_the_store_directory_is_removed(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    mount.wait_until_supervised()
    mount.expect("ERROR|Traceback|No such file")
    (mount.path / "f").write_bytes(pattern(MB))
    (mount.path / "d").mkdir()
    with opened(mount.path / "f") as fd:
        shutil.rmtree(mount.store)
        # Files that are open in the daemon live on; nothing else is made up.
        assert errno_of(lambda: os.pwrite(fd, b"x", 5)) in {0, errno.EIO}
        assert errno_of(lambda: (mount.path / "new").write_bytes(pattern(MB))) in {0, errno.EIO}
        assert errno_of(lambda: os.mkdir(mount.path / ".snap" / "s")) in {0, errno.EIO}
        assert errno_of(lambda: os.fsync(fd)) in {0, errno.EIO}
        assert errno_of(lambda: os.statvfs(mount.path)) in {0, errno.EIO}
        assert errno_of((mount.path / ".ramfs" / "status.json").read_bytes) in {0, errno.EIO}
        time.sleep(1.5)  # housekeeping too
        assert mount.running
        assert "d" in os.listdir(mount.path)
    mount.umount(check=False)
    assert not mount.running


def test_a_removed_store_is_not_another(make_mount: Callable[..., Mount]) -> None:
    """What was lost is an error, not an empty file."""
    mount = make_mount()
    (mount.path / "f").write_bytes(pattern(MB))
    mount.restart()
    mount.expect("ERROR|Traceback|No such file|missing")
    shutil.rmtree(mount.store / "layers")
    assert errno_of(lambda: read(mount.path / "f")) == errno.EIO
    assert mount.running
    mount.umount(check=False)


def test_a_layer_is_cut_short_under_the_daemon(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    mount.expect("shorter than its pages|ERROR")
    (mount.path / "cut").write_bytes(pattern(MB))
    (mount.path / "kept").write_bytes(pattern(MB, 2))
    assert read(mount.path / "cut") == pattern(MB)
    mount.restart()
    layers = sorted((mount.store / "layers").glob("*.ram"))
    with opened(layers[0]) as fd:
        os.ftruncate(fd, 4096)
    for offset in (512 * 1024, MB - 4096):
        with fails(errno.EIO):  # and not zeros
            read(mount.path / "cut", offset, 4096)
    assert mount.running
    assert read(mount.path / "kept") == pattern(MB, 2)
    mount.umount(check=False)


def test_a_layer_is_cut_short_after_it_was_mapped(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    mount.expect("ERROR")
    (mount.path / "cut").write_bytes(pattern(2 * MB))
    mount.restart()
    assert read(mount.path / "cut", 0, 100) == pattern(100)
    (layer,) = (mount.store / "layers").glob("*.ram")
    with opened(layer) as fd:
        os.ftruncate(fd, 4096)
    assert errno_of(lambda: read(mount.path / "cut", 3 * MB // 2, 4096)) == errno.EIO
    assert mount.running
    mount.umount(check=False)


def test_a_catalog_locked_by_another_process(tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "f").write_bytes(b"data")
    mount.umount()
    other = sqlite3.connect(mount.store / "catalog.sqlite")
    try:
        other.execute("BEGIN EXCLUSIVE")
        done = mount_command(mount.store, mount.path, "-f")
        assert done.returncode == 5
        assert "locked by another process" in done.stderr
        assert "Traceback" not in done.stderr
        other.execute("ROLLBACK")
    finally:
        other.close()
    mount.start()
    assert read(mount.path / "f") == b"data"


def test_the_daemon_lets_nobody_else_into_its_catalog(mounted: Mount) -> None:
    (mounted.path / "f").write_bytes(b"data")
    other = sqlite3.connect(mounted.store / "catalog.sqlite", timeout=0.2)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM names").fetchall()
    other.close()
    (mounted.path / "g").write_bytes(b"data")
    mounted.restart()
    assert sorted(os.listdir(mounted.path)) == ["f", "g"]


@pytest.mark.parametrize("how", ["-f", "background"])
def test_a_second_mount_names_the_first(mounted: Mount, tmp_path: Path, how: str) -> None:
    (tmp_path / "other").mkdir()
    done = mount_command(mounted.store, tmp_path / "other", *([how] if how == "-f" else []))
    assert done.returncode == 5
    assert str(mounted.pid) in done.stderr
    assert str(mounted.path) in done.stderr
    assert "Traceback" not in done.stderr
    (mounted.path / "f").write_bytes(b"the first goes on")
    assert os.listdir(tmp_path / "other") == []


def test_fsck_of_a_mounted_store_is_refused(mounted: Mount) -> None:
    (mounted.path / "f").write_bytes(b"data")
    with pytest.raises(AssertionError, match=str(mounted.pid)):
        fsck(mounted.store)


def test_a_store_that_may_not_be_written(tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
    store = tmp_path / "file"
    store.write_text("no directory")
    with pytest.raises(MountFailed, match="not a directory"):
        make_mount(store=store)


def test_a_directory_that_is_no_store_is_left_alone(tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
    store = tmp_path / "precious"
    store.mkdir()
    (store / "thesis.tex").write_text("years")
    with pytest.raises(MountFailed, match="not a ramfs store"):
        make_mount(store=store)
    assert sorted(os.listdir(store)) in (["thesis.tex"], ["lock", "thesis.tex"])
