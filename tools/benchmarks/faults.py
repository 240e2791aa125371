"""Pages of a file as a guest meets them: faults, touches, stores, writes, msync; and how a working set comes back."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ramfs.image.working_set import NAME, Records, page_count, parse
from ramfs.store.cachestat import cachestat

from . import peers
from .bench import KIB, MIB, PAGE, Bench, pin, run
from .cases import (
    DAEMON,
    NBDFUSE,
    RAMFS,
    TMPFS,
    case,
    check_cold,
    dense,
    disk,
    rate,
    read_ahead,
    serve,
    set_read_ahead,
    turns,
)
from .peers import Peer, Prepare, Served, nbdfuse_with
from .stats import Goal, Measure

OVERLAY = "storage daemon, qcow2 overlay"
USERFAULT = "userfaultfd handler"
STEP = 32  # pages for each touch in random order, more than the 16 that a fault maps around itself
#: C programs that serve a file by FUSE. What the filters keep is kept from one round to the next.
BY_FUSE: dict[str, Peer] = {
    DAEMON: peers.storage_daemon,
    OVERLAY: peers.storage_daemon_overlay,
    NBDFUSE: peers.nbdfuse,
    f"{NBDFUSE}, cow": nbdfuse_with("--filter=cow"),
    f"{NBDFUSE}, cow-on-read": nbdfuse_with("--filter=cow", "cow-on-read=true"),
    f"{NBDFUSE}, cache": nbdfuse_with("--filter=cache"),
}


@contextmanager
def on_disk(bench: Bench, prepare: Prepare, kind: str) -> Iterator[Served]:
    with disk(bench, kind) as point:
        prepare(point / "ram")
        run(["sync", "-f", point])
        yield Served(point / "ram")


EVERYBODY: dict[str, Peer] = {
    RAMFS: peers.ramfs,
    **BY_FUSE,
    "XFS on a loop device": lambda bench, prepare: on_disk(bench, prepare, "xfs"),
    "btrfs on a loop device": lambda bench, prepare: on_disk(bench, prepare, "btrfs"),
    TMPFS: peers.tmpfs,
}


@contextmanager
def everybody(bench: Bench) -> Iterator[dict[str, Served]]:
    """All of them up, with the same pages; those that serve a plain file on tmpfs share it."""
    fill = dense(bench)
    with peers.tmpfs(bench, fill) as plain:

        def prepare(path: Path) -> None:
            if path.parent == plain.path.parent:
                os.link(plain.path, path)
            else:
                fill(path)

        with serve(bench, EVERYBODY, prepare) as up:
            yield up


def beat(measures: Sequence[Measure], limit: float, *, at_least: bool = False) -> None:
    """Set ramfs the goal to be so good, in relation to the best of the C programs that serve by FUSE."""
    for measure in measures:
        medians = {name: statistics.median(measure.samples[name]) for name in BY_FUSE if name in measure.samples}
        best = (max if at_least else min)(medians, key=medians.__getitem__, default=DAEMON)
        measure.goals = [*measure.goals, Goal(limit, at_least, best)]


def userfault(
    bench: Bench, memory: Path, number: int, threads: int = 1, client: int | None = None, server: int | None = None
) -> dict[str, float]:
    """What Bench.touch tells of a file, of memory that a handler on the core ``server`` fills from that file."""
    handler = -1 if server is None else server
    return bench.probe("uffd", memory, bench.size, "random", STEP, threads, number + 1, handler, cpu=client)


@case(
    "fault",
    "cold random 4 KiB fault on a mapped file, 1 and 4 threads, and in memory that userfaultfd fills",
    quick=128,
)
def fault(bench: Bench) -> list[Measure]:
    # Most of a fault's time is waking the server and the client, and that costs several times
    # more on another core than on the same one. Which it is, the scheduler chooses anew for
    # each run: a coin, not a figure to judge by. So it is measured both ways, chosen by us.
    cpus = sorted(os.sched_getaffinity(0))
    kinds: dict[str, tuple[int, int | None, int | None]] = {  # threads, the client's core, the server's
        "1 thread, server on the same core": (1, cpus[0], cpus[0]),
        "1 thread, server on another core": (1, cpus[0], cpus[-1]),
        "4 threads": (4, None, None),
    }
    points = ("p50", "p99")
    measures = {
        (kind, point): Measure(f"cold random fault, {kind}, {point}", "us") for kind in kinds for point in points
    }
    with everybody(bench) as up:
        for number, name in turns(bench, [*up, USERFAULT]):
            pids = up[name].pids if name in up else ()
            seen: dict[str, float] = {}
            for kind, (threads, client, server) in kinds.items():
                if name == USERFAULT:
                    seen = userfault(bench, up[TMPFS].path, number, threads, client, server)
                elif pids or threads > 1 or not seen:  # where nobody serves it, all cores are as good
                    pin(pids, server)
                    how = ("random", "read", "random", threads)
                    seen = bench.touch(up[name].path, *how, step=STEP, seed=number + 1, cpu=client)
                    check_cold(name, seen)
                for point in points:
                    measures[kind, point].add(name, seen[f"{point}_us"])
            pin(pids, None)
    beat(list(measures.values()), 1.0)
    return list(measures.values())


@case(
    "sequential",
    "first touch of every page in order, mapped, nothing cached; and of what is cached, mapped anew",
    quick=128,
)
def sequential(bench: Bench) -> list[Measure]:
    same = f"{DAEMON}, with ramfs' read-ahead"
    cold = Measure("cold sequential touch", "GB/s", less_is_better=False)
    warm = Measure("warm sequential touch", "GB/s", less_is_better=False)
    with everybody(bench) as up:
        ahead = read_ahead(up[RAMFS]) if RAMFS in up else 0
        for number, name in turns(bench, list(up)):
            seen = bench.touch(up[name].path, order="sequential", seed=number + 1)
            check_cold(name, seen)
            cold.add(name, rate(bench.size, seen["seconds"]))
            warm.add(name, rate(bench.size, seen["again"]))
            if name == DAEMON and ahead:  # what it would do if someone tuned its mount as ramfs tunes its own
                usual = read_ahead(up[name])
                set_read_ahead(up[name], ahead)
                seen = bench.touch(up[name].path, order="sequential", seed=number + 1)
                cold.add(same, rate(bench.size, seen["seconds"]))
                set_read_ahead(up[name], usual)
    beat([cold], 2.0, at_least=True)
    return [cold, warm]


@case("store", "stores into a resident shared mapping, pages dirty and just flushed, and msync", quick=128)
def store(bench: Bench) -> list[Measure]:
    # After a flush the kernel takes a fault for each page before it may be stored to, which
    # tmpfs never does and no FUSE server can avoid: told, but without a goal.
    goals = [Goal(0.95, True, TMPFS)]
    words, pages = "GB/s", "million pages/s"
    found = {
        "words_dirty": Measure("storing every word in order, pages dirty", words, goals=goals),
        "pages_dirty": Measure("storing one word a page in random order, pages dirty", pages, goals=goals),
        "words_flushed": Measure("storing every word in order, after a flush", words),
        "pages_flushed": Measure("storing one word a page in random order, after a flush", pages),
        "kept": Measure("storing every word in order, after a flush, and msync", words),
    }
    with everybody(bench) as up:
        for number, name in turns(bench, list(up)):
            # The kernel holds stores into most mounts back to the speed at which it can write back: a part will do.
            size = bench.size // 4 if name in BY_FUSE else bench.size
            seen = bench.probe("store", up[name].path, size, number + 1)
            seen["kept"] = seen["words_flushed"] + seen["msync"]
            for key, measure in found.items():
                measure.less_is_better = False
                amount = rate(size, seen[key])
                measure.add(name, amount if measure.unit == words else amount * 1e3 / PAGE)
    return list(found.values())


@case("write", "sequential write(2) into a preallocated file, and fsync", quick=128)
def write(bench: Bench) -> list[Measure]:
    chunks = {"1 MiB": MIB, "128 KiB": 128 * KIB}
    found = {
        label: Measure(f"write(2) in calls of {label}, with fsync", "GB/s", less_is_better=False) for label in chunks
    }
    with everybody(bench) as up:
        for number, name in turns(bench, list(up)):
            size = bench.size // 4 if name in BY_FUSE else bench.size
            for label, chunk in chunks.items():
                seen = bench.probe("write", up[name].path, size, chunk, number + 1)
                found[label].add(name, rate(size, seen["write"] + seen["fsync"]))
        check_cold(RAMFS, bench.touch(up[RAMFS].path, order="sequential"))  # what was written must be there
    beat(list(found.values()), 1.0, at_least=True)
    return list(found.values())


@case("storm", "first stores to every page of an empty shared file, as a booting guest does")
def storm(bench: Bench) -> list[Measure]:
    found = Measure("first stores to an empty file", "GB/s", less_is_better=False)
    worst = Measure("the longest single store", "ms")
    contenders = {name: EVERYBODY[name] for name in (RAMFS, DAEMON, TMPFS)}
    for number in bench.each_round():
        for name, peer in contenders.items():
            with serve(bench, {name: peer}, lambda path: empty(path, bench.size)) as up:
                if name in up:
                    seen = bench.touch(up[name].path, order="sequential", access="write", seed=number + 1)
                    found.add(name, rate(bench.size, seen["seconds"]))
                    worst.add(name, seen["max_us"] / 1e3)
    return [found, worst]


def empty(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@case("resume", "one page in every 64 KiB in random order with MADV_HUGEPAGE, as a resumed QEMU")
def resume(bench: Bench) -> list[Measure]:
    found: list[Measure] = []
    contenders = {name: EVERYBODY[name] for name in (RAMFS, DAEMON, NBDFUSE, TMPFS)}
    with serve(bench, contenders, dense(bench)) as up:
        for more, access in ((1, "read"), (0, "write")):
            total = Measure(f"resume, {access} faults, until all is touched", "ms")
            p99 = Measure(f"resume, {access} faults, p99", "us")
            for number, name in turns(bench, list(up), more):
                seen = bench.touch(up[name].path, access=access, advice="huge", seed=number + 1)
                total.add(name, seen["seconds"] * 1e3)
                p99.add(name, seen["p99_us"])
            found += [total, p99]
    return found


FROM_AROUND, SCATTERED, NATIVE = RAMFS, "ramfs, recorded as single pages", "ramfs, the frozen file, native"


@case("restore", "a recorded working set comes back in a clone, for each page; a fault that userfaultfd serves")
def restore(bench: Bench) -> list[Measure]:
    """The first clone asks for one page in so many at random; the next one has what was recorded read ahead.

    As a VMM maps a file the kernel reads around each fault, and that is recorded; where it says that it wants
    single pages, these are. A page is there when it is in the page cache, and was touched once in a mapping.
    """
    cpus = sorted(os.sched_getaffinity(0))
    found = Measure("a working set, until each page of it was touched, for each page", "us")
    found.goals = [Goal(0.2, against=USERFAULT), Goal(0.2, subject=SCATTERED, against=USERFAULT)]
    total = Measure("the same, all of it", "ms")
    with ExitStack() as stack:
        plain = stack.enter_context(peers.tmpfs(bench, dense(bench))).path
        at = stack.enter_context(peers.ramfs_mount(bench))
        sets: dict[str, Path] = {}
        for name, advice in ((FROM_AROUND, "none"), (SCATTERED, "random")):
            home = at.root / bench.fresh("vm").name
            home.mkdir()
            bench.fill(home / peers.BLOCK_FILE, bench.size)
            sets[name] = home / ".snap" / "s"
            sets[name].mkdir()
            run(["cp", "-r", sets[name], at.root / "first"])
            bench.touch(at.root / "first" / peers.BLOCK_FILE, advice=advice, step=STEP)
            run(["rm", "-r", at.root / "first"])
        for number, name in turns(bench, [FROM_AROUND, SCATTERED, NATIVE, USERFAULT]):
            if name in sets:
                recorded = parse((sets[name] / NAME).read_bytes())[peers.BLOCK_FILE.encode()]
                clone = at.root / f"clone{number}"
                run(["cp", "-r", sets[name], clone])
                seconds = bring_back(clone / peers.BLOCK_FILE, bench.size, recorded)
                run(["rm", "-r", clone])
                each = seconds / page_count(recorded)
            else:
                if name == NATIVE:
                    frozen = sets[FROM_AROUND] / peers.BLOCK_FILE
                    seen = bench.touch(frozen, access="private", step=STEP, seed=number + 1)
                else:
                    seen = userfault(bench, plain, number, client=cpus[0], server=cpus[0])
                seconds = seen["seconds"]
                each = seconds / (bench.size // PAGE // STEP)
            found.add(name, each * 1e6)
            total.add(name, seconds * 1e3)
    return [found, total]


def bring_back(path: Path, size: int, recorded: Records) -> float:
    """Seconds from the open of a clone until the pages of a working set are cached, and to touch them all then."""
    pages = np.concatenate([np.arange(first, first + count) for _, first, count in recorded.tolist()])
    begun = grown = time.perf_counter()
    cached = 0
    fd = os.open(path, os.O_RDWR)
    try:
        # Somebody may empty the machine's page cache meanwhile: then the rest comes by faults.
        while cached < len(pages) and time.perf_counter() < grown + 1:
            if (now := cachestat(fd).cached) > cached:
                cached, grown = now, time.perf_counter()
            time.sleep(0.0001)
        with mmap.mmap(fd, size) as memory:
            first_words = np.frombuffer(memory, np.uint64)[pages * (PAGE // 8)]
        seconds = time.perf_counter() - begun
    finally:
        os.close(fd)
    if (first_words != pages.astype(np.uint64) + 1).any():
        raise RuntimeError("a page that was read ahead has other contents")
    return seconds
