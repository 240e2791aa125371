"""The store is full in the middle of a write: ENOSPC to the writer, nothing acknowledged is lost."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from arrival.conftest import pull, pulls, wait_until_here
from fault.conftest import fsck, needs_root
from harness import Mount, MountFailed
from mount.posix import PAGE, errno_of, eventually, fails, opened, pattern, read, status

pytestmark = needs_root
MB = 1 << 20


def mount_small(make_mount: Callable[..., Mount], small: Path) -> Mount:
    mount = make_mount(store=small / "store")
    mount.expect("No space left on device|disk is full")
    return mount


def fill(path: Path, chunk: int = 64 * 1024) -> bytes:
    """Append until the store is full; what was acknowledged."""
    done = bytearray()
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
        while len(done) < 64 * MB:
            data = pattern(chunk, len(done) // chunk % 250 + 1)
            try:
                done += data[: os.write(fd, data)]
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return bytes(done)
    raise AssertionError("the store never gets full")


def test_write_is_enospc_and_everything_acknowledged_stays(small: Path, make_mount: Callable[..., Mount]) -> None:
    mount = mount_small(make_mount, small)
    (mount.path / "before").write_bytes(pattern(MB, 9))
    (mount.path / ".snap" / "s").mkdir()
    done = fill(mount.path / "big")
    assert len(done) > 8 * MB
    assert mount.running
    for chunk in (PAGE, 1, MB):  # again and again, small and large
        with opened(mount.path / "big") as fd:
            assert errno_of(lambda fd=fd, chunk=chunk: os.pwrite(fd, pattern(chunk), 40 * MB)) in {0, errno.ENOSPC}
    assert read(mount.path / "big", 0, len(done)) == done
    assert read(mount.path / "before") == pattern(MB, 9)
    assert read(mount.path / ".snap" / "s" / "before") == pattern(MB, 9)
    # It works again once there is room.
    (mount.path / "big").unlink()
    eventually(lambda: os.statvfs(mount.path).f_bavail * PAGE > 8 * MB, "the space is free again", timeout=60)
    (mount.path / "after").write_bytes(pattern(4 * MB, 4))
    (mount.path / ".snap" / "t").mkdir()
    mount.restart()
    assert read(mount.path / ".snap" / "t" / "after") == pattern(4 * MB, 4)
    assert sorted(os.listdir(mount.path)) == ["after", "before"]
    mount.umount()
    fsck(mount.store)


def test_msync_tells_of_a_full_store(small: Path, make_mount: Callable[..., Mount]) -> None:
    mount = mount_small(make_mount, small)
    path = mount.path / "ram"
    path.write_bytes(pattern(MB))
    with opened(path) as fd:
        os.ftruncate(fd, 40 * MB)
        memory = mmap.mmap(fd, 40 * MB)
        memory[: 2 * MB] = pattern(2 * MB, 2)
        memory.flush(0, 2 * MB)  # acknowledged
        memory[2 * MB :] = pattern(38 * MB, 3)
        assert errno_of(lambda: memory.flush() and None) in {errno.ENOSPC, errno.EIO}
        assert mount.running
        memory.close()
    assert read(path, 0, 2 * MB) == pattern(2 * MB, 2)
    path.unlink()
    eventually(lambda: os.statvfs(mount.path).f_bavail * PAGE > 8 * MB, "the space is free again", timeout=60)
    path.write_bytes(pattern(MB, 7))
    mount.restart()
    assert read(path) == pattern(MB, 7)
    mount.umount()
    fsck(mount.store)


def test_names_and_snapshots_in_a_full_store(small: Path, make_mount: Callable[..., Mount]) -> None:
    mount = mount_small(make_mount, small)
    tree = mount.path / "tree"
    tree.mkdir()
    (tree / "ram").write_bytes(pattern(MB))
    fill(mount.path / "big", PAGE)
    made = []
    for number in range(5000):
        code = errno_of(lambda number=number: os.mkdir(mount.path / f"d{number}"))
        assert code in {0, errno.ENOSPC}
        if code:
            break
        made.append(f"d{number}")
    else:
        raise AssertionError("names take no space")
    assert errno_of(lambda: os.mkdir(tree / ".snap" / "s")) in {0, errno.ENOSPC}
    cp = subprocess.run(["cp", "-r", tree, mount.path / "clone"], capture_output=True, text=True, check=False)
    if cp.returncode:
        assert "No space left on device" in cp.stderr
    snapshots = os.listdir(tree / ".snap")
    assert mount.running
    listed = set(os.listdir(mount.path))
    assert set(made) <= listed
    assert read(tree / "ram") == pattern(MB)
    for name in snapshots:
        assert read(tree / ".snap" / name / "ram") == pattern(MB)
    mount.kill()
    mount.start()
    assert set(os.listdir(mount.path)) == listed
    assert os.listdir(tree / ".snap") == snapshots
    (mount.path / "big").unlink()
    eventually(lambda: os.statvfs(mount.path).f_bavail * PAGE > 8 * MB, "the space is free again", timeout=60)
    (tree / ".snap" / "later").mkdir()
    assert read(tree / ".snap" / "later" / "ram") == pattern(MB)
    mount.umount()
    fsck(mount.store)


def test_a_store_too_small_to_begin(small: Path, make_mount: Callable[..., Mount]) -> None:
    with opened(small / "ballast", os.O_RDWR | os.O_CREAT) as fd, fails(errno.ENOSPC):
        while True:
            os.write(fd, bytes(PAGE))
    with pytest.raises(MountFailed, match=r"No space left|disk is full"):
        make_mount(store=small / "store")
    (small / "ballast").unlink()
    mount = make_mount("again", store=small / "store")
    (mount.path / "f").write_bytes(b"works")


def test_another_daemon_takes_over_a_full_store(small: Path, make_mount: Callable[..., Mount]) -> None:
    """It needs no room for that; not even when all that the store had kept for such moments is used."""
    mount = mount_small(make_mount, small)
    (mount.path / "dir").mkdir()
    for number in range(20):
        (mount.path / "dir" / f"f{number}").write_bytes(pattern(PAGE, number + 1))
    done = fill(mount.path / "big")
    for turn in range(2):  # the first takeover gives the reserve up
        with opened(small / "other", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:  # others use that file system too
            for size in (64 * 1024, PAGE):
                while errno_of(lambda size=size, fd=fd: os.write(fd, bytes(size))) == 0:
                    pass
        assert (mount.store / "reserve").exists() == (turn == 0)
        pid = mount.kill_daemon()
        eventually(lambda pid=pid: status(mount.path)["pid"] != pid, "another daemon serves")
        assert read(mount.path / "big", 0, len(done)) == done
        assert len(os.listdir(mount.path / "dir")) == 20
    (small / "other").unlink()
    (mount.path / "big").unlink()
    eventually(lambda: os.statvfs(mount.path).f_bavail * PAGE > 8 * MB, "the space is free again", timeout=60)
    (mount.path / "after").write_bytes(pattern(MB, 4))
    mount.restart()
    assert read(mount.path / "after") == pattern(MB, 4)
    assert all(read(mount.path / "dir" / f"f{number}") == pattern(PAGE, number + 1) for number in range(20))
    mount.umount()
    fsck(mount.store)


def test_what_arrives_waits_for_room(small: Path, shm: Path, make_mount: Callable[..., Mount]) -> None:
    """A guest that touches it stalls, and nothing that was acknowledged is lost."""
    mount = mount_small(make_mount, small)
    data = pattern(17 * MB, 3)
    (shm / "ram").write_bytes(data)
    done = fill(mount.path / "big")
    (mount.path / "big").unlink()
    eventually(lambda: os.statvfs(mount.path).f_bavail * PAGE > 8 * MB, "the space is free again", timeout=60)
    (mount.path / "held").write_bytes(done[: 8 * MB])
    mount.expect("the store is full")
    pull(mount, f"file:{shm / 'ram'}")
    eventually(lambda: pulls(mount)[0]["state"] == "waiting", "it says that it waits")
    assert "full" in pulls(mount)[0]["error"]
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read, mount.path / "vm" / "ram", 16 * MB, MB)
        assert read(mount.path / "held") == done[: 8 * MB]
        mount.kill_daemon()
        assert read(mount.path / "held") == done[: 8 * MB]
        (mount.path / "held").unlink()
        wait_until_here(mount)
        assert reader.result() == data[16 * MB :]
    assert read(mount.path / "vm" / "ram") == data
