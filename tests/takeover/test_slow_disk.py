"""A daemon is killed while the disk of its store reads a page that somebody waits for."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import eventually, opened, pattern
from power.disk import MAKE, SIZE, ServedDisk, call, mounted_image
from takeover.conftest import drop_caches, freed

MB = 1 << 20


class PausableDisk(ServedDisk):
    """A disk that can be told not to answer."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.image = directory / "image"
        self.control = directory / "control"

    def prepare(self) -> list[str | Path]:
        with self.image.open("wb") as file:
            file.truncate(SIZE["ext4"])
        call(*MAKE["ext4"], self.image)
        return ["--filter=pause", "file", self.image, f"pause-control={self.control}"]

    def tell(self, word: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.control))
            control.sendall(word)
            assert control.recv(1) == word.upper()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PausableDisk]:
    with PausableDisk(tmp_path) as disk:
        yield disk


def test_a_read_that_waits_for_the_disk(disk: PausableDisk, tmp_path: Path) -> None:
    """The kernel must not take the end of the daemon, in the middle of its reply, for the end of the page."""
    data = pattern(4 * MB)
    with mounted_image(disk.device, tmp_path / "ext4") as point, Mount(point / "store", tmp_path / "mnt") as mount:
        mount.expect("ended by signal 9")
        (mount.path / "f").write_bytes(data)
        mount.restart()
        mount.wait_until_supervised()
        with opened(mount.path / "f") as fd, freed(mount):
            os.pread(fd, 1, 0)  # the layer is open and mapped
            for layer in (mount.store / "layers").glob("*.ram"):
                eventually(lambda layer=layer: not is_cached(layer, 3 * MB), "the page is on disk alone")
            read: list[bytes | OSError] = []

            def reader() -> None:
                # Past the page cache: there the kernel tries a second time.
                with opened(mount.path / "f", os.O_RDONLY | os.O_DIRECT) as direct, mmap.mmap(-1, 4096) as page:
                    try:
                        os.preadv(direct, [page], 3 * MB)
                        read.append(page[:])
                    except OSError as error:
                        read.append(error)

            thread = threading.Thread(target=reader)
            pid = mount.pid
            disk.tell(b"p")
            try:
                thread.start()
                wait_for_disk(pid)
                mount.kill_daemon()
            finally:
                disk.tell(b"r")
            thread.join()
            assert read == [data[3 * MB : 3 * MB + 4096]]


def is_cached(path: Path, offset: int) -> bool:
    """Is a page in the page cache still, after it was asked to go?"""
    with opened(path) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        drop_caches("1")  # what is still on its way to the lists of the kernel is left by the call before
        with mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, offset=offset) as page:
            here = ctypes.c_ubyte()
            start = ctypes.addressof(ctypes.c_char.from_buffer(page))
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(4096), ctypes.byref(here)) == 0
    return bool(here.value & 1)


def wait_for_disk(pid: int) -> None:
    """Until a process sleeps in the kernel and cannot be woken by any signal but the last."""

    def waits() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"

    eventually(waits, "the daemon waits for the disk")
    time.sleep(0.05)
    assert waits()
