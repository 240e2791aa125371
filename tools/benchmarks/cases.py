"""The cases: what is measured, on whom, and what ramfs is meant to reach."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.guest import Guest

from . import peers, takeover
from .bench import GIB, KIB, PAGE, Bench, Unavailable, bdi, run, unmount
from .peers import Peer, Prepare, Served
from .stats import Curve, Goal, Measure

RAMFS, DAEMON, NBDFUSE, TMPFS = "ramfs", "storage daemon (FUSE export)", "nbdfuse + nbdkit", "tmpfs"

Measuring = Callable[[Bench], Sequence[Measure | Curve]]

#: In which runs a case takes part: in each, in those without --quick, or only where --only names it.
ALWAYS, FULL, ASKED = "", "not with --quick", "only when asked for"


@dataclass(frozen=True)
class Case:
    about: str
    measure: Measuring
    when: str = ALWAYS
    quick: int = 256
    """MiB of the mapped file with --quick"""


CASES: dict[str, Case] = {}


def case(name: str, about: str, when: str = ALWAYS, quick: int = 256) -> Callable[[Measuring], Measuring]:
    def register(measure: Measuring) -> Measuring:
        CASES[name] = Case(about, measure, when, quick)
        return measure

    return register


def digests(store: Path | None) -> int:
    """Bytes of the digests of sealed layers: of the pages, not of the copies. Only ramfs has them."""
    return sum(path.stat().st_blocks * 512 for path in store.glob("layers/*.xxh3")) if store else 0


def made_digests(served: Served) -> int:
    """The same, once they are made."""
    deadline = time.monotonic() + 30
    while not (made := digests(served.store)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return made


@contextmanager
def serve(bench: Bench, contenders: dict[str, Peer], prepare: Prepare) -> Iterator[dict[str, Served]]:
    """Start all contenders; those that cannot be had are noted and left out."""
    with ExitStack() as stack:
        up: dict[str, Served] = {}
        for name, peer in contenders.items():
            try:
                up[name] = stack.enter_context(peer(bench, prepare))
            except (Unavailable, RuntimeError, OSError) as error:
                bench.miss(name, error)
        yield up


def turns(bench: Bench, names: Sequence[str], more: int = 0) -> Iterator[tuple[int, str]]:
    """Everybody once a round, each round led by another, so that none always follows the same one.

    There are bench.rounds of them, or fewer where the case has no time left: see Bench.each_round, also for `more`.
    """
    for number in bench.each_round(more):
        for i in range(len(names)):
            yield number, names[(i + number) % len(names)]


def dense(bench: Bench) -> Prepare:
    return lambda path: bench.fill(path, bench.size)


def rate(size: int, seconds: float) -> float:
    return size / seconds / 1e9


def check_cold(name: str, seen: dict[str, float]) -> None:
    """A fault that finds its page cached, or a hole, is not what these cases are about."""
    if name != TMPFS and seen["resident"] > 0.01:
        raise RuntimeError(f"{name}: {seen['resident']:.0%} of the file was still cached")
    if seen["zeros"]:
        raise RuntimeError(f"{name}: {int(seen['zeros'])} pages read as zeros")


def read_ahead(served: Served) -> int:
    return int((bdi(served.mount) / "read_ahead_kb").read_text()) if served.mount else 0


def set_read_ahead(served: Served, kib: int) -> None:
    if served.mount:
        (bdi(served.mount) / "read_ahead_kb").write_text(f"{kib}\n")


XFS = "cp --reflink on XFS"


def filler(bench: Bench, size: int, run_bytes: int, stride: int) -> Prepare:
    return lambda path: bench.fill(path, size, run_bytes, stride)


@contextmanager
def disk(bench: Bench, kind: str = "xfs") -> Iterator[Path]:
    """XFS or btrfs, with reflinks, on a loop device over a file on tmpfs: a disk that is no slower than memory."""
    image, point = bench.fresh(f"{kind}.img"), bench.fresh(kind)
    point.mkdir()
    with ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            file.truncate(20 * GIB)
        run([f"mkfs.{kind}", "-q", image])
        run(["mount", "-o", "loop", image, point])
        stack.callback(unmount, point)
        yield point


@contextmanager
def xfs_directory(bench: Bench, prepare: Prepare) -> Iterator[Served]:
    with disk(bench) as point:
        (point / "vm").mkdir()
        block = point / "vm" / peers.BLOCK_FILE
        prepare(block)
        run(["sync", "-f", point])
        yield Served(block, mount=point)


@case(
    "memory",
    "what supervisor and daemons have for themselves with 17 GiB of images touched; 5 GiB with --quick",
    when=FULL,
)
def memory(bench: Bench) -> list[Measure]:
    anonymous, beyond = f"{RAMFS}, daemon, anonymous", f"{RAMFS}, daemon, all but mapped pages of the store's layers"
    supervisor, standby = f"{RAMFS}, supervisor", f"{RAMFS}, daemon that stands by"
    together = f"{RAMFS}, all of them, what they share once"
    found = Measure(
        "resident memory of what serves a mount",
        "MiB",
        goals=[Goal(150.0, subject=beyond, worst_round=True), Goal(20.0, subject=supervisor, worst_round=True)],
    )
    try:
        with peers.ramfs_mount(bench) as at:
            images = 5 if bench.quick else 17
            for number in range(images):
                vm = at.root / f"vm{number}"
                vm.mkdir()
                block = vm / peers.BLOCK_FILE
                full = number == images - 1  # after those with one page in every 256 KiB
                if full:
                    bench.fill(block, GIB)
                    bench.touch(block, order="sequential", size=GIB)
                else:
                    bench.fill(block, GIB, PAGE, 256 * KIB)
                    bench.touch(block, size=GIB, advice="random", seed=number + 1)
                parent, waiting = at.others()
                layers = str(at.store.resolve() / "layers")

                def own(pid: int, kind: str = "Rss", layers: str = layers) -> float:
                    return sum(mib for path, mib in resident(pid, kind).items() if not path.startswith(layers))

                found.add(anonymous, resident(at.pid)[ANONYMOUS])
                found.add(beyond, own(at.pid))
                found.add(supervisor, own(parent))
                found.add(standby, own(waiting))
                found.add(together, sum(own(pid, "Pss") for pid in (parent, at.pid, waiting)))
    except (Unavailable, RuntimeError, OSError) as error:
        bench.miss(RAMFS, error)
        return []
    return [found]


ANONYMOUS = ""


def resident(pid: int, kind: str = "Rss") -> dict[str, float]:
    """MiB of a process's resident pages, by the path that is mapped; "Pss" divides those of several by their number."""
    found = {ANONYMOUS: 0.0}
    path = ANONYMOUS
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line)
        if head:
            path = ANONYMOUS if head[1].startswith("[") else head[1]
        elif line.startswith(f"{kind}:"):
            found[path] = found.get(path, 0.0) + int(line.split()[1]) / KIB
    return found


