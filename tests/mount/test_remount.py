"""The same tree and the same bytes after every kind of end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from mount.posix import PAGE, Process, opened, page_of, pattern, read

MB = 1 << 20


def describe(root: Path) -> dict[str, tuple[Any, ...]]:
    """All that a tree tells, snapshots included; inode numbers as which names are the same."""
    told: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}

    def visit(path: Path, where: str) -> None:
        info = path.lstat()
        content: object = None
        if stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(read(path)).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        told[where] = (
            info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_size, info.st_mtime_ns, info.st_ctime_ns,
            info.st_rdev, first.setdefault(info.st_ino, where), content, xattrs,
        )  # fmt: skip
        if stat.S_ISDIR(info.st_mode):
            for name in sorted(os.listdir(path)):
                visit(path / name, f"{where}/{name}")
            if not where.rpartition("/")[0].endswith("/.snap") and "/.snap/" not in where:
                for name in sorted(os.listdir(path / ".snap")):
                    visit(path / ".snap" / name, f"{where}/.snap/{name}")

    visit(root, "")
    return told


def grow(root: Path) -> None:
    """A tree with one of everything, and every way that pages come to be."""
    vm = root / "vm"
    (vm / "sub").mkdir(parents=True)
    (vm / "ram").write_bytes(pattern(3 * MB + 77))
    (vm / "sparse").touch()
    os.truncate(vm / "sparse", 64 * MB)
    with opened(vm / "sparse") as fd:
        os.pwrite(fd, b"far", 64 * MB - 3)
        os.pwrite(fd, page_of(3), 32 * MB)
    os.link(vm / "ram", vm / "sub" / "hard")
    (vm / "link").symlink_to("nowhere")
    os.mkfifo(vm / "pipe")
    os.setxattr(vm / "ram", "user.note", b"\0\xff")
    os.mkdir(os.path.join(os.fsencode(vm), b"\xff\n"))
    (vm / ".snap" / "one").mkdir()
    with opened(vm / "ram") as fd:
        os.pwrite(fd, pattern(MB, 2), MB - 5)
    os.truncate(vm / "ram", 3 * MB - 10)
    (vm / ".snap" / "two").mkdir()
    subprocess.run(["cp", "-r", vm, root / "clone"], check=True)
    subprocess.run(["cp", "-al", vm / ".snap" / "one", root / "dense"], check=True)
    with opened(root / "clone" / "ram") as fd:
        os.pwrite(fd, bytes(2 * PAGE), 0)
        os.copy_file_range(fd, fd, 100 * PAGE, 10 * PAGE, 400 * PAGE)
    (vm / ".snap" / "one").rmdir()
    os.rename(vm / "sub", root / "moved")
    (root / "moved").chmod(0o2711)
    os.utime(root / "moved" / "hard", ns=(5, 6))
    (root / "gone").write_bytes(b"x")
    (root / "gone").unlink()


def test_unmounted_and_mounted(mounted: Mount) -> None:
    grow(mounted.path)
    before = describe(mounted.path)
    for _ in range(3):
        mounted.restart()
        assert describe(mounted.path) == before


def test_killed_and_mounted(mounted: Mount) -> None:
    grow(mounted.path)
    before = describe(mounted.path)
    for _ in range(3):
        mounted.kill()
        mounted.start()
        assert describe(mounted.path) == before
    mounted.restart()
    assert describe(mounted.path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal_with_pages_still_dirty(mounted: Mount, number: signal.Signals) -> None:
    import mmap

    path = mounted.path / "ram"
    path.write_bytes(bytes(MB))

    def work() -> mmap.mmap:
        with opened(path) as fd:
            memory = mmap.mmap(fd, MB)
        memory[:] = pattern(MB)
        return memory

    process = Process(work)
    assert mounted.process is not None
    mounted.process.send_signal(number)
    try:
        mounted.process.wait(30)
    finally:
        process.kill()
    mounted.abandon()  # the mount had a user
    mounted.start()
    assert read(path) == pattern(MB)


def test_open_and_unlinked_files_are_gone_after_a_crash(mounted: Mount) -> None:
    kept = mounted.path / "kept"
    kept.write_bytes(b"kept")
    fd = os.open(mounted.path / "gone", os.O_RDWR | os.O_CREAT)
    os.write(fd, pattern(MB))
    (mounted.path / "gone").unlink()
    other = os.open(mounted.path / "qemu_back_mem.pc.ram.aaaaaa", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(other, b"block")
    mounted.kill()
    for number in (fd, other):
        with pytest.raises(OSError):  # noqa: PT011  (ENOTCONN)
            os.fstat(number)
        with contextlib.suppress(OSError):
            os.close(number)
    mounted.start()
    assert sorted(os.listdir(mounted.path)) == ["kept", "pc.ram@0x0"]
    assert read(mounted.path / "pc.ram@0x0") == b"block"


def test_every_acknowledged_act_outlives_a_kill(mounted: Mount) -> None:
    """A process acts and notes what was acknowledged, while the daemon is killed; in several rounds.

    Whatever came back as done must be there; the one act under way may be there or not.
    """
    for turn in range(6):
        directory = mounted.path / f"turn{turn}"
        directory.mkdir()
        done: list[tuple[str, int]] = []
        under_way: list[tuple[str, int]] = []

        def act(directory: Path = directory, done: Any = done, under_way: Any = under_way) -> None:
            number = 0
            fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
            try:
                while True:
                    number += 1
                    for kind in ("write", "create", "rename"):
                        under_way[:] = [(kind, number)]
                        if kind == "write":
                            os.pwrite(fd, page_of(number), (number % 64) * PAGE)
                        elif kind == "create":
                            (directory / f"c{number}").mkdir() if number % 2 else os.symlink(
                                "t", directory / f"c{number}"
                            )
                        else:
                            os.rename(directory / f"c{number}", directory / f"r{number}")
                        done.append((kind, number))
            except OSError:
                pass
            finally:
                with contextlib.suppress(OSError):
                    os.close(fd)

        thread = threading.Thread(target=act)
        thread.start()
        while len(done) < 200 + 37 * turn:
            time.sleep(0.001)
        mounted.kill()
        thread.join()
        mounted.start()
        last = {kind: max(number for what, number in done if what == kind) for kind in ("write", "create", "rename")}
        names = set(os.listdir(directory)) - {"file"}
        maybe = {f"{kind[0]}{number}" for kind, number in under_way} | {f"c{number}" for _, number in under_way}
        expected = {f"r{number}" for number in range(1, last["rename"] + 1)}
        expected |= {f"c{number}" for number in range(last["rename"] + 1, last["create"] + 1)}
        assert names - maybe == expected - maybe, turn
        assert len(names) in {len(expected), len(expected) + 1}
        data = read(directory / "file")
        for page in range(64):
            written = [n for what, n in done if what == "write" and n % 64 == page]
            allowed = {written[-1]} if written else {0}
            allowed |= {n for what, n in under_way if what == "write" and n % 64 == page}
            content = data[page * PAGE : (page + 1) * PAGE]
            assert any(content == (page_of(n) if n else bytes(len(content))) for n in allowed), (turn, page)


def test_a_second_store_is_another_tree(make_mount: Callable[..., Mount]) -> None:
    one, two = make_mount("one"), make_mount("two")
    (one.path / "f").write_bytes(b"one")
    assert os.listdir(two.path) == []
    assert one.path.stat().st_dev != two.path.stat().st_dev


def test_a_store_moves_with_its_directory(make_mount: Callable[..., Mount], tmp_path: Path) -> None:
    one = make_mount("one", store=tmp_path / "before")
    grow(one.path)
    before = describe(one.path)
    one.umount()
    os.rename(tmp_path / "before", tmp_path / "after")
    two = make_mount("two", store=tmp_path / "after")
    assert describe(two.path) == before
