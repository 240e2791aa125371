"""SEEK_DATA and SEEK_HOLE: what lies where, also when the daemon has not been told yet."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import PAGE, PUNCH, Process, eventually, extents, fails, fallocate, opened, pattern, read

from ramfs.cli._states import read_zeros, zero_runs
from ramfs.store.cachestat import dirty_bytes

SIZE = 256 * PAGE


@pytest.fixture
def path(here: Path) -> Path:
    """A file of zeros with pages 10 to 19 stored."""
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, pattern(10 * PAGE), 10 * PAGE)
    return here / "f"


def pages_of(path: Path, flags: int = os.O_RDONLY) -> list[tuple[int, int]]:
    """The extents, in pages."""
    with opened(path, flags) as fd:
        return [(start // PAGE, -(-stop // PAGE)) for start, stop in extents(fd)]


def test_the_offsets(path: Path) -> None:
    for flags in (os.O_RDONLY, os.O_RDWR):
        with opened(path, flags) as fd:
            for offset, data, hole in (
                (0, 10 * PAGE, 0), (5 * PAGE + 7, 10 * PAGE, 5 * PAGE + 7), (10 * PAGE, 10 * PAGE, 20 * PAGE),
                (15 * PAGE + 9, 15 * PAGE + 9, 20 * PAGE), (20 * PAGE - 1, 20 * PAGE - 1, 20 * PAGE),
            ):  # fmt: skip
                assert os.lseek(fd, offset, os.SEEK_DATA) == data
                assert os.lseek(fd, offset, os.SEEK_HOLE) == hole
            for offset in (20 * PAGE, SIZE - 1, SIZE, SIZE + 1, 1 << 50, -1):
                with fails(errno.ENXIO):
                    os.lseek(fd, offset, os.SEEK_DATA)
            assert os.lseek(fd, SIZE - 1, os.SEEK_HOLE) == SIZE - 1
            for offset in (SIZE, SIZE + 1, 1 << 50, -1):
                with fails(errno.ENXIO):
                    os.lseek(fd, offset, os.SEEK_HOLE)
            assert os.lseek(fd, 0, os.SEEK_END) == SIZE


def test_the_end_is_a_hole(here: Path) -> None:
    (here / "f").write_bytes(pattern(PAGE + 100))
    with opened(here / "f") as fd:
        assert os.lseek(fd, 5, os.SEEK_HOLE) == PAGE + 100
        assert extents(fd) == [(0, PAGE + 100)]
        os.ftruncate(fd, 0)
        with fails(errno.ENXIO):
            os.lseek(fd, 0, os.SEEK_HOLE)


def test_owned_and_shared_pages_are_data(here: Path) -> None:
    vm, clone = here / "vm", here / "clone"
    vm.mkdir()
    (vm / "f").write_bytes(bytes(4 * PAGE) + pattern(4 * PAGE) + bytes(8 * PAGE))
    (vm / ".snap" / "one").mkdir()
    subprocess.run(["cp", "-r", vm, clone], check=True)
    with opened(clone / "f") as fd:
        os.pwrite(fd, pattern(PAGE), 12 * PAGE)
        fallocate(fd, PUNCH, 4 * PAGE, PAGE)
        # At another place of the file, where no page can be shared under its own number.
        os.copy_file_range(fd, fd, PAGE, 5 * PAGE, 14 * PAGE)
    assert pages_of(vm / "f") == pages_of(vm / ".snap/one/f") == [(4, 8)]
    assert pages_of(clone / "f") == pages_of(clone / "f", os.O_RDWR) == [(5, 8), (12, 13), (14, 15)]


def test_stores_into_a_mapping_are_data(path: Path) -> None:
    with opened(path) as fd:
        memory = mmap.mmap(fd, 0)
    with memory:  # its descriptor is closed
        memory[30 * PAGE] = 1
        assert pages_of(path) == [(10, 20), (30, 31)]
        memory[20 * PAGE : 22 * PAGE] = pattern(2 * PAGE)
        memory[0] = 1
        assert pages_of(path) == [(0, 1), (10, 22), (30, 31)]
        memory[SIZE - 1] = 1
        with opened(path, os.O_RDONLY) as fd:
            assert os.lseek(fd, 40 * PAGE, os.SEEK_DATA) == SIZE - PAGE
            assert os.lseek(fd, SIZE - PAGE, os.SEEK_HOLE) == SIZE


def test_zeros_in_a_mapping_are_a_hole(path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[12 * PAGE : 15 * PAGE] = bytes(3 * PAGE)
        assert pages_of(path) == [(10, 12), (15, 20)]
        memory[10 * PAGE : 20 * PAGE] = bytes(10 * PAGE)
        assert os.lseek(fd, 10 * PAGE, os.SEEK_HOLE) == 10 * PAGE
        assert pages_of(path) == []


def test_many_dirty_pages(here: Path) -> None:
    """Each is a WRITE of its own: all must have been answered before the LSEEK is."""
    count = 600
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 2 * count * PAGE)
        with mmap.mmap(fd, 0) as memory:
            for number in range(count):
                memory[2 * number * PAGE] = 1
            assert os.lseek(fd, PAGE, os.SEEK_DATA) == 2 * PAGE
            assert pages_of(here / "f") == [(2 * number, 2 * number + 1) for number in range(count)]


def test_a_lseek_writes_back_no_more_than_it_needs(shared: Mount, path: Path) -> None:
    """A guest's memory is not flushed as a whole because somebody looks where its data is."""
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[100 * PAGE : 200 * PAGE] = pattern(100 * PAGE)
        assert os.lseek(fd, 10 * PAGE, os.SEEK_DATA) == 10 * PAGE
        assert os.lseek(fd, 12 * PAGE, os.SEEK_DATA) == 12 * PAGE
        table = next((shared.store / "tables").glob(f"{image_of(shared, path):08x}.map"))
        assert table.read_bytes()[PAGE + 400 : PAGE + 800] == bytes(400)
        assert os.lseek(fd, 20 * PAGE, os.SEEK_DATA) == 100 * PAGE


