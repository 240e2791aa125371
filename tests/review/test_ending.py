"""The daemon ends, killed or told, while a snapshot waits for what it flushes through the mount."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import Mount

SIZE = 256 << 20

#: A guest with dirty memory, which takes a snapshot of itself. Not the test: it may hang with the mount.
GUEST = f"""
import mmap, os, sys
directory = sys.argv[1]
fd = os.open(directory + "/ram", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, {SIZE})
memory = mmap.mmap(fd, {SIZE})
for at in range(0, {SIZE}, 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(4096) * 256
print("dirty", flush=True)
try:
    os.mkdir(directory + "/.snap/s")
except OSError:
    pass
"""


@contextmanager
def _snapshot_under_way(mount: Mount) -> Iterator[None]:
    """A snapshot that waits for its flush: the daemon is stopped as soon as it has begun."""
    (mount.path / "vm").mkdir()
    with subprocess.Popen([sys.executable, "-c", GUEST, mount.path / "vm"], stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        assert guest.stdout.readline() == b"dirty\n"
        deadline = time.monotonic() + 20
        while not _waits_in_fsync(mount.pid):
            assert time.monotonic() < deadline, "the snapshot flushes nothing"
        try:
            yield
        finally:
            guest.kill()
            guest.wait(30)


def _helpers(daemon: int) -> list[int]:
    """The processes that the daemon has started."""
    found = []
    for children in Path(f"/proc/{daemon}/task").glob("*/children"):
        found += [int(pid) for pid in children.read_text().split()]
    return found


def _waits_in_fsync(daemon: int) -> bool:
    """Is the daemon, or a process of its, in fsync(2)?"""
    tasks = [task for pid in (daemon, *_helpers(daemon)) for task in Path(f"/proc/{pid}/task").glob("*")]
    for task in tasks:
        with contextlib.suppress(OSError):
            if (task / "syscall").read_text().split()[0] == "74":
                return True
    return False


def test_a_daemon_that_is_killed_while_it_flushes_is_gone(mounted: Mount) -> None:
    """A thread of it that waited for its own mount would keep it, the guests and the store's lock for ever."""
    with _snapshot_under_way(mounted):
        mounted.kill()
    mounted.start()
    assert os.listdir(mounted.path / "vm" / ".snap") == []


def test_a_second_signal_does_not_wait_for_a_flush(mounted: Mount) -> None:
    mounted.expect("exited with 75; going on")  # where the second one comes late
    with _snapshot_under_way(mounted):
        assert mounted.process is not None
        os.kill(mounted.pid, signal.SIGTERM)
        time.sleep(0.05)
        mounted.terminate(timeout=20)
    mounted.start()


def test_flushing_leaves_no_process_behind(mounted: Mount) -> None:
    (mounted.path / "vm").mkdir()
    with open(mounted.path / "vm" / "ram", "w+b") as file:
        file.truncate(mmap.PAGESIZE)
        (mounted.path / "vm" / ".snap" / "s").mkdir()
    helpers = _helpers(mounted.pid)
    assert helpers
    mounted.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    mounted.start()


def test_unmounted_as_soon_as_it_is_there(mounted: Mount) -> None:
    """The daemon looks at its mount when it is no longer one."""
    for _ in range(10):
        mounted.restart()
