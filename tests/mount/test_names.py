"""Names: links, symlinks, rename, directories, listings, special nodes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import RENAME_EXCHANGE, RENAME_NOREPLACE, errno_of, fails, in_child, opened, pattern, renameat2

LONGEST = "n" * 255
WILD = [b"new\nline", b"\xff\xfe not utf-8", b" ", b"-rf", b"\\", "ü".encode(), b"\x01\x7f", b"...", b"a" * 255, b"..a"]


# --- names ---


@pytest.mark.parametrize("name", WILD)
def test_any_bytes_make_a_name(here: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(here), name)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, name)
    assert os.listdir(os.fsencode(here)) == [name]
    os.rename(path, path[:-1] + b"~")
    os.rename(path[:-1] + b"~", path)
    with opened(path) as fd:
        assert os.read(fd, 300) == name
    os.unlink(path)
    os.mkdir(path)
    os.rmdir(path)
    assert os.listdir(here) == []


def test_256_bytes_are_too_long_for_every_call(here: Path) -> None:
    long, good = here / (LONGEST + "n"), here / "good"
    good.touch()
    calls: list[Callable[[], object]] = [
        lambda: os.open(long, os.O_RDWR | os.O_CREAT),
        lambda: os.mkdir(long),
        lambda: os.symlink("x", long),
        lambda: os.link(good, long),
        lambda: os.rename(good, long),
        lambda: os.mkfifo(long),
        lambda: os.stat(long),
        lambda: os.unlink(long),
        lambda: os.mkdir(here / ".snap" / (LONGEST + "n")),
    ]
    for call in calls:
        with fails(errno.ENAMETOOLONG):
            call()
    (here / LONGEST).touch()
    assert sorted(os.listdir(here)) == ["good", LONGEST]


def test_dot_and_dot_dot(here: Path) -> None:
    (here / "d").mkdir()
    assert os.stat(f"{here}/d/..").st_ino == here.stat().st_ino
    assert os.stat(f"{here}/d/.").st_ino == (here / "d").stat().st_ino
    for name in (".", ".."):
        with pytest.raises(OSError):  # noqa: PT011  (EINVAL or ENOTEMPTY or EBUSY, by the kernel)
            os.rmdir(f"{here}/d/{name}")
        with fails(errno.EEXIST):
            os.mkdir(f"{here}/d/{name}")


def test_a_case_is_a_name_of_its_own(here: Path) -> None:
    (here / "a").write_text("a")
    (here / "A").write_text("A")
    assert ((here / "a").read_text(), (here / "A").read_text()) == ("a", "A")


# --- hard links ---


def test_hard_links_count_and_share(here: Path) -> None:
    (here / "d").mkdir()
    (here / "a").write_bytes(pattern(5000))
    os.link(here / "a", here / "b")
    os.link(here / "a", here / "d" / "c")
    assert {(here / name).stat().st_ino for name in ("a", "b", "d/c")} == {(here / "a").stat().st_ino}
    assert (here / "b").stat().st_nlink == 3
    (here / "d" / "c").write_bytes(b"changed")
    assert (here / "a").read_bytes() == b"changed"
    (here / "a").unlink()
    assert (here / "b").stat().st_nlink == 2
    (here / "b").unlink()
    assert (here / "d" / "c").stat().st_nlink == 1
    assert (here / "d" / "c").read_bytes() == b"changed"


def test_a_link_over_a_name_is_eexist_and_of_a_directory_eperm(here: Path) -> None:
    (here / "a").touch()
    (here / "b").touch()
    (here / "d").mkdir()
    with fails(errno.EEXIST):
        os.link(here / "a", here / "b")
    with fails(errno.EPERM):
        os.link(here / "d", here / "e")
    with fails(errno.ENOENT):
        os.link(here / "none", here / "e")


def test_a_link_of_a_symlink_is_the_symlink(here: Path) -> None:
    (here / "s").symlink_to("target")
    os.link(here / "s", here / "t", follow_symlinks=False)
    assert os.readlink(here / "t") == "target"
    assert (here / "t").lstat().st_nlink == 2


# --- symlinks ---


@pytest.mark.parametrize("target", [b"x", b"dangling/path", b"/etc/hostname", b"\xff\x80\n", b"t" * 4095])
def test_symlinks(here: Path, target: bytes) -> None:
    path = os.path.join(os.fsencode(here), b"link")
    os.symlink(target, path)
    assert os.readlink(path) == target
    told = os.lstat(path)
    assert stat.S_ISLNK(told.st_mode)
    assert told.st_size == len(target)
    os.unlink(path)


def test_a_symlink_is_followed_into_a_directory(here: Path) -> None:
    (here / "d").mkdir()
    (here / "link").symlink_to("d")
    (here / "link" / "f").write_text("text")
    assert (here / "d" / "f").read_text() == "text"
    with fails(errno.ENOTDIR):
        os.rmdir(here / "link")


def test_symlinks_in_a_circle_are_eloop(here: Path) -> None:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    with fails(errno.ELOOP):
        (here / "a").read_bytes()


def test_readlink_of_a_file_is_einval(here: Path) -> None:
    (here / "f").touch()
    with fails(errno.EINVAL):
        os.readlink(here / "f")


# --- rename ---


def test_rename_within_and_across(here: Path) -> None:
    (here / "d").mkdir()
    (here / "a").write_text("a")
    os.rename(here / "a", here / "b")
    os.rename(here / "b", here / "d" / "c")
    assert (here / "d" / "c").read_text() == "a"
    assert os.listdir(here) == ["d"]


def test_rename_over_a_file(here: Path) -> None:
    (here / "a").write_text("new")
    (here / "b").write_text("old")
    with opened(here / "b", os.O_RDONLY) as fd:
        os.rename(here / "a", here / "b")
        assert (here / "b").read_text() == "new"
        assert os.read(fd, 10) == b"old"
        assert os.fstat(fd).st_nlink == 0
    assert os.listdir(here) == ["b"]


def test_rename_of_a_file_over_its_own_link_does_nothing(here: Path) -> None:
    (here / "a").write_text("a")
    os.link(here / "a", here / "b")
    os.rename(here / "a", here / "b")
    assert sorted(os.listdir(here)) == ["a", "b"]


def test_rename_matrix_of_kinds(here: Path) -> None:
    for name in ("dir", "empty", "full"):
        (here / name).mkdir()
    (here / "full" / "x").touch()
    (here / "file").touch()
    with fails(errno.EISDIR):
        os.rename(here / "file", here / "empty")
    with fails(errno.ENOTDIR):
        os.rename(here / "dir", here / "file")
    with fails(errno.ENOTEMPTY):
        os.rename(here / "dir", here / "full")
    with fails(errno.ENOENT):
        os.rename(here / "none", here / "x")
    with fails(errno.ENOENT):
        os.rename(here / "file", here / "none" / "x")
    os.rename(here / "dir", here / "empty")
    assert sorted(os.listdir(here)) == ["empty", "file", "full"]
    assert here.stat().st_nlink == 4


def test_rename_of_a_directory_into_itself_is_einval(here: Path) -> None:
    (here / "d" / "e").mkdir(parents=True)
    for target in (here / "d" / "x", here / "d" / "e" / "x"):
        with fails(errno.EINVAL):
            os.rename(here / "d", target)
    with fails(errno.ENOTEMPTY):
        os.rename(here / "d" / "e", here / "d")


def test_rename_over_a_directory_with_snapshots_is_enotempty(here: Path) -> None:
    (here / "a").mkdir()
    (here / "b").mkdir()
    (here / "b" / ".snap" / "s").mkdir()
    with fails(errno.ENOTEMPTY):
        os.rename(here / "a", here / "b")
    os.rename(here / "b", here / "c")
    assert os.listdir(here / "c" / ".snap") == ["s"]


def test_rename_noreplace(here: Path) -> None:
    (here / "a").write_text("a")
    (here / "b").write_text("b")
    with fails(errno.EEXIST):
        renameat2(here / "a", here / "b", RENAME_NOREPLACE)
    renameat2(here / "a", here / "c", RENAME_NOREPLACE)
    assert (here / "c").read_text() == "a"
    assert (here / "b").read_text() == "b"


def test_rename_exchange_of_files(here: Path) -> None:
    (here / "d").mkdir()
    (here / "a").write_text("a")
    (here / "d" / "b").write_text("b")
    renameat2(here / "a", here / "d" / "b", RENAME_EXCHANGE)
    assert ((here / "a").read_text(), (here / "d" / "b").read_text()) == ("b", "a")
    with fails(errno.ENOENT):
        renameat2(here / "a", here / "none", RENAME_EXCHANGE)


def test_rename_exchange_of_a_directory_and_a_file_between_parents(here: Path) -> None:
    (here / "p" / "sub").mkdir(parents=True)
    (here / "q").mkdir()
    (here / "q" / "file").write_text("file")
    renameat2(here / "p" / "sub", here / "q" / "file", RENAME_EXCHANGE)
    assert (here / "p" / "sub").read_text() == "file"
    assert (here / "q" / "file").is_dir()
    assert os.stat(here / "q" / "file" / "..").st_ino == (here / "q").stat().st_ino
    assert ((here / "p").stat().st_nlink, (here / "q").stat().st_nlink) == (2, 3)


def test_rename_exchange_of_directories_between_parents(here: Path) -> None:
    (here / "p" / "one").mkdir(parents=True)
    (here / "q" / "two" / "deep").mkdir(parents=True)
    renameat2(here / "p" / "one", here / "q" / "two", RENAME_EXCHANGE)
    assert os.listdir(here / "p" / "one") == ["deep"]
    assert os.stat(here / "p" / "one" / "..").st_ino == (here / "p").stat().st_ino
    assert ((here / "p").stat().st_nlink, (here / "q").stat().st_nlink) == (3, 3)


def test_rename_exchange_of_a_directory_with_its_own_child_is_einval(here: Path) -> None:
    (here / "d" / "e").mkdir(parents=True)
    with fails(errno.EINVAL):
        renameat2(here / "d", here / "d" / "e", RENAME_EXCHANGE)


def test_unknown_rename_flags_are_einval(here: Path) -> None:
    (here / "a").touch()
    with fails(errno.EINVAL):
        renameat2(here / "a", here / "b", 4)  # RENAME_WHITEOUT


def test_a_moved_directory_counts_at_its_new_parent(here: Path) -> None:
    (here / "p" / "d").mkdir(parents=True)
    (here / "q").mkdir()
    os.rename(here / "p" / "d", here / "q" / "d")
    assert ((here / "p").stat().st_nlink, (here / "q").stat().st_nlink) == (2, 3)
    assert os.stat(here / "q" / "d" / "..").st_ino == (here / "q").stat().st_ino


# --- directories ---


def test_directories_count_their_directories(here: Path) -> None:
    assert here.stat().st_nlink == 2
    for number in range(3):
        (here / f"d{number}").mkdir()
    (here / "file").touch()
    assert here.stat().st_nlink == 5
    (here / "d1").rmdir()
    assert here.stat().st_nlink == 4


def test_rmdir(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d" / "f").touch()
    with fails(errno.ENOTEMPTY):
        (here / "d").rmdir()
    (here / "d" / "f").unlink()
    (here / "d").rmdir()
    (here / "f").touch()
    with fails(errno.ENOTDIR):
        (here / "f").rmdir()
    with fails(errno.ENOENT):
        (here / "none").rmdir()
    with fails(errno.EEXIST):
        (here / "f").mkdir()
    with fails(errno.ENOENT):
        (here / "none" / "d").mkdir()


def test_unlink_of_a_directory_is_eisdir(here: Path) -> None:
    (here / "d").mkdir()
    with fails(errno.EISDIR):
        (here / "d").unlink()


def test_a_removed_directory_takes_no_names(here: Path) -> None:
    (here / "d").mkdir()

    def work() -> None:
        (here / "d").rmdir()
        assert os.listdir(".") == []
        with fails(errno.ENOENT):
            os.mkdir("x")
        with fails(errno.ENOENT):
            os.open("f", os.O_RDWR | os.O_CREAT)

    in_child(work, cwd=here / "d")


def test_deep_trees(here: Path) -> None:
    path = here
    for number in range(60):
        path /= f"level{number}"
        path.mkdir()
    (path / "f").write_text("deep")
    assert (path / "f").read_text() == "deep"


# --- listings ---


def test_a_listing_has_types_and_dots(here: Path) -> None:
    (here / "d").mkdir()
    (here / "f").touch()
    (here / "l").symlink_to("f")
    with os.scandir(here) as entries:
        kinds = {entry.name: (entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries}
        assert kinds == {"d": (True, False), "f": (False, False), "l": (False, True)}
    # The first entry is a true one, where some file systems lose it after . and ..
    assert in_child(lambda: os.popen("ls -a1").read().split(), cwd=here) == [".", "..", "d", "f", "l"]


def test_a_listing_is_stable_under_change(here: Path) -> None:
    """What stays all the while is listed exactly once, whatever comes and goes between two getdents(2)."""
    stay = {f"stay{number:04}" for number in range(1500)}
    go = [f"go{number:04}" for number in range(500)]
    for number, name in enumerate(sorted(stay)):
        (here / name).touch()
        if number % 3 == 0:
            (here / go[number // 3]).touch()
    seen: list[str] = []
    gone = iter(go)
    with os.scandir(here) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 4 == 0:
                (here / f"new{number}").touch()
                with contextlib.suppress(StopIteration):
                    (here / next(gone)).unlink()
            if number % 40 == 0:
                os.rename(here / f"new{number}", here / f"renamed{number}")
            if number > 20000:
                pytest.fail("the listing never ends")
    old = [name for name in seen if name in stay]
    assert len(old) == len(set(old)), "listed twice"
    assert set(old) == stay
    assert len(set(seen)) == len(seen)


def test_everything_deleted_while_listed(here: Path) -> None:
    for number in range(2000):
        (here / f"f{number}").touch()
    with os.scandir(here) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(here) == []


def test_seekdir_goes_back_to_a_place(here: Path) -> None:
    for number in range(500):
        (here / f"f{number:03}").touch()
    fd = os.open(here, os.O_RDONLY)
    try:
        first = os.listdir(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.listdir(fd) == first
        (here / "late").touch()
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.listdir(fd) == [*first, "late"]
    finally:
        os.close(fd)


# --- nodes ---


def test_fifo(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o600)
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
    child = os.fork()
    if child == 0:
        with opened(here / "fifo", os.O_WRONLY) as fd:
            os.write(fd, b"through")
        os._exit(0)
    with opened(here / "fifo", os.O_RDONLY) as fd:
        assert os.read(fd, 100) == b"through"
    os.waitpid(child, 0)


def test_socket(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("sock")
        server.listen()
        assert stat.S_ISSOCK(os.stat("sock").st_mode)
        client.connect("sock")
        client.send(b"hello")
        other, _ = server.accept()
        with other:
            assert other.recv(10) == b"hello"


def test_mknod_of_a_file_and_of_a_device(here: Path) -> None:
    os.mknod(here / "f", stat.S_IFREG | 0o640)
    assert (here / "f").stat().st_mode == stat.S_IFREG | 0o640
    (here / "f").write_bytes(b"x")
    if os.geteuid() == 0:
        os.mknod(here / "dev", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert (here / "dev").stat().st_rdev == os.makedev(1, 3)
    with fails(errno.EEXIST):
        os.mknod(here / "f", stat.S_IFREG | 0o640)


# --- names that are kept ---


def test_dot_ramfs_is_hidden_and_cannot_be_touched(shared: Mount, here: Path) -> None:
    root, inside = shared.path, shared.path / ".ramfs"
    assert ".ramfs" not in os.listdir(root)
    assert sorted(os.listdir(inside)) == ["control", "metrics", "status.json"]
    (here / "f").touch()
    refused: list[Callable[[], object]] = [
        lambda: os.open(inside / "new", os.O_RDWR | os.O_CREAT),
        lambda: os.mkdir(inside / "new"),
        lambda: os.symlink("x", inside / "new"),
        lambda: os.mkfifo(inside / "new"),
        lambda: os.unlink(inside / "status.json"),
        lambda: os.rename(inside / "metrics", inside / "m"),
        lambda: os.rename(inside / "metrics", here / "m"),
        lambda: os.rename(here / "f", inside / "f"),
        lambda: os.rename(here / "f", inside / "metrics"),
        lambda: os.link(here / "f", inside / "f"),
        lambda: os.link(inside / "metrics", here / "m"),
        lambda: os.rmdir(inside),
        lambda: os.rename(inside, root / "other"),
        lambda: os.rename(here, inside),
        lambda: os.mkdir(inside),
        lambda: os.chmod(inside / "metrics", 0o777),
        lambda: os.chown(inside, 1, 1),
        lambda: os.utime(inside / "metrics", ns=(1, 1)),
        lambda: os.truncate(inside / "status.json", 0),
        lambda: os.setxattr(inside / "metrics", "user.x", b"1"),
        lambda: os.mkdir(inside / ".snap" / "x"),
    ]
    for number, call in enumerate(refused):
        code = errno_of(call)
        assert code in {errno.EROFS, errno.EBUSY, errno.EPERM, errno.EEXIST, errno.ENOENT}, f"call {number}: {code}"
    with fails(errno.ENOENT):
        (inside / "none").stat()
    assert sorted(os.listdir(inside)) == ["control", "metrics", "status.json"]
    assert os.listdir(here) == ["f"]


def test_dot_ramfs_below_the_root_is_an_ordinary_name(here: Path) -> None:
    (here / ".ramfs").mkdir()
    assert os.listdir(here) == [".ramfs"]


def test_dot_snap_is_a_kept_name(here: Path) -> None:
    (here / "f").touch()
    (here / "d").mkdir()
    with fails(errno.EEXIST):
        (here / ".snap").mkdir()
    with fails(errno.EEXIST):
        os.open(here / ".snap", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    with fails(errno.EEXIST):
        os.symlink("x", here / ".snap")
    with fails(errno.EEXIST):
        os.link(here / "f", here / ".snap")
    for old, new in ((here / "d", here / ".snap"), (here / ".snap", here / "other"), (here / "f", here / ".snap")):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.rename(old, new)
        assert caught.value.errno in {errno.EBUSY, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EINVAL}
    with fails(errno.EBUSY):
        (here / ".snap").rmdir()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        (here / ".snap").unlink()
    assert caught.value.errno in {errno.EISDIR, errno.EPERM, errno.EBUSY}
    for call in (
        lambda: os.open(here / ".snap" / "f", os.O_RDWR | os.O_CREAT),
        lambda: os.symlink("x", here / ".snap" / "l"),
        lambda: os.mkfifo(here / ".snap" / "p"),
        lambda: os.link(here / "f", here / ".snap" / "f"),
        lambda: os.rename(here / "f", here / ".snap" / "f"),
        lambda: os.rename(here / "d", here / ".snap" / "d"),
        lambda: os.chmod(here / ".snap", 0o700),
        lambda: os.setxattr(here / ".snap", "user.x", b"1"),
    ):
        with fails(errno.EROFS):
            call()
    assert sorted(os.listdir(here)) == ["d", "f"]
    assert os.listdir(here / ".snap") == []
    with fails(errno.ENOENT):
        (here / ".snap" / ".snap").stat()
