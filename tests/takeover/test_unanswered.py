"""The daemon dies when it has carried a request out and not answered it: the next one answers, and does nothing twice.

Each case is a request, what is to be found afterwards, and for the caller nothing but a wait. At the end nothing may
be left of any of them: an inode that the new daemon believes the kernel to know would keep its space for ever.

RAMFS_KILL_STEPS=1000 kills at all calls that change files on the way to the answer, too, not at a sample of them.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import RAMFS, Mount
from mount.posix import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    eventually,
    linkat,
    opened,
    pattern,
    read,
    renameat2,
    status,
    statx,
)
from takeover.conftest import Request, Victim, drop_caches, freed, fsck

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can let the kernel forget names")

STEPS = int(os.environ.get("RAMFS_KILL_STEPS", "2"))
#: Of what is killed on the way: all that changes something, when all steps are asked for.
SAMPLE = ("Create", "Append", "Copy", "Clone", "Snapshot", "RenameOverAnOpenFile")
#: Of what is done with the requests kept by the daemon itself, as on kernels before 6.9.
OLD = ("Create", "CreateNewBlockFile", "UnlinkOfAnOpenFile", "SetxattrCreate", "Append", "Clone", "Snapshot")
TEMPORARY = "qemu_back_mem.pc.ram.Xy12Zw"
BLOCK = "pc.ram@0x0"
DATA = pattern(3 * 4096 + 100)


class Case(NamedTuple):
    """A request of the kernel's. ``given`` is what `prepare` returned; `check` sees it and what `act` returned."""

    request: Request
    prepare: Callable[[Path], Any]
    act: Callable[[Path, Any], Any]
    check: Callable[[Path, Any, Any], None]


CASES: dict[str, Case] = {}


def case(request: Request, prepare: Callable[[Path], Any] = lambda here: None) -> Callable[[Any], type]:
    """Register a class with `act` and `check` as a case, under its name."""

    def register(told: Any) -> type:
        CASES[told.__name__] = Case(request, prepare, told().act, told().check)
        return told

    return register


def file(here: Path, name: str = "f", data: bytes = DATA) -> Path:
    (here / name).write_bytes(data)
    return here / name


def names(here: Path) -> list[str]:
    return sorted(os.listdir(here))


def expect_file(path: Path, data: bytes = DATA, links: int = 1) -> None:
    assert read(path) == data
    assert path.stat().st_nlink == links


