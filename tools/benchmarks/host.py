"""What a guest costs its host: memory, once or twice, and bytes written to the disk of the store."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ramfs.store.cachestat import cachestat
from tests.harness import caches_emptied
from tests.vm.guest import Guest

from . import peers
from .bench import MIB, PAGE, PATIENCE, Bench, Unavailable, bdi, run, unmount
from .cases import ASKED, FULL, RAMFS, case, dense, disk, serve, set_read_ahead, turns
from .stats import Goal, Measure

#: The disk can share blocks: by default the kernel serves live files there by itself, and with CACHED the daemon does.
CACHED, IN_MEMORY, PLAIN = "ramfs, native=frozen", "ramfs, store on tmpfs", "plain file on the same disk"


def cached(path: Path) -> int:
    """Bytes of a file in the page cache (Linux 6.5 or newer)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = cachestat(fd)
        if found is None:
            raise Unavailable("the kernel has no cachestat")
        return int(found.cached) * PAGE
    finally:
        os.close(fd)


def top(pid: int) -> int:
    """The first of the processes that serve a mount: what has started the daemon, if that is still there."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return parent if parent > 1 and b"ramfs" in Path(f"/proc/{parent}/cmdline").read_bytes() else pid


def private(pid: int) -> int:
    """Bytes of a process and of those it has started that are no file's."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 + sum(map(private, children))
    return 0


@dataclass(frozen=True)
class Ground:
    """Where guests keep their memory."""

    root: Path
    store: Path | None = None
    pid: int = 0

    def memory(self, files: Sequence[Path]) -> int:
        """Bytes in the page cache, of guests' files (once for each inode) and of the store's, and the daemon's own."""
        store = self.store.rglob("*") if self.store else ()
        once = {file.stat().st_ino: file for file in files}.values()
        total = sum(map(cached, once)) + sum(cached(path) for path in store if path.is_file())
        return total + (private(self.pid) if self.pid else 0)


@contextmanager
def ground(bench: Bench, name: str, point: Path) -> Iterator[Ground]:
    if name == PLAIN:
        yield Ground(point)
    else:
        options = ["native=frozen"] if name == CACHED else []
        with peers.ramfs_mount(bench, None if name == IN_MEMORY else point, options) as at:
            yield Ground(at.root, at.store, top(at.pid))


def settle(place: Ground, files: Sequence[Path]) -> int:
    """The memory when all is flushed and nothing more is let go."""
    for path in {path.stat().st_ino: path for path in files}.values():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return at_rest(lambda: place.memory(files), 1)


def at_rest(amount: Callable[[], int], pause: float) -> int:
    """An amount once three looks in a row, with pauses in seconds, have found it the same; or after half a minute."""
    last, still = amount(), 0
    deadline = time.monotonic() + 30
    while still < 3 and time.monotonic() < deadline:
        time.sleep(pause)
        now = amount()
        still = still + 1 if now == last else 0
        last = now
    return last


def footprint(bench: Bench, name: str, point: Path) -> list[float]:
    """Memory of a guest, the daemons' part of it, of 8 clones, of dense ones; measured anew if somebody interfered."""
    for _ in range(5):
        before = caches_emptied()
        with ground(bench, name, point) as at:
            found = list(itertools.islice(footprints(bench, at), 2 if bench.quick else None))
            run(["rm", "-r", at.root / "vm"])
        if caches_emptied() == before:
            return found
        bench.say(f"  {name}: again, for somebody has dropped the page cache")
    raise RuntimeError("the page cache is dropped all the time")


