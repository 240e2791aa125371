"""Fleets: many guests go on from one template at once; how long it takes, and what each of them costs the host."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.guest import Guest

from . import peers
from .bench import KIB, MIB, PATIENCE, ROOT, Bench, run
from .cases import RAMFS, TMPFS, case, digests, turns
from .host import Ground, at_rest, top
from .stats import Curve, Goal, Measure

DENSE, PRIVATE = "ramfs, dense (cp -al, share=off)", "one file on tmpfs, share=off"
STREAM = "QEMU -incoming from a file"
#: MiB of a guest, and how many of them it has filled. (With 80 it runs out of memory at times.)
SIZE, USED = 96, 16
#: MiB that QEMU needs besides, at most: to know which fleets fit into this machine.
QEMU = 60
#: Guests that are started at the same time; two processors do not start more of them any faster.
STARTING = 8


@dataclass(frozen=True)
class Way:
    """How a guest comes by the memory of the template."""

    ground: Ground
    template: Sequence[Path]
    """its files, which may be in the page cache before"""
    start: Callable[[Path], Guest]
    """a guest that runs or is about to, with its own files in a directory that is not there yet"""


@contextmanager
def ways(bench: Bench) -> Iterator[dict[str, Way]]:
    with ExitStack() as stack:
        at = stack.enter_context(peers.ramfs_mount(bench))
        plain = bench.fresh("tmpfs")
        plain.mkdir()
        stack.callback(run, ["rm", "-rf", plain])
        vm, stream, library = at.root / "vm", plain / "stream", bench.fresh("readonly.so")
        vm.mkdir()
        with Guest(vm / "ram", mib=SIZE, boot=f"tick=0.1 fill=1:{USED}") as guest:
            guest.wait_for_line("= filled", PATIENCE)
            guest.wait_for_tick()
            run([*bench.ramfs, "snapshot", vm, "warm", "--qmp", guest.socket])
            guest.qmp("migrate", uri=f"exec:cat > {stream}")
            while guest.qmp("query-migrate")["status"] != "completed":
                time.sleep(0.01)
        template = vm / ".snap" / "warm"
        run(["cp", "-r", template, plain / "vm"])
        # QEMU 8.2 opens a file for reading alone with readonly=on,rom=off; Debian's 7.2 has to be made to.
        run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests" / "vm" / "readonly.c", "-ldl"])

        def mapped(directory: Path, *, share: bool) -> Guest:
            env = {} if share else {"LD_PRELOAD": str(library), "READONLY": str(directory / "ram")}
            guest = Guest(directory / "ram", mib=SIZE, incoming=True, share=share, env=env)
            return loaded(guest, lambda: guest.load(directory / "state"))

        def copied(source: Path, directory: Path) -> Guest:
            run(["cp", "-r", source, directory])
            return mapped(directory, share=True)

        def linked(directory: Path) -> Guest:
            run(["cp", "-al", template, directory])
            return mapped(directory, share=False)

        def streamed(_: Path) -> Guest:
            guest = Guest(None, mib=SIZE, incoming=True)
            return loaded(guest, lambda: arrive(guest, stream))

        frozen, plain_files = ([place / name for name in ("ram", "state")] for place in (template, plain / "vm"))
        here, there = Ground(at.root, at.store, top(at.pid)), Ground(plain)
        yield {
            RAMFS: Way(here, frozen, lambda directory: copied(template, directory)),
            DENSE: Way(here, frozen, linked),
            TMPFS: Way(there, plain_files, lambda directory: copied(plain / "vm", directory)),
            PRIVATE: Way(there, plain_files, lambda _: mapped(plain / "vm", share=False)),
            STREAM: Way(there, [], streamed),
        }


def loaded(guest: Guest, load: Callable[[], None]) -> Guest:
    try:
        load()
    except BaseException:
        guest.close()
        raise
    return guest


def arrive(guest: Guest, stream: Path) -> None:
    """All of a guest's state and memory out of a file."""
    guest.qmp("migrate-incoming", uri=f"exec:cat {stream}")
    while guest.status() == "inmigrate":
        time.sleep(0.005)
    guest.qmp("cont")


@dataclass(frozen=True)
class Fleet:
    """What one was measured to take; memory in bytes for each guest."""

    seconds: float
    """from the first copy until the last guest has ticked"""
    wrote: float
    """pages of its own, in the mapping of its RAM"""
    host: float
    """these, what the page cache has of its files, and what the store and the daemon take for it"""
    qemu: float
    """QEMU's own: program, heap, translated code, page tables"""


