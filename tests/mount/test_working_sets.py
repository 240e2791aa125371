"""What a clone asks for first is recorded for its snapshot, and read ahead for the next clone."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import mmap
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import Mount
from mount.posix import PAGE, Mapping, counters, eventually, fails, opened, page_of, pattern, read

from ramfs.image.working_set import NAME, parse
from ramfs.store.repair import check_store

MB = 1 << 20
SIZE = 32 * MB
MEMORY = pattern(SIZE)
#: Where the guest of these tests looks first, in this order: far apart, so that reading around them is not reading all.
TOUCHED = (20, 4, 28, 12)


def asked(mount: Mount) -> int:
    """READs that were not ahead of anybody."""
    told = counters(mount.path)
    return told["reads"] - told["reads_ahead"]


def snapshot(mount: Mount, name: str = "base") -> Path:
    """A frozen directory with the memory of a guest."""
    directory = mount.path / name
    directory.mkdir()
    (directory / "ram").write_bytes(MEMORY)
    (directory / ".snap" / "warm").mkdir()
    return directory / ".snap" / "warm"


def clone(source: Path, target: Path) -> Path:
    """A copy of a directory; its memory."""
    subprocess.run(["cp", "-r", source, target], check=True)
    return target / "ram"


def go_on(memory: Path, where: Sequence[int] = TOUCHED) -> None:
    """What a guest does: look at a page at each of these MiB, in a shared mapping."""
    with opened(memory) as fd:
        mapping = Mapping(fd, writable=True)
    for at in where:
        assert mapping.bytes(at * MB, PAGE) == MEMORY[at * MB : at * MB + PAGE]
    mapping.close()


def working_set(snapshot: Path) -> list[tuple[int, int]]:
    """The recorded pages ``(first, count)`` of the memory; none if there are none."""
    try:
        records = parse((snapshot / NAME).read_bytes())[b"ram"]
    except FileNotFoundError:
        return []
    return list(zip(records["first"].tolist(), records["count"].tolist(), strict=True))


def recorded(snapshot: Path, where: Sequence[int] = TOUCHED) -> list[tuple[int, int]]:
    """The same, as soon as it has these MiB, in this order and nothing far from them."""
    eventually(lambda: len(working_set(snapshot)) >= len(where), "it is recorded")
    found = working_set(snapshot)
    places = [next(at for at in where if first <= at * 256 < first + count) for first, count in found]
    assert [at for at, _ in itertools.groupby(places)] == list(where)
    return found


def pages_of(found: list[tuple[int, int]]) -> int:
    return sum(count for _, count in found)


def wait_until_ahead(mount: Mount, pages: int) -> None:
    eventually(lambda: counters(mount.path)["read_ahead_bytes"] >= pages * PAGE, f"{pages} pages are read ahead")
    assert counters(mount.path)["read_ahead_bytes"] == pages * PAGE


def test_a_clone_is_recorded_and_the_next_one_is_spared(mounted: Mount) -> None:
    warm = snapshot(mounted)
    first = clone(warm, mounted.path / "first")
    go_on(first, ())  # which asks for nothing
    before = counters(mounted.path)["read_bytes"]
    go_on(first)
    found = recorded(warm)
    assert pages_of(found) * PAGE == counters(mounted.path)["read_bytes"] - before < SIZE / 4
    assert counters(mounted.path)["reads_ahead"] == 0

    # It can be drawn: a quarter after the other, in the order in which they were asked for.
    command = [sys.executable, "-m", "ramfs", "map", "--working-set", "--json", warm]
    drawn = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)["files"][0]["runs"]
    kinds = {page: kind for first, stop, kind in drawn for page in range(first, stop)}
    assert [kinds[at * 256] for at in TOUCHED] == [2, 3, 4, 5]
    assert sum(kind > 1 for kind in kinds.values()) == pages_of(found)

    second = clone(warm, mounted.path / "second")
    before = asked(mounted)
    with opened(second) as fd:
        mapping = Mapping(fd, writable=True)
    wait_until_ahead(mounted, pages_of(found))
    assert counters(mounted.path)["reads_ahead"] <= len(TOUCHED)
    for at in TOUCHED:
        assert mapping.bytes(at * MB, PAGE) == MEMORY[at * MB : at * MB + PAGE]
    mapping.close()
    assert asked(mounted) == before

    # What asks for much else completes it, in its own place: behind what is known.
    go_on(clone(warm, mounted.path / "third"), (8, 24))
    both = recorded(warm, (*TOUCHED, 8, 24))
    assert both[: len(found)] == found
    assert check_store_of(mounted) == []


def check_store_of(mount: Mount) -> list[str]:
    """What is found wrong with the store, after an unmount."""
    mount.umount()
    kinds = [finding.kind for finding in check_store(str(mount.store)).findings]
    mount.start()
    return kinds


def test_it_is_a_file_of_the_snapshot(mounted: Mount) -> None:
    warm = snapshot(mounted)
    path = warm / NAME
    with fails(errno.ENOENT):
        path.stat()
    go_on(clone(warm, mounted.path / "first"))
    found = recorded(warm)
    told = path.stat()
    assert told.st_size == len(path.read_bytes())
    assert told.st_mode & 0o777 == 0o444 & (warm / "ram").stat().st_mode
    assert os.listdir(warm) == ["ram"]
    assert not (mounted.path / "first" / NAME).exists()
    for call in (lambda: os.truncate(path, 0), lambda: os.open(path, os.O_RDWR), lambda: path.chmod(0o600)):
        with fails(errno.EROFS):
            call()
    with opened(path, os.O_RDONLY) as fd:
        text = os.pread(fd, 1 << 20, 0)
        mounted.kill_daemon()
        assert os.pread(fd, 1 << 20, 0) == text  # of the daemon that took over
    mounted.umount()
    mounted.start()
    assert working_set(warm) == found

    path.unlink()  # records another
    with fails(errno.ENOENT):
        path.unlink()
    go_on(clone(warm, mounted.path / "second"), (7, 3))
    recorded(warm, (7, 3))
    # With the snapshot it goes.
    warm.rmdir()
    eventually(lambda: not rows(mounted), "it is removed")


def rows(mount: Mount) -> int:
    """Working sets in the catalog, as of now: read from a copy, for the daemon has it locked."""
    copy = mount.store.with_name("copy.sqlite")
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).write_bytes((mount.store / f"catalog.sqlite{suffix}").read_bytes())
    with contextlib.closing(sqlite3.connect(copy)) as db:
        (number,) = db.execute("SELECT count(*) FROM working_sets").fetchone()
    return int(number)


def test_only_what_goes_on_from_a_snapshot_counts(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    warm = snapshot(mount)
    go_on(mount.path / "base" / "ram")  # the parent itself
    read(clone(warm, mount.path / "read"))  # who only reads
    written = clone(warm, mount.path / "written")
    with opened(written) as fd:
        os.pwrite(fd, b"x", 1)
    go_on(written, (4, 8))
    assert working_set(warm) == []
    subprocess.run(["cp", "-al", warm, mount.path / "dense"], check=True)
    read(mount.path / "dense" / "ram")
    assert working_set(warm) == []

    other = make_mount("other", options=["noprefetch"])
    warm = snapshot(other)
    for name in ("one", "two"):
        go_on(clone(warm, other.path / name))
    assert working_set(warm) == []
    assert counters(other.path)["reads_ahead"] == 0


def test_what_guests_store_meanwhile_is_never_lost(mounted: Mount) -> None:
    warm = snapshot(mounted)
    go_on(clone(warm, mounted.path / "first"), range(32))
    found = recorded(warm, range(32))
    assert pages_of(found) == SIZE // PAGE // 2
    inside = [page for first, count in found for page in range(first, first + count)]
    for number in range(6):
        seed = random.Random(number)
        path = clone(warm, mounted.path / f"vm{number}")
        chosen = seed.sample(inside, 2000)
        expected = {page: page_of(page * 100 + number) for page in chosen}
        with opened(path) as fd:  # it begins
            mapping = mmap.mmap(fd, 0)
            for count, page in enumerate(chosen):
                if count % 2:
                    mapping[page * PAGE : (page + 1) * PAGE] = expected[page]
                else:
                    os.pwrite(fd, expected[page], page * PAGE)
            before = [mapping[page * PAGE : (page + 1) * PAGE] == expected[page] for page in chosen]
            assert all(before)
            os.fsync(fd)
            mapping.close()
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        got = read(path)
        for page in range(SIZE // PAGE):
            data = got[page * PAGE : (page + 1) * PAGE]
            assert data == expected.get(page, MEMORY[page * PAGE : (page + 1) * PAGE]), page
    assert counters(mounted.path)["reads_ahead"] > 0


def test_a_daemon_dies_and_a_mount_goes_while_it_is_read_ahead(mounted: Mount) -> None:
    warm = snapshot(mounted)
    go_on(clone(warm, mounted.path / "first"), range(32))
    found = recorded(warm, range(32))
    clones = [clone(warm, mounted.path / f"vm{number}") for number in range(3)]
    for path in clones[:2]:
        with opened(path) as fd:
            mapping = Mapping(fd, writable=True)
        mounted.kill_daemon()
        assert mapping.bytes(0, SIZE) == MEMORY
        mapping.close()
    assert working_set(warm) == found
    with opened(clones[2]) as fd:
        assert os.pread(fd, 1, 0) == pattern(1)
    mounted.umount()
    assert check_store(str(mounted.store)).findings == []


def test_a_damaged_one_is_found_and_removed(mounted: Mount) -> None:
    warm = snapshot(mounted)
    go_on(clone(warm, mounted.path / "first"))
    recorded(warm)
    mounted.umount()
    with contextlib.closing(sqlite3.connect(mounted.store / "catalog.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE working_sets SET records = x'0102'")
        db.execute("INSERT INTO working_sets VALUES (4711, x'00')")
    found = {finding.kind for finding in check_store(str(mounted.store)).findings}
    assert found == {"working-set", "catalog-reference"}
    assert check_store(str(mounted.store), repair=True).findings == []
    mounted.start()
    assert working_set(warm) == []


def test_it_is_drawn(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    warm = snapshot(mount)
    go_on(clone(warm, mount.path / "clone"))
    recorded(warm)
    command = [sys.executable, "-m", "ramfs", "map", "--working-set", "--json", str(warm)]
    told = json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout)
    [file] = told["files"]
    # What was read around a page begins before it.
    drawn = {told["kinds"][kind]: stop // 256 for _, stop, kind in file["runs"]}
    assert (drawn["touched first"], drawn["touched last"]) == (TOUCHED[0], TOUCHED[-1])
    assert sum(stop - first for first, stop, _ in file["runs"]) == SIZE // PAGE
