"""Snapshots of trees that are deep, or that change while they are made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness import Mount

DEPTH = 1100  # more than Python goes down in calls


def make_deep(top: Path) -> None:
    here = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=here))
    os.close(here)


def test_a_deep_tree_is_frozen_and_deleted(mounted: Mount) -> None:
    top = mounted.path / "top"
    top.mkdir()
    make_deep(top)
    (top / ".snap" / "s").mkdir()
    assert os.listdir(top / ".snap") == ["s"]
    (top / ".snap" / "s").rmdir()
    assert os.listdir(top / ".snap") == []
    mounted.restart()
    assert os.listdir(top) == ["d"]


#: A guest with dirty memory in two files, of which the later one is renamed while the first is flushed.
GUEST = """
import mmap, os, sys, threading, time
directory, size = sys.argv[1], 256 << 20
maps = []
for name in ("big", "small"):
    fd = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    maps.append(mmap.mmap(fd, size))
for at in range(0, size, 1 << 20):
    maps[0][at : at + (1 << 20)] = os.urandom(4096) * 256
maps[1][:6] = b"stored"
thread = threading.Thread(target=os.mkdir, args=[f"{directory}/.snap/s"])
thread.start()
time.sleep(0.02)
os.rename(f"{directory}/small", f"{directory}/renamed")
thread.join()
"""


def test_a_file_that_is_renamed_while_others_are_flushed_is_whole(mounted: Mount) -> None:
    (mounted.path / "vm").mkdir()
    subprocess.run([sys.executable, "-c", GUEST, mounted.path / "vm"], check=True, timeout=60)
    frozen = mounted.path / "vm" / ".snap" / "s"
    (name,) = set(os.listdir(frozen)) - {"big"}
    with open(frozen / name, "rb") as file:
        assert file.read(6) == b"stored"


def test_a_deep_file_is_flushed_when_the_daemon_is_told_to_end(make_mount: Callable[..., Mount]) -> None:
    """What was stored into mapped pages of a deep file before SIGTERM is there afterwards."""
    mount = make_mount()
    top = mount.path / "top"
    top.mkdir()
    make_deep(top)
    path = top / "/".join(["d"] * DEPTH) / "file"
    guest = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR); os.ftruncate(fd, 4096); memory = mmap.mmap(fd, 4096)\n"
        "memory[:6] = b'stored'; print('+', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", guest, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        mount.terminate(signal.SIGTERM)
        process.kill()
    mount.start()
    assert path.read_bytes()[:6] == b"stored"