def footprints(bench: Bench, at: Ground) -> Iterator[float]:
    """In sizes of the guest, and in MiB what the daemons have for themselves."""
    vm = at.root / "vm"
    vm.mkdir()
    block = vm / peers.BLOCK_FILE
    with block.open("wb") as file:
        file.truncate(bench.size)
    bench.touch(block, order="sequential", access="write")
    yield settle(at, [block]) / bench.size
    yield private(at.pid) / MIB if at.pid else 0.0
    copies = [at.root / f"clone{number}" for number in range(8)]
    for copy in copies:
        run(["cp", "-r", vm, copy])
    clones = [copy / peers.BLOCK_FILE for copy in copies]
    for clone in clones:
        bench.touch(clone, order="sequential")
    yield settle(at, clones) / bench.size
    run(["rm", "-r", *copies])
    if at.store:
        frozen = vm / ".snap" / "s"
        frozen.mkdir()
        run(["cp", "-al", frozen, copies[0]])
        dense_clone = copies[0] / block.name
        run(["dd", f"if={dense_clone}", "of=/dev/null", "bs=1M", "status=none"])
        yield settle(at, [dense_clone]) / bench.size
        run(["rm", "-r", copies[0]])
        frozen.rmdir()


@case(
    "host",
    "host memory of a guest that has touched all of its own; not with --quick, of 8 clones of it",
    quick=512,
    when=FULL,
)
def host(bench: Bench) -> list[Measure]:
    goals = [Goal(1.15), Goal(1.15, subject=CACHED)]
    found = [
        Measure("host memory of one guest, all stored and flushed, of its size", "x", goals=goals),
        Measure("of that, what supervisor and daemons have for themselves, whatever its size", "MiB"),
        Measure("host memory of 8 clones by cp -r that have read everything, of the size of one", "x"),
        Measure("host memory of dense clones by cp -al that have read everything, of the size of one", "x"),
    ]
    with disk(bench) as point:
        for name in (RAMFS, CACHED, PLAIN) if bench.quick else (RAMFS, CACHED, IN_MEMORY, PLAIN):
            for measure, value in zip(found, footprint(bench, name, point), strict=False):
                measure.add(name, value)
    return found


def written(point: Path) -> int:
    """Bytes that were written to the disk that is mounted at a path, so far."""
    device = run(["findmnt", "--noheadings", "--output", "SOURCE", point]).strip()
    return int((Path("/sys/block") / Path(device).name / "stat").read_text().split()[6]) * 512


@case(
    "dirtying",
    "bytes to the disk and host memory while a guest stores into a quarter of its memory all the time",
    when=FULL,
)
def dirtying(bench: Bench) -> list[Measure]:
    rate = Measure("written to disk, of what is stored into, in each minute", "x")
    peak = Measure("largest host memory meanwhile, of what is stored into", "x")
    # Twice what the kernel waits until it writes a page back.
    for name, (wrote, most) in dirtied(bench, (RAMFS, CACHED, PLAIN), 70).items():
        rate.add(name, wrote)
        peak.add(name, most)
    return [rate, peak]


