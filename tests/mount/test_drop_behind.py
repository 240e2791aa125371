"""Pages that the kernel keeps for the mount do not stay in the page cache of a store on disk, nor is one lost by it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Mount, caches_emptied, were_caches_emptied
from mount.posix import PAGE, opened, pattern, read

SIZE = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    size = path.stat().st_size
    if not size:
        return 0
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        found = np.zeros(-(-size // PAGE), np.uint8)
        address = ctypes.c_void_p(np.frombuffer(memory, np.uint8).ctypes.data)
        assert _libc.mincore(address, ctypes.c_size_t(size), found.ctypes.data_as(ctypes.c_void_p)) == 0
        return int((found & 1).sum()) * PAGE


def in_store(mount: Mount) -> int:
    """Bytes of layers in the store's page cache."""
    return sum(map(cached, (mount.store / "layers").glob("*.ram")))


def leaves(mount: Mount, patience: float = 12) -> None:
    """Wait until the store's page cache has no page of a layer."""
    deadline = time.monotonic() + patience
    while now := in_store(mount):
        assert time.monotonic() < deadline, f"{now} bytes are in the store's page cache"
        time.sleep(0.1)


def forget(path: Path) -> None:
    """Let the mount's page cache of a file go: the next read asks the daemon."""
    deadline = time.monotonic() + 12
    with opened(path) as fd:
        while True:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # leaves what somebody else holds just now
            if not (left := cached(path)):
                return
            assert time.monotonic() < deadline, f"{left} bytes of {path.name} stay in the page cache"
            time.sleep(0.05)


def test_what_is_on_disk_and_with_the_kernel_leaves(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    path = mount.path / "f"
    emptied = caches_emptied()
    path.write_bytes(pattern(SIZE))
    assert in_store(mount) == SIZE  # dirty: nowhere else yet
    with opened(path) as fd:
        os.fsync(fd)
    leaves(mount)
    # Other work on the machine may take some of it, and tests that run beside this one all.
    assert cached(path) > SIZE // 2 or were_caches_emptied(emptied)
    forget(path)
    assert read(path) == pattern(SIZE)  # from the disk
    leaves(mount)
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[PAGE] = 255  # written back by the fsync, and dropped again
        memory.flush()
        leaves(mount)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert memory[:] == pattern(SIZE)[:PAGE] + b"\xff" + pattern(SIZE)[PAGE + 1 :]


def test_what_two_clones_read_stays_until_one_is_gone(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    one, two, shifted = (mount.path / name for name in ("one", "two", "shifted"))
    one.write_bytes(pattern(SIZE))
    shutil.copy(one, two)
    with opened(one, os.O_RDONLY) as source, opened(shifted, os.O_RDWR | os.O_CREAT) as target:
        os.pwrite(target, bytes(PAGE), 0)
        assert os.copy_file_range(source, target, SIZE, 0, PAGE) == SIZE
    digests = mount.store / "layers" / "00000001.xxh3"
    deadline = time.monotonic() + 20
    while not digests.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    emptied = caches_emptied()
    for path in (one, two):
        forget(path)
        assert read(path) == pattern(SIZE)
    time.sleep(2.5)  # two looks of the daemon
    assert in_store(mount) > SIZE // 2 or were_caches_emptied(emptied)
    one.unlink()
    two.unlink()  # what is left names the pages of the layer at another place
    forget(shifted)
    assert read(shifted) == bytes(PAGE) + pattern(SIZE)
    leaves(mount)
    forget(shifted)
    assert read(shifted) == bytes(PAGE) + pattern(SIZE)
    leaves(mount)


def test_a_store_in_memory_has_its_pages_nowhere_else(shm: Path, make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(store=shm / "store")
    path = mount.path / "f"
    path.write_bytes(pattern(SIZE))
    forget(path)
    assert read(path) == pattern(SIZE)
    time.sleep(1.5)
    assert in_store(mount) == SIZE
    assert "\nramfs_dropped_pages_total 0\n" in (mount.path / ".ramfs" / "metrics").read_text()
