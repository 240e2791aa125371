"""What programs ask of a file beside reading and writing it: flags, extents, locks, files without a name, btime."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sqlite3
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import RAMFS, Mount
from mount.posix import (
    AT_EMPTY_PATH,
    BTIME,
    NOBODY,
    PAGE,
    Process,
    Statx,
    counters,
    errno_of,
    eventually,
    fails,
    in_child,
    linkat,
    opened,
    page_counts,
    pattern,
    read,
    status,
    statx,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and become another user")


def run(*command: object) -> tuple[int, str, str]:
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def frozen(here: Path) -> Path:
    """A directory that is frozen as NAME/.snap/one."""
    (here / "vm" / "sub").mkdir(parents=True)
    (here / "vm" / "ram").write_bytes(pattern(8 * PAGE))
    (here / "vm" / "sub" / "state").write_bytes(b"state")
    (here / "vm" / ".snap" / "one").mkdir()
    return here / "vm" / ".snap" / "one"


# --- flags: lsattr, chattr ---


def flags_of(path: Path) -> str:
    """What lsattr prints before the name."""
    code, out, said = run("lsattr", "-d", path)
    assert (code, said) == (0, "")
    return out.split()[0].strip("-")


def test_what_is_frozen_shows_as_immutable(frozen: Path) -> None:
    vm = frozen.parents[1]
    subprocess.run(["cp", "-r", frozen, vm.parent / "clone"], check=True)
    os.link(frozen / "ram", vm.parent / "dense")
    for path in (frozen, frozen / "ram", frozen / "sub", frozen / "sub" / "state", vm.parent / "dense"):
        assert flags_of(path) == "i", path
    root = vm.parents[1]
    for path in (vm, vm / "ram", vm / ".snap", vm.parent / "clone", vm.parent / "clone" / "ram", root, root / ".ramfs"):
        assert flags_of(path) == "", path
    assert flags_of(root / ".ramfs" / "status.json") == ""
    assert run("lsattr", "-p", frozen)[1].split()[:2] == ["0", "----i-----------------"]  # by FS_IOC_FSGETXATTR
    assert run("lsattr", "-R", vm)[2] == ""


@pytest.mark.parametrize(
    ("what", "change", "said"),
    [
        ("one/ram", "-i", "Read-only file system while setting flags on"),
        ("one/ram", "+a", "Read-only file system while setting flags on"),
        ("one", "-i", "Read-only file system while setting flags on"),
        ("one/ram", "+i", ""),  # it has it
        ("../ram", "+i", "Operation not supported while setting flags on"),
        ("..", "+C", "Operation not supported while setting flags on"),
        ("../ram", "-i", ""),  # it has it not
    ],
)
def test_flags_are_not_set(frozen: Path, what: str, change: str, said: str) -> None:
    path = frozen.parent / what
    before = flags_of(path)
    code, _, error = run("chattr", change, path)
    assert (code, error) == ((1, f"chattr: {said} {path}\n") if said else (0, ""))
    assert flags_of(path) == before


def test_flags_are_no_hindrance_to_copies(frozen: Path) -> None:
    """cp -a and tar of a frozen directory say nothing, and what they make can be written to."""
    top = frozen.parents[2]
    assert run("cp", "-a", frozen, top / "copy") == (0, "", "")
    assert run("tar", "-C", frozen, "--xattrs", "-cf", top / "copy.tar", ".") == (0, "", "")
    (top / "unpacked").mkdir()
    assert run("tar", "-C", top / "unpacked", "--xattrs", "-xf", top / "copy.tar") == (0, "", "")
    for made in (top / "copy", top / "unpacked"):
        assert read(made / "ram") == pattern(8 * PAGE)
        (made / "ram").write_bytes(b"mine")
        (made / "sub" / "new").touch()


def test_flags_by_ioctl(frozen: Path) -> None:
    flags, xflags = 0x8008_6601, 0x801C_581F  # FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR
    for path, shown in ((frozen, True), (frozen / "ram", True), (frozen.parents[1] / "ram", False)):
        with opened(path, os.O_RDONLY) as fd:
            assert struct.unpack("=q", fcntl.ioctl(fd, flags, bytes(8))) == (0x10 if shown else 0,)
            assert struct.unpack("=5I8x", fcntl.ioctl(fd, xflags, bytes(28))) == (8 if shown else 0, 0, 0, 0, 0)


@pytest.mark.parametrize("what", ["ram", ".", "../../../../.ramfs/status.json"])
def test_unknown_ioctls(frozen: Path, shared: Mount, what: str) -> None:
    failed = counters(shared.path)["errors"]
    with opened(frozen / what, os.O_RDONLY) as fd:
        assert not os.isatty(fd)
        for command in (0x8008_7601, 0x8004_6601, 0x4004_6602, 0xDEAD):  # FS_IOC_GETVERSION, and the flags' of 32 bits
            assert errno_of(lambda command=command: fcntl.ioctl(fd, command, bytes(8))) == errno.ENOTTY, hex(command)
    assert counters(shared.path)["errors"] == failed
    assert shared.running


# --- extents: filefrag ---


def test_extents_are_not_told(here: Path, shared: Mount) -> None:
    """FIEMAP never reaches a FUSE server: the kernel refuses it, and filefrag does as well as it can."""
    path = here / "f"
    path.write_bytes(pattern(64 * PAGE))
    with opened(path, os.O_RDONLY) as fd, fails(errno.EOPNOTSUPP):
        fcntl.ioctl(fd, 0xC020_660B, struct.pack("=QQIIII32x", 0, 1 << 40, 0, 0, 1, 0))
    assert run("filefrag", path) == (0, f"{path}: 0 extents found\n", "")
    shares = counters(shared.path)["shared_ranges"]
    assert run("cp", path, here / "copy") == (0, "", "")
    assert counters(shared.path)["shared_ranges"] == shares + 1  # cp asks for none
    assert page_counts(here / "copy")["owned"] == 0
    code, _, said = run("cp", "--reflink=always", path, here / "clone")
    assert (code, said) == (1, f"cp: failed to clone '{here}/clone' from '{path}': Operation not supported\n")


# --- files without a name: O_TMPFILE ---


def unnamed(directory: Path, flags: int = 0, mode: int = 0o600) -> int:
    return os.open(directory, os.O_RDWR | os.O_TMPFILE | flags, mode)


def test_a_file_without_a_name(here: Path, shared: Mount) -> None:
    before = status(shared.path)["inodes"]
    with open(unnamed(here), "w+b") as file:
        info = os.fstat(file.fileno())
        assert (info.st_nlink, stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode)) == (0, stat.S_IFREG, 0o600)
        assert os.listdir(here) == []
        file.truncate(16 * PAGE)
        with mmap.mmap(file.fileno(), 16 * PAGE) as memory:
            memory[PAGE : PAGE + 6] = b"mapped"
        file.write(b"written")
        file.flush()
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 7, 0) + os.pread(file.fileno(), 6, PAGE) == b"writtenmapped"
        assert status(shared.path)["inodes"] == before + 1
        assert "(unlinked)" in [entry["path"] for entry in status(shared.path)["open_files"]]
        (here / ".snap" / "one").mkdir()
        assert os.listdir(here / ".snap" / "one") == []
        (here / ".snap" / "one").rmdir()
    eventually(lambda: status(shared.path)["inodes"] == before, "the file is gone")


def test_pythons_temporary_file(here: Path) -> None:
    with tempfile.TemporaryFile(dir=here) as file:
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == f"{here}// (deleted)"  # it never had a name
        file.write(pattern(PAGE))
        file.seek(0)
        assert file.read() == pattern(PAGE)
        assert os.listdir(here) == []


def test_it_gets_a_name(here: Path) -> None:
    fd = unnamed(here)
    os.write(fd, pattern(4 * PAGE))
    linkat(fd, here / "named")
    linkat(fd, here / "again")
    info = (here / "named").stat()
    assert (info.st_nlink, info.st_ino, os.fstat(fd).st_nlink) == (2, os.fstat(fd).st_ino, 2)
    os.pwrite(fd, b"on", 0)
    os.close(fd)
    assert read(here / "again") == b"on" + pattern(4 * PAGE)[2:]
    with fails(errno.EEXIST), opened(here, os.O_RDWR | os.O_TMPFILE) as other:
        linkat(other, here / "named")


def test_what_gets_no_name(here: Path, frozen: Path) -> None:
    with opened(here, os.O_RDWR | os.O_TMPFILE | os.O_EXCL) as fd, fails(errno.ENOENT):
        linkat(fd, here / "named")
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        (here / "f").unlink()
        with fails(errno.ENOENT):
            linkat(fd, here / "back")
    with opened(frozen / "ram", os.O_RDONLY) as fd:
        frozen.rmdir()  # of which the kernel does not know that it takes the file's name
        with fails(errno.ENOENT):
            linkat(fd, here / "back")
    assert sorted(os.listdir(here)) == ["vm"]


def test_where_no_file_can_be_made(frozen: Path) -> None:
    for directory in (frozen, frozen.parent, frozen.parents[3] / ".ramfs"):
        with fails(errno.EROFS):
            unnamed(directory)


@needs_root
def test_its_owner_and_mode(public: Mount) -> None:
    directory = public.path / "d"
    directory.mkdir()
    with fails(errno.EACCES):
        in_child(lambda: unnamed(directory), user=NOBODY)
    os.chown(directory, -1, 1234)
    directory.chmod(0o2777)

    def make() -> None:
        os.umask(0o027)
        linkat_by_proc(unnamed(directory, mode=0o666), directory / "f")

    in_child(make, user=NOBODY)
    info = (directory / "f").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (NOBODY, 1234, 0o640)


def linkat_by_proc(fd: int, new: Path) -> None:
    """As `linkat`, the way that needs no privilege."""
    subprocess.run(["ln", "-L", f"/proc/self/fd/{fd}", new], check=True, pass_fds=[fd])


def test_after_a_crash_only_what_has_a_name_is_there(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    before = status(mount.path)["inodes"]

    def work() -> list[int]:
        fds = [unnamed(mount.path) for _ in range(2)]
        for fd in fds:
            os.write(fd, pattern(PAGE))
        linkat(fds[0], mount.path / "named")
        return fds

    with Process(work):
        mount.kill()
    mount.start()
    assert os.listdir(mount.path) == ["named"]
    assert read(mount.path / "named") == pattern(PAGE)
    assert status(mount.path)["inodes"] == before + 1
    mount.umount()
    assert run(*RAMFS, "fsck", mount.store)[0] == 0
    mount.start()


# --- locks ---


def ofd(fd: int, kind: int, *, wait: bool = False) -> None:
    """An open file description's lock on byte 100, as QEMU's."""
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, 100, 1, 0))


def posix(fd: int, kind: int, *, wait: bool = False) -> None:
    """A process's lock on byte 100."""
    command = fcntl.F_SETLKW if wait else fcntl.F_SETLK
    fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, 100, 1, 0))


