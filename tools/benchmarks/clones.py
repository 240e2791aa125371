"""Clones: what one takes, over the size of its image and over what is resident of it; reads after many generations."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import peers
from .bench import GIB, KIB, MIB, PAGE, Bench, Unavailable, run
from .cases import RAMFS, TMPFS, XFS, case, check_cold, dense, digests, disk, serve, turns
from .stats import Curve, Goal, Measure

BTRFS, OVERLAY = "cp --reflink on btrfs", "qemu-img create, overlay"
SIZE = 64 * GIB
#: A guest that uses huge pages fills its memory in runs of 2 MiB.
RUN = 2 * MIB

Make = Callable[[Path, Path], None]
"""makes a file, perhaps of the pattern: a file of bench.size in the same place"""


@dataclass(frozen=True)
class Place:
    """Where a contender keeps files and their clones."""

    root: Path
    used: Callable[[], int]
    """bytes that it takes in all"""


@contextmanager
def places(bench: Bench) -> Iterator[dict[str, Place]]:
    """All who share pages, and tmpfs, each with a pattern; those that cannot be had are noted and left out."""
    with ExitStack() as stack:
        found: dict[str, Place] = {}

        def of_disk(kind: str) -> Place:
            point = stack.enter_context(disk(bench, kind))

            def used() -> int:
                run(["sync", "-f", point])
                told = os.statvfs(point)
                return (told.f_blocks - told.f_bfree) * told.f_frsize

            return Place(point, used)

        def of_ramfs() -> Place:
            at = stack.enter_context(peers.ramfs_mount(bench))
            return Place(at.root, lambda: taken(at.store) - digests(at.store))

        def of_tmpfs() -> Place:
            root = bench.fresh("tmpfs")
            root.mkdir()
            stack.callback(run, ["rm", "-rf", root])
            return Place(root, lambda: taken(root))

        for name, start in {
            RAMFS: of_ramfs,
            XFS: lambda: of_disk("xfs"),
            BTRFS: lambda: of_disk("btrfs"),
            TMPFS: of_tmpfs,
        }.items():
            try:
                place = start()
                bench.fill(place.root / "pattern", bench.size)
                found[name] = place
            except (Unavailable, RuntimeError, OSError) as error:
                bench.miss(name, error)
        yield found


def taken(directory: Path) -> int:
    """Bytes of all files below a directory that are stored."""
    return int(run(["du", "-s", "--block-size=1", directory]).split()[0])


def filled(bench: Bench, size: int, resident: int, part: int = RUN) -> Make:
    return lambda path, _: bench.fill(path, size, part, size * part // resident)


def spread(size: int, resident: int) -> Make:
    """More than the memory of this machine: the pattern again and again, by reference."""

    def make(path: Path, pattern: Path) -> None:
        length = pattern.stat().st_size
        with pattern.open("rb") as source, path.open("wb") as target:
            target.truncate(size)
            for at in range(0, size, size * length // resident):
                done = 0
                while done < length:
                    done += os.copy_file_range(source.fileno(), target.fileno(), length - done, done, at + done)

    return make


@dataclass(frozen=True)
class Layout:
    """A file that is cloned, and what it stands for."""

    make: Make
    resident: int
    over: str = ""
    """the curve that it is a point of, and where"""
    x: float = 0.0
    label: str = ""
    """among the clones of 64 GiB"""


SPARSE, FRAGMENTED, WHOLE = "64 MiB resident", "fragmented: runs of 64 KiB", "all of it resident"
OVER_SIZE, OVER_RESIDENT = "size of the file (GiB)", "resident of 64 GiB (GiB)"


def layouts(bench: Bench) -> list[Layout]:
    little = bench.size // 4
    sizes = (1, 16, 256) if bench.quick else (1, 4, 16, 64, 256)
    found = [Layout(filled(bench, gib * GIB, little), little, OVER_SIZE, gib) for gib in sizes]
    found.append(Layout(filled(bench, SIZE, 64 * MIB), 64 * MIB, OVER_RESIDENT, 64 * MIB / GIB, SPARSE))
    for gib in (4, 64) if bench.quick else (1, 4, 16, 64):
        label = WHOLE if gib == 64 else ""
        found.append(Layout(spread(SIZE, gib * GIB), gib * GIB, OVER_RESIDENT, gib, label))
    return [*found, Layout(filled(bench, SIZE, bench.size, 64 * KIB), bench.size, label=FRAGMENTED)]


def cloned(bench: Bench, name: str, place: Place, source: Path) -> tuple[float, int]:
    """The seconds that one clone took, and the bytes that it takes when it is synced. It is removed again."""
    block = source / peers.BLOCK_FILE
    before = place.used()
    if name == OVERLAY:
        copy = bench.fresh("overlay.qcow2")
        command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", block, "-F", "raw", copy]
    else:
        copy = place.root / bench.fresh("copy").name
        command = ["cp", "-r", *(["--reflink=always"] if name in (XFS, BTRFS) else []), source, copy]
    begun = time.perf_counter()
    run(command)
    seconds = time.perf_counter() - begun
    if name == OVERLAY:
        grew = copy.stat().st_blocks * 512
    else:
        run(["sync", copy / block.name])
        grew = place.used() - before
        compare(block, copy / block.name)
    run(["rm", "-rf", copy])
    return seconds, grew


def compare(source: Path, copy: Path) -> None:
    """Look at some pages of both, as comparing 64 GiB takes too long."""
    size = source.stat().st_size
    with source.open("rb") as one, copy.open("rb") as other:
        for _ in range(64):
            offset = random.randrange(size // PAGE) * PAGE
            if os.pread(one.fileno(), PAGE, offset) != os.pread(other.fileno(), PAGE, offset):
                raise RuntimeError(f"{copy} differs from {source} at {offset}")


@case("clone", "cp -r of a directory with a block file of 1 to 256 GiB; reflinks on XFS and btrfs, overlay, plain copy")
def clone(bench: Bench) -> list[Measure | Curve]:
    whole = f"{RAMFS}, {WHOLE}"
    took = Measure(
        "clone of 64 GiB",
        "ms",
        goals=[
            Goal(50.0, subject=whole),
            Goal(2.0, against=f"{RAMFS}, {SPARSE}", subject=whole),
            Goal(1.0, against=f"{XFS}, {FRAGMENTED}", subject=f"{RAMFS}, {FRAGMENTED}"),
        ],
    )
    grew = Measure(
        "growth of the store by a clone of 64 GiB, of what is resident (without digests)",
        "%",
        goals=[Goal(0.5, subject=f"{RAMFS}, {label}") for label in (SPARSE, WHOLE)],
    )
    times = {over: Curve("time of a clone", "ms", over) for over in (OVER_SIZE, OVER_RESIDENT)}
    amounts = {over: Curve("bytes that a clone takes", "KiB", over) for over in (OVER_SIZE, OVER_RESIDENT)}
    wanted = layouts(bench)
    with places(bench) as up:
        for index, layout in enumerate(wanted):
            contenders = [name for name in up if name != TMPFS or layout.resident < GIB]
            sources = {name: up[name].root / f"vm{index}" for name in contenders}
            for name, source in sources.items():
                source.mkdir()
                layout.make(source / peers.BLOCK_FILE, up[name].root / "pattern")
            if XFS in sources:  # what it is made of does not matter to an overlay
                sources[OVERLAY] = sources[XFS]
            for _, name in turns(bench, list(sources), len(wanted) - index - 1):
                seconds, more = cloned(bench, name, up[XFS if name == OVERLAY else name], sources[name])
                if layout.over:
                    times[layout.over].add(name, layout.x, seconds * 1e3)
                    amounts[layout.over].add(name, layout.x, max(more, 0) / KIB)
                if layout.label:
                    took.add(f"{name}, {layout.label}", seconds * 1e3)
                    if name == RAMFS:
                        grew.add(f"{name}, {layout.label}", 100 * more / layout.resident)
            run(["rm", "-rf", *sources.values()])
    return [took, grew, *times.values(), *amounts.values()]


@case("chain", "reads after 50 generations of 1 % against a flat file of the same contents")
def chain(bench: Bench) -> list[Measure]:
    generations = 50
    old, flat = f"{RAMFS}, 50 generations", f"{RAMFS}, flat"
    goals = [Goal(1.2, subject=old, against=flat)]
    found = {
        "seconds": Measure("cold sequential read, whole file", "ms", goals=goals),
        "p50_us": Measure("cold random fault, p50", "us", goals=goals),
        "p99_us": Measure("cold random fault, p99", "us"),
    }
    made = Measure("time of one snapshot", "ms")
    with serve(bench, {RAMFS: peers.ramfs}, dense(bench)) as up:
        if RAMFS not in up:
            return []
        block = up[RAMFS].path
        for number in range(generations):
            bench.scatter(block, bench.size, bench.size // PAGE // 100, number + 1)
            begun = time.perf_counter()
            (block.parent / ".snap" / f"g{number}").mkdir()
            made.add(RAMFS, (time.perf_counter() - begun) * 1e3)
        (block.parent.parent / "flat").mkdir()
        plain = block.parent.parent / "flat" / peers.BLOCK_FILE
        run(["dd", f"if={block}", f"of={plain}", "bs=1M", "conv=fsync", "status=none"])
        run(["cmp", block, plain])
        files = {old: block, flat: plain}
        for number, name in turns(bench, list(files)):
            whole = bench.touch(files[name], order="sequential")
            random = bench.touch(files[name], advice="random", seed=number + 1)
            for seen in (whole, random):
                check_cold(name, seen)
            found["seconds"].add(name, whole["seconds"] * 1e3)
            found["p50_us"].add(name, random["p50_us"])
            found["p99_us"].add(name, random["p99_us"])
    return [*found.values(), made]
