"""Live files on the native path: the file of a layer on XFS and btrfs, which the kernel lets guests write to."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disk import reflink_disk
from harness import RAMFS, Mount
from mount.posix import (
    KEEP_SIZE,
    PAGE,
    PUNCH,
    Mapping,
    Process,
    counters,
    eventually,
    extents,
    fails,
    fallocate,
    opened,
    page_counts,
    pattern,
    read,
    status,
)

from ramfs.store.repair import check_store

MB = 1 << 20
SIZE = 4 * MB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the kernel serves files itself for root only")

_numbers = itertools.count()


def mapped(path: Path, *, writable: bool = True) -> Mapping:
    with opened(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
        return Mapping(fd, writable=writable)


@pytest.fixture(scope="module")
def disk(module_shm: Path) -> Iterator[Path]:
    with reflink_disk(module_shm, "xfs") as point:
        yield point


@pytest.fixture(scope="module")
def shared(disk: Path, module_shm: Path) -> Iterator[Mount]:
    with Mount(disk / "shared", module_shm / "shared") as mount:
        yield mount
    report = check_store(str(disk / "shared"))
    assert not report.findings, report


@pytest.fixture
def own(disk: Path, tmp_path: Path) -> Iterator[Mount]:
    """A mount that may be killed; its store is checked after the test."""
    store = disk / f"own{next(_numbers)}"
    with Mount(store, tmp_path / "mnt") as mount:
        yield mount
    report = check_store(str(store))
    assert not report.findings, report


@pytest.fixture
def ram(here: Path) -> Path:
    return make(here / "ram")


def make(path: Path, size: int = SIZE) -> Path:
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        os.ftruncate(fd, size)
        os.pwrite(fd, pattern(MB), 0)
    return path


def how(path: Path) -> str:
    """How a file that is open is served: "live", "native" or "cached"."""
    mount = next(parent for parent in path.parents if (parent / ".ramfs").exists())
    files = [file for file in status(mount)["open_files"] if (mount / file["path"]).samefile(path)]
    assert len(files) == 1, files
    return "live" if files[0]["live"] else "native" if files[0]["native"] else "cached"


def idle(mount: Path) -> None:
    eventually(lambda: status(mount)["native"]["live"] == 0, "no file is direct any more")


def released(mount: Path) -> None:
    """The kernel tells of a close a moment after it."""
    eventually(lambda: not status(mount)["open_files"], "all handles are released")


def ramfs(*words: object) -> str:
    done = subprocess.run([*RAMFS, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


# --- against a model ---


@pytest.mark.parametrize("fstype", ["xfs", "btrfs"])
def test_random_work(shm: Path, fstype: str) -> None:
    rng = random.Random(5)
    serial = itertools.count(1)
    with reflink_disk(shm, fstype) as disk:
        mount = Mount(disk / "store", shm / "mnt").start()
        mount.expect("signal 9; going on")
        try:
            _random_work(mount, rng, serial)
            mount.umount()
        finally:
            mount.abandon()
        report = check_store(str(disk / "store"))
        assert not report.findings, report


def _random_work(mount: Mount, rng: random.Random, serial: Iterator[int]) -> None:
    vm, kills = mount.path / "vm", 2
    vm.mkdir()
    model = bytearray()
    fd, memory = os.open(vm / "ram", os.O_RDWR | os.O_CREAT), None
    copies: dict[Path, bytes] = {}

    def check() -> None:
        assert os.fstat(fd).st_size == len(model)
        assert os.pread(fd, len(model) + 1, 0) == model
        for path, data in copies.items():
            assert read(path) == data, path

    for step in range(80):
        kinds = {"write": 20, "append": 4, "map": 20, "truncate": 6, "punch": 8, "snapshot": 5, "cp": 5, "clone": 4}
        kinds |= {"reopen": 4, "remount": 2, "kill": 2, "use copy": 5}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        new = (b"%08d" % next(serial)) * rng.choice((1, 512, 700, 2000))
        at = rng.choice((rng.randrange(SIZE // PAGE) * PAGE, rng.randrange(SIZE)))
        if kind == "write":
            os.pwrite(fd, new, at)
        elif kind == "append":
            at = len(model)
            with opened(vm / "ram", os.O_WRONLY | os.O_APPEND) as other:
                os.write(other, new)
        elif kind == "map" and at + len(new) <= len(model):
            memory = memory or mmap.mmap(fd, 0)
            if len(memory) < at + len(new):
                memory = mmap.mmap(fd, 0)
            memory[at : at + len(new)] = new
        elif kind == "truncate":
            os.ftruncate(fd, at)
            model.extend(bytes(max(0, at - len(model))))
            del model[at:]
            memory = None
        elif kind == "punch":
            length = rng.randrange(1, 40 * PAGE)
            fallocate(fd, PUNCH, at, length)
            length = max(0, min(length, len(model) - at))
            model[at : at + length] = bytes(length)
        elif kind == "snapshot":
            (vm / ".snap" / f"s{step}").mkdir()
            copies[vm / ".snap" / f"s{step}" / "ram"] = bytes(model)
        elif kind in ("cp", "clone"):
            target = mount.path / f"{kind}{step}"
            if kind == "cp":
                subprocess.run(["cp", "-r", vm, target], check=True)
            else:
                ramfs("clone", vm, target)
            copies[target / "ram"] = bytes(model)
        elif kind == "use copy" and copies:
            path = rng.choice(list(copies))
            if ".snap" not in path.parts:
                data = bytearray(copies[path])
                with opened(path) as other:
                    os.pwrite(other, new, at)
                data.extend(bytes(max(0, at - len(data))))
                data[at : at + len(new)] = new
                copies[path] = bytes(data)
        elif kind == "reopen":
            memory = None
            os.close(fd)
            if rng.random() < 0.5:
                idle(mount.path)
                with opened(vm / "ram", os.O_RDONLY) as other:
                    assert how(vm / "ram") == "cached"
                    assert os.pread(other, len(model) + 1, 0) == model
                    if rng.random() < 0.5:  # others wait, and are cached
                        with opened(vm / "ram", os.O_WRONLY) as writer:
                            os.pwrite(writer, new, at)
                        model.extend(bytes(max(0, at - len(model))))
                        model[at : at + len(new)] = new
                released(mount.path)
            fd = os.open(vm / "ram", os.O_RDWR)
        elif kind == "remount":
            memory = None
            os.close(fd)
            if rng.random() < 0.5:
                mount.restart()
            else:
                mount.kill()
                mount.start()
            fd = os.open(vm / "ram", os.O_RDWR)
        elif kind == "kill" and kills:
            kills -= 1
            mount.kill_daemon()
        if kind in ("write", "append") or (kind == "map" and at + len(new) <= len(model)):
            model.extend(bytes(max(0, at - len(model))))
            model[at : at + len(new)] = new
        assert how(vm / "ram") == "live", kind
        if step % 5 == 0:
            check()
    memory = None
    check()
    os.close(fd)


# --- what is native, and when ---


def test_nothing_is_asked_of_the_daemon(shared: Mount, ram: Path) -> None:
    with opened(ram) as fd:
        assert how(ram) == "live"
        before = counters(shared.path)
        memory = mmap.mmap(fd, SIZE)
        memory[2 * MB : 2 * MB + 5] = b"store"
        assert os.pwrite(fd, b"write", 3 * MB) == 5
        assert os.pread(fd, 5, 2 * MB) == b"store"
        assert memory[3 * MB : 3 * MB + 5] == b"write"
        after = counters(shared.path)
        assert (after["reads"], after["writes"]) == (before["reads"], before["writes"])
        assert "ram" in Path("/proc/self/maps").read_text()
        text = ramfs("status", shared.path)
        assert ", native live)" in text, text


def test_the_first_open_decides(shared: Mount, here: Path) -> None:
    path = here / "ram"
    path.write_bytes(pattern(MB))  # O_WRONLY
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with opened(path, flags):
            assert how(path) == "cached"
            with opened(path) as fd, mmap.mmap(fd, MB) as memory:
                assert how(path) == "cached"
                memory[0] = 1
        released(shared.path)
    with opened(path):
        assert how(path) == "live"
        with opened(path, os.O_RDONLY) as fd:
            assert os.pread(fd, 2, 0) == b"\1" + pattern(MB)[1:2]
    with opened(path, os.O_RDONLY):
        assert how(path) == "live"  # until nobody has it
    os.chmod(path, 0o4755)
    idle(shared.path)
    with opened(path):
        assert how(path) == "cached"  # the kernel would not drop set-user-ID


def test_only_where_it_is_wanted_and_possible(
    disk: Path, tmp_path: Path, shm: Path, make_mount: Callable[..., Mount]
) -> None:
    for number, (store, options, expected, why) in enumerate((
        (disk / "frozen", ["native=frozen"], "cached", "native=frozen"),
        (disk / "off", ["native=off"], "cached", "native=off"),
        (disk / "rdwr", ["template_rdwr"], "cached", "template_rdwr"),
        (shm / "tmpfs", [], "cached", "cannot share blocks"),
        (disk / "auto", ["native=auto"], "live", ""),
    )):  # fmt: skip
        mount = make_mount(f"mnt{number}", store=store, options=options)
        path = make(mount.path / "ram")
        with opened(path):
            assert how(path) == expected
            assert why in status(mount.path)["native"]["live_refused"]
        mount.umount()
        mount.start()
        assert read(path, 0, MB) == pattern(MB)
        mount.umount()


def test_a_mapping_keeps_it(shared: Mount, ram: Path) -> None:
    """The handle is closed, and nobody is told when the mapping goes."""
    for writable in (True, False):
        memory = mapped(ram)
        if not writable:
            other = mapped(ram, writable=False)
            memory.close()
            memory = other
        released(shared.path)
        time.sleep(2.2)  # housekeeping looks twice
        assert status(shared.path)["native"]["live"] == 1
        if writable:
            memory[2 * MB] = b"later"
        with opened(ram, os.O_WRONLY) as fd:
            assert how(ram) == "live"
            os.pwrite(fd, b"LATER", 2 * MB + 10)
        assert memory.bytes(2 * MB, 15) == b"later\0\0\0\0\0LATER"
        memory.close()
    idle(shared.path)
    assert read(ram, 2 * MB, 15) == b"later\0\0\0\0\0LATER"


def test_what_readahead_got_meanwhile_is_not_shown_later(shared: Mount, ram: Path) -> None:
    """readahead(2) fills the mount's own cache, which knows nothing of stores."""
    assert read(ram, 0, MB) == pattern(MB)  # native still, then cached
    idle(shared.path)
    assert read(ram, 0, MB) == pattern(MB)
    released(shared.path)
    with opened(ram) as fd, mmap.mmap(fd, SIZE) as memory:
        assert how(ram) == "live"
        reads = counters(shared.path)["reads"]
        os.posix_fadvise(fd, 0, MB, os.POSIX_FADV_WILLNEED)
        eventually(lambda: counters(shared.path)["reads"] > reads, "the mount's cache has pages")
        memory[:MB] = pattern(MB, 2)
    idle(shared.path)
    with opened(ram, os.O_RDONLY) as fd:
        assert how(ram) == "cached"
        assert os.pread(fd, MB, 0) == pattern(MB, 2)