def flock(fd: int, kind: int, *, wait: bool = False) -> None:
    """A lock on the whole file."""
    kinds = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
    fcntl.flock(fd, kinds[kind] | (0 if wait else fcntl.LOCK_NB))


@pytest.fixture(params=[ofd, posix, flock])
def lock(request: pytest.FixtureRequest) -> Callable[..., None]:
    kind: Callable[..., None] = request.param
    return kind


def test_locks_are_the_kernels(shared: Mount) -> None:
    """They need no request, and no daemon that lives: INIT does not ask for them."""
    posix_locks, flock_locks = 1 << 1, 1 << 10
    assert not status(shared.path)["connection"]["want"] & (posix_locks | flock_locks)


def test_a_lock_keeps_others_out(here: Path, lock: Callable[..., None]) -> None:
    path = here / "f"
    path.touch()

    def hold() -> int:
        fd = os.open(path, os.O_RDWR)
        lock(fd, fcntl.F_WRLCK)
        return fd

    with opened(path) as fd:
        with Process(hold) as holder:
            for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK):
                with fails(errno.EAGAIN):
                    lock(fd, kind)
            holder.kill()
        lock(fd, fcntl.F_RDLCK)

        def share() -> int:
            other = os.open(path, os.O_RDWR)
            lock(other, fcntl.F_RDLCK)
            with fails(errno.EAGAIN):
                lock(other, fcntl.F_WRLCK)
            return other

        with Process(share):
            pass
        lock(fd, fcntl.F_WRLCK)


