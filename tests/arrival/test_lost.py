"""Sources that are lost: touches wait, nothing is given up, nothing is fetched twice, and nobody else is held up."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arrival.conftest import MB, nbdkit, pull, pulls, steer, wait_until_here
from arrival.test_verified import Touch, seal
from harness import Mount
from mount.posix import PAGE, eventually, opened, pattern, read

RAM = "pc.ram@0x0"
MIB = 8
LOST = "lost the connection|cannot be reached|trying again"


@pytest.fixture
def served(tmp_path: Path) -> Path:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / RAM).write_bytes(pattern(MIB * MB))
    seal(directory)
    return directory


def uncached(path: Path) -> bytes:
    """The bytes of a file, by requests to the daemon."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return read(path)


def test_a_crowd_that_waits_holds_up_nobody_else(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """Neither other files of the mount, nor another pull."""
    mounted.expect(LOST)
    other = mounted.path / "other"
    other.write_bytes(pattern(4 * MB, 3))
    os.sync()
    with nbdkit(tmp_path / "2", "file", f"dir={served}") as second:
        with nbdkit(tmp_path / "1", "file", f"dir={served}") as first:
            pull(mounted, first, "lost", like=False, paused=True)
            pull(mounted, second, "kept", like=False, paused=True)
        crowd = [Touch(mounted.path / "lost" / RAM, page) for page in range(0, 2000, 10)]
        eventually(lambda: pulls(mounted)[0]["state"] == "waiting", "the state is told")
        began = time.monotonic()
        assert uncached(other) == pattern(4 * MB, 3)
        with opened(other) as fd:
            os.pwrite(fd, b"written", 5)
            os.fsync(fd)
        assert Touch(mounted.path / "kept" / RAM, 700).end(5) == pattern(MIB * MB)[700 * PAGE : 701 * PAGE]
        steer(mounted, "kept", paused=False)
        eventually(lambda: len(pulls(mounted)) == 1, "the other pull ends")
        assert time.monotonic() - began < 10
        assert all(touch.waits for touch in crowd)
        steer(mounted, "lost", uri=second, paused=False)
        for touch, page in zip(crowd, range(0, 2000, 10), strict=True):
            assert touch.end(10) == pattern(MIB * MB)[page * PAGE : (page + 1) * PAGE]
        wait_until_here(mounted)


TOUCHES = {
    "a mapped read": "m = mmap.mmap(fd, 0); print(m[5000])",
    "a mapped read without read-ahead": "m = mmap.mmap(fd, 0); m.madvise(mmap.MADV_RANDOM); print(m[5000])",
    "a mapped store": "m = mmap.mmap(fd, 0); m[5000] = 1",
    "read": "os.pread(fd, 10, 5000)",
    "a direct read": "m = mmap.mmap(-1, 4096); f = os.open(path, os.O_RDONLY | os.O_DIRECT); os.preadv(f, [m], 4096)",
    "write": "os.pwrite(fd, b'x', 5000)",
    "truncate": "os.truncate(path, 5000)",
    "fallocate": "os.posix_fallocate; subprocess.run(['fallocate', '-p', '-o', '5000', '-l', '100', path])",
}


class Toucher:
    """A process that does something to a file which has to wait."""

    def __init__(self, path: Path, what: str) -> None:
        code = f"import mmap, os, subprocess, sys; path = sys.argv[1]; fd = os.open(path, os.O_RDWR); {TOUCHES[what]}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, path], stdout=subprocess.DEVNULL, start_new_session=True
        )

    def kill(self) -> float:
        """Kill it and all that it has started; how long they took to die."""
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        eventually(lambda: not _group(self.process.pid), "all are dead")
        return time.monotonic() - began


def _group(number: int) -> list[str]:
    """The processes of a group that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == number and state not in "ZX":
                found.append(path.parent.name)
    return found


def test_who_waits_can_be_killed(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """And nobody else: signals that it handles do not disturb who waits."""
    mounted.expect(LOST)
    with nbdkit(tmp_path / "1", "file", f"dir={served}") as uri:
        for number in range(len(TOUCHES) + 1):
            pull(mounted, uri, f"vm{number}", like=False, paused=True)
    handler = "import signal; signal.signal(signal.SIGUSR1, lambda *_: None); "
    code = f"{handler}import mmap, os, sys; f = os.open(sys.argv[1], 0); m = mmap.mmap(f, 0, prot=1); m.madvise(1)"
    path = mounted.path / f"vm{len(TOUCHES)}" / RAM
    survivor = subprocess.Popen([sys.executable, "-c", f"{code}; sys.exit(m[5000] % 200)", path])
    touchers = [Toucher(mounted.path / f"vm{number}" / RAM, what) for number, what in enumerate(TOUCHES)]
    eventually(lambda: sum(each["state"] == "waiting" for each in pulls(mounted)) == len(TOUCHES) + 1, "all wait")
    survivor.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert all(each.process.poll() is None for each in touchers)
    for what, toucher in zip(TOUCHES, touchers, strict=True):
        assert toucher.kill() < 1, what
    survivor.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert survivor.poll() is None
    with nbdkit(tmp_path / "2", "file", f"dir={served}") as uri:
        for number in range(len(TOUCHES) + 1):
            steer(mounted, f"vm{number}", uri=uri, paused=False)
        assert survivor.wait(10) == pattern(MIB * MB)[5000] % 200
        wait_until_here(mounted)
    for number in range(len(TOUCHES)):
        assert read(mounted.path / f"vm{number}" / RAM) == pattern(MIB * MB), "nothing was done for the dead"