@case(
    "takeover",
    "kill -9 of the daemon, and ramfs upgrade, under loads that check every byte; 120 times, 6 with --quick",
    when=FULL,
)
def taken_over(bench: Bench) -> list[Measure]:
    kills, upgrades = (4, 2) if bench.quick else (100, 20)
    with ExitStack() as stack:
        mounts = [stack.enter_context(peers.ramfs_mount(bench)) for _ in range(3)]
        directory = mounts[2].root / "guest"
        directory.mkdir()
        guest = stack.enter_context(Guest(directory / "ram", boot="fill=1:4"))
        guest.wait_for_line("= filled", 120)
        places = [(at.root, at.store) for at in mounts]
        storm = takeover.Storm(places, bench.program("steady"), bench.ramfs)
        stack.callback(storm.abandon)
        storm.add_guest(guest, directory)
        storm.kill(kills)
        storm.upgrade(upgrades)
        storm.end()
        guest.check()
        guest.close()
        storm.check()
        for at in mounts:
            run([*bench.ramfs, "umount", at.root])
            run([*bench.ramfs, "fsck", at.store])
            run([*bench.ramfs, "mount", at.store, at.root])
        storm.check()
    found = []
    for how, title in (("kill", "after kill -9"), ("upgrade", "during an upgrade")):
        stalls = storm.stalls(how)
        bench.say(f"  {how}: {takeover.distribution(stalls)}")
        goals = [Goal(500.0, subject=f"{RAMFS}, p99")] if how == "kill" else []
        measure = Measure(f"longest wait of one access {title}", "ms", goals=goals)
        for name, part in takeover.PARTS.items():
            measure.add(f"{RAMFS}, {name}", takeover.percentile(stalls, part) * 1e3)
        found.append(measure)
    return found
