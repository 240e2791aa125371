"""The native path: frozen files of one layer that the kernel serves from the store by itself."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import RAMFS, Mount
from mount.posix import (
    PAGE,
    PUNCH,
    Mapping,
    Process,
    counters,
    errno_of,
    eventually,
    fails,
    fallocate,
    opened,
    pattern,
    read,
    status,
)

from ramfs.store.cachestat import cachestat

MB = 1 << 20
SIZE = 4 * MB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the kernel serves files itself for root only")


def write(path: Path, *parts: tuple[int, bytes], size: int = SIZE) -> bytes:
    """Make or change a file as a guest does: of full size first, then parts of it. Returns its contents."""
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, size)
        for offset, data in parts:
            assert os.pwrite(fd, data, offset) == len(data)
    return read(path)


def copy(source: Path, target: Path) -> None:
    """A clone that shares pages, as cp makes it."""
    subprocess.run(["cp", "-r", source, target], check=True)


def freeze(directory: Path, name: str = "s") -> Path:
    path = directory / ".snap" / name
    path.mkdir()
    return path / "ram"


def natives(mount: Path) -> dict[str, bool]:
    """The open files of a mount: is each native?"""
    return {file["path"]: file["native"] for file in status(mount)["open_files"]}


def is_native(path: Path) -> bool:
    """Open a file, and see whether the kernel serves it; its contents go through no request then."""
    mount = next(parent for parent in path.parents if (parent / ".ramfs").exists())
    with opened(path, os.O_RDONLY) as fd:
        (native,) = [file["native"] for file in status(mount)["open_files"] if (mount / file["path"]).samefile(path)]
        before = counters(mount)["reads"]
        assert os.pread(fd, PAGE, 0) is not None
        if native:
            assert counters(mount)["reads"] == before
    return native


def cached(fd: int) -> int:
    """Pages of a file in the page cache (cachestat)."""
    told = cachestat(fd)
    assert told is not None
    return int(told.cached)


@pytest.fixture
def vm(here: Path) -> Path:
    """A directory whose one file was written by one guest."""
    path = here / "vm"
    path.mkdir()
    write(path / "ram", (0, pattern(MB)), (3 * MB, pattern(5 * PAGE, 2)))
    return path


# --- what is native, and what it reads as ---


def test_a_frozen_file_of_one_layer(shared: Mount, vm: Path) -> None:
    frozen, expected = freeze(vm), read(vm / "ram")
    before = counters(shared.path)
    with opened(frozen, os.O_RDONLY) as fd:
        assert natives(shared.path) == {str(frozen.relative_to(shared.path)): True}
        assert os.pread(fd, SIZE + 1, 0) == expected
        assert os.pread(fd, PAGE, SIZE) == b""
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as memory:
            assert memory[:] == expected
            assert str(frozen) in Path("/proc/self/maps").read_text()
        assert cached(fd) == 0  # it is in memory once, as the layer
        os.fsync(fd)
        with opened(vm / "copy", os.O_RDWR | os.O_CREAT) as target:
            assert os.copy_file_range(fd, target, SIZE, 0, 0) == SIZE
            assert os.sendfile(target, fd, 0, PAGE) == PAGE
        assert os.lseek(fd, 0, os.SEEK_END) == SIZE
    assert counters(shared.path)["reads"] == before["reads"]
    assert counters(shared.path)["errors"] == before["errors"]
    told = status(shared.path)["native"]
    assert (told["files"], told["live"], told["refused"]) == (0, 0, "")
    assert read(vm / "copy") == expected


def test_the_parent_goes_on(shared: Mount, vm: Path) -> None:
    frozen, expected = freeze(vm), read(vm / "ram")
    with opened(frozen, os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as memory:
        write(vm / "ram", (0, pattern(MB, 9)), (2 * MB, pattern(MB, 8)))
        (vm / "ram").unlink()
        assert memory[:] == expected
        assert os.pread(fd, SIZE, 0) == expected
        assert natives(shared.path) == {str(frozen.relative_to(shared.path)): True}


def test_all_inodes_on_a_layer_share_its_memory(shared: Mount, vm: Path) -> None:
    one, two = freeze(vm, "one"), freeze(vm, "two")
    assert one.stat().st_ino != two.stat().st_ino
    before = counters(shared.path)["reads"]
    with opened(one, os.O_RDONLY) as first, opened(two, os.O_RDONLY) as second:
        assert set(natives(shared.path).values()) == {True}
        with (
            mmap.mmap(first, SIZE, prot=mmap.PROT_READ) as left,
            mmap.mmap(second, SIZE, prot=mmap.PROT_READ) as right,
        ):
            assert left[:] == right[:]
            smaps = Path("/proc/self/smaps").read_text().split(str(two))[1]
            fields = dict(line.split()[:2] for line in smaps.splitlines()[1:] if line.endswith("kB"))
            assert int(fields["Pss:"]) <= int(fields["Rss:"]) // 2 + 64, "the two mappings have pages of their own"
    assert counters(shared.path)["reads"] == before


def grown(ram: Path) -> None:
    with opened(ram) as fd:
        os.ftruncate(fd, SIZE + MB)


def zeroed(ram: Path) -> None:
    freeze(ram.parent, "before")  # so that the page stays in the layer
    write(ram, (PAGE, bytes(PAGE)))


def cut(ram: Path) -> None:
    freeze(ram.parent, "before")
    with opened(ram) as fd:
        os.ftruncate(fd, MB // 2)


def emptied(ram: Path) -> None:
    with opened(ram) as fd:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, SIZE)


def ragged(ram: Path) -> None:
    with opened(ram) as fd:
        os.pwrite(fd, b"end", SIZE)


def shifted(ram: Path) -> None:
    with opened(ram) as fd, opened(ram.with_name("other"), os.O_RDWR | os.O_CREAT) as other:
        os.copy_file_range(fd, other, MB, 0, PAGE)
    os.rename(ram.with_name("other"), ram)


def second_layer(ram: Path) -> None:
    freeze(ram.parent, "before")
    write(ram, (2 * MB, pattern(PAGE, 3)))


@pytest.mark.parametrize(
    ("change", "native"),
    [
        (grown, True),
        (zeroed, False),
        (cut, False),
        (emptied, False),
        (ragged, False),
        (shifted, False),
        (second_layer, False),
    ],
)
def test_what_reads_as_its_layer_and_what_does_not(vm: Path, change: Callable[[Path], None], native: bool) -> None:
    change(vm / "ram")
    expected = read(vm / "ram")
    frozen = freeze(vm)
    assert is_native(frozen) is native
    assert read(frozen) == expected
    with opened(frozen, os.O_RDONLY) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        assert memory[:] == expected


def test_a_file_that_was_written_by_appending(here: Path) -> None:
    """Its layer's file grew in steps, and was too long until it was frozen."""
    (here / "vm").mkdir()
    with open(here / "vm" / "ram", "wb") as file:
        file.writelines(pattern(25 * PAGE, number) for number in range(11))
    frozen = freeze(here / "vm")
    assert is_native(frozen)
    assert read(frozen) == read(here / "vm" / "ram")


