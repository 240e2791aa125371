"""What a guest gains when the kernel serves its memory from the store: dense clones, and live files on XFS."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

from . import peers
from .bench import PAGE, Bench
from .cases import RAMFS, TMPFS, case, check_cold, disk, rate, turns
from .host import Ground
from .stats import Goal, Measure

CACHED = "ramfs, native=off"
STEP = 16  # pages for each touch in random order: see touch.c


@case(
    "native",
    "a frozen file as a dense clone maps it: faults, copies on write, memory of 8 clones; native and not",
    quick=128,
)
def native(bench: Bench) -> list[Measure]:
    p50 = Measure("cold random fault of a frozen file, p50", "us", goals=[Goal(1.0, against=CACHED)])
    p99 = Measure("cold random fault of a frozen file, p99", "us")
    touched = Measure("first touch of a frozen file in order", "GB/s", less_is_better=False)
    stored = Measure("first store to every page of a clone's own, in order", "GB/s", less_is_better=False)
    memory = Measure("page cache with 8 dense clones that have read all, the store's too, of the size of one", "x")
    with ExitStack() as stack:
        places: dict[str, tuple[Path, Ground]] = {}
        for name, options in ((RAMFS, ()), (CACHED, ("native=off",))):
            at = stack.enter_context(peers.ramfs_mount(bench, options=options))
            (at.root / "vm").mkdir()
            bench.fill(at.root / "vm" / peers.BLOCK_FILE, bench.size)
            (at.root / "vm" / ".snap" / "s").mkdir()
            places[name] = at.root / "vm" / ".snap" / "s" / peers.BLOCK_FILE, Ground(at.root, at.store)
        plain = stack.enter_context(peers.tmpfs(bench, lambda path: bench.fill(path, bench.size))).path
        places[TMPFS] = plain, Ground(plain.parent)
        for number, name in turns(bench, list(places)):
            path, place = places[name]
            seen = bench.touch(path, access="private", advice="random", step=STEP, seed=number + 1)
            check_cold(TMPFS if name == RAMFS else name, seen)  # what is in the store is in memory
            p50.add(name, seen["p50_us"])
            p99.add(name, seen["p99_us"])
            touched.add(name, rate(bench.size, bench.touch(path, order="sequential", access="private")["seconds"]))
            seen = bench.touch(path, order="sequential", access="cow")
            stored.add(name, rate(bench.size, seen["seconds"]))
            for clone in range(8):
                bench.touch(path, order="sequential", access="private", seed=clone + 1)
            memory.add(name, place.memory([path]) // PAGE * PAGE / bench.size)
    return [p50, p99, touched, stored, memory]


XFS = "the file on XFS"
FROZEN_ONLY = "ramfs, native=frozen"


def forget(place: Path) -> None:
    """Have nothing of a store's layers, or of a file, in the page cache."""
    os.sync()
    for path in place.glob("layers/*.ram") if place.is_dir() else [place]:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@case(
    "live",
    "a live file on XFS as a guest maps it: faults from the disk, stores; native, cached, and the file itself",
    quick=128,
)
def live(bench: Bench) -> list[Measure]:
    p50 = Measure("fault of a live file that is on the disk alone, random, p50", "us")
    p99 = Measure("the same, p99", "us")
    words = Measure("storing every word of a live file in order, pages dirty", "GB/s", less_is_better=False)
    spots = Measure("storing one word a page at random, pages dirty", "million pages/s", less_is_better=False)
    flushed = Measure("the same, after a flush", "million pages/s", less_is_better=False)
    frozen = Measure("snapshot of a live file that was flushed", "ms")
    with ExitStack() as stack:
        point = stack.enter_context(disk(bench))
        places: dict[str, tuple[Path, Path]] = {}
        for name, options in ((RAMFS, ()), (FROZEN_ONLY, ("native=frozen",))):
            at = stack.enter_context(peers.ramfs_mount(bench, below=point, options=options))
            (at.root / "vm").mkdir()
            bench.fill(at.root / "vm" / peers.BLOCK_FILE, bench.size)
            places[name] = at.root / "vm" / peers.BLOCK_FILE, at.store
        bench.fill(point / "plain", bench.size)
        places[XFS] = point / "plain", point / "plain"
        plain = stack.enter_context(peers.tmpfs(bench, lambda path: bench.fill(path, bench.size))).path
        places[TMPFS] = plain, plain
        for number, name in turns(bench, list(places)):
            path, place = places[name]
            forget(place)
            seen = bench.touch(path, advice="random", step=STEP, seed=number + 1)
            p50.add(name, seen["p50_us"])
            p99.add(name, seen["p99_us"])
            seen = bench.probe("store", path, bench.size, number + 1)
            words.add(name, rate(bench.size, seen["words_dirty"]))
            spots.add(name, bench.size / PAGE / seen["pages_dirty"] / 1e6)
            flushed.add(name, bench.size / PAGE / seen["pages_flushed"] / 1e6)
            bench.fill(path, bench.size)
            if name in (RAMFS, FROZEN_ONLY):
                os.sync()
                begin = time.monotonic()
                (path.parent / ".snap" / str(number)).mkdir()
                frozen.add(name, (time.monotonic() - begin) * 1e3)
                (path.parent / ".snap" / str(number)).rmdir()
    return [p50, p99, words, spots, flushed, frozen]