def fleet(bench: Bench, way: Way, count: int) -> Fleet:
    """Let so many guests go on until each has ticked, and stand still then."""
    guests: list[Guest] = []
    directories = [way.ground.root / bench.fresh("clone").name for _ in range(count)]
    layers = way.ground.store / "layers" if way.ground.store else None
    kept = len(os.listdir(layers)) if layers else 0

    def used(files: Sequence[Path]) -> int:
        """What the host has in memory, but for digests: those belong to the template, and come some seconds later."""
        return way.ground.memory([*way.template, *files]) - digests(way.ground.store)

    before = at_rest(lambda: used([]), 0.2)  # what the fleet before has left goes a while later

    def go(directory: Path) -> None:
        guest = way.start(directory)
        guests.append(guest)
        guest.wait_for_tick(timeout=PATIENCE)
        guest.qmp("stop")

    try:
        begun = time.monotonic()
        with ThreadPoolExecutor(STARTING) as pool:
            for done in [pool.submit(go, directory) for directory in directories]:
                done.result()
        seconds = time.monotonic() - begun
        files = [path for directory in directories if directory.exists() for path in directory.iterdir()]
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)  # what a guest has dirty goes to the store sooner or later, and is there once more then
            os.close(fd)
        own = [memory(guest) for guest in guests]
        anonymous = sum(wrote for wrote, _ in own)
        host = anonymous + used(files) - before
        return Fleet(seconds, anonymous / count, host / count, sum(qemu for _, qemu in own) / count)
    finally:
        for guest in guests:
            guest.close()
        run(["rm", "-rf", *directories])
        deadline = time.monotonic() + 10
        while layers and len(os.listdir(layers)) > kept and time.monotonic() < deadline:
            time.sleep(0.05)


def memory(guest: Guest) -> tuple[int, int]:
    """Bytes of the pages that a guest has for itself of its RAM, and of all else in its QEMU, shared pages in part."""
    wrote = other = 0
    ram = False
    for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            size = int(head[2], 16) - int(head[1], 16)
            ram = size == SIZE * MIB if guest.memory is None else line.endswith(str(guest.memory))
        elif line.startswith("Anonymous:" if ram else "Pss:"):
            amount = int(line.split()[1]) * KIB
            wrote, other = (wrote + amount, other) if ram else (wrote, other + amount)
    tables = re.search(r"VmPTE:\s*(\d+)", Path(f"/proc/{guest.pid}/status").read_text())
    return wrote, other + (int(tables[1]) * KIB if tables else 0)


def fits(count: int) -> bool:
    """Is there half as much memory again as so many guests need?"""
    free = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return free is not None and int(free[1]) * KIB >= 3 * count * (SIZE + QEMU) * MIB // 2


@case("fleet", f"guests of {SIZE} MiB (TCG) go on from a template, 1 to 64 at once, 4 with --quick: time, host memory")
def fleets(bench: Bench) -> list[Measure | Curve]:
    first = Measure("from cp to the first tick of a clone", "ms")
    beyond = Measure(
        "host memory of each clone of the largest fleet beyond the pages it wrote, of these",
        "%",
        goals=[Goal(3.0, subject=DENSE)],
    )
    wrote = Measure("pages that a clone has for itself at its first tick", "MiB")
    qemu = Measure("QEMU's own memory for each guest", "MiB")
    took = Curve("from the first cp until all have ticked", "s", "clones at once")
    host = Curve("host memory of each clone, besides QEMU's own", "MiB", "clones at once")
    counts = [1, 4] if bench.quick else [1, 2, 4, 8, 16, 32, 64]
    with ways(bench) as all_ways:
        for count in counts:
            if not fits(count):
                bench.say(f"  {count} and more guests at once could take all of the free memory")
                break
            for number, name in turns(bench, list(all_ways), len(counts) - 1):
                if number and count > 1:
                    break
                seen = fleet(bench, all_ways[name], count)
                took.add(name, count, seen.seconds)
                host.add(name, count, seen.host / MIB)
                if count == 1:
                    first.add(name, seen.seconds * 1e3)
                if count == counts[-1] and seen.wrote:
                    beyond.add(name, 100 * (seen.host - seen.wrote) / seen.wrote)
                    wrote.add(name, seen.wrote / MIB)
                    qemu.add(name, seen.qemu / MIB)
    return [first, beyond, wrote, qemu, took, host]