def test_sizes_times_and_holes(shared: Mount, here: Path) -> None:
    path = here / "ram"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, SIZE)
        os.utime(path, ns=(5, 7_000_000_000))
        assert os.stat(path).st_mtime_ns == 7_000_000_000
        assert os.stat(path).st_blocks * 512 == SIZE
        os.pwrite(fd, pattern(5 * PAGE), 10 * PAGE)
        os.pwrite(fd, b"end", SIZE)
        told = os.stat(path)
        assert told.st_size == SIZE + 3
        assert abs(told.st_mtime - time.time()) < 5
        assert extents(fd) == [(10 * PAGE, 15 * PAGE), (SIZE, SIZE + 3)]
        assert page_counts(path)["owned"] == 6
        fallocate(fd, PUNCH, 11 * PAGE, 2 * PAGE)
        assert extents(fd) == [(10 * PAGE, 11 * PAGE), (13 * PAGE, 15 * PAGE), (SIZE, SIZE + 3)]
        fallocate(fd, KEEP_SIZE, 0, 2 * SIZE)
        assert os.stat(path).st_size == SIZE + 3
        fallocate(fd, 0, 0, 2 * SIZE)
        assert os.stat(path).st_size == 2 * SIZE
        with fails(errno.ENXIO):
            os.lseek(fd, 2 * SIZE, os.SEEK_DATA)
        os.fsync(fd)
        assert os.getxattr(path, "user.ramfs.dirty") == b"0"
        os.truncate(path, 12 * PAGE + 1)
        os.truncate(path, SIZE)
        assert os.pread(fd, SIZE, 10 * PAGE) == (pattern(PAGE)).ljust(SIZE - 10 * PAGE, b"\0")
    idle(shared.path)
    with fails(errno.ENODATA):
        os.getxattr(path, "user.ramfs.dirty")
    assert page_counts(path)["owned"] <= 2
    assert read(path, 10 * PAGE) == pattern(PAGE).ljust(SIZE - 10 * PAGE, b"\0")


