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
from .bench import GIB, KIB, MIB, PAGE, Bench, Unavailable, bdi, run, unmount
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


def digests(served: Served) -> int:
    """Bytes of the digests of sealed layers: of the pages, not of the copies. Only ramfs has them."""
    return sum(path.stat().st_blocks * 512 for path in served.store.glob("layers/*.xxh3")) if served.store else 0


def made_digests(served: Served) -> int:
    """The same, once they are made."""
    deadline = time.monotonic() + 30
    while not (made := digests(served)) and time.monotonic() < deadline:
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


@case("clone", "cp -r of a directory with 16 GiB of block file; reflink, overlay, plain copy")
def clone(bench: Bench) -> list[Measure]:
    size = 16 * GIB
    # A guest that uses huge pages fills its memory in runs of 2 MiB; one that does not, in smaller ones.
    much = f"{bench.size // MIB:,} MiB"
    reference, small = f"{much} resident", "64 MiB resident"
    layouts = {
        reference: (bench.size, 2 * MIB),
        small: (64 * MIB, 2 * MIB),
        f"{much} in runs of 64 KiB": (bench.size, 64 * KIB),
    }
    subject = f"{RAMFS}, {reference}"
    took = Measure(
        "clone 16 GiB",
        "ms",
        goals=[Goal(200.0, subject=subject), Goal(2.0, against=f"{RAMFS}, {small}", subject=subject)],
    )
    grew = Measure(
        "growth of the store by a copy, of what is resident (without digests)",
        "%",
        goals=[Goal(0.5, subject=f"{RAMFS}, {label}", worst_round=True) for label in (reference, small)],
    )

    hashed = Measure("digests of what the first copy sealed, made once some seconds later, of what is resident", "%")

    for index, (label, (resident, part)) in enumerate(layouts.items()):
        stride = size * part // resident
        prepare = filler(bench, size, part, stride)
        contenders: dict[str, Peer] = {RAMFS: peers.ramfs}
        if label != small:
            contenders |= {TMPFS: tmpfs_directory, XFS: xfs_directory, OVERLAY: peers.tmpfs}
        with serve(bench, contenders, prepare) as up:
            for number, name in turns(bench, list(up), len(layouts) - index - 1):
                source, copy = up[name].path, up[name].path.parent.with_name(f"copy-{number}")
                before = allocated(up[name]) - digests(up[name])
                if name == OVERLAY:
                    copy = bench.fresh("overlay.qcow2")
                    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", source, "-F", "raw", copy]
                elif name == XFS:
                    command = ["cp", "-r", "--reflink=always", source.parent, copy]
                else:
                    command = ["cp", "-r", source.parent, copy]
                begun = time.perf_counter()
                run([str(word) for word in command])
                took.add(f"{name}, {label}", (time.perf_counter() - begun) * 1e3)
                if name == RAMFS:
                    time.sleep(1)  # what the daemon does behind the answer counts too
                    after = allocated(up[name]) - digests(up[name])
                    grew.add(f"{name}, {label}", 100 * (after - before) / resident)
                    check_copy(bench, source, copy / source.name, size)
                run(["rm", "-rf", copy])
            hashed.add(f"{RAMFS}, {label}", 100 * made_digests(up[RAMFS]) / resident)
    return [took, grew, hashed]


def check_copy(bench: Bench, source: Path, copy: Path, size: int) -> None:
    """Look at the same random pages of both, as comparing 16 GiB takes too long."""
    seen = [bench.touch(path, advice="random", size=size, step=MIB // PAGE)["zeros"] for path in (source, copy)]
    if seen[0] != seen[1]:
        raise RuntimeError(f"of the same pages {seen[0]:.0f} are zeros in the source and {seen[1]:.0f} in the copy")


XFS, OVERLAY = "cp --reflink on XFS", "qemu-img create, overlay"


def filler(bench: Bench, size: int, run_bytes: int, stride: int) -> Prepare:
    return lambda path: bench.fill(path, size, run_bytes, stride)


def allocated(served: Served) -> int:
    """Bytes that the store really takes; only ramfs has one."""
    return int(run(["du", "-s", "--block-size=1", served.store]).split()[0]) if served.store else 0


@contextmanager
def tmpfs_directory(bench: Bench, prepare: Prepare) -> Iterator[Served]:
    place = bench.fresh("tmpfs")
    (place / "vm").mkdir(parents=True)
    block = place / "vm" / peers.BLOCK_FILE
    prepare(block)
    try:
        yield Served(block)
    finally:
        run(["rm", "-rf", place])


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


@case("memory", "what supervisor and daemons have for themselves with 17 GiB of images touched; 5 GiB with --quick")
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
