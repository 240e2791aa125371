"""Stores on file systems that fail: a small tmpfs, a disk whose reads fail on demand."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import RAMFS


def run(*command: object) -> str:
    """Run a command; its output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def fsck(store: Path) -> None:
    """`ramfs fsck` must find nothing."""
    done = subprocess.run(
        [*RAMFS, "fsck", str(store)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"fsck: {done.stdout}{done.stderr}"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems that fail")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "ramfs-test", path)
    yield path
    run("umount", "-l", path)


class Disk:
    """An ext4 file system whose disk fails to read while :attr:`trigger` exists."""

    def __init__(self, path: Path, trigger: Path) -> None:
        self.path = path
        self.trigger = trigger

    def break_reads(self) -> None:
        """From now on only what the kernel has in memory can be read, and it is told to forget that."""
        os.sync()
        self.trigger.touch()
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def mend(self) -> None:
        """Reads work again."""
        self.trigger.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """nbdkit's error filter, as a file by nbdfuse, as a disk by a loop device."""
    image, trigger, mountpoint = tmp_path / "disk", tmp_path / "trigger", tmp_path / "ext4"
    image.touch()
    mountpoint.mkdir()
    with contextlib.ExitStack() as stack:
        server = subprocess.Popen(
            [
                "nbdfuse", str(image), "--command", "nbdkit", "-s", "--exit-with-parent", "--filter=error",
                "memory", "128M", "error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}",
            ],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(server.wait)
        stack.callback(server.terminate)
        deadline = time.monotonic() + 10
        while not image.stat().st_size:
            assert server.poll() is None, "nbdfuse has ended"
            assert time.monotonic() < deadline, "nbdfuse does not mount"
            time.sleep(0.02)
        stack.callback(subprocess.run, ["umount", "-l", image], check=False)
        loop = run("losetup", "--find", "--show", image).strip()
        stack.callback(run, "losetup", "--detach", loop)
        # Without lazy work in the background, which would meet the errors in our place.
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", loop)
        run("mount", "-o", "noatime", loop, mountpoint)
        stack.callback(run, "umount", mountpoint)
        stack.callback(lambda: trigger.unlink(missing_ok=True))
        yield Disk(mountpoint, trigger)