def close_all(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


# --- files and names are made ---


@case(Request.CREATE)
class Create:
    def act(self, here, _):
        fd = os.open(here / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(fd, DATA)
        return fd

    def check(self, here, _, fd):
        assert os.pread(fd, 1 << 20, 0) == DATA
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        os.close(fd)
        assert names(here) == ["f"]
        expect_file(here / "f")


@case(Request.CREATE)
class CreateWithoutExcl:
    def act(self, here, _):
        return os.open(here / "f", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def check(self, here, _, fd):
        os.write(fd, DATA)
        os.close(fd)
        expect_file(here / "f")


@case(Request.CREATE)
class CreateNewBlockFile:
    def act(self, here, _):
        return os.open(here / TEMPORARY, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def check(self, here, _, fd):
        os.ftruncate(fd, len(DATA))
        os.pwrite(fd, DATA, 0)
        assert os.stat(here / TEMPORARY).st_ino == os.fstat(fd).st_ino
        os.unlink(here / TEMPORARY)
        assert names(here) == [BLOCK]
        assert os.fstat(fd).st_nlink == 1
        os.close(fd)
        expect_file(here / BLOCK)
        # Nobody has it open any more, in the eyes of the new daemon too.
        os.close(os.open(here / TEMPORARY, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(here / TEMPORARY)


@case(Request.CREATE, lambda here: file(here, BLOCK))
class CreateExistingBlockFile:
    act = CreateNewBlockFile.act

    def check(self, here, _, fd):
        assert os.pread(fd, 1 << 20, 0) == DATA
        CreateNewBlockFile().check(here, _, fd)


@case(Request.TMPFILE)
class CreateUnnamed:
    def act(self, here, _):
        return os.open(here, os.O_RDWR | os.O_TMPFILE, 0o600)

    def check(self, here, _, fd):
        os.write(fd, DATA)
        assert os.fstat(fd).st_nlink == 0
        assert names(here) == []
        linkat(fd, here / "named")
        os.close(fd)
        expect_file(here / "named")


@case(Request.MKDIR)
class Mkdir:
    def act(self, here, _):
        os.mkdir(here / "d", 0o750)

    def check(self, here, _, __):
        assert stat.S_IMODE((here / "d").stat().st_mode) == 0o750
        assert here.stat().st_nlink == 3
        file(here / "d")


@case(Request.MKDIR, file)
class Snapshot:
    def act(self, here, _):
        os.mkdir(here / ".snap" / "s")

    def check(self, here, path, _):
        assert names(here / ".snap") == ["s"]
        file(here, data=b"newer")
        expect_file(here / ".snap" / "s" / "f")
        expect_file(here / "f", b"newer")


@case(Request.MKNOD)
class Mknod:
    def act(self, here, _):
        os.mkfifo(here / "fifo")

    def check(self, here, _, __):
        assert stat.S_ISFIFO((here / "fifo").lstat().st_mode)
        assert names(here) == ["fifo"]


@case(Request.SYMLINK)
class Symlink:
    def act(self, here, _):
        os.symlink("some/where", here / "l")

    def check(self, here, _, __):
        assert os.readlink(here / "l") == "some/where"


@case(Request.LINK, file)
class Link:
    def act(self, here, path):
        os.link(path, here / "g")

    def check(self, here, path, _):
        expect_file(path, links=2)
        os.unlink(path)
        expect_file(here / "g")


@case(Request.LINK, lambda here: os.open(here, os.O_RDWR | os.O_TMPFILE, 0o600))
class LinkUnnamed:
    def act(self, here, fd):
        linkat(fd, here / "named")

    def check(self, here, fd, _):
        assert os.fstat(fd).st_nlink == 1
        os.write(fd, DATA)
        os.close(fd)
        expect_file(here / "named")


# --- names move and go ---


@case(Request.RENAME, file)
class Rename:
    def act(self, here, path):
        os.rename(path, here / "g")

    def check(self, here, _, __):
        assert names(here) == ["g"]
        expect_file(here / "g")


@case(Request.RENAME, lambda here: (file(here), os.open(file(here, "g", b"old"), os.O_RDONLY)))
class RenameOverAnOpenFile:
    def act(self, here, given):
        os.rename(given[0], here / "g")

    def check(self, here, given, _):
        assert names(here) == ["g"]
        expect_file(here / "g")
        assert os.pread(given[1], 9, 0) == b"old"
        assert os.fstat(given[1]).st_nlink == 0
        os.close(given[1])


@case(Request.RENAME, lambda here: [(here / name).mkdir() for name in ("a", "b", "a/d")])
class RenameDirectory:
    def act(self, here, _):
        os.rename(here / "a" / "d", here / "b" / "d")

    def check(self, here, _, __):
        assert names(here / "a") == []
        assert names(here / "b") == ["d"]
        assert [(here / name).stat().st_nlink for name in ("a", "b")] == [2, 3]


@case(Request.RENAME2, lambda here: (file(here), file(here, "g", b"other")))
class RenameExchange:
    def act(self, here, _):
        renameat2(here / "f", here / "g", RENAME_EXCHANGE)

    def check(self, here, _, __):
        expect_file(here / "g")
        expect_file(here / "f", b"other")


@case(Request.RENAME2, file)
class RenameNoreplace:
    def act(self, here, path):
        renameat2(path, here / "g", RENAME_NOREPLACE)

    def check(self, here, _, __):
        assert names(here) == ["g"]
        expect_file(here / "g")


@case(Request.UNLINK, file)
class Unlink:
    def act(self, here, path):
        os.unlink(path)

    def check(self, here, path, _):
        assert names(here) == []
        file(here, data=b"another")  # and not the next one of that name
        expect_file(path, b"another")


@case(Request.UNLINK, lambda here: os.open(file(here), os.O_RDWR))
class UnlinkOfAnOpenFile:
    def act(self, here, _):
        os.unlink(here / "f")

    def check(self, here, fd, _):
        assert os.pread(fd, 1 << 20, 0) == DATA
        os.pwrite(fd, b"more", len(DATA))
        assert os.fstat(fd).st_size == len(DATA) + 4
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)


@case(Request.UNLINK, lambda here: os.link(file(here), here / "g"))
class UnlinkOneOfTwo:
    def act(self, here, _):
        os.unlink(here / "f")

    def check(self, here, _, __):
        assert names(here) == ["g"]
        expect_file(here / "g")


def qemu_opens(here: Path) -> int:
    fd = os.open(here / TEMPORARY, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, len(DATA))
    return fd


@case(Request.UNLINK, qemu_opens)
class UnlinkTemporaryName:
    def act(self, here, _):
        os.unlink(here / TEMPORARY)

    def check(self, here, fd, _):
        os.pwrite(fd, DATA, 0)
        os.close(fd)
        assert names(here) == [BLOCK]
        expect_file(here / BLOCK)


@case(Request.RMDIR, lambda here: (here / "d").mkdir())
class Rmdir:
    def act(self, here, _):
        os.rmdir(here / "d")

    def check(self, here, _, __):
        assert names(here) == []
        assert here.stat().st_nlink == 2
        (here / "d").mkdir()


@case(Request.RMDIR, lambda here: (file(here), (here / ".snap" / "s").mkdir()))
class DeleteSnapshot:
    def act(self, here, _):
        os.rmdir(here / ".snap" / "s")

    def check(self, here, _, __):
        assert names(here / ".snap") == []
        expect_file(here / "f")
        (here / ".snap" / "s").mkdir()


# --- attributes ---


@case(Request.SETXATTR, file)
class SetxattrCreate:
    def act(self, here, path):
        os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)

    def check(self, here, path, _):
        assert os.getxattr(path, "user.x") == b"1"


def with_attribute(here: Path) -> Path:
    os.setxattr(file(here), "user.x", b"0")
    return here / "f"


@case(Request.SETXATTR, with_attribute)
class SetxattrReplace:
    def act(self, here, path):
        os.setxattr(path, "user.x", b"1", os.XATTR_REPLACE)

    check = SetxattrCreate.check


@case(Request.SETXATTR, with_attribute)
class Setxattr:
    def act(self, here, path):
        os.setxattr(path, "user.x", b"1")

    check = SetxattrCreate.check


@case(Request.REMOVEXATTR, with_attribute)
class Removexattr:
    def act(self, here, path):
        os.removexattr(path, "user.x")

    def check(self, here, path, _):
        assert os.listxattr(path) == []


@case(Request.SETATTR, file)
class Truncate:
    def act(self, here, path):
        os.truncate(path, 5000)

    def check(self, here, path, _):
        os.truncate(path, len(DATA))
        expect_file(path, DATA[:5000] + bytes(len(DATA) - 5000))


@case(Request.SETATTR, file)
class ChmodAndTimes:
    def act(self, here, path):
        os.chmod(path, 0o604)
        os.utime(path, ns=(1_000_000_001, 2_000_000_002))

    def check(self, here, path, _):
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o604
        assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002)


# --- contents ---


@case(Request.WRITE, file)
class Append:
    def act(self, here, path):
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            return [os.write(fd, bytes([65 + number]) * 5000) for number in range(3)]

    def check(self, here, path, written):
        assert written == [5000] * 3
        expect_file(path, DATA + b"A" * 5000 + b"B" * 5000 + b"C" * 5000)


@case(
    Request.COPY_FILE_RANGE, lambda here: (os.open(file(here), os.O_RDONLY), os.open(file(here, "g", b""), os.O_RDWR))
)
class Copy:
    def act(self, here, fds):
        return os.copy_file_range(fds[0], fds[1], len(DATA))

    def check(self, here, fds, done):
        assert done == len(DATA)
        os.pwrite(fds[1], b"new", 4096)
        close_all(*fds)
        expect_file(here / "f")
        expect_file(here / "g", DATA[:4096] + b"new" + DATA[4099:])


def tree(here: Path) -> Path:
    (here / "vm").mkdir()
    file(here / "vm")
    return here


@case(Request.WRITE, tree)
class Clone:
    def act(self, here, _):
        command = [*RAMFS, "clone", here / "vm", here / "copy"]
        assert here.stat().st_nlink == 3
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done

    def check(self, here, _, __):
        assert here.stat().st_nlink == 4  # which the kernel had to be told of
        file(here / "vm", data=b"newer")
        expect_file(here / "copy" / "f")
        assert names(here) == ["copy", "vm"]


@case(Request.FSYNC, lambda here: os.open(file(here), os.O_RDWR))
class Fsync:
    def act(self, here, fd):
        os.fsync(fd)

    def check(self, here, fd, _):
        os.close(fd)
        expect_file(here / "f")


@case(Request.READ, file)
class ReadCold:
    def act(self, here, path):
        with opened(path, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(fd, 1 << 20, 0)

    def check(self, here, path, data):
        assert data == DATA


# --- what gives the kernel something to hold ---


@case(Request.LOOKUP, file)
class Lookup:
    def act(self, here, path):
        drop_caches()
        return path.stat()

    def check(self, here, path, found):
        assert found.st_size == len(DATA)


@case(Request.LOOKUP, lambda here: ((here / "d").mkdir(), os.open(here, os.O_RDONLY))[1])
class LookupOfADirectory:
    def act(self, here, top):
        drop_caches()
        return os.open("d", os.O_RDONLY, dir_fd=top)

    def check(self, here, top, fd):
        os.rmdir(here / "d")
        # It lives on as long as the kernel is counted to know it.
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
        close_all(fd, top)


@case(Request.OPEN, file)
class Open:
    def act(self, here, path):
        return os.open(path, os.O_RDWR)

    def check(self, here, path, fd):
        assert [each["path"] for each in status(here.parent)["open_files"]] == [str(path.relative_to(here.parent))]
        os.pwrite(fd, b"new", 0)
        os.unlink(path)
        assert os.pread(fd, 1 << 20, 0) == b"new" + DATA[3:]
        os.close(fd)
        eventually(lambda: not status(here.parent)["open_files"], "nothing is open")


@case(Request.OPEN, file)
class OpenAndTruncate:
    def act(self, here, path):
        return os.open(path, os.O_RDWR | os.O_TRUNC)

    def check(self, here, path, fd):
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"new")
        os.close(fd)
        expect_file(path, b"new")


@case(Request.OPEN, lambda here: here.parent / ".ramfs" / "status.json")
class OpenStatus:
    def act(self, here, path):
        return os.open(path, os.O_RDONLY)

    def check(self, here, path, fd):
        assert json.loads(os.pread(fd, 1 << 20, 0))["pid"] > 0
        os.close(fd)


def frozen_manifest(here: Path) -> Path:
    file(here)
    (here / ".snap" / "s").mkdir()
    return here / ".snap" / "s" / "ramfs.manifest"


@case(Request.OPEN, frozen_manifest)
class OpenManifest:
    def act(self, here, path):
        return os.open(path, os.O_RDONLY)

    def check(self, here, path, fd):
        assert len(os.pread(fd, 1 << 20, 0)) == os.fstat(fd).st_size == 48 + 32 + 4 * 16
        os.close(fd)
        path.parent.rmdir()


@case(Request.FLUSH, lambda here: os.open(file(here), os.O_RDWR))
class Flush:
    def act(self, here, fd):
        os.close(fd)

    def check(self, here, fd, _):
        expect_file(here / "f")


@case(Request.RELEASE, lambda here: os.open(file(here), os.O_RDWR))
class Release:
    def act(self, here, fd):
        os.unlink(here / "f")
        os.close(fd)
        os.statvfs(here)

    def check(self, here, fd, _):
        eventually(lambda: not status(here.parent)["open_files"], "the file is closed")


@case(Request.OPENDIR, file)
class Opendir:
    def act(self, here, path):
        return names(here)

    def check(self, here, path, found):
        assert found == ["f"]


@case(Request.READDIRPLUS, lambda here: [file(here, f"f{number}") for number in range(5)])
class Readdir:
    def act(self, here, paths):
        drop_caches()
        return names(here)

    def check(self, here, paths, found):
        assert found == [path.name for path in paths]
        for path in paths:
            expect_file(path)


@case(Request.IOCTL, file)
class Ioctl:
    def act(self, here, path):
        return subprocess.run(["lsattr", path], capture_output=True, text=True, check=False)

    def check(self, here, path, done):
        assert (done.returncode, done.stderr) == (0, ""), done


@case(Request.STATX, file)
class Birth:
    def act(self, here, path):
        return statx(path, 0x800)

    def check(self, here, path, found):
        assert found.btime > 0


# --- the killing ---

#: Enough mounts for none to see so many deaths in a row that its daemons are held back.
MOUNTS = 7


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory, assassin: Path) -> Iterator[list[Victim]]:
    yield from mounted(tmp_path_factory, assassin, resends=True)


@pytest.fixture(scope="module")
def old_victims(tmp_path_factory: pytest.TempPathFactory, assassin: Path) -> Iterator[list[Victim]]:
    yield from mounted(tmp_path_factory, assassin, resends=False)


def mounted(temporary: pytest.TempPathFactory, assassin: Path, *, resends: bool) -> Iterator[list[Victim]]:
    victims: list[Victim] = []
    try:
        for number in range(MOUNTS):
            base = temporary.mktemp(f"victim{number}")
            victims.append(Victim(base, assassin, resends=resends))
            victims[-1].mount.start()
        yield victims
        for victim in victims:
            victim.mount.umount()
            fsck(victim.mount.store)
    finally:
        for victim in victims:
            victim.mount.abandon()


@pytest.fixture
def victim(victims: list[Victim]) -> Victim:
    """The one that has been left alone longest."""
    victims.append(victims.pop(0))
    return victims[-1]


def carry_out(victim: Victim, name: str, *, step: int = 0, kills: int = 1) -> bool:
    """Let a case happen with its daemon killed on the way, and judge what is there then.

    Returns whether it was killed: where so many steps were not made, it is not.
    """
    told, assassin = CASES[name], victim.assassin
    with freed(victim.mount):
        here = victim.directory()
        given = told.prepare(here)
        assassin.aim(told.request, step=step, kills=kills)
        try:
            came_to = told.act(here, given)
        finally:
            assassin.disarm()
        told.check(here, given, came_to)
    if step and not assassin.killed:
        return False
    assert assassin.killed == kills, f"{assassin.killed} daemons were killed"
    asked = kills if victim.resends else 0
    assert assassin.again >= asked, f"the kernel asked {assassin.again} times again"
    return True


@pytest.mark.parametrize("name", CASES)
def test_killed_before_the_answer(victim: Victim, name: str) -> None:
    carry_out(victim, name)


@pytest.mark.parametrize(
    "name", ["CreateNewBlockFile", "LookupOfADirectory", "Readdir", "UnlinkTemporaryName", "Snapshot"]
)
def test_killed_twice_before_the_answer(victim: Victim, name: str) -> None:
    carry_out(victim, name, kills=2)


@pytest.mark.parametrize("name", SAMPLE if STEPS < 10 else CASES)
@pytest.mark.timeout(600)
def test_killed_on_the_way_to_the_answer(victims: list[Victim], name: str) -> None:
    told, victim = CASES[name], victims[0]
    with freed(victim.mount):
        here = victim.directory()
        given = told.prepare(here)
        victim.assassin.aim(told.request, step=1 << 30)
        try:
            came_to = told.act(here, given)
        finally:
            victim.assassin.disarm()
        told.check(here, given, came_to)
    calls = victim.assassin.calls
    assert calls or name not in SAMPLE, "nothing is stored for it"
    count = min(STEPS, calls)
    killed = 0
    for step in sorted({round(1 + number * (calls - 1) / max(1, count - 1)) for number in range(count)}):
        victims.append(victims.pop(0))
        killed += carry_out(victims[-1], name, step=step)
    assert killed >= count // 2, "hardly any was killed"  # the number of steps is not always the same


# --- on a kernel that cannot be asked for unanswered requests ---


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", OLD)
def test_killed_where_requests_are_kept(old_victims: list[Victim], name: str, step: int) -> None:
    """Killed with the answer made, which the next daemon sends; and on the way there, so that it carries it out."""
    old_victims.append(old_victims.pop(0))
    carry_out(old_victims[-1], name, step=step)


def test_nothing_is_left_of_what_was_kept(old_victims: list[Victim]) -> None:
    test_nothing_is_left_of_it(old_victims)


def test_nothing_is_left_of_it(victims: list[Victim]) -> None:
    """No lookup, no open file was counted once too often: what is deleted is gone."""
    for victim in victims:
        mount: Mount = victim.mount
        for path in mount.path.iterdir():
            for frozen in (path / ".snap").iterdir():
                frozen.rmdir()
            subprocess.run(["rm", "-r", path], check=True)
    drop_caches()
    for victim in victims:
        nothing_left(victim.mount)


def nothing_left(mount: Mount) -> None:
    eventually(lambda: status(mount.path)["inodes"] == 1, "no inode is left")
    eventually(lambda: not any((mount.store / "layers").iterdir()), "no layer is left")
    eventually(lambda: not any((mount.store / "tables").iterdir()), "no table is left")
