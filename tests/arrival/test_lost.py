"""Sources that are lost: touches wait, nothing is given up, nothing is fetched twice, and nobody else is held up."""

from __future__ import annotations

import os
import time
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