def test_live_files_and_clones_are_not(shared: Mount, vm: Path) -> None:
    frozen = freeze(vm)
    copy(frozen.parent, vm.with_name("clone"))
    for path in (vm / "ram", vm.with_name("clone") / "ram"):
        assert not is_native(path)
    dense = vm.with_name("dense")
    dense.mkdir()
    os.link(frozen, dense / "ram")
    assert is_native(dense / "ram")


# --- one inode, one way ---


def test_many_open_at_once(shared: Mount, vm: Path) -> None:
    frozen, expected = freeze(vm), read(vm / "ram")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert read(frozen, PAGE, PAGE) == expected[PAGE : 2 * PAGE]
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    eventually(lambda: not natives(shared.path), "all handles are released")


def test_with_the_last_handle_the_layer_is_let_go(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "vm").mkdir()
    write(mount.path / "vm" / "ram", (0, pattern(MB)))
    frozen = freeze(mount.path / "vm")
    mount.restart()  # a daemon that has no layer open itself
    (layer,) = (mount.store / "layers").glob("*.ram")

    def held() -> bool:
        with opened(layer, os.O_RDONLY) as fd:
            return errno_of(lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)) == errno.EAGAIN

    assert not held()
    for _ in range(3):
        with opened(frozen, os.O_RDONLY), opened(frozen, os.O_RDONLY):
            assert held()
        eventually(lambda: not held(), "nobody has the layer open")


# --- no write reaches a layer ---


