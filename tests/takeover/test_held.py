"""What processes hold of a mount is theirs after a takeover, and goes when they let go of it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import Process, errno_of, eventually, fails, in_child, opened, pattern, read, status
from takeover.conftest import drop_caches, freed, fsck

DATA = pattern(300_000)
PAGE = 4096


def take_over(mount: Mount) -> None:
    """Let the daemon die, and another serve."""
    pid = mount.kill_daemon()
    eventually(lambda: status(mount.path)["pid"] != pid, "another daemon serves")


def lock_of(command: int, path: Path, kind: int = fcntl.F_WRLCK) -> int:
    """errno of a lock that another process wants."""

    def work() -> int:
        with opened(path) as fd:
            if command == fcntl.LOCK_EX:
                return errno_of(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
            return errno_of(lambda: fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 10, 0)))

    return in_child(work)


def test_locks(mounted: Mount) -> None:
    paths = [mounted.path / name for name in ("flock", "posix", "ofd")]
    for path in paths:
        path.write_bytes(DATA)
    fds = [os.open(path, os.O_RDWR) for path in paths]
    ofd_setlk = 37  # F_OFD_SETLK
    fcntl.flock(fds[0], fcntl.LOCK_EX)
    fcntl.lockf(fds[1], fcntl.LOCK_EX, 10)
    fcntl.fcntl(fds[2], ofd_setlk, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 10, 0))
    commands = (fcntl.LOCK_EX, fcntl.F_SETLK, ofd_setlk)
    with freed(mounted):
        for _ in range(2):
            for path, command in zip(paths, commands, strict=True):
                assert lock_of(command, path) in (errno.EAGAIN, errno.EACCES), path
            take_over(mounted)
        for fd in fds:
            os.close(fd)
        for path, command in zip(paths, commands, strict=True):
            assert lock_of(command, path) == 0, path


def test_what_is_open(make_mount: Callable[..., Mount], tmp_path: Path) -> None:
    mount = make_mount(options=("template_rdwr",))
    root = mount.path
    with freed(mount):
        (root / "d" / "inner").mkdir(parents=True)
        for name in ("unlinked", "appended", "frozen", "also"):
            (root / "d" / name).write_bytes(DATA)
        (root / "d" / ".snap" / "s").mkdir()
        unlinked = os.open(root / "d" / "unlinked", os.O_RDWR)
        os.unlink(root / "d" / "unlinked")
        appended = os.open(root / "d" / "appended", os.O_WRONLY | os.O_APPEND)
        template = os.open(root / "d" / ".snap" / "s" / "frozen", os.O_RDWR)
        frozen = os.open(root / "d" / ".snap" / "s" / "frozen", os.O_RDONLY)
        unnamed = os.open(root / "d", os.O_RDWR | os.O_TMPFILE, 0o600)
        os.write(unnamed, DATA)
        told = os.open(root / ".ramfs" / "status.json", os.O_RDONLY)
        text = os.pread(told, 100, 0)
        gone = os.open(root / "d" / "inner", os.O_RDONLY)
        os.rmdir(root / "d" / "inner")
        for _ in range(3):  # what the second daemon knew is what the third knows
            take_over(mount)
            assert os.pread(unlinked, 1 << 20, 0) == DATA
            assert (os.fstat(unlinked).st_nlink, os.fstat(unnamed).st_nlink) == (0, 0)
            os.write(appended, b"more")
            with fails(errno.EROFS):
                os.pwrite(template, b"x", 0)
            with pytest.raises(OSError, match="No such device"):  # direct_io is in the kernel's descriptor
                mmap.mmap(template, PAGE)
            with mmap.mmap(template, PAGE, flags=mmap.MAP_PRIVATE) as private:
                assert private[:] == DATA[:PAGE]
            assert os.pread(frozen, 1 << 20, 0) == os.pread(unnamed, 1 << 20, 0) == DATA
            assert os.pread(told, 100, 0) == text
            assert os.listdir(gone) == []
        assert read(root / "d" / "appended") == DATA + b"more" * 3
        paths = {each["path"]: each["pids"] for each in status(root)["open_files"]}
        me = [os.getpid()]
        assert paths == {"(unlinked)": me, "d/appended": me, "d/.snap/s/frozen": me}
        assert status(root)["inodes"] == 14
        for fd in (unlinked, appended, template, frozen, unnamed, told, gone):
            os.close(fd)
        eventually(lambda: status(root)["inodes"] == 11, "what had no name is gone")
        assert status(root)["open_files"] == []
    mount.umount()
    fsck(mount.store)


def test_a_process_that_stays_in_a_directory(mounted: Mount) -> None:
    (mounted.path / "d" / "e").mkdir(parents=True)
    (mounted.path / "d" / "e" / "f").write_bytes(DATA)

    def work() -> None:
        os.chdir(mounted.path / "d" / "e")

    with freed(mounted), Process(work) as process:
        os.rename(mounted.path / "d", mounted.path / "moved")
        take_over(mounted)
        inside = Path(f"/proc/{process.pid}/cwd")
        assert read(inside / "f") == DATA
        assert os.readlink(inside) == str(mounted.path / "moved" / "e")
        os.unlink(inside / "f")
        os.rmdir(mounted.path / "moved" / "e")
        take_over(mounted)
        assert os.listdir(inside) == []
        with fails(errno.ENOENT):
            (inside / "new").write_bytes(b"")


@pytest.mark.parametrize("changes", [False, True])
def test_a_listing_goes_on(mounted: Mount, changes: bool) -> None:
    """Entries that are there all the time are told once, whatever comes and goes and whoever answers."""
    count = 1500
    for number in range(count):
        (mounted.path / f"stays{number}").touch()
        if changes:
            (mounted.path / f"goes{number}").touch()
    found: list[str] = []
    with freed(mounted), os.scandir(mounted.path) as entries:
        for turn, entry in enumerate(entries):
            found.append(entry.name)
            if turn in (10, count // 2):
                take_over(mounted)
                if changes:
                    for number in range(turn, count, 3):
                        (mounted.path / f"goes{number}").unlink(missing_ok=True)
                        (mounted.path / f"comes{number}").touch()
    assert len(found) == len(set(found))
    assert sorted(name for name in found if name.startswith("stays")) == sorted(f"stays{n}" for n in range(count))


def test_dirty_pages_of_a_process_that_ends_meanwhile(mounted: Mount) -> None:
    """Its exit waits for the next daemon, which takes them."""
    (mounted.path / "f").write_bytes(bytes(1 << 20))
    daemon = mounted.pid

    def work() -> object:
        with opened(mounted.path / "f") as fd:
            memory = mmap.mmap(fd, 1 << 20)
        for at in range(0, 1 << 20, PAGE):
            memory[at : at + 8] = at.to_bytes(8, "little")
        return memory

    process = Process(work)
    with freed(mounted):
        assert mounted.kill_daemon() == daemon
        process.kill()
        data = read(mounted.path / "f")
    assert all(data[at : at + 8] == at.to_bytes(8, "little") for at in range(0, 1 << 20, PAGE))


def in_memory(mount: Mount) -> int:
    """Files whose tables the daemon has open: those that the kernel knows of."""
    found: int = status(mount.path)["images"]["in_use"]
    return found


def test_what_the_kernel_forgets_is_forgotten(mounted: Mount) -> None:
    """Counts neither grow nor shrink from daemon to daemon."""
    root = mounted.path
    for number in range(50):
        (root / f"d{number % 5}").mkdir(exist_ok=True)
        (root / f"d{number % 5}" / f"f{number}").write_bytes(DATA[:PAGE])
    with freed(mounted):
        for turn in range(3):
            subprocess.run(["ls", "-lR", root], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["ls", "-lR", root], check=True, stdout=subprocess.DEVNULL)
            held = [os.open(root / f"d{number % 5}" / f"f{number}", os.O_RDONLY) for number in range(turn * 10, 50, 3)]
            take_over(mounted)
            for fd in held:
                os.close(fd)
            take_over(mounted)
            for number in range(turn * 10, turn * 10 + 10):
                (root / f"d{number % 5}" / f"f{number}").unlink()
        drop_caches()
        eventually(lambda: status(root)["inodes"] == 1 + 5 + 20, "what was deleted is gone")
        eventually(lambda: len(list((mounted.store / "layers").glob("*.ram"))) == 20, "its pages too")
        for number in range(30, 50):
            with opened(root / f"d{number % 5}" / f"f{number}") as fd:
                os.fsync(fd)  # until then it stays in memory for that
        drop_caches()
        eventually(lambda: in_memory(mounted) == 0, "no file is in memory any more")
        for number in range(30, 50):
            assert read(root / f"d{number % 5}" / f"f{number}") == DATA[:PAGE]
