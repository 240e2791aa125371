"""Modes, owners, times, extended attributes, statfs; and what other users may."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import NOBODY, fails, in_child, opened, page_counts, pattern

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and become another user")


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


# --- modes ---


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o777, 0o4755, 0o2755, 0o1777, 0o7777])
def test_chmod(here: Path, mode: int) -> None:
    for path in (here / "f", here / "d"):
        path.touch() if path.name == "f" else path.mkdir()
        path.chmod(mode)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_ISREG((here / "f").stat().st_mode)
    assert stat.S_ISDIR((here / "d").stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_umask_takes_from_all_kinds(here: Path, mask: int) -> None:
    with umask(mask):
        (here / "d").mkdir(0o777)
        os.close(os.open(here / "f", os.O_RDWR | os.O_CREAT, 0o666))
        os.mkfifo(here / "p", 0o666)
    assert stat.S_IMODE((here / "d").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((here / "f").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((here / "p").stat().st_mode) == 0o666 & ~mask


@needs_root
def test_a_setgid_directory_gives_its_group(here: Path) -> None:
    os.chown(here, -1, 1234)
    here.chmod(0o2775)
    (here / "f").touch()
    (here / "d").mkdir()
    (here / "l").symlink_to("f")
    assert (here / "f").stat().st_gid == 1234
    assert not (here / "f").stat().st_mode & stat.S_ISGID
    assert (here / "d").stat().st_gid == 1234
    assert (here / "d").stat().st_mode & stat.S_ISGID
    assert (here / "l").lstat().st_gid == 1234


@needs_root
def test_chown(here: Path) -> None:
    (here / "f").touch()
    os.chown(here / "f", 1000, 2000)
    assert ((here / "f").stat().st_uid, (here / "f").stat().st_gid) == (1000, 2000)
    os.chown(here / "f", -1, 3000)
    assert ((here / "f").stat().st_uid, (here / "f").stat().st_gid) == (1000, 3000)
    (here / "l").symlink_to("f")
    os.chown(here / "l", 7, 8, follow_symlinks=False)
    assert ((here / "l").lstat().st_uid, (here / "f").stat().st_uid) == (7, 1000)


@needs_root
def test_chown_takes_suid_away(here: Path) -> None:
    (here / "f").touch()
    (here / "f").chmod(0o6755)
    os.chown(here / "f", 1000, 1000)
    assert stat.S_IMODE((here / "f").stat().st_mode) == 0o755


@needs_root
def test_a_write_of_another_takes_suid_away(public: Mount) -> None:
    path = public.path / "f"
    path.touch()
    path.chmod(0o6777)

    def write() -> None:
        with opened(path) as fd:
            os.write(fd, b"changed")

    in_child(write, user=NOBODY)
    assert not path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)


# --- another user ---


@needs_root
def test_modes_bind_other_users(public: Mount) -> None:
    root = public.path
    for name, mode in (("private", 0o600), ("readable", 0o644), ("writable", 0o666)):
        (root / name).write_bytes(b"data")
        (root / name).chmod(mode)
    (root / "closed").mkdir(0o700)
    (root / "closed" / "f").touch()
    (root / "open").mkdir()
    (root / "open").chmod(0o777)
    refused: list[Callable[[], object]] = [
        lambda: os.open(root / "private", os.O_RDONLY),
        lambda: os.open(root / "readable", os.O_RDWR),
        lambda: os.open(root / "new", os.O_RDWR | os.O_CREAT),
        lambda: os.mkdir(root / "new"),
        lambda: os.unlink(root / "writable"),
        lambda: os.rename(root / "writable", root / "open" / "w"),
        lambda: os.listdir(root / "closed"),
        lambda: os.stat(root / "closed" / "f"),
        lambda: os.truncate(root / "readable", 0),
    ]
    for call in refused:
        with fails(errno.EACCES):
            in_child(call, user=NOBODY)
    for call in (
        lambda: os.chmod(root / "writable", 0o777),
        lambda: os.chown(root / "writable", NOBODY, NOBODY),
        lambda: os.utime(root / "readable", ns=(1, 1)),
    ):
        with pytest.raises(PermissionError):
            in_child(call, user=NOBODY)
    assert in_child((root / "readable").read_bytes, user=NOBODY) == b"data"
    in_child(lambda: (root / "writable").write_bytes(b"theirs"), user=NOBODY)
    in_child(lambda: (root / "open" / "f").write_bytes(b"made"), user=NOBODY)
    made = (root / "open" / "f").stat()
    assert (made.st_uid, made.st_gid) == (NOBODY, NOBODY)
    assert (root / "writable").read_bytes() == b"theirs"


@needs_root
def test_a_supplementary_group_counts(public: Mount) -> None:
    path = public.path / "f"
    path.write_bytes(b"grouped")
    os.chown(path, 0, 4321)
    path.chmod(0o640)
    assert in_child(path.read_bytes, user=NOBODY, groups=[4321]) == b"grouped"
    with fails(errno.EACCES):
        in_child(path.read_bytes, user=NOBODY)


@needs_root
def test_sticky_directories_keep_others_off(public: Mount) -> None:
    tmp = public.path / "tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    (tmp / "mine").touch()
    in_child((tmp / "theirs").touch, user=NOBODY)
    with pytest.raises(PermissionError):
        in_child((tmp / "mine").unlink, user=NOBODY)
    with pytest.raises(PermissionError):
        in_child(lambda: (tmp / "mine").rename(tmp / "x"), user=NOBODY)
    in_child((tmp / "theirs").unlink, user=NOBODY)


@needs_root
def test_snapshots_of_a_directory_are_for_those_who_may_write_it(public: Mount) -> None:
    directory = public.path / "d"
    directory.mkdir()
    directory.chmod(0o755)
    with fails(errno.EACCES):
        in_child(lambda: os.mkdir(directory / ".snap" / "s"), user=NOBODY)
    directory.chmod(0o777)
    in_child(lambda: os.mkdir(directory / ".snap" / "s"), user=NOBODY)
    directory.chmod(0o755)
    with fails(errno.EACCES):
        in_child(lambda: os.rmdir(directory / ".snap" / "s"), user=NOBODY)
    assert os.listdir(directory / ".snap") == ["s"]


@needs_root
def test_a_frozen_file_keeps_its_secrets(public: Mount) -> None:
    directory = public.path / "d"
    directory.mkdir()
    (directory / "f").write_bytes(b"secret")
    (directory / "f").chmod(0o600)
    (directory / ".snap" / "s").mkdir()
    (directory / "f").chmod(0o644)
    assert in_child((directory / "f").read_bytes, user=NOBODY) == b"secret"
    with fails(errno.EACCES):
        in_child((directory / ".snap" / "s" / "f").read_bytes, user=NOBODY)


# --- times ---


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_times_in_nanoseconds(here: Path, kind: str) -> None:
    path = here / "x"
    {"file": path.touch, "directory": path.mkdir, "symlink": lambda: path.symlink_to("y")}[kind]()
    wanted = (1_234_567_890_123_456_789, 987_654_321_987_654_321)
    os.utime(path, ns=wanted, follow_symlinks=False)
    told = path.lstat()
    assert (told.st_atime_ns, told.st_mtime_ns) == wanted
    assert told.st_ctime_ns > 1_700_000_000_000_000_000


def test_times_before_1970_and_far_ahead(here: Path) -> None:
    (here / "f").touch()
    for wanted in ((-1_000_000_001, -5), (0, 0), (1 << 62, 1 << 62)):
        os.utime(here / "f", ns=wanted)
        assert ((here / "f").stat().st_atime_ns, (here / "f").stat().st_mtime_ns) == wanted


def changed(path: Path, act: Callable[[], object]) -> set[str]:
    """Which times of a file an act moves on."""
    before = path.lstat()
    time.sleep(0.002)
    act()
    after = path.lstat()
    moved = {name for name in ("mtime", "ctime") if getattr(after, f"st_{name}_ns") > getattr(before, f"st_{name}_ns")}
    assert all(getattr(after, f"st_{name}_ns") >= getattr(before, f"st_{name}_ns") for name in ("mtime", "ctime"))
    return moved


def test_what_moves_mtime_and_ctime(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"abc")
    both, only = {"mtime", "ctime"}, {"ctime"}

    def write(data: bytes) -> None:
        with opened(path) as fd:
            os.pwrite(fd, data, 1)

    assert changed(path, lambda: write(b"x")) == both
    assert changed(path, lambda: os.truncate(path, 1)) == both
    assert changed(path, lambda: path.chmod(0o600)) == only
    assert changed(path, lambda: os.setxattr(path, "user.x", b"1")) == only
    assert changed(path, lambda: os.removexattr(path, "user.x")) == only
    assert changed(path, lambda: os.link(path, here / "g")) == only
    assert changed(path, (here / "g").unlink) == only
    assert changed(path, path.read_bytes) == set()
    assert changed(path, lambda: os.setxattr(here, "user.x", b"1")) == set()


def test_what_moves_the_times_of_a_directory(here: Path) -> None:
    both = {"mtime", "ctime"}
    (here / "d").mkdir()
    assert changed(here, (here / "f").touch) == both
    assert changed(here, lambda: (here / "f").rename(here / "g")) == both
    assert changed(here, lambda: os.link(here / "g", here / "h")) == both
    assert changed(here, (here / "g").unlink) == both
    assert changed(here, (here / "d" / "x").touch) == set()
    assert changed(here / "d", (here / "d" / "x").unlink) == both
    assert changed(here, (here / "d").rmdir) == both
    assert changed(here, lambda: (here / "h").write_bytes(b"x")) == set()


def test_fstat_of_an_open_file_follows_its_writes(here: Path) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as one:
        before = os.fstat(one).st_mtime_ns
        time.sleep(0.002)
        os.write(one, b"x")
        assert os.fstat(one).st_mtime_ns > before
        assert os.fstat(one).st_size == 1


# --- extended attributes ---


def test_xattrs(here: Path) -> None:
    path = here / "f"
    path.touch()
    with fails(errno.ENODATA):
        os.getxattr(path, "user.a")
    os.setxattr(path, "user.a", b"one")
    os.setxattr(path, "user.b", b"")
    os.setxattr(path, "user.a", b"two\0binary\xff")
    assert os.getxattr(path, "user.a") == b"two\0binary\xff"
    assert os.getxattr(path, "user.b") == b""
    assert sorted(os.listxattr(path)) == ["user.a", "user.b"]
    os.removexattr(path, "user.a")
    assert os.listxattr(path) == ["user.b"]
    with fails(errno.ENODATA):
        os.removexattr(path, "user.a")


def test_xattr_create_and_replace(here: Path) -> None:
    path = here / "f"
    path.touch()
    with fails(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    assert os.getxattr(path, "user.a") == b"1"
    os.setxattr(path, "user.a", b"2", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"2"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_xattr_sizes(here: Path, kind: str) -> None:
    path = here / "x"
    path.touch() if kind == "file" else path.mkdir()
    os.setxattr(path, "user.big", pattern(65536))
    assert os.getxattr(path, "user.big") == pattern(65536)
    with fails(errno.E2BIG):
        os.setxattr(path, "user.big", bytes(65537))
    os.setxattr(path, "user." + "n" * 250, b"x")
    assert os.getxattr(path, "user." + "n" * 250) == b"x"
    with fails(errno.ERANGE):
        os.setxattr(path, "user." + "n" * 251, b"x")


def test_many_xattrs(here: Path) -> None:
    path = here / "f"
    path.touch()
    names = {f"user.name{number:03}" for number in range(300)}
    for name in names:
        os.setxattr(path, name, name.encode())
    assert set(os.listxattr(path)) == names


def test_xattr_name_spaces(here: Path) -> None:
    path = here / "f"
    path.touch()
    for name in ("nothing.x", "user"):
        with fails(errno.EOPNOTSUPP):
            os.setxattr(path, name, b"x")
    with fails(errno.EPERM):
        os.setxattr(path, "user.ramfs.pages", b"x")
    with fails(errno.EPERM):
        os.setxattr(path, "user.ramfs.other", b"x")
    if os.geteuid() == 0:
        os.setxattr(path, "trusted.x", b"t")
        assert os.getxattr(path, "trusted.x") == b"t"


def test_page_counts_are_an_attribute(here: Path) -> None:
    path = here / "f"
    path.write_bytes(pattern(3 * 4096) + bytes(2 * 4096) + b"x")
    assert page_counts(path) == {"owned": 4, "shared": 0, "zero": 2, "absent": 0, "total": 6}
    assert os.listxattr(path) == []
    with fails(errno.ENODATA):
        os.getxattr(here, "user.ramfs.pages")


def test_cp_a_copies_everything(here: Path) -> None:
    source = here / "source"
    source.mkdir(0o750)
    (source / "f").write_bytes(pattern(10000))
    os.setxattr(source / "f", "user.note", b"kept")
    os.setxattr(source, "user.dir", b"kept too")
    os.link(source / "f", source / "g")
    (source / "l").symlink_to("f")
    os.mkfifo(source / "p", 0o640)
    if os.geteuid() == 0:
        os.chown(source / "f", 12, 34)
    (source / "f").chmod(0o640)
    os.utime(source / "f", ns=(111_111_111_111, 222_222_222_222))
    done = subprocess.run(["cp", "-a", source, here / "copy"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    old, new = (source / "f").stat(), (here / "copy" / "f").stat()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"):
        assert getattr(old, field) == getattr(new, field), field
    assert os.getxattr(here / "copy" / "f", "user.note") == b"kept"
    assert os.getxattr(here / "copy", "user.dir") == b"kept too"
    assert (here / "copy" / "f").read_bytes() == pattern(10000)
    assert (here / "copy" / "g").stat().st_ino == new.st_ino
    assert os.readlink(here / "copy" / "l") == "f"


# --- statfs ---


def test_statfs_is_that_of_the_store(shared: Mount, here: Path) -> None:
    told, store = os.statvfs(here), os.statvfs(shared.store)
    assert (told.f_frsize, told.f_blocks, told.f_namemax) == (store.f_frsize, store.f_blocks, 255)
    assert abs(told.f_bavail - store.f_bavail) * told.f_frsize < 1 << 30
