"""What becomes of faults, clones, snapshots, memory and mounting as generations and images grow in number."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from . import peers
from .bench import MIB, PAGE, Bench, Unavailable, mounted, run, serving, unmount
from .cases import ANONYMOUS, RAMFS, XFS, case, disk, resident
from .peers import Mounted
from .stats import Curve

T = TypeVar("T")

GENERATIONS, GENERATIONS_QUICK = (1, 2, 5, 10, 20, 50, 100, 200, 500), (1, 5, 25)
IMAGES, IMAGES_QUICK = (1, 10, 100, 300, 1000), (1, 100)
"""where it is looked"""
PART = 100
"""of a file's pages one in so many is written between two generations"""
SAMPLES = 1000
"""faults at each point"""
BEFORE = "ramfs before"
"""the command that BEFORE in the environment names, measured beside the other"""
FREEZE = "snapshot, median since the point before"
BEHIND = "processor time of the daemon in the 2 s after pages were written that snapshots have too"
REMOVE = "removal of a generation in the middle, median"
QCOW2 = "qcow2 overlays, storage daemon (FUSE export)"
MOST = {XFS: 100, QCOW2: 200, BEFORE: 100}
"""who is given up after so many, for the time that more of them take"""


def commands(bench: Bench) -> dict[str, Bench]:
    """The commands that are measured, by name, each with a scratch directory of its own."""
    found = {RAMFS: bench}
    if "BEFORE" in os.environ:
        place = bench.fresh("before")
        place.mkdir()
        found[BEFORE] = replace(bench, scratch=place, ramfs=shlex.split(os.environ["BEFORE"]))
    return found


def in_turn(contenders: dict[str, T], point: int) -> list[tuple[str, T]]:
    """At each point another one is the first: what it made just now is not yet at rest."""
    found = list(contenders.items())
    return found[point % len(found) :] + found[: point % len(found)]


def milliseconds(work: Callable[..., object], *arguments: object) -> float:
    begun = time.perf_counter()
    work(*arguments)
    return (time.perf_counter() - begun) * 1e3


def digest(path: Path) -> str:
    """Of a file's contents, read in order."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while part := file.read(MIB):
            state.update(part)
    return state.hexdigest()


@dataclass
class Curves:
    """The curves of one case, by what they tell."""

    x: str
    by_title: dict[str, Curve] = field(default_factory=dict)

    def add(self, title: str, unit: str, who: str, x: float, value: float) -> None:
        curve = self.by_title.setdefault(title, Curve(title, unit, self.x))
        curve.add(who, x, value)

    def faults(self, bench: Bench, who: str, x: int, path: Path, size: int) -> None:
        seen = bench.touch(path, advice="random", size=size, step=max(size // PAGE // SAMPLES, 1), seed=x)
        self.add("cold random fault, p50", "us", who, x, seen["p50_us"])
        self.add("cold random fault, p99", "us", who, x, seen["p99_us"])


@dataclass
class Held:
    """A mount that outlives its daemons here."""

    bench: Bench
    at: Mounted
    who: str
    curves: Curves

    def pid(self) -> int:
        return int(json.loads((self.at.root / ".ramfs" / "status.json").read_text())["pid"])

    def remount(self, x: int) -> None:
        """Time what a restart takes: after a kill of all that serves the mount, and after an unmount; and fsck."""
        mount: list[str | Path] = [*self.bench.ramfs, "mount", self.at.store, self.at.root]
        told = json.loads((self.at.root / ".ramfs" / "status.json").read_text())
        for pid in (told["supervisor"]["pid"], told["pid"]):
            os.kill(int(pid), signal.SIGKILL)
        unmount(self.at.root)
        self.command("ramfs mount after kill -9", x, *mount)
        self.command("ramfs umount", x, *self.bench.ramfs, "umount", self.at.root)
        self.command("ramfs fsck", x, *self.bench.ramfs, "fsck", self.at.store)
        self.command("ramfs mount after umount", x, *mount)

    def overwrite(self, x: int, path: Path, size: int, pages: int, seed: int) -> None:
        """What it costs behind the answers when pages are written anew that snapshots, or clones, have as well."""
        self.bench.scatter(path, size, pages, seed)
        before = self.processor_time()
        time.sleep(2)  # garbage is looked for once a second, and digests are made later
        self.curves.add(BEHIND, "ms", self.who, x, self.processor_time() - before)

    def processor_time(self) -> float:
        """Of the daemon, all its threads, in ms."""
        words = Path(f"/proc/{self.pid()}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) * 1e3 / os.sysconf("SC_CLK_TCK")

    def weigh(self, x: int) -> None:
        """What the daemon and the store have grown to."""
        pid, layers = self.pid(), str(self.at.store.resolve() / "layers")
        self.curves.add("daemon, anonymous memory", "MiB", self.who, x, resident(pid)[ANONYMOUS])
        own = sum(mib for path, mib in resident(pid, "Pss").items() if not path.startswith(layers))
        self.curves.add("daemon, PSS without mapped pages of layers", "MiB", self.who, x, own)
        self.curves.add("store beyond pages of guests", "MiB", self.who, x, self.overhead() / MIB)

    def overhead(self) -> int:
        """Bytes that the store takes and that are no guest's pages."""
        files = [path for path in self.at.store.rglob("*") if path.is_file() and path.suffix != ".ram"]
        return sum(path.stat().st_blocks * 512 for path in files if path.name != "reserve")

    def command(self, title: str, x: int, *words: str | Path) -> None:
        self.curves.add(title, "ms", self.who, x, milliseconds(run, words))


