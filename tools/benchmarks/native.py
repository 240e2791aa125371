"""What a dense clone gains when the kernel serves its template from the store (docs/architecture.md)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from . import peers
from .bench import PAGE, Bench
from .cases import RAMFS, TMPFS, case, check_cold, rate, turns
from .host import Ground
from .stats import Goal, Measure

CACHED = "ramfs, native=off"
STEP = 16  # pages for each touch in random order: see touch.c


@case("native", "a frozen file as a dense clone maps it: faults, copies on write, memory of 8 clones; native and not")
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