def test_a_lock_is_waited_for_until_the_file_is_closed(here: Path, lock: Callable[..., None]) -> None:
    path, first = here / "f", here / "first"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    lock(fd, fcntl.F_WRLCK)

    child = os.fork()
    if child == 0:
        other = os.open(path, os.O_RDWR)
        if lock is not posix:
            os.close(fd)  # the lock is the description's, which the parent still has
        lock(other, fcntl.F_WRLCK, wait=True)
        os._exit(0 if first.exists() else 1)
    ino = os.fstat(fd).st_ino

    def waits() -> bool:
        return any(" -> " in line and f":{ino} " in line for line in Path("/proc/locks").read_text().splitlines())

    eventually(waits, "the other waits")
    first.touch()
    os.close(fd)
    assert os.waitpid(child, 0)[1] == 0


# --- when it was made: statx ---

BASIC = 0x7FF
FORCE, CACHED = 0x2000, 0x4000


def btime(path: Path) -> int:
    """When it was made, in ns; it must be known."""
    told = statx(path, BTIME)
    assert told.mask & BTIME
    return told.btime


def agree(path: Path | str, flags: int = 0, fd: int = -100) -> Statx:
    """STATX and GETATTR, each asked of the daemon, must tell the same; returns it."""
    plain = statx(path, BASIC, flags | FORCE, fd=fd)
    full = statx(path, BASIC | BTIME, flags | FORCE, fd=fd)
    assert plain.mask & BASIC == full.mask & BASIC == BASIC
    assert full._replace(mask=0, btime=0) == plain._replace(mask=0, btime=0)
    return full