def test_nothing_can_be_written(vm: Path) -> None:
    frozen, expected = freeze(vm), read(vm / "ram")
    with opened(frozen, os.O_RDONLY) as fd:
        assert is_native(frozen)
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
            assert errno_of(lambda flags=flags: os.close(os.open(frozen, flags))) == errno.EROFS
        # By another way to the same inode, which knows nothing of the first.
        assert errno_of(lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))) == errno.EROFS
        assert errno_of(lambda: os.truncate(frozen, 0)) == errno.EROFS
        assert errno_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EBADF
        assert errno_of(lambda: os.ftruncate(fd, 0)) == errno.EINVAL
        assert errno_of(lambda: os.posix_fallocate(fd, 0, PAGE)) == errno.EBADF
        with fails(errno.EBADF):
            fallocate(fd, PUNCH, 0, PAGE)
        with fails(errno.EACCES):
            mmap.mmap(fd, SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with Mapping(fd) as memory:
            with fails(errno.EACCES):
                memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
            with fails(errno.EACCES):
                memory.advise(mmap.MADV_REMOVE)
        assert os.pread(fd, SIZE, 0) == expected
    assert read(vm / "ram") == expected


def test_a_private_mapping_is_written_for_oneself(vm: Path) -> None:
    """As QEMU maps the memory of a dense clone: readonly=on, share=off, rom=off."""
    frozen, expected = freeze(vm), read(vm / "ram")

    def work() -> mmap.mmap:
        with opened(frozen, os.O_RDONLY) as fd:
            memory = mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        memory[0 : 2 * MB] = pattern(2 * MB, 7)
        return memory

    with Process(work), opened(frozen, os.O_RDONLY) as fd:
        memory = mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert memory[:] == expected
        memory[:PAGE] = pattern(PAGE, 5)
        assert os.pread(fd, SIZE, 0) == expected
        memory.close()
    assert read(vm / "ram") == expected


def test_what_may_be_opened_for_writing_is_not_native(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(options=["template_rdwr"])
    (mount.path / "vm").mkdir()
    expected = write(mount.path / "vm" / "ram", (0, pattern(MB)))
    frozen = freeze(mount.path / "vm")
    assert not is_native(frozen)
    with opened(frozen, os.O_RDONLY) as reader, opened(frozen) as fd:
        assert errno_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EROFS
        with fails(errno.ENODEV):
            mmap.mmap(fd, SIZE)
        with mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE) as memory:
            memory[0] = 0
        assert os.pread(reader, SIZE, 0) == expected
    assert "template_rdwr" in status(mount.path)["native"]["refused"]


# --- who keeps the pages ---


def test_a_mapping_outlives_its_handle_and_its_snapshot(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "vm").mkdir()
    expected = write(mount.path / "vm" / "ram", (0, pattern(MB)), (2 * MB, pattern(MB)))
    frozen = freeze(mount.path / "vm")
    copy(frozen.parent, mount.path / "clone")
    with opened(frozen, os.O_RDONLY) as fd:
        memory = Mapping(fd)
    eventually(lambda: not natives(mount.path), "the handle is released")
    frozen.parent.rmdir()
    (mount.path / "vm" / "ram").unlink()
    # Another file names some of the layer's pages; the others are garbage once nobody has them mapped.
    write(mount.path / "clone" / "ram", (0, bytes(MB)))
    passes = counters(mount.path)["garbage_passes"]
    eventually(lambda: counters(mount.path)["garbage_passes"] > passes, "a garbage pass")
    assert memory.bytes() == expected
    memory.close()
    mount.restart()  # the kernel remembers the inode for long, now that its snapshot is gone
    eventually(lambda: status(mount.path)["store_bytes"]["layers"] < 2 * MB, "the pages are given back")
    assert read(mount.path / "clone" / "ram") == bytes(2 * MB) + pattern(MB) + bytes(MB)


def test_a_mapping_outlives_a_killed_daemon(make_mount: Callable[..., Mount]) -> None:
    """Its pages stay as they are, whatever the next daemon finds to be garbage."""
    mount = make_mount()
    (mount.path / "vm").mkdir()
    expected = write(mount.path / "vm" / "ram", (0, pattern(MB)), (2 * MB, pattern(MB)))
    frozen = freeze(mount.path / "vm")
    with opened(frozen, os.O_RDONLY) as fd:
        memory = Mapping(fd)
    mount.kill()
    mount.start()
    for turn in range(2):
        if turn:
            mount.restart()
        else:
            copy(frozen.parent, mount.path / "clone")
            frozen.parent.rmdir()
            (mount.path / "vm" / "ram").unlink()
            write(mount.path / "clone" / "ram", (0, bytes(MB)))
        passes = counters(mount.path)["garbage_passes"]
        (mount.path / "other").write_bytes(bytes(range(256)) * 16)
        (mount.path / "other").unlink()
        eventually(lambda passes=passes: counters(mount.path)["garbage_passes"] > passes, "a garbage pass")
        assert memory.bytes() == expected
    memory.close()
    mount.restart()
    eventually(lambda: status(mount.path)["store_bytes"]["layers"] < 2 * MB, "the pages are given back")


def test_the_next_daemon_goes_on(make_mount: Callable[..., Mount]) -> None:
    """What is native stays so, what is cached stays so, and mapped files do not even notice."""
    mount = make_mount()
    (mount.path / "vm").mkdir()
    expected = write(mount.path / "vm" / "ram", (0, pattern(MB)), (2 * MB, pattern(MB)))
    frozen = freeze(mount.path / "vm")
    second_layer(mount.path / "vm" / "ram")
    cached_one = freeze(mount.path / "vm", "two-layers")
    layer = min((mount.store / "layers").glob("*.ram"))
    with opened(frozen, os.O_RDONLY) as fd, opened(cached_one, os.O_RDONLY) as other, Mapping(fd) as memory:
        old = mount.kill_daemon()
        assert memory.bytes() == expected  # while nobody serves the mount
        assert os.pread(fd, SIZE, 0) == expected
        eventually(lambda: status(mount.path)["pid"] != old, "another daemon serves")
        run = subprocess.run([*RAMFS, "flatten", cached_one], capture_output=True, text=True, check=False)
        assert "flattened" in run.stdout, run
        for path, native in ((frozen, True), (cached_one, False)):
            with opened(path, os.O_RDONLY) as again:
                assert os.pread(again, SIZE, 0) == read(path)
                told = {file["path"]: file["native"] for file in status(mount.path)["open_files"]}
                assert told[str(path.relative_to(mount.path))] is native
        assert os.pread(other, SIZE, 0) == read(cached_one)
    eventually(lambda: not natives(mount.path), "all handles are released")
    assert is_native(cached_one)

    def held() -> bool:
        with opened(layer, os.O_RDONLY) as fd:
            return errno_of(lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)) == errno.EAGAIN

    eventually(lambda: not held(), "the kernel has let go of the layer")