@case("expiry", "the same by how long the kernel keeps dirty pages, vm.dirty_expire_centisecs", when=ASKED)
def expiry(bench: Bench) -> list[Measure]:
    rate = Measure("written to disk, of what is stored into, in each minute", "x")
    peak = Measure("largest host memory meanwhile, of what is stored into", "x")
    knob = Path("/proc/sys/vm/dirty_expire_centisecs")
    before = knob.read_text()
    try:
        for seconds in (15, 30, 60):
            knob.write_text(f"{seconds * 100}\n")
            for name, (wrote, most) in dirtied(bench, (RAMFS, CACHED, PLAIN), seconds * 7 // 3).items():
                rate.add(f"{name}, {seconds} s", wrote)
                peak.add(f"{name}, {seconds} s", most)
    finally:
        knob.write_text(before)
    return [rate, peak]


def dirtied(bench: Bench, names: Sequence[str], seconds: int) -> dict[str, tuple[float, float]]:
    """For each: bytes to disk in each minute, and the largest host memory; both of what is stored into each second."""
    work = bench.size // 4
    with ExitStack() as stack:
        places: dict[str, tuple[Path, Ground, Path, np.ndarray]] = {}
        for name in names:
            point = stack.enter_context(disk(bench))
            at = stack.enter_context(ground(bench, name, point))
            block = at.root / peers.BLOCK_FILE
            bench.fill(block, work)
            settle(at, [block])
            memory = np.memmap(block, np.uint64, "r+")
            stack.callback(memory._mmap.close)
            places[name] = point, at, block, memory
        before = {name: written(point) for name, (point, *_) in places.items()}
        most = dict.fromkeys(places, 0)
        for second in range(seconds):
            begun = time.monotonic()
            for name, (_, at, block, memory) in places.items():
                memory[1 :: PAGE // 8] = second
                most[name] = max(most[name], at.memory([block]))
            time.sleep(max(0.0, begun + 1 - time.monotonic()))
        found = {
            name: ((written(point) - before[name]) / work * 60 / seconds, most[name] / work)
            for name, (point, *_) in places.items()
        }
        places.clear()
    return found


@case(
    "guests",
    "until a guest has booted, and until one that was resumed has checked its memory, by read-ahead",
    when=ASKED,
)
def guests(bench: Bench) -> list[Measure]:
    booted = Measure("from QEMU's start until the guest is up", "ms")
    resumed = Measure("from the load of its state until a guest has checked 32 MiB of its memory", "ms")
    settings = {RAMFS: 512} | {f"read-ahead {ahead} KiB": ahead for ahead in (0, 128, 4096)}
    with peers.ramfs_mount(bench) as at:
        served = peers.Served(at.root, mount=at.root)
        vm, frozen = at.root / "vm", at.root / "vm" / ".snap" / "s"
        vm.mkdir()
        with Guest(vm / "ram", boot="fill=1:32") as guest:
            guest.wait_for_line("= filled", PATIENCE)
            run([*bench.ramfs, "snapshot", vm, "s", "--qmp", guest.socket])
        for number, name in turns(bench, list(settings)):
            set_read_ahead(served, settings[name])
            place = at.root / f"guest{number}"
            place.mkdir()
            begun = time.monotonic()
            with Guest(place / "ram") as guest:
                guest.wait_for_line("guest is up", PATIENCE)
                booted.add(name, (time.monotonic() - begun) * 1e3)
            run(["rm", "-r", place])
            run(["cp", "-r", frozen, place])
            with Guest(place / "ram", incoming=True) as guest:
                begun = time.monotonic()
                guest.load(place / "state")
                answer = guest.say("verify", PATIENCE)
                if not answer.startswith("verified ok"):
                    raise RuntimeError(f"a resumed guest: {answer}")
                resumed.add(name, (time.monotonic() - begun) * 1e3)
            run(["rm", "-r", place])
    return [booted, resumed]


@case("tuning", "what read-ahead and the number of background requests do to cold reads", when=ASKED)
def tuning(bench: Bench) -> list[Measure]:
    kinds = {  # order, pages for each touch, advice
        "every page in order": ("sequential", 1, "none"),
        "one page in 64 KiB, in random order": ("random", 16, "none"),
        "one page in 16 MiB, in random order": ("random", 4096, "none"),
        "one page in 64 KiB, in random order, MADV_HUGEPAGE": ("random", 16, "huge"),
    }
    usual = 512, 65535
    others = [(ahead, usual[1]) for ahead in (0, 128, 256, 1024, 4096)] + [(usual[0], most) for most in (12, 64, 256)]
    settings = {RAMFS: usual} | {
        f"read-ahead {ahead} KiB, {most} in the background": (ahead, most) for ahead, most in others
    }
    found = {kind: Measure(f"until touched: {kind}", "ms") for kind in kinds}
    with serve(bench, {RAMFS: peers.ramfs}, dense(bench)) as up, ExitStack() as stack:
        at = up[RAMFS]
        assert at.mount is not None
        control = bench.fresh("fusectl")
        control.mkdir()
        run(["mount", "-t", "fusectl", "fusectl", control])
        stack.callback(unmount, control)
        background = control / bdi(at.mount).name.partition(":")[2] / "max_background"
        for number, name in turns(bench, list(settings)):
            ahead, most = settings[name]
            set_read_ahead(at, ahead)
            background.write_text(f"{most}\n")
            for kind, (order, step, advice) in kinds.items():
                seen = bench.touch(at.path, order=order, step=step, advice=advice, seed=number + 1)
                found[kind].add(name, seen["seconds"] * 1e3)
    return list(found.values())