def test_statx_tells_what_stat_tells(frozen: Path) -> None:
    vm = frozen.parents[1]
    (vm / "link").symlink_to("ram")
    os.mkfifo(vm / "fifo", 0o640)
    os.utime(vm / "ram", ns=(-1_500_000_000, 2_222_222_222_222_222_222))
    os.link(vm / "ram", vm / "other")
    if os.geteuid() == 0:
        os.mknod(vm / "device", 0o600 | stat.S_IFCHR, os.makedev(259, 70_000))
        os.chown(vm / "ram", 12, 34)
        assert agree(vm / "device").rdev == (259, 70_000)
    for path in (vm, vm / "ram", vm / "link", vm / "fifo", vm / ".snap", frozen, frozen / "ram", frozen / "sub"):
        assert agree(path).mask & BTIME, path
    told = agree(vm / "ram")
    assert (told.atime, told.mtime, told.nlink, told.size) == (
        -1_500_000_000, 2_222_222_222_222_222_222, 2, 8 * PAGE,
    )  # fmt: skip
    assert told.blocks == 8 * PAGE // 512
    for path in (frozen.parents[3] / ".ramfs", frozen.parents[3] / ".ramfs" / "status.json"):
        assert not agree(path).mask & BTIME


def test_statx_of_open_files(here: Path) -> None:
    path = here / "f"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd, opened(here, os.O_RDONLY) as directory:
        os.write(fd, pattern(3 * PAGE))
        assert agree("", AT_EMPTY_PATH, fd).size == 3 * PAGE
        assert agree("", AT_EMPTY_PATH, directory).ino == here.stat().st_ino
        path.unlink()
        os.ftruncate(fd, PAGE)
        told = agree("", AT_EMPTY_PATH, fd)
        assert (told.nlink, told.size) == (0, PAGE)
        assert told.mask & BTIME


