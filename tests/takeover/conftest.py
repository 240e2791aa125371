"""Mounts whose daemon dies between the execution of a request and its answer (assassin.c)."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import subprocess
import threading
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import pytest
from harness import RAMFS, Mount

#: Seconds after which a system call that waits for a mount is freed, by ending the mount.
PATIENCE = 60


class Request(IntEnum):
    """Kinds of requests, as linux/fuse.h numbers them."""

    LOOKUP = 1
    GETATTR = 3
    SETATTR = 4
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    REMOVEXATTR = 24
    FLUSH = 25
    OPENDIR = 27
    RELEASEDIR = 29
    FSYNCDIR = 30
    INIT = 26
    CREATE = 35
    IOCTL = 39
    READDIRPLUS = 44
    RENAME2 = 45
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52


class Assassin:
    """What kills the daemons of one mount: the page of memory that assassin.c has, too."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("I")

    def aim(self, request: Request, *, step: int = 0, kills: int = 1) -> None:
        """Kill the daemon that next answers such a request; with ``step`` at its n-th call on the way there."""
        self._words[1:6] = memoryview(b"".join(n.to_bytes(4, "little") for n in (step, kills, 0, 0, 0))).cast("I")
        self._words[0] = request

    def disarm(self) -> None:
        self._words[0] = 0

    @property
    def killed(self) -> int:
        return self._words[3]

    @property
    def again(self) -> int:
        """How often the request came again."""
        return self._words[4]

    @property
    def calls(self) -> int:
        """Calls that change files, made for the request before it was answered."""
        return self._words[5]


class Victim:
    """A mount and its assassin."""

    def __init__(self, base: Path, library: Path, options: tuple[str, ...] = (), *, resends: bool = True) -> None:
        """Without ``resends`` as on a kernel before 6.9, which cannot be asked for unanswered requests."""
        self.resends = resends
        self.assassin = Assassin(base / "assassin")
        env = {"LD_PRELOAD": str(library), "ASSASSIN": str(base / "assassin")}
        if not resends:
            env["RAMFS_NO_RESEND"] = "1"
        self.mount = Mount(base / "store", base / "mnt", options, env=env)
        self.mount.expect(r"\(process \d+\) was ended by signal 9; going on")
        self._numbers = itertools.count()

    def directory(self) -> Path:
        """A fresh directory on the mount."""
        path = self.mount.path / f"d{next(self._numbers)}"
        path.mkdir()
        return path


@contextlib.contextmanager
def freed(mount: Mount, patience: float = PATIENCE) -> Iterator[None]:
    """Let no system call of the block wait for ever: nothing else could end it."""
    process = mount.process
    assert process is not None
    timer = threading.Timer(patience, lambda: mount._kill_all(process))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def drop_caches(what: str = "2") -> None:
    """Let the kernel forget names and inodes that nobody uses; "1": pages of files."""
    Path("/proc/sys/vm/drop_caches").write_text(what)


def fsck(store: Path) -> None:
    """`ramfs fsck` must find nothing."""
    done = subprocess.run(
        [*RAMFS, "fsck", str(store)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"fsck: {done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def assassin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """assassin.c as a library to preload."""
    library = tmp_path_factory.mktemp("assassin") / "assassin.so"
    source = Path(__file__).with_name("assassin.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-D_FORTIFY_SOURCE=0"]
    subprocess.run(["gcc", *flags, "-o", library, source, "-ldl"], check=True)
    return library