# --- where it cannot be ---


def test_it_can_be_turned_off(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(options=["native=auto", "native=off"])
    (mount.path / "vm").mkdir()
    expected = write(mount.path / "vm" / "ram", (0, pattern(MB)))
    frozen = freeze(mount.path / "vm")
    assert not is_native(frozen)
    assert read(frozen) == expected
    assert status(mount.path)["native"]["refused"] == "the mount option native=off"


def test_a_store_on_a_stacked_file_system(tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    parts = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", parts, tmp_path / "merged"], check=True)
    try:
        mount = make_mount(store=tmp_path / "merged" / "store")
        (mount.path / "vm").mkdir()
        expected = write(mount.path / "vm" / "ram", (0, pattern(MB)))
        frozen = freeze(mount.path / "vm")
        assert not is_native(frozen)
        assert read(frozen) == expected
        assert "stacked" in status(mount.path)["native"]["refused"]
        mount.umount()
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_a_lost_page_is_not_served(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    mount.expect("shorter than its pages|was lost")
    (mount.path / "vm").mkdir()
    expected = write(mount.path / "vm" / "ram", (0, pattern(SIZE)))
    frozen = freeze(mount.path / "vm")
    assert is_native(frozen)
    (layer,) = (mount.store / "layers").glob("*.ram")

    def last_page_is_lost() -> None:
        assert not is_native(frozen)
        assert read(frozen, 0, SIZE - PAGE) == expected[:-PAGE]
        with opened(frozen, os.O_RDONLY) as fd, fails(errno.EIO):
            os.pread(fd, PAGE, SIZE - PAGE)

    mount.umount()
    os.truncate(layer, SIZE - PAGE)
    mount.start()
    last_page_is_lost()
    mount.umount()
    fsck = [*RAMFS, "fsck", "--repair", mount.store]
    assert subprocess.run(fsck, capture_output=True, check=False).returncode == 1
    os.truncate(layer, SIZE)
    mount.start()
    last_page_is_lost()


def test_without_the_privilege_files_are_cached(tmp_path: Path) -> None:
    """Root of a user namespace may mount, and no more."""
    (tmp_path / "mnt").mkdir()
    shell = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", _UNPRIVILEGED]
    done = subprocess.run([*shell, tmp_path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.split("\n") == ["right", "False", "the daemon lacks CAP_SYS_ADMIN", ""]


_UNPRIVILEGED = """
import json, os, subprocess, sys
base = sys.argv[1]
mnt = base + "/mnt"
ramfs = [sys.executable, "-m", "ramfs"]
subprocess.run([*ramfs, "mount", "-o", "native=frozen", base + "/store", mnt], check=True)
os.mkdir(mnt + "/vm")
with open(mnt + "/vm/ram", "wb") as file:
    file.write(bytes(range(256)) * 4096)
os.mkdir(mnt + "/vm/.snap/s")
with open(mnt + "/vm/.snap/s/ram", "rb") as file:
    print("right" if file.read() == bytes(range(256)) * 4096 else "wrong")
    status = json.load(open(mnt + "/.ramfs/status.json"))
    print(status["open_files"][0]["native"], status["native"]["refused"], sep="\\n")
subprocess.run([*ramfs, "umount", mnt], check=True)
"""