def test_what_no_table_can_tell_of(own: Mount) -> None:
    """The kernel lets a file grow beyond the largest that ramfs knows: it stays as it is until it is shorter."""
    ram = make(own.path / "ram")
    with opened(ram) as fd:
        os.pwrite(fd, b"far", 1 << 45)
        with fails(errno.EFBIG):
            (own.path / ".snap" / "s").mkdir()
    own.restart()
    assert status(own.path)["native"]["live"] == 1
    with opened(ram, os.O_RDONLY) as fd:
        assert os.pread(fd, 4, 1 << 45) == b"far"
    os.truncate(ram, SIZE)
    idle(own.path)
    assert read(ram, 0, MB) == pattern(MB)


# --- snapshots and copies ---


def test_a_snapshot_is_of_one_moment(here: Path) -> None:
    """Stores go on: what is stored first is in every snapshot that has what is stored after it, in another page."""
    vm = here / "vm"
    vm.mkdir()
    path = make(vm / "ram")
    with opened(path) as fd:
        os.pwrite(fd, bytes(8), 2 * PAGE)
    stop = threading.Event()

    def work() -> None:
        with opened(path) as fd, mmap.mmap(fd, SIZE) as memory:
            for number in itertools.count(1):
                memory[3 * MB : 3 * MB + 8] = memory[MB : MB + 8] = number.to_bytes(8, "little")
                memory[2 * PAGE : 2 * PAGE + 8] = number.to_bytes(8, "little")
                if stop.is_set():
                    return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        last = 0
        for number in range(12):
            (vm / ".snap" / str(number)).mkdir()
            data = read(vm / ".snap" / str(number) / "ram")
            first, second, third = (int.from_bytes(data[at : at + 8], "little") for at in (3 * MB, MB, 2 * PAGE))
            assert first >= second >= third >= first - 1
            assert third >= last, "it is not of the moment after the one before"
            last = third
            assert data == read(vm / ".snap" / str(number) / "ram")
    finally:
        stop.set()
        thread.join()
    assert last > 0


