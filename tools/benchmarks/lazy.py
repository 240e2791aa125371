"""A guest goes on from a snapshot that is at a server, some way off: by ramfs, and by whatever else can do that."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ramfs import qmp
from tests.vm.guest import Guest, listens

from . import peers
from .arrival import HOST, PORT, is_arriving, nbdkit, pull
from .bench import MIB, PATIENCE, Bench, Unavailable, mounted, run, serving, unmount
from .cases import RAMFS, case, turns
from .postcopy import QEMU, Waits, free_port, until
from .stats import Curve

DAEMON, NBDFUSE = "storage daemon, overlay over NBD", "nbdfuse, nbdkit that keeps what is read"
#: MiB of the guest, and how much of that it has filled.
SIZE, USED = 256, 64
#: Milliseconds that a byte takes, each way.
DELAYS = [0, 1, 10]
_NEWNET = 0x40000000


@dataclass
class Line:
    """The loopback of a network of its own, on which each byte takes ``delay`` ms, either way."""

    delay: float
    netem: bool

    @contextmanager
    def to(self, port: int) -> Iterator[int]:
        """The port at which who listens at ``port`` is reached over the line."""
        if self.netem or not self.delay:
            yield port
            return
        near = free_port()
        command = [sys.executable, "-m", "tools.benchmarks.relay", near, port, self.delay]
        with serving([str(word) for word in command], lambda: is_listening(near)):
            yield near

    @property
    def carried(self) -> int:
        """Bytes so far, both ways, with the headers of TCP."""
        lines = (line.split() for line in Path("/proc/thread-self/net/dev").read_text().splitlines())
        twice = 1 if self.netem or not self.delay else 2  # to the relay, and on from there
        return next(int(words[1]) for words in lines if words[0] == "lo:") // twice


def is_listening(port: int) -> bool:
    lines = (line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:])
    return any(int(words[1].split(":")[1], 16) == port and words[3] == "0A" for words in lines)


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, has a loopback that nobody else uses."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(failed: int) -> None:
        if failed:
            raise OSError(ctypes.get_errno(), f"no network of its own: {os.strerror(ctypes.get_errno())}")

    with open("/proc/thread-self/ns/net") as before:
        check(libc.unshare(_NEWNET))
        try:
            run(["ip", "link", "set", "lo", "up"])
            yield
        finally:
            check(libc.setns(before.fileno(), _NEWNET))


def delayed(delay: float) -> Line:
    """Let the loopback have a delay: by netem, or else by a relay before each server."""
    with contextlib.suppress(RuntimeError):
        run(["tc", "qdisc", "del", "dev", "lo", "root"])
    if delay:
        try:
            run(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", f"{delay}ms", "limit", "1000000"])
        except RuntimeError:
            return Line(delay, netem=False)
    return Line(delay, netem=True)


@dataclass(frozen=True)
class Memory:
    """Of a guest that is about to go on."""

    path: Path
    state: Callable[[], Path]
    """of its devices; waits until it is here"""
    complete: Callable[[], bool]
    """is all of it here?"""


Contender = Callable[[Bench, int], AbstractContextManager[Memory]]
"""Has the file ``ram`` of the server at a port; and its file ``state``."""


def by_ramfs(at: peers.Mounted) -> Contender:
    @contextmanager
    def pulled(bench: Bench, port: int) -> Iterator[Memory]:
        here = at.root / bench.fresh("vm").name
        pull(at, f"nbd://{HOST}:{port}/", here.name, like=False)
        try:
            yield Memory(here / "ram", lambda: here / "state", lambda: not is_arriving(at))
        finally:
            run(["rm", "-r", here])

    return pulled


class Copy:
    """nbdcopy, while other things are done."""

    def __init__(self, uri: str, to: str | Path) -> None:
        self._process = subprocess.Popen(["nbdcopy", uri, to], start_new_session=True)

    def done(self) -> bool:
        """Is all copied?"""
        if self._process.poll():
            raise RuntimeError(f"nbdcopy exited with {self._process.returncode}")
        return self._process.returncode == 0

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def copied(bench: Bench, port: int) -> Iterator[Callable[[], Path]]:
    """Have the state copied while memory is made ready."""
    path = bench.fresh("state")

    def come() -> Path:
        until(copy.done, "the state is copied")
        return path

    with closing(Copy(f"nbd://{HOST}:{port}/state", path)) as copy:
        yield come


@contextmanager
def storage_daemon(bench: Bench, port: int) -> Iterator[Memory]:
    """Copies what is read into an overlay, and has a second one for what is written.

    It needs both: nothing else may use a node that a writable FUSE export is on, but then the rest could not be copied.
    """
    overlays = [bench.fresh("overlay") for _ in range(2)]
    point, at = bench.fresh("daemon"), bench.fresh("nbd.sock")
    point.touch()
    server = f"server.type=inet,server.host={HOST},server.port={port}"
    command: list[str | Path] = ["qemu-storage-daemon"]
    for node in (
        f"driver=nbd,node-name=far,{server},export=ram,read-only=on",
        f"driver=file,node-name=kept-file,filename={overlays[0]},aio=io_uring",
        f"driver=file,node-name=ram-file,filename={overlays[1]},aio=io_uring",
        "driver=qcow2,node-name=kept,file=kept-file,backing=far",
        "driver=copy-on-read,node-name=all,file=kept",
        "driver=qcow2,node-name=ram,file=ram-file,backing=all",
    ):
        command += ["--blockdev", node]
    command += ["--export", f"type=fuse,id=ram,node-name=ram,mountpoint={point},writable=on"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={at}", "--export", "type=nbd,id=all,node-name=all"]
    with copied(bench, port) as state:
        for overlay in overlays:
            run(["qemu-img", "create", "-q", "-f", "qcow2", overlay, f"{SIZE}M"])
        try:
            with (
                serving(command, lambda: mounted(point) and listens(at)),
                closing(Copy(f"nbd+unix:///all?socket={at}", "null:")) as stream,
            ):
                yield Memory(point, state, stream.done)
        finally:
            unmount(point)
            for overlay in overlays:
                overlay.unlink()


@contextmanager
def nbdfuse(bench: Bench, port: int) -> Iterator[Memory]:
    """nbdkit at home keeps what is read."""
    at, point, room = bench.fresh("nbd.sock"), bench.fresh("nbdfuse"), bench.fresh("cow")
    point.mkdir()
    room.mkdir()
    server: list[str | Path] = ["env", f"TMPDIR={room}", "nbdkit", "--foreground", "--unix", at]
    server += ["--filter=cow", "nbd", f"uri=nbd://{HOST}:{port}/ram", "cow-on-read=true"]
    with (
        copied(bench, port) as state,
        serving(server, lambda: listens(at)),
        serving(["nbdfuse", point / "ram", "--unix", at], lambda: mounted(point)),
        closing(Copy(f"nbd+unix:///?socket={at}", "null:")) as stream,
    ):
        try:
            yield Memory(point / "ram", state, stream.done)
        finally:
            unmount(point)


class Moment(threading.Thread):
    """When something has become so: in seconds, as time.monotonic() has it."""

    def __init__(self, so: Callable[[], bool], what: str) -> None:
        super().__init__(daemon=True)
        self._so, self._what = so, what
        self._found: float | Exception = 0.0
        self.start()

    def run(self) -> None:
        """Look for it."""
        try:
            until(self._so, self._what)
            self._found = time.monotonic()
        except Exception as error:  # noqa: BLE001  (raised by who asks)
            self._found = error

    @property
    def found(self) -> float:
        """Waits for it."""
        self.join()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


def observe(guest: Guest, waits: Waits, complete: Moment, begun: float) -> dict[str, float]:
    """What a guest tells that has just been let go: times in ms."""
    guest.wait_for_tick()
    seen = {"tick": time.monotonic()}
    guest.check([1] * 8)
    seen |= {"checked": time.monotonic(), "complete": complete.found}
    return {key: (each - begun) * 1e3 for key, each in seen.items()} | {"stall": waits.end(guest.socket) * 1e3}


def restored(bench: Bench, port: int, contender: Contender) -> dict[str, float]:
    begun = time.monotonic()
    with contender(bench, port) as memory, Guest(memory.path, mib=SIZE, incoming=True) as guest:
        complete = Moment(memory.complete, "all is here")
        guest.status()  # it has its processor then
        waits = Waits(guest.pid)
        guest.load(memory.state())
        return observe(guest, waits, complete, begun)


def migrated(bench: Bench, line: Line, snapshot: Path) -> dict[str, float]:
    """The same by postcopy-ram, out of a QEMU that has the snapshot, and runs."""
    port = free_port()
    with ExitStack() as stack:
        paths = [bench.fresh("ram") for _ in range(2)]
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        run(["cp", "--sparse=always", snapshot / "ram", paths[0]])
        source = stack.enter_context(Guest(paths[0], mib=SIZE, incoming=True))
        source.load(snapshot / "state")
        chosen = {"postcopy-ram": True, "x-ignore-shared": False}
        capabilities = [{"capability": name, "state": state} for name, state in chosen.items()]
        source.qmp("migrate-set-capabilities", capabilities=capabilities)
        source.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "max-postcopy-bandwidth": 0})
        begun = time.monotonic()
        target = stack.enter_context(Guest(paths[1], mib=SIZE, incoming=True))
        target.qmp("migrate-set-capabilities", capabilities=capabilities)
        target.qmp("migrate-incoming", uri=f"tcp:{HOST}:{port}")
        waits = Waits(target.pid)
        source.qmp("migrate", uri=f"tcp:{HOST}:{stack.enter_context(line.to(port))}")
        until(lambda: source.qmp("query-migrate")["status"] == "active", "the migration begins")
        source.qmp("migrate-start-postcopy")
        complete = Moment(lambda: source.qmp("query-migrate")["status"] == "completed", "the migration is complete")
        return observe(target, waits, complete, begun)


@contextmanager
def snapshot(bench: Bench) -> Iterator[Path]:
    """The directory of a guest that has ticked: its memory, as sparse as it was, and its state."""
    directory = bench.fresh("snapshot")
    directory.mkdir()

    async def stop() -> None:
        with (directory / "state").open("wb") as state:
            async with qmp.connect(guest.socket) as talk:
                await talk.stop()
                async with talk.saving():
                    await talk.save_state(state.fileno())

    with Guest(directory / "ram", mib=SIZE, boot=f"tick=0.02 fill=1:{USED}") as guest:
        guest.wait_for_line("= filled", PATIENCE)
        guest.wait_for_tick()
        asyncio.run(stop())
    yield directory
    run(["rm", "-r", directory])


@case("lazy", f"a guest of {SIZE} MiB, {USED} filled, goes on from a snapshot at a server, over lines with delays")
def lazy(bench: Bench) -> list[Curve]:
    x = "delay each way, ms"
    found = {
        "tick": Curve("from the order until the guest's first tick", "ms", x, logarithmic=False),
        "checked": Curve(f"from the order until the guest has checked its {USED} MiB", "ms", x, logarithmic=False),
        "complete": Curve("from the order until all of its memory is here", "ms", x, logarithmic=False),
        "stall": Curve("time that its processor waited for memory", "ms", x, logarithmic=False),
        "bytes": Curve("bytes on the wire, both ways", "MiB", x, logarithmic=False),
    }
    with ExitStack() as stack:
        stack.enter_context(own_network())
        directory = stack.enter_context(snapshot(bench))
        at = stack.enter_context(peers.ramfs_mount(bench))
        stack.enter_context(nbdkit(directory))
        contenders: dict[str, Contender] = {RAMFS: by_ramfs(at), DAEMON: storage_daemon, NBDFUSE: nbdfuse}
        delays = DELAYS[:2] if bench.quick else DELAYS
        for number, delay in enumerate(delays, 1):
            line = delayed(delay)
            if delay:
                bench.say(f"  {delay} ms each way by {'netem' if line.netem else 'a relay: this kernel has no netem'}")
            with line.to(PORT) as port:
                for _, name in turns(bench, [*contenders, QEMU], more=len(delays) - number):
                    before = line.carried
                    try:
                        if name == QEMU:
                            seen = migrated(bench, line, directory)
                        else:
                            seen = restored(bench, port, contenders[name])
                    except Unavailable as error:
                        bench.miss(name, error)
                        continue
                    seen["bytes"] = (line.carried - before) / MIB
                    for key, value in seen.items():
                        found[key].add(name, delay, value)
    return list(found.values())