def test_statx_of_what_the_kernel_knows(here: Path) -> None:
    """Once told, it is kept; a look at what is kept does not ask, whether it is there or not."""
    path = here / "f"
    before = time.time_ns()
    path.touch()
    assert not statx(path, BASIC | BTIME, CACHED).mask & BTIME
    made = btime(path)
    assert before <= made <= time.time_ns()
    cached = statx(path, BASIC | BTIME, CACHED)
    assert cached.mask & BTIME
    assert cached.btime == made


def test_what_statx_told_is_believed_as_long_as_what_stat_told(here: Path, shared: Mount) -> None:
    path = here / "f"
    path.touch()

    def requests(times: int) -> int:
        before = status(shared.path)["connection"]["answered"]
        for _ in range(times):
            statx(path, BASIC | BTIME)
        return int(status(shared.path)["connection"]["answered"]) - before

    none = requests(0)  # but those that ask for the status
    statx(path, BASIC | BTIME, FORCE)
    assert requests(100) == none
    with opened(path):  # it may be mapped, and its times change without the kernel's knowing
        statx(path, BASIC | BTIME, FORCE)
        assert requests(100) - none <= 3
        time.sleep(0.6)
        assert requests(1) - none == 1


def test_when_it_was_made_stays(here: Path) -> None:
    path = here / "f"
    path.touch()
    made = btime(path)
    path.write_bytes(pattern(PAGE))
    path.chmod(0o640)
    os.utime(path, ns=(1, 1))
    os.setxattr(path, "user.x", b"x")
    path = path.rename(here / "g")
    os.link(path, here / "h")
    assert btime(path) == btime(here / "h") == made
    assert run("stat", "-c", "%W", path)[1] == f"{made // 10**9}\n"
    assert run("stat", "-c", "%w", path)[1].startswith(
        time.strftime("%Y-%m-%d %H:%M:%S.", time.localtime(made // 10**9))
    )
    listed = run("ls", "-l", "--time=birth", "--time-style=+%s", path)[1]
    assert f" {made // 10**9} " in listed


def test_a_copy_is_made_when_it_is_copied(frozen: Path) -> None:
    vm = frozen.parents[1]
    top = vm.parent
    moment = btime(frozen)
    for path in (frozen / "ram", frozen / "sub", frozen / "sub" / "state"):
        assert btime(path) == moment  # one, for the whole snapshot
    assert btime(vm) < btime(vm / "ram") < moment
    assert btime(vm / ".snap") == btime(vm)
    assert statx(frozen / "ram", BASIC).mtime == statx(vm / "ram", BASIC).mtime
    subprocess.run(["cp", "-a", frozen, top / "copy"], check=True)
    assert run(*RAMFS, "clone", vm, top / "clone")[0] == 0
    assert moment < btime(top / "copy") < btime(top / "copy" / "ram") < btime(top / "clone")
    assert btime(top / "clone") == btime(top / "clone" / "ram")


def test_a_store_of_before(make_mount: Callable[..., Mount]) -> None:
    """Its files were made nobody knows when; new ones are known, and all is after a remount as it was."""
    mount = make_mount()
    (mount.path / "old").write_bytes(b"old")
    mount.umount()
    catalog = sqlite3.connect(mount.store / "catalog.sqlite", isolation_level=None)
    catalog.execute("ALTER TABLE inodes DROP COLUMN btime")
    catalog.close()
    assert run(*RAMFS, "fsck", mount.store)[0] == 0
    mount.start()
    (mount.path / "new").touch()
    assert not agree(mount.path / "old").mask & BTIME
    assert run("stat", "-c", "%w %W", mount.path / "old")[1] == "- 0\n"
    made = btime(mount.path / "new")
    mount.restart()
    assert btime(mount.path / "new") == made
    assert not agree(mount.path / "old").mask & BTIME
    assert (mount.path / "old").read_bytes() == b"old"


def test_where_libfuse_looks_who_asks(make_mount: Callable[..., Mount]) -> None:
    """With allow_root a request that libfuse does not see would be answered to anybody: it is not."""
    mount = make_mount(options=("allow_root",))
    (mount.path / "f").touch()
    assert not agree(mount.path / "f").mask & BTIME