@contextmanager
def reported(bench: Bench, who: str) -> Iterator[None]:
    try:
        yield
    except (Unavailable, OSError) as error:
        bench.miss(who, error)


@case("growth", "1 to 500 generations of one image; reflinks on XFS, a chain of qcow2 overlays")
def growth(bench: Bench) -> list[Curve]:
    size = bench.size // 4
    steps = GENERATIONS if not bench.quick else GENERATIONS_QUICK
    written = size // PAGE // PART
    curves = Curves("generations")
    with ExitStack() as stack:
        oracle = stack.enter_context(peers.tmpfs(bench, lambda path: bench.fill(path, size))).path
        chains: dict[str, Chain] = {}
        for who, each in commands(bench).items():
            chains[who] = stack.enter_context(RamfsChain.made(each, who, size, curves))
        for who, make in ((XFS, ReflinkChain.made), (QCOW2, OverlayChain.made)):
            with reported(bench, who):
                chains[who] = stack.enter_context(make(bench, who, size, curves))
        kept: dict[int, str] = {}
        took: dict[str, list[float]] = {who: [] for who in chains}
        for number in range(1, steps[-1] + 1):
            bench.scatter(oracle, size, written, number)
            for who, chain in chains.items():
                bench.scatter(chain.live, size, written, number)
                took[who].append(milliseconds(chain.freeze, number))
            if number not in steps:
                continue
            kept[number] = digest(oracle)
            for who, chain in in_turn(chains, steps.index(number)):
                curves.add(FREEZE, "ms", who, number, statistics.median(took[who]))
                took[who].clear()
                curves.faults(bench, who, number, chain.live, size)
                chain.look(number)
                if number in (MOST.get(who), steps[-1]):
                    chain.remove(range(number // 4, number * 3 // 4))
                    check(chain, kept)
                    chain.end()
                    del chains[who]
    return list(curves.by_title.values())


def check(chain: Chain, kept: dict[int, str]) -> None:
    """All that is left of a chain has the contents that were written."""
    for number, contents in kept.items():
        if (frozen := chain.frozen(number)) is not None and digest(frozen) != contents:
            raise RuntimeError(f"{chain.who}: generation {number} is not what it was")
    if digest(chain.live) != kept[max(kept)]:
        raise RuntimeError(f"{chain.who}: the last contents are not what was written")


@dataclass
class Chain:
    """One file and its generations, on a contender."""

    bench: Bench
    who: str
    size: int
    curves: Curves
    live: Path

    def freeze(self, number: int) -> None:
        raise NotImplementedError

    def frozen(self, number: int) -> Path | None:
        """A generation's file, None if it was removed, or cannot be read beside the newest."""
        del number
        return None

    def look(self, number: int) -> None:
        """What else is told of so many generations."""

    def remove(self, numbers: range) -> None:
        """Remove these generations, where that can be done."""

    def end(self) -> None:
        """Check what can only be checked at the end."""


@dataclass
class RamfsChain(Chain):
    held: Held

    @classmethod
    @contextmanager
    def made(cls, bench: Bench, who: str, size: int, curves: Curves) -> Iterator[Chain]:
        with peers.ramfs_mount(bench) as at:
            live = at.root / "vm" / peers.BLOCK_FILE
            live.parent.mkdir()
            bench.fill(live, size)
            yield cls(bench, who, size, curves, live, Held(bench, at, who, curves))

    def _snap(self, number: int) -> Path:
        return self.live.parent / ".snap" / f"g{number}"

    def freeze(self, number: int) -> None:
        self._snap(number).mkdir()

    def frozen(self, number: int) -> Path | None:
        return path if (path := self._snap(number) / self.live.name).exists() else None

    def look(self, number: int) -> None:
        vm, copy = self.live.parent, self.held.at.root / "copy"
        self.held.command("clone", number, "cp", "-r", self._snap(number), copy)
        run(["rm", "-r", copy])
        self.held.command("ls -lR", number, "ls", "-lR", vm / ".snap")
        self.held.command("ramfs log", number, *self.bench.ramfs, "log", "--json", vm)
        self.held.command("ramfs du", number, *self.bench.ramfs, "du", "--json", vm)
        self.held.weigh(number)
        self.held.remount(number)
        self.held.overwrite(number, self.live, self.size, self.size // PAGE // PART, number)  # with the same bytes

    def remove(self, numbers: range) -> None:
        took = [milliseconds(self._snap(number).rmdir) for number in numbers]
        self.curves.add(REMOVE, "ms", self.who, numbers.stop, statistics.median(took))

    def end(self) -> None:
        run([*self.bench.ramfs, "umount", self.held.at.root])
        run([*self.bench.ramfs, "fsck", self.held.at.store])


@dataclass
class ReflinkChain(Chain):
    """The file on XFS, and reflinks of it."""

    @classmethod
    @contextmanager
    def made(cls, bench: Bench, who: str, size: int, curves: Curves) -> Iterator[Chain]:
        with disk(bench) as point:
            bench.fill(point / "live", size)
            yield cls(bench, who, size, curves, point / "live")

    def freeze(self, number: int) -> None:
        run(["cp", "--reflink=always", self.live, self.live.with_name(f"g{number}")])

    def frozen(self, number: int) -> Path | None:
        return path if (path := self.live.with_name(f"g{number}")).exists() else None

    def look(self, number: int) -> None:
        frozen, copy = self.live.with_name(f"g{number}"), self.live.with_name("copy")
        took = milliseconds(run, ["cp", "--reflink=always", frozen, copy])
        self.curves.add("clone", "ms", self.who, number, took)
        copy.unlink()
        extents = int(run(["filefrag", self.live]).split(":")[-1].split()[0])
        self.curves.add("extents of the file", "", self.who, number, extents)

    def remove(self, numbers: range) -> None:
        took = [milliseconds(self.live.with_name(f"g{number}").unlink) for number in numbers]
        self.curves.add(REMOVE, "ms", self.who, numbers.stop, statistics.median(took))


@dataclass
class OverlayChain(Chain):
    """A chain of overlays, with subclusters of a page, to which the storage daemon adds while it serves."""

    overlays: Path
    monitor: Monitor

    @classmethod
    @contextmanager
    def made(cls, bench: Bench, who: str, size: int, curves: Curves) -> Iterator[Chain]:
        place, point, control = bench.fresh("overlays"), bench.fresh("overlay"), bench.fresh("overlay.qmp")
        place.mkdir()
        point.touch()
        bench.fill(place / "base", size)
        _overlay(place / "0", size)
        command = [
            "qemu-storage-daemon", "--chardev", f"socket,id=control,path={control},server=on,wait=off",
            "--monitor", "chardev=control",
            "--blockdev", f"driver=file,node-name=base,filename={place / 'base'}",
            "--blockdev", f"driver=qcow2,node-name=g0,file.driver=file,file.filename={place / '0'},backing=base",
            "--export", f"type=fuse,id=ram,node-name=g0,mountpoint={point},writable=on",
        ]  # fmt: skip
        try:
            with serving(command, lambda: mounted(point)), Monitor.connected(control) as monitor:
                yield cls(bench, who, size, curves, point, place, monitor)
        finally:
            unmount(point)
            run(["rm", "-rf", place])

    def freeze(self, number: int) -> None:
        path = self.overlays / str(number)
        _overlay(path, self.size)
        file = {"driver": "file", "filename": str(path)}
        self.monitor.ask("blockdev-add", {"driver": "qcow2", "node-name": f"g{number}", "file": file, "backing": None})
        self.monitor.ask("blockdev-snapshot", {"node": f"g{number - 1}", "overlay": f"g{number}"})


def _overlay(path: Path, size: int) -> None:
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=128k,extended_l2=on", path, str(size)])


@dataclass
class Monitor:
    """QEMU's monitor, one command at a time."""

    stream: Any

    @classmethod
    @contextmanager
    def connected(cls, path: Path) -> Iterator[Monitor]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            with connection.makefile("rw") as stream:
                stream.readline()
                monitor = cls(stream)
                monitor.ask("qmp_capabilities", {})
                yield monitor

    def ask(self, command: str, arguments: dict[str, Any]) -> None:
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        while "return" not in (told := json.loads(self.stream.readline())):
            if "error" in told:
                raise RuntimeError(f"{command}: {told['error']['desc']}")


@case("images", "1 to 1000 images in one store, most of them clones of one; reflinks on XFS")
def images(bench: Bench) -> list[Curve]:
    size = bench.size // 16
    steps = IMAGES if not bench.quick else IMAGES_QUICK
    written = size // PAGE // PART
    curves = Curves("images")
    with ExitStack() as stack:
        fleets: dict[str, tuple[Bench, Held]] = {}
        for who, each in commands(bench).items():
            at = stack.enter_context(peers.ramfs_mount(each))
            base = at.root / "base" / peers.BLOCK_FILE
            base.parent.mkdir()
            bench.fill(base, size)
            (base.parent / ".snap" / "warm").mkdir()
            fleets[who] = each, Held(each, at, who, curves)
        point = stack.enter_context(disk(bench))
        bench.fill(point / "base", size)
        contents = {0: digest(point / "base")}
        took: dict[str, list[float]] = {who: [] for who in (*fleets, XFS)}
        for number in range(1, steps[-1] + 1):
            # One in ten is a guest of its own, with some memory; of the clones one in three has run.
            alone, ran = number % 10 == 9, number % 3 == 1
            for who, (_, held) in fleets.items():
                copy = held.at.root / f"vm{number}"
                block = copy / peers.BLOCK_FILE
                if alone:
                    copy.mkdir()
                    bench.fill(block, size, PAGE, 64 * PAGE, seed=number)
                    continue
                source = held.at.root / "base" / ".snap" / "warm"
                took[who].append(milliseconds(run, ["cp", "-r", source, copy]))
                if ran:
                    bench.scatter(block, size, written, number)
            if not alone:
                plain = point / str(number)
                took[XFS].append(milliseconds(run, ["cp", "--reflink=always", point / "base", plain]))
                if ran:
                    bench.scatter(plain, size, written, number)
            if number not in steps:
                continue
            for who, values in took.items():
                curves.add("clone, median since the point before", "ms", who, number, statistics.median(values))
                values.clear()
            plain = point / str(number)
            curves.faults(bench, XFS, number, plain, size)
            bench.scatter(plain, size, 16, 0)
            contents[number] = digest(plain)
            for who, (each, held) in in_turn(fleets, steps.index(number)):
                vm = held.at.root / f"vm{number}"
                curves.faults(bench, who, number, vm / peers.BLOCK_FILE, size)
                bench.scatter(vm / peers.BLOCK_FILE, size, 16, 0)
                curves.add("snapshot", "ms", who, number, milliseconds((vm / ".snap" / "one").mkdir))
                held.command("ls -lR", number, "ls", "-lR", held.at.root)
                held.command("ramfs du", number, *each.ramfs, "du", "--json", held.at.root)
                held.weigh(number)
                held.remount(number)
                held.overwrite(number, vm / peers.BLOCK_FILE, size, 16, 0)
            for who in [who for who in fleets if number in (MOST.get(who), steps[-1])]:
                each, held = fleets.pop(who)
                del took[who]
                check_images(who, held, contents)
                run([*each.ramfs, "umount", held.at.root])
                run([*each.ramfs, "fsck", held.at.store])
    return list(curves.by_title.values())


def check_images(who: str, held: Held, contents: dict[int, str]) -> None:
    """The images that were looked at have the contents that were written, and so have their snapshots."""
    for number, written in contents.items():
        snap = held.at.root / (f"vm{number}/.snap/one" if number else "base/.snap/warm")
        for path in (snap / peers.BLOCK_FILE, snap.parent.parent / peers.BLOCK_FILE):
            if digest(path) != written:
                raise RuntimeError(f"{who}: {path.relative_to(held.at.root)} is not what was written")
