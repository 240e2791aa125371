"""What a guest costs its host: memory, once or twice, and bytes written to the disk of the store."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import peers
from .bench import PAGE, Bench, Unavailable, run
from .cases import RAMFS, case, disk
from .stats import Goal, Measure

IN_MEMORY, PLAIN = "ramfs, store on tmpfs", "plain file on the same disk"

_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)


def cached(path: Path) -> int:
    """Bytes of a file in the page cache (Linux 6.5 or newer)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        if _libc.syscall(_CACHESTAT, fd, whole, found, 0):
            raise Unavailable("the kernel has no cachestat")
        return found[0] * PAGE
    finally:
        os.close(fd)


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
        with peers.ramfs_mount(bench, None if name == IN_MEMORY else point) as at:
            yield Ground(at.root, at.store, at.pid)


def settle(place: Ground, files: Sequence[Path]) -> int:
    """The memory when all is flushed and nothing more is let go."""
    for path in {path.stat().st_ino: path for path in files}.values():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    last = place.memory(files)
    deadline = time.monotonic() + 30
    still = 0
    while still < 3 and time.monotonic() < deadline:
        time.sleep(1)
        now = place.memory(files)
        still = still + 1 if now == last else 0
        last = now
    return last


@case("host", "host memory of a guest that has touched all of its own, and of 8 clones of it")
def host(bench: Bench) -> list[Measure]:
    size = bench.size
    one = Measure("host memory of one guest, all stored and flushed, of its size", "x", goals=[Goal(1.15)])
    clones = Measure("host memory of 8 clones by cp -r that have read everything, of the size of one", "x")
    dense = Measure("host memory of 8 dense clones by cp -al that have read everything, of the size of one", "x")
    with ExitStack() as stack:
        point = stack.enter_context(disk(bench))
        for name in (RAMFS, IN_MEMORY, PLAIN):
            with ground(bench, name, point) as at:
                vm = at.root / "vm"
                vm.mkdir()
                block = vm / peers.BLOCK_FILE
                with block.open("wb") as file:
                    file.truncate(size)
                bench.touch(block, order="sequential", access="write")
                one.add(name, settle(at, [block]) / size)
                copies = [at.root / f"clone{number}" for number in range(8)]
                for copy in copies:
                    run(["cp", "-r", vm, copy])
                one_by_one = [copy / peers.BLOCK_FILE for copy in copies]
                for copy in one_by_one:
                    bench.touch(copy, order="sequential")
                clones.add(name, settle(at, one_by_one) / size)
                run(["rm", "-r", *copies])
                if name != PLAIN:
                    (vm / ".snap" / "s").mkdir()
                    frozen = vm / ".snap" / "s" / peers.BLOCK_FILE
                    run(["cp", "-al", frozen.parent, copies[0]])
                    run(["dd", f"if={copies[0] / block.name}", "of=/dev/null", "bs=1M", "status=none"])
                    dense.add(name, settle(at, [frozen]) / size)
                    run(["rm", "-r", copies[0]])
                    frozen.parent.rmdir()
                run(["rm", "-r", vm])
    return [one, clones, dense]


def written(point: Path) -> int:
    """Bytes that were written to the disk that is mounted at a path, so far."""
    device = run(["findmnt", "--noheadings", "--output", "SOURCE", point]).strip()
    return int((Path("/sys/block") / Path(device).name / "stat").read_text().split()[6]) * 512


@case("dirtying", "bytes to the disk and host memory while a guest stores into a quarter of its memory all the time")
def dirtying(bench: Bench) -> list[Measure]:
    seconds = 70  # twice what the kernel waits until it writes a page back
    work = bench.size // 4
    rate = Measure("written to disk, of what is stored into, in each minute", "x")
    peak = Measure("largest host memory meanwhile, of what is stored into", "x")
    with ExitStack() as stack:
        places: dict[str, tuple[Path, Ground, Path, np.ndarray]] = {}
        for name in (RAMFS, PLAIN):
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
        for name, (point, *_) in places.items():
            rate.add(name, (written(point) - before[name]) / work * 60 / seconds)
            peak.add(name, most[name] / work)
        places.clear()
    return [rate, peak]