def image_of(mount: Mount, path: Path) -> int:
    """The table that was changed last is that of the file that was written last."""
    tables = sorted((mount.store / "tables").glob("*.map"), key=lambda table: table.stat().st_mtime_ns)
    assert path.stat().st_size == SIZE
    return int(tables[-1].stem, 16)


def test_a_file_without_a_name_is_all_data(path: Path) -> None:
    """Nobody can open it to have its dirty pages written back; so what is not known counts as data."""
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        path.unlink()
        memory[30 * PAGE] = 1
        assert extents(fd) == [(0, SIZE)]


def test_another_name_serves_as_well(path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        os.link(path, path.with_name("g"))
        path.unlink()
        memory[30 * PAGE] = 1
        path.with_name("g").rename(path.with_name("h"))
        assert extents(fd) == [(10 * PAGE, 20 * PAGE), (30 * PAGE, 31 * PAGE)]


def helpers(mount: Mount) -> list[int]:
    """The processes that write back for the daemon."""
    tasks = Path(f"/proc/{mount.pid}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    return [pid for pid in children if b"flush_helper" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_helper_that_hangs_holds_nobody_up(shared: Mount, path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[30 * PAGE] = 1
        eventually(lambda: "INFO: mounted" in shared.log, "the helper has nothing to do")
        stopped = helpers(shared)
        assert stopped
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            assert os.lseek(fd, 0, os.SEEK_DATA) == 0  # all of it counts as data
            assert 4 < time.monotonic() - begun < 15
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert extents(fd) == [(10 * PAGE, 20 * PAGE), (30 * PAGE, 31 * PAGE)]


def test_a_helper_that_was_killed_is_replaced(shared: Mount, path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[30 * PAGE] = 1
        killed = helpers(shared)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert extents(fd) == [(10 * PAGE, 20 * PAGE), (30 * PAGE, 31 * PAGE)]
        assert not set(killed) & set(helpers(shared))


def test_it_goes_with_everything_else(shared: Mount, here: Path, path: Path) -> None:
    """What takes the file's lock in the kernel, or its directory's, waits for a LSEEK and never the other way round."""
    end = time.monotonic() + 2.5
    longest = 0.0
    rounds: dict[str, int] = {}
    failures: list[BaseException] = []

    def look() -> None:
        nonlocal longest
        with opened(path) as fd:
            begun = time.monotonic()
            os.lseek(fd, 40 * PAGE, os.SEEK_HOLE)
            os.lseek(fd, 0, os.SEEK_DATA)
            longest = max(longest, time.monotonic() - begun)

    def dirty() -> None:
        with opened(path) as fd, mmap.mmap(fd, 0) as memory:
            for number in range(40, 250):
                memory[number * PAGE] = 1
            fallocate(fd, PUNCH, 40 * PAGE, 200 * PAGE)

    def sync() -> None:
        with opened(path) as fd:
            os.fsync(fd)
            os.pwrite(fd, b"x", 5)
            os.utime(fd)

    def name() -> None:
        other = path.with_name("other")
        try:
            os.link(path, other)
        except FileNotFoundError:
            # The kernel may take the link count of an older reply (to utime) after that of the link's; with the unlink
            # it is 0 then, until it asks again. It does not ask us before it refuses.
            assert os.stat(path).st_nlink == 1
            return
        other.rename(path.with_name("third"))
        os.unlink(path.with_name("third"))

    def snapshot() -> None:
        (here / ".snap" / "one").mkdir()
        (here / ".snap" / "one").rmdir()

    def repeat(work: object) -> None:
        try:
            while time.monotonic() < end and not failures:
                work()  # type: ignore[operator]
                rounds[work.__name__] = rounds.get(work.__name__, 0) + 1  # type: ignore[attr-defined]
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in (look, dirty, sync, name, snapshot)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]
    assert set(rounds) == {"look", "dirty", "sync", "name", "snapshot"}
    assert longest < 4  # never had to be given up


def test_a_virtual_file_has_data_as_far_as_it_reads(shared: Mount) -> None:
    with opened(shared.path / ".ramfs/status.json", os.O_RDONLY) as fd:
        length = os.lseek(fd, 0, os.SEEK_HOLE)
        assert len(os.pread(fd, 1 << 20, 0)) == length > 100
        assert os.lseek(fd, 7, os.SEEK_DATA) == 7
        with fails(errno.ENXIO):
            os.lseek(fd, length, os.SEEK_DATA)
    with opened(shared.path, os.O_RDONLY) as fd, fails(errno.ENXIO):
        os.lseek(fd, 0, os.SEEK_DATA)


# --- without writing back ---


def test_zeros_are_told_without_writing_back(shared: Mount, path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[11 * PAGE : 13 * PAGE] = bytes(2 * PAGE)
        memory[100 * PAGE : 104 * PAGE] = bytes(2 * PAGE) + pattern(2 * PAGE)
        _ = memory[200 * PAGE]  # in the cache, and clean
        before = dirty_bytes(fd)
        zeros = zero_runs(str(path), 10)
        assert dirty_bytes(fd) == before == 6 * PAGE
        assert zeros.known == [(0, 10), (20, 100), (104, 256)]
        assert pages_in(zeros.possible) == {11, 12, 100, 101, 102, 103}
        assert pages_in(read_zeros(str(path), zeros.possible)) == {11, 12, 100, 101}
        assert zero_runs(str(path), 0) == ([], []), "what there was no time to look at may be dirty"


def pages_in(runs: list[tuple[int, int]]) -> set[int]:
    return {page for first, stop in runs for page in range(first, stop)}


def test_what_was_stored_is_never_told_as_zeros(path: Path) -> None:
    """Whatever is on its way to the daemon in that moment."""
    order = list(range(20, 256))
    random.Random(7).shuffle(order)
    stored = 0
    done = threading.Event()

    def store() -> None:
        nonlocal stored
        with opened(path) as fd, mmap.mmap(fd, 0) as memory:
            for page in order:
                memory[page * PAGE] = 1
                stored += 1
                time.sleep(0.002)
        done.set()

    def sync() -> None:
        with opened(path) as fd:
            while not done.is_set():
                os.fsync(fd)

    threads = [threading.Thread(target=work) for work in (store, sync)]
    for thread in threads:
        thread.start()
    looks = 0
    while not done.is_set() or not looks:
        before = set(order[:stored])
        assert not before & pages_in(zero_runs(str(path), 10).known)
        looks += 1
    for thread in threads:
        thread.join()
    assert pages_in(zero_runs(str(path), 10).known) == set(range(10))


# --- tools ---


def run(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.fixture
def live(path: Path) -> Iterator[Path]:
    """The file, with stores of another process in it that nobody has flushed."""

    def store() -> mmap.mmap:
        with opened(path) as fd:
            memory = mmap.mmap(fd, 0)
        memory[30 * PAGE : 33 * PAGE] = pattern(3 * PAGE)
        return memory

    with Process(store):
        yield path


EXPECTED = [(10, 20), (30, 33)]


def test_cp_keeps_the_holes(live: Path, tmp_path: Path) -> None:
    copy = live.with_name("copy")
    run("cp", "--sparse=auto", live, copy)
    assert pages_of(copy) == EXPECTED
    # Elsewhere cp goes by st_blocks, which tells of no hole; asked to look for itself, it finds them.
    run("cp", "--sparse=always", live, tmp_path / "copy")
    assert read(tmp_path / "copy") == read(live)
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 64 * PAGE


def test_tar_brings_the_holes_back(live: Path, tmp_path: Path) -> None:
    """Its archive has the zeros, since st_blocks tells of no hole; the file that comes out has the holes again."""
    run("tar", "-S", "-C", live.parent, "-cf", tmp_path / "archive", live.name)
    (live.parent / "out").mkdir()
    run("tar", "-S", "-C", live.parent / "out", "-xf", tmp_path / "archive")
    assert read(live.parent / "out" / live.name) == read(live)
    assert pages_of(live.parent / "out" / live.name) == EXPECTED


def test_nbdkit_serves_the_extents(live: Path) -> None:
    for readonly in ([], ["-r"]):
        told = run("nbdkit", *readonly, "file", live, "--run", 'nbdinfo --map --json "$uri"')
        found = [
            (each["offset"] // PAGE, (each["offset"] + each["length"]) // PAGE)
            for each in json.loads(told)
            if not each["type"] & 1
        ]
        assert found == EXPECTED


def test_qemu_img_maps_the_extents(live: Path) -> None:
    told = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", live))
    found = [(each["start"] // PAGE, (each["start"] + each["length"]) // PAGE) for each in told if each["data"]]
    assert found == EXPECTED
    assert all(each["zero"] != each["data"] for each in told)
