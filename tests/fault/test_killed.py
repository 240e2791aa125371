"""kill -9 at the steps of a snapshot and of a clone: contents exact, no half snapshot, fsck clean.

strace kills the daemon as it enters its n-th call of one kind. Which calls an act makes is found by a dry
run; from them a sample is taken, spread over the act. RAMFS_KILL_STEPS=1000 takes them all.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault.conftest import fsck, needs_root
from harness import RAMFS, Mount
from mount.posix import PAGE, opened, page_counts, page_of, pattern, read

pytestmark = needs_root

STEPS = int(os.environ.get("RAMFS_KILL_STEPS", "4"))
CALLS = "pwrite64,fdatasync,fsync,openat,ftruncate,unlink,rename,copy_file_range,fallocate,close"
MB = 1 << 20

FIRST = pattern(MB + 123)
SECOND = FIRST[:PAGE] + page_of(2) + FIRST[2 * PAGE :]


def prepare(mount: Mount) -> None:
    """A directory with a snapshot and pages written since, so that each act seals, copies and syncs."""
    tree = mount.path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "ram").write_bytes(FIRST)
    (tree / "sub" / "f").write_bytes(b"sub")
    (tree / ".snap" / "old").mkdir()
    with opened(tree / "ram") as fd:
        os.pwrite(fd, page_of(2), PAGE)


def snapshot(mount: Mount) -> None:
    os.mkdir(mount.path / "tree" / ".snap" / "new")


def delete_snapshot(mount: Mount) -> None:
    os.rmdir(mount.path / "tree" / ".snap" / "old")
    time.sleep(1.3)  # garbage is looked for meanwhile


def copy(mount: Mount) -> None:
    subprocess.run(["cp", "-r", mount.path / "tree", mount.path / "clone"], check=True, stderr=subprocess.DEVNULL)


def clone(mount: Mount) -> None:
    command = [*RAMFS, "clone", mount.path / "tree", mount.path / "clone"]
    subprocess.run(command, check=True, capture_output=True)


def attached(tasks: Path) -> bool:
    """Are all threads of a process traced?"""
    try:
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks.iterdir())
    except OSError:  # a thread has ended meanwhile
        return False


@contextlib.contextmanager
def traced(mount: Mount, log: Path, *options: str) -> Iterator[None]:
    """strace on the daemon while the block runs."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", log, *options, "-p", str(mount.pid)],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    tasks = Path(f"/proc/{mount.pid}/task")
    deadline = time.monotonic() + 10
    while not attached(tasks):
        assert tracer.poll() is None, "strace has ended"
        assert time.monotonic() < deadline, "strace does not attach"
        time.sleep(0.005)
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()


@contextlib.contextmanager
def dying_with_its_daemon(mount: Mount) -> Iterator[None]:
    """In the block the supervisor starts no other daemon: it is killed as soon as the one there is dies."""
    assert mount.process is not None
    mount.expect("the supervisor is gone")
    supervisor, done = mount.process, os.eventfd(0)
    exited = os.pidfd_open(mount.pid)

    def watch() -> None:
        poll = select.poll()
        poll.register(exited, select.POLLIN)
        poll.register(done, select.POLLIN)
        if exited in dict(poll.poll()):
            supervisor.kill()

    watcher = threading.Thread(target=watch)
    supervisor.send_signal(signal.SIGSTOP)
    watcher.start()
    try:
        yield
    finally:
        os.eventfd_write(done, 1)
        watcher.join()
        supervisor.send_signal(signal.SIGCONT)
        for fd in (exited, done):
            os.close(fd)


def calls_of(log: Path) -> list[tuple[str, int]]:
    """The calls of a log in their order: (name, how many-th of its name in its thread)."""
    counts: Counter[tuple[str, str]] = Counter()
    steps: dict[tuple[str, int], None] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            counts[match[1], match[2]] += 1
            steps[match[2], counts[match[1], match[2]]] = None
    return list(steps)


def judge(mount: Mount, what: object) -> None:
    """Everything from before is there; of the act under way, all or (of cp alone) a part."""
    tree = mount.path / "tree"
    assert read(tree / "ram") == SECOND, what
    assert read(tree / "sub" / "f") == b"sub", what
    snapshots = os.listdir(tree / ".snap")
    assert set(snapshots) <= {"old", "new"}, what
    for name in snapshots:
        assert read(tree / ".snap" / name / "ram") == (FIRST if name == "old" else SECOND), (what, name)
        assert sorted(os.listdir(tree / ".snap" / name)) == ["ram", "sub"], (what, name)
        assert read(tree / ".snap" / name / "sub" / "f") == b"sub", (what, name)
    if (mount.path / "clone").exists():
        ram = mount.path / "clone" / "ram"
        if ram.exists():
            assert read(ram) in (SECOND, b""), what
            page_counts(ram)
    # And it goes on as if nothing had been.
    with opened(tree / "ram") as fd:
        os.pwrite(fd, page_of(7), 5 * PAGE)
    os.mkdir(tree / ".snap" / "after")
    assert read(tree / ".snap" / "after" / "ram", 5 * PAGE, PAGE) == page_of(7), what
    assert read(tree / "ram", PAGE, PAGE) == page_of(2), what


@pytest.mark.parametrize("act", [snapshot, delete_snapshot, copy, clone])
def test_killed_at_a_step(act: Callable[[Mount], None], tmp_path: Path, shm: Path) -> None:
    template = shm / "template"
    mount = Mount(template, tmp_path / "mnt").start()
    prepare(mount)
    mount.kill()  # so that each copy of the store is one whose daemon was killed before, too
    copy_store(template, shm / "dry")
    with Mount(shm / "dry", tmp_path / "dry") as dry:
        with traced(dry, tmp_path / "calls", "-e", f"trace={CALLS}"):
            act(dry)
        judge(dry, "the dry run")
    steps = calls_of(tmp_path / "calls")
    assert len(steps) > 5, steps
    count = min(STEPS, len(steps))
    sample = [steps[round(number * (len(steps) - 1) / max(1, count - 1))] for number in range(count)]
    killed = 0
    for call, number in sample:
        store = shm / "store"
        copy_store(template, store)
        mount = Mount(store, tmp_path / "mnt").start()
        injection = f"inject={call}:signal=KILL:when={number}"
        try:
            options = ("-e", f"trace={call}", "-e", injection)
            with traced(mount, tmp_path / "log", *options), dying_with_its_daemon(mount):
                try:
                    act(mount)
                except (OSError, subprocess.CalledProcessError):
                    assert mount.process is not None
                    mount.process.wait(10)
                acknowledged = mount.running
            if mount.running:  # fewer calls than in the dry run: the act was done
                mount.umount()
            else:
                killed += 1
                mount.abandon()
            fsck(store)
            mount.start()
            judge(mount, (act.__name__, call, number))
            if acknowledged and act is snapshot:
                assert "new" in os.listdir(mount.path / "tree" / ".snap")
            mount.umount()
        finally:
            mount.abandon()
        shutil.rmtree(store)
    assert killed >= len(sample) // 2, "strace has hardly killed anything"


def copy_store(source: Path, target: Path) -> None:
    """Copy a store that is not mounted."""
    shutil.copytree(source, target, copy_function=copy_sparse, ignore=shutil.ignore_patterns("supervisor"))


def copy_sparse(source: str, target: str) -> str:
    """Copy a file of the store; holes stay holes."""
    subprocess.run(["cp", "--sparse=always", "--preserve=mode", source, target], check=True)
    return target
