"""The tree without a kernel: what happens between the steps of a snapshot, and what stays in memory."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Mount

from ramfs.errors import FileError
from ramfs.namespace import Caller, Inode, Namespace
from ramfs.pager import Pager
from ramfs.store.store import Store
from ramfs.units import ROOT, SNAP_BIT, HandleId, InodeNumber

CALLER = Caller(os.getuid(), os.getgid(), 1)
USER = Caller(1000, 1000, 1, lambda: {1000})


@pytest.fixture
def space(shm: Path) -> Iterator[Namespace]:
    store = Store(str(shm / "store"), create=True)
    yield Namespace(Pager(store))
    store.close()


def _directory(space: Namespace, name: bytes) -> Inode:
    return space.make(ROOT, name, stat.S_IFDIR | 0o755, CALLER)


def _errno(error: pytest.ExceptionInfo[FileError]) -> int:
    return error.value.errno


def test_a_directory_stays_while_its_snapshot_is_made(space: Namespace) -> None:
    """Else the snapshot would get a name in a directory that is gone, and keep its pages for ever."""
    directory = _directory(space, b"vm")
    file = space.make(directory.ino, b"ram", stat.S_IFREG | 0o644, CALLER)
    frozen = space.freeze(directory, b"s")
    space.unlink(directory.ino, b"ram")
    space.forget(file.ino, 0)
    with pytest.raises(FileError) as error:
        space.rmdir(ROOT, b"vm")
    assert _errno(error) == errno.ENOTEMPTY
    frozen.commit()
    space.delete_snapshot(InodeNumber(directory.ino | SNAP_BIT), b"s")
    space.rmdir(ROOT, b"vm")
    assert space.catalog.number("SELECT count(*) FROM images") == 0


def test_a_snapshot_that_cannot_be_named_leaves_nothing(space: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _directory(space, b"vm")
    space.make(directory.ino, b"ram", stat.S_IFREG | 0o644, CALLER)
    frozen = space.freeze(directory, b"s")

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(space, "_add_name", full)
        with pytest.raises(sqlite3.OperationalError):
            frozen.commit()
    frozen.abort()
    assert space.catalog.number("SELECT count(*) FROM images") == 1
    space.freeze(space.check_snapshot(InodeNumber(directory.ino | SNAP_BIT), b"s"), b"s").commit()


def test_abort_after_commit_harms_nothing(space: Namespace) -> None:
    directory = _directory(space, b"vm")
    frozen = space.freeze(directory, b"s")
    frozen.commit()
    frozen.abort()
    assert space.lookup(InodeNumber(directory.ino | SNAP_BIT), b"s").is_dir


def test_a_temporary_name_outlives_the_kernels_memory(space: Namespace) -> None:
    """The kernel may forget an inode between QEMU's create and its unlink."""
    directory = _directory(space, b"vm")
    name = b"qemu_back_mem.pc.ram.abcdef"
    inode = space.block_inode(directory.ino, name, stat.S_IFREG | 0o600, CALLER)
    assert inode is not None
    inode.lookups += 1
    space.forget(inode.ino, 1)
    space.unlink(directory.ino, name)
    again = space.lookup(directory.ino, b"pc.ram@0x0")
    assert (again.nlink, again.aliases) == (1, 0)


def test_a_temporary_name_of_a_file_that_was_removed(space: Namespace) -> None:
    directory = _directory(space, b"vm")
    name = b"qemu_back_mem.pc.ram.abcdef"
    inode = space.block_inode(directory.ino, name, stat.S_IFREG | 0o600, CALLER)
    assert inode is not None
    space.unlink(directory.ino, b"pc.ram@0x0")
    assert space.lookup(directory.ino, name) is inode
    space.unlink(directory.ino, name)
    assert space.catalog.number("SELECT count(*) FROM images") == 0


def test_walking_and_looking_leave_nothing_in_memory(space: Namespace) -> None:
    inner = ROOT
    for name in (b"a", b"b", b"c"):
        inner = space.make(inner, name, stat.S_IFDIR | 0o755, CALLER).ino
    file = space.make(inner, b"file", stat.S_IFREG | 0o644, CALLER)
    file.opens[HandleId(1)] = None  # type: ignore[assignment]
    for inode in list(space.inodes.values()):
        space.let_go(inode)
    assert [path for path, _ in space.files_below(space.get_root())] == [b"a/b/c/file"]
    assert space.path_of(inner) == b"a/b/c"
    with space.at(b"a/b/c", CALLER):
        pass
    with pytest.raises(FileError), space.at(b"a/b/other/c", CALLER):
        pass
    assert set(space.inodes) <= {ROOT, file.ino}
    file.opens.clear()


def test_a_device_is_not_copied_for_its_reader(space: Namespace) -> None:
    """Who owns the copy could give himself the right to write."""
    directory = _directory(space, b"vm")
    space.make(directory.ino, b"disk", stat.S_IFBLK | 0o644, CALLER, rdev=os.makedev(8, 0))
    open_to_all = space.make(ROOT, b"all", stat.S_IFDIR | 0o777, CALLER)
    with pytest.raises(FileError) as error:
        space.clone(directory, open_to_all.ino, b"copy", USER)
    assert _errno(error) == errno.EPERM
    space.clone(directory, open_to_all.ino, b"copy", Caller(0, 0, 1))


def test_a_clone_is_counted_among_the_links_of_its_parent(mounted: Mount) -> None:
    """The kernel keeps attributes for minutes, and does not see what a command to the daemon changes."""
    (mounted.path / "vm").mkdir()
    before = mounted.path.stat()
    command = b'{"clone": {"source": "vm", "parent": "", "name": "copy"}}'
    (mounted.path / ".ramfs" / "control").write_bytes(command)
    after = mounted.path.stat()
    assert after.st_nlink == before.st_nlink + 1
    assert after.st_mtime_ns > before.st_mtime_ns