def test_frozen_files_are_native_and_copies_may_become_so(shared: Mount, ram: Path) -> None:
    with opened(ram) as fd, mmap.mmap(fd, SIZE) as memory:
        memory[2 * MB : 2 * MB + 4] = b"snap"
        (ram.parent / ".snap" / "s").mkdir()
        memory[2 * MB : 2 * MB + 4] = b"more"
        frozen = ram.parent / ".snap" / "s" / "ram"
        with opened(frozen, os.O_RDONLY) as other:
            assert how(frozen) == "native"
            assert os.pread(other, 4, 2 * MB) == b"snap"
        subprocess.run(["cp", "-r", frozen.parent, shared.path / "clone"], check=True)
        copy = shared.path / "clone" / "ram"
        assert page_counts(copy)["owned"] == 0
        with opened(copy) as other, mmap.mmap(other, SIZE) as clone:
            assert how(copy) == "live"
            assert clone[2 * MB : 2 * MB + 4] == b"snap"
            counts = page_counts(copy)
            assert (counts["owned"], counts["shared"]) == (0, MB // PAGE + 1)
            clone[:4] = b"mine"
            clone.flush()
            assert page_counts(copy)["owned"] == 1
            assert memory[2 * MB : 2 * MB + 4] == b"more"
            assert memory[:MB] == pattern(MB)
            # Into one that is native itself, at other offsets too.
            assert os.copy_file_range(fd, other, MB, 0, 3 * MB) == MB
            assert os.copy_file_range(fd, other, 3 * PAGE, 5, 7 * PAGE) == 3 * PAGE
            assert clone[3 * MB :] == pattern(MB)
            assert clone[7 * PAGE : 10 * PAGE] == pattern(MB)[5 : 5 + 3 * PAGE]
    assert read(frozen, 2 * MB, 4) == b"snap"


def test_rounds_before_a_snapshot_see_what_is_dirty(shared: Mount, ram: Path) -> None:
    with opened(ram) as fd, mmap.mmap(fd, SIZE) as memory:
        memory[: 3 * MB] = pattern(3 * MB, 4)
        told = json.loads(ramfs("snapshot", ram.parent, "s", "--json"))
        assert told["flushed"] >= 2 * MB, told
        assert len(told["rounds"]) == 2, told
    assert read(ram.parent / ".snap" / "s" / "ram", 0, 3 * MB) == pattern(3 * MB, 4)


def fill_up(write: Callable[[], object]) -> None:
    while True:
        try:
            write()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return


def test_a_full_disk(shm: Path) -> None:
    """Calls are told; a store into a page that has no place is SIGBUS, as in any file of that disk."""
    with reflink_disk(shm, "xfs") as disk, Mount(disk / "store", shm / "mnt") as mount:
        mount.expect("No space left|reserve|disk is full")
        ram = make(mount.path / "ram")
        with opened(ram) as fd, mmap.mmap(fd, SIZE) as memory:
            filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
            for size in (MB, PAGE):
                fill_up(lambda size=size: os.write(filler, bytes(size)))
            os.close(filler)
            places = iter(range(2 * MB, SIZE, PAGE))
            fill_up(lambda: os.pwrite(fd, b"x", next(places)))
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                for at in range(2 * MB, SIZE, PAGE):
                    memory[at] = 1
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
            memory[:4] = b"fine"  # this page has its place
            os.unlink(disk / "filler")
            os.pwrite(fd, b"end", SIZE - 3)
            assert memory[:4] + memory[-3:] == b"fineend"


# --- daemons die ---


def steady(path: Path, stop: Callable[[], bool]) -> int:
    """Store to pages at random, and look that each has what was stored last; returns how many stores there were."""
    rng, last = random.Random(3), {}
    with opened(path) as fd, mmap.mmap(fd, SIZE) as memory:
        for number in itertools.count(1):
            page = rng.randrange(SIZE // PAGE)
            found = memory[page * PAGE : (page + 1) * PAGE]
            assert page not in last or found == last[page].to_bytes(8, "little") * (PAGE // 8), page
            memory[page * PAGE : (page + 1) * PAGE] = number.to_bytes(8, "little") * (PAGE // 8)
            last[page] = number
            if stop():
                return number
    raise AssertionError


def test_the_next_daemon_goes_on(own: Mount) -> None:
    """kill -9 and upgrades under stores that are checked: nobody waits, and all that is asked later is right."""
    ram = make(own.path / "ram")
    done = threading.Event()
    counted: list[int] = []
    thread = threading.Thread(target=lambda: counted.append(steady(ram, done.is_set)))
    thread.start()
    try:
        for turn in range(3):
            old = own.pid
            if turn == 2:
                own.wait_until_supervised()
                ramfs("upgrade", own.path)
            else:
                own.kill_daemon()
            eventually(lambda old=old: status(own.path)["pid"] != old, "another daemon serves")
            assert how(ram) == "live"
            (own.path / ".snap" / str(turn)).mkdir()
            assert len(read(own.path / ".snap" / str(turn) / "ram")) == SIZE
    finally:
        done.set()
        thread.join()
    assert counted
    assert counted[0] > 1000
    idle(own.path)


def test_a_mapping_outlives_the_mount(own: Mount) -> None:
    """Daemon and supervisor are killed: the guest stores on, and who opens the file in the next mount sees it."""
    ram = make(own.path / "ram")
    with Process(lambda: None):
        memory = mapped(ram)
        memory[2 * MB] = b"before"
        own.kill()
        memory[2 * MB] = b"meantime"
        own.start()
        assert read(ram, 2 * MB, 8) == b"meantime"
        with opened(ram, os.O_RDONLY) as fd:
            assert how(ram) == "live"
            memory[2 * MB] = b"later on"
            assert os.pread(fd, 8, 2 * MB) == b"later on"
        (own.path / ".snap" / "s").mkdir()
        memory[2 * MB] = b"at last!"
        assert read(own.path / ".snap" / "s" / "ram", 2 * MB, 8) == b"later on"
        own.restart()
        assert status(own.path)["native"]["live"] == 1
        assert read(ram, 2 * MB, 8) == b"at last!"
        memory.close()
    idle(own.path)
    assert read(ram, 0, MB) == pattern(MB)
    assert read(ram, 2 * MB, 8) == b"at last!"


def test_space_comes_back(own: Mount) -> None:
    ram = make(own.path / "ram")
    with opened(ram) as fd, mmap.mmap(fd, SIZE) as memory:
        memory[:] = pattern(SIZE, 3)
        os.fsync(fd)
        subprocess.run(["cp", ram, own.path / "copy"], check=True)
        fallocate(fd, PUNCH, 0, SIZE)
        os.unlink(own.path / "copy")
        own.path.joinpath(".snap", "s").mkdir()
        own.path.joinpath(".snap", "s").rmdir()
        eventually(lambda: status(own.path)["store_bytes"]["layers"] < MB, "the pages are given back")
        ram.unlink()
        memory[:4] = b"here"
        assert os.pread(fd, 4, 0) == b"here"
    eventually(lambda: status(own.path)["layers"]["total"] == 0, "no layer is left")


# --- views ---


def test_a_view_shows_what_is_in_memory(shared: Mount, ram: Path) -> None:
    """The layer's file is the guest's memory. A view that is open neither keeps a file from being live nor live."""
    with opened(ram.parent / ".guest/physmem", os.O_RDONLY) as view:
        assert os.pread(view, 2 * MB, 0) == pattern(MB) + bytes(MB)
        with opened(ram, os.O_RDWR) as fd, Mapping(fd, writable=True) as memory:
            assert how(ram) == "live"
            memory[2 * MB + 5] = b"stored"
            assert os.pread(view, 16, 2 * MB) == bytes(5) + b"stored" + bytes(5)
            assert os.lseek(view, MB, os.SEEK_DATA) == 2 * MB
        idle(shared.path)
        assert os.pread(view, 6, 2 * MB + 5) == b"stored"
