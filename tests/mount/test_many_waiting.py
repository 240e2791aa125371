"""More requests that wait than the daemon has threads, or pyfuse3 workers by default."""

from __future__ import annotations

import mmap
import os
import threading

from harness import Mount

CROWD = 130


def test_a_crowd_takes_snapshots(mounted: Mount) -> None:
    """Each waits for a thread that syncs a file through the mount, which waits for its requests to be answered."""
    directory = mounted.path / "vm"
    directory.mkdir()
    fd = os.open(directory / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 << 20)
    ready = threading.Barrier(CROWD)
    with mmap.mmap(fd, 4 << 20) as memory:
        memory[:4096] = b"guest" * 819 + b"!"

        def snapshot(number: int) -> None:
            ready.wait()
            (directory / ".snap" / str(number)).mkdir()

        crowd = [threading.Thread(target=snapshot, args=(number,), daemon=True) for number in range(CROWD)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join(60)
        assert not any(thread.is_alive() for thread in crowd)
    os.close(fd)
    assert len(list((directory / ".snap").iterdir())) == CROWD
    assert (directory / ".snap" / "77" / "ram").read_bytes()[:4096] == b"guest" * 819 + b"!"
