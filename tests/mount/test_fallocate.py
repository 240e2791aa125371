"""Holes and room: fallocate(2), and who else makes holes."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Mount, mounts_below
from mount.posix import (
    KEEP_SIZE,
    NOBODY,
    PAGE,
    PUNCH,
    PUNCH_HOLE,
    ZERO_RANGE,
    counters,
    eventually,
    extents,
    fails,
    fallocate,
    in_child,
    opened,
    page_counts,
    pattern,
    read,
)

COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE = 0x08, 0x20, 0x40


def file_of(here: Path, data: bytes) -> Path:
    (here / "f").write_bytes(data)
    return here / "f"


def stored(mount: Mount) -> int:
    """Bytes that the layers of the store take."""
    return sum(path.stat().st_blocks * 512 for path in (mount.store / "layers").glob("*.ram"))


RANGES = [
    (0, PAGE), (PAGE, 3 * PAGE), (0, 8 * PAGE), (100, 50), (PAGE - 1, 2), (PAGE + 7, 4 * PAGE),
    (5 * PAGE + 1, 9 * PAGE),
]  # fmt: skip


@pytest.mark.parametrize("mode", [PUNCH, ZERO_RANGE | KEEP_SIZE, ZERO_RANGE])
@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_range_becomes_zeros(here: Path, mode: int, offset: int, length: int) -> None:
    """For who reads, who has it mapped, and in the store; at all of them at once."""
    model = bytearray(pattern(8 * PAGE + 500))
    path = file_of(here, bytes(model))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        assert memory[:] == model
        memory[6 * PAGE] = model[6 * PAGE] = 1
        fallocate(fd, mode, offset, length)
        size = len(model)
        model[offset : offset + length] = bytes(min(length, size - offset))
        if mode == ZERO_RANGE:
            model.extend(bytes(max(0, offset + length - len(model))))
        assert os.fstat(fd).st_size == len(model)
        assert memory[:size] == model[:size]
        assert read(path) == model
        memory[offset] = model[offset] = 7
        memory.flush()
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 16 * PAGE) as memory:
        assert memory[: os.preadv(fd, [memory], 0)] == model


def test_a_hole_takes_no_room_at_once(shared: Mount, here: Path) -> None:
    path = file_of(here, pattern(4 << 20))
    before = stored(shared)
    with opened(path) as fd:
        fallocate(fd, PUNCH, 1 << 20, 2 << 20)
        assert before - stored(shared) >= 2 << 20
        assert page_counts(path) == {"owned": 512, "shared": 0, "zero": 512, "absent": 0, "total": 1024}
        assert extents(fd) == [(0, 1 << 20), (3 << 20, 4 << 20)]


def test_a_hole_is_only_the_clones(shared: Mount, here: Path) -> None:
    vm, clone = here / "vm", here / "clone"
    vm.mkdir()
    data = pattern(2 << 20)
    file_of(vm, data)
    (vm / ".snap" / "one").mkdir()
    subprocess.run(["cp", "-r", vm, clone], check=True)
    with opened(clone / "f") as fd:
        fallocate(fd, PUNCH, 0, 1 << 20)
        fallocate(fd, PUNCH, (1 << 20) + 10, 10)
    assert page_counts(clone / "f") == {"owned": 1, "shared": 255, "zero": 256, "absent": 0, "total": 512}
    assert read(clone / "f") == bytes(1 << 20) + data[1 << 20 : (1 << 20) + 10] + bytes(10) + data[(1 << 20) + 20 :]
    assert read(vm / "f") == data
    assert read(vm / ".snap/one/f") == data
    # What both forebears let go of is the clone's alone, and goes with its hole.
    (vm / ".snap" / "one").rmdir()
    (vm / "f").unlink()
    eventually(lambda: stored(shared) < 1.5 * (1 << 20) + others, "the pages under the hole are collected")


others = 4 << 20  # what the module's other tests left in the store, at most


def test_room_comes_back_when_no_snapshot_has_it(shared: Mount, here: Path) -> None:
    path = file_of(here, pattern(8 << 20))
    (here / ".snap" / "one").mkdir()
    with opened(path) as fd:
        fallocate(fd, PUNCH, 0, 8 << 20)
    before = stored(shared)
    (here / ".snap" / "one").rmdir()
    eventually(lambda: before - stored(shared) >= 8 << 20, "the snapshot's pages are collected")


def test_a_large_hole_is_made_while_others_are_served(shared: Mount, here: Path) -> None:
    """In parts of 64 MiB; nothing of it is left out, and what is written to it meanwhile stays."""
    path, size = here / "large", 200 << 20
    chunk = os.urandom(8 << 20)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for offset in range(0, size, len(chunk)):
            os.pwrite(fd, chunk, offset)
        ended = threading.Event()
        served = 0

        def ask() -> None:
            nonlocal served
            while not ended.is_set():
                os.stat(shared.path / ".ramfs" / "status.json")
                counters(shared.path)
                served += 1

        asker = threading.Thread(target=ask)
        asker.start()
        fallocate(fd, PUNCH, 0, size)
        ended.set()
        asker.join()
        assert served
        assert extents(fd) == []
        assert page_counts(path)["zero"] == size // PAGE


def test_work_is_not_done_for_each_page(here: Path) -> None:
    """A terabyte with a page here and there costs what the pages cost."""
    with opened(here / "sparse", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 4 << 40)
        places = [number * (1 << 40) + 12345 * PAGE for number in range(4)]
        for place in places:
            os.pwrite(fd, pattern(PAGE), place)
        assert extents(fd) == [(place, place + PAGE) for place in places]
        fallocate(fd, PUNCH, 0, 4 << 40)
        assert extents(fd) == []


# --- plain allocation ---


def test_room_is_promised_by_growing(here: Path) -> None:
    path = file_of(here, pattern(PAGE + 10))
    with opened(path) as fd:
        os.posix_fallocate(fd, 0, 100)
        assert os.fstat(fd).st_size == PAGE + 10
        fallocate(fd, KEEP_SIZE, 0, 64 * PAGE)
        assert os.fstat(fd).st_size == PAGE + 10
        os.posix_fallocate(fd, PAGE, 9 * PAGE)
        assert os.fstat(fd).st_size == 10 * PAGE
        assert read(path) == pattern(PAGE + 10).ljust(10 * PAGE, b"\0")
        assert extents(fd) == [(0, 2 * PAGE)]  # memory stays sparse


def test_no_room_is_told_before_it_is_needed(here: Path) -> None:
    path = file_of(here, pattern(PAGE))
    space = os.statvfs(here)
    beyond = space.f_bavail * space.f_frsize + (1 << 30)
    with opened(path) as fd:
        for mode in (0, KEEP_SIZE):
            with fails(errno.ENOSPC):
                fallocate(fd, mode, 0, beyond)
        assert os.fstat(fd).st_size == PAGE
        os.ftruncate(fd, beyond)  # needs none
        fallocate(fd, PUNCH, 0, beyond)
        fallocate(fd, ZERO_RANGE, 0, beyond)


def test_what_is_there_needs_no_room(tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
    """A file that fills more than half of its store can be allocated again, with all of its pages."""
    store = tmp_path / "small"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", store], check=True)
    try:
        with make_mount(store=store / "store") as mount:
            (mount.path / "f").write_bytes(pattern(12 << 20))
            with opened(mount.path / "f") as fd:
                os.posix_fallocate(fd, 0, 12 << 20)
                with fails(errno.ENOSPC):
                    os.posix_fallocate(fd, 0, 26 << 20)
                # A hole needs no room either: the store may be full.
                with fails(errno.ENOSPC):
                    for number in range(20):
                        os.pwrite(fd, os.urandom(1 << 20), (12 + number) << 20)
                fallocate(fd, PUNCH, 0, 12 << 20)
                os.pwrite(fd, pattern(4 << 20), 0)
                assert read(mount.path / "f", 0, 4 << 20) == pattern(4 << 20)
    finally:
        subprocess.run(["umount", store], check=True)
        assert not mounts_below(store)


# --- what does not go ---


def test_other_modes_are_refused(here: Path) -> None:
    path = file_of(here, pattern(4 * PAGE))
    with opened(path) as fd:
        for mode in (COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE, PUNCH_HOLE, PUNCH | ZERO_RANGE, 0x80):
            with fails(errno.EOPNOTSUPP):
                fallocate(fd, mode, 0, PAGE)
    assert read(path) == pattern(4 * PAGE)


def test_errors_are_those_of_a_local_file_system(shared: Mount, here: Path) -> None:
    path = file_of(here, pattern(4 * PAGE))
    with opened(path) as fd:
        for offset, length, number in (
            (0, 0, errno.EINVAL), (-1, PAGE, errno.EINVAL), (0, -1, errno.EINVAL),
            (0, 1 << 44, errno.EFBIG), (1 << 44, PAGE, errno.EFBIG), ((1 << 63) - PAGE, PAGE, errno.EFBIG),
        ):  # fmt: skip
            for mode in (0, PUNCH, ZERO_RANGE):
                with fails(number):
                    fallocate(fd, mode, offset, length)
    with opened(path, os.O_RDONLY) as fd, fails(errno.EBADF):
        fallocate(fd, PUNCH, 0, PAGE)
    with opened(here, os.O_RDONLY) as fd, fails(errno.EBADF):
        fallocate(fd, PUNCH, 0, PAGE)
    with opened(shared.path / ".ramfs/control", os.O_WRONLY) as fd, fails(errno.EOPNOTSUPP):
        fallocate(fd, PUNCH, 0, PAGE)
    assert read(path) == pattern(4 * PAGE)


def test_a_frozen_file_keeps_its_pages(tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(options=("template_rdwr", "allow_other"))
    (mount.path / "f").write_bytes(pattern(4 * PAGE))
    (mount.path / "f").chmod(0o6755)
    (mount.path / ".snap" / "one").mkdir()
    frozen = mount.path / ".snap/one/f"
    times = frozen.stat()
    with opened(frozen) as fd:
        for mode in (0, KEEP_SIZE, PUNCH, ZERO_RANGE):
            with fails(errno.EROFS):
                fallocate(fd, mode, 0, 8 * PAGE)
            with fails(errno.EROFS):
                in_child(lambda mode=mode: fallocate(fd, mode, 0, PAGE), user=NOBODY)  # type: ignore[misc]
    after = frozen.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (times.st_mode, times.st_mtime_ns, times.st_size)
    assert read(frozen) == pattern(4 * PAGE)


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, PUNCH, ZERO_RANGE])
def test_times_and_privileges_are_a_writers(public: Mount, mode: int) -> None:
    path = file_of(public.path, pattern(4 * PAGE))
    with opened(path) as fd:
        for user, bits in ((0, 0o6755), (NOBODY, 0o755)):
            os.chmod(fd, 0o6755)
            os.utime(fd, ns=(1, 1))
            changed = os.fstat(fd).st_ctime_ns
            in_child(lambda: fallocate(fd, mode, PAGE, PAGE), user=user)
            status = os.fstat(fd)
            assert stat.S_IMODE(status.st_mode) == bits
            assert status.st_mtime_ns > 1
            assert status.st_ctime_ns > changed


# --- who makes holes ---


def test_madv_remove_gives_memory_back(shared: Mount, here: Path) -> None:
    path = file_of(here, pattern(1 << 20))
    before = stored(shared)
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[5 * PAGE] = 1
        memory.madvise(mmap.MADV_REMOVE, PAGE, 200 * PAGE)
        assert before - stored(shared) >= 200 * PAGE
        expected = pattern(1 << 20)[:PAGE] + bytes(200 * PAGE) + pattern(1 << 20)[201 * PAGE :]
        assert memory[:] == expected
        assert extents(fd) == [(0, PAGE), (201 * PAGE, 1 << 20)]
        memory[7 * PAGE] = 1
        memory.flush()
        assert page_counts(path)["zero"] == 199


def test_a_hole_outlives_the_daemon(mounted: Mount) -> None:
    path = file_of(mounted.path, pattern(1 << 20))
    with opened(path) as fd:
        fallocate(fd, PUNCH, PAGE + 5, 100 * PAGE)
    mounted.kill()
    mounted.start()
    data = pattern(1 << 20)
    assert read(path) == data[: PAGE + 5] + bytes(100 * PAGE) + data[101 * PAGE + 5 :]
    with opened(path) as fd:
        assert extents(fd) == [(0, 2 * PAGE), (101 * PAGE, 1 << 20)]


def test_a_daemon_that_is_killed_fails_neither_holes_nor_seeks(mounted: Mount) -> None:
    """What it did not answer, its successor does; doing it twice is no harm."""
    size, full, store = 128 << 20, 80 << 20, 25_000 * PAGE
    data = os.urandom(full)
    ended = threading.Event()
    rounds: list[list[tuple[int, int]]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with opened(mounted.path / "f", os.O_RDWR | os.O_CREAT) as fd:
                os.ftruncate(fd, size)
                with mmap.mmap(fd, 0) as memory:
                    while not ended.is_set():
                        os.pwrite(fd, data, 0)
                        memory[store] = 1
                        rounds.append(extents(fd))
                        fallocate(fd, PUNCH, 0, size)
                        rounds.append(extents(fd))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(3):
        seen = len(rounds)
        eventually(lambda: len(rounds) > seen + 2 or failures, "it goes on")  # noqa: B023  (called at once)
        mounted.kill_daemon()
    seen = len(rounds)
    eventually(lambda: len(rounds) > seen + 2 or failures, "it goes on")
    ended.set()
    worker.join(60)
    assert not worker.is_alive()
    if failures:
        raise failures[0]
    assert rounds == [[(0, full), (store, store + PAGE)], []] * (len(rounds) // 2)


@pytest.mark.vm
def test_qemu_allocates_its_memory_beforehand(here: Path) -> None:
    """-mem-prealloc: each page is made writable once, and is still nothing but zeros."""
    memory = here / "ram"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-S"]
    command += ["-mem-prealloc", "-mem-path", str(memory), "-qmp", "stdio", "-no-user-config"]
    memory.mkdir()
    done = subprocess.run(
        command, input=b'{"execute":"qmp_capabilities"}{"execute":"quit"}', capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    (block,) = memory.iterdir()
    assert block.stat().st_size == 64 << 20
    assert page_counts(block)["zero"] > 60 << 8
