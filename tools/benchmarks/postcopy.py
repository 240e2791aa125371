"""A guest goes to another host, and its memory follows: by ramfs, and by QEMU's postcopy-ram. Both over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ramfs import qmp
from tests.vm.guest import Guest

from . import peers
from .arrival import pulls
from .bench import MIB, PATIENCE, ROOT, Bench
from .cases import RAMFS, case
from .peers import Mounted
from .stats import Goal, Measure

QEMU, BACK = "QEMU's postcopy-ram", "ramfs, and back again"
#: Where the kernel waits for a page such that a signal may end it: for QEMU's migration, for one answer of FUSE.
WAITING = {"handle_userfault", "request_wait_answer", "__fuse_simple_request", "fuse_simple_request"}
#: Seconds between two looks at whether a thread waits.
LOOK = 0.002
#: MiB of the guest, and how much of that it has filled; the same with --quick.
FULL, QUICK = (1024, 300), (512, 100)
#: For both alike: where the kernel lies makes some MiB of difference, by what is left of it where it was loaded.
STEADY = "nokaslr"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.001)


class Waits:
    """For how long the threads of a process cannot go on, which a vCPU does for want of a page: looks very often."""

    def __init__(self, pid: int) -> None:
        self._tasks = {int(each.name): each for each in Path(f"/proc/{pid}/task").iterdir()}
        self._seconds = dict.fromkeys(self._tasks, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(LOOK):
            now = time.monotonic()
            for number, task in self._tasks.items():
                with contextlib.suppress(OSError):
                    state = (task / "stat").read_bytes().rpartition(b") ")[2][:1]
                    if state == b"D" or (task / "wchan").read_text() in WAITING:
                        self._seconds[number] += now - before
            before = now

    def end(self, socket_: str | Path) -> float:
        """Seconds that the processor of the guest with this QMP socket waited."""

        async def ask() -> int:
            async with qmp.connect(socket_) as guest:
                return int((await guest.execute("query-cpus-fast"))[0]["thread-id"])

        self._ended.set()
        self._thread.join()
        return self._seconds[asyncio.run(ask())]


def by_qemu(bench: Bench, size: int, used: int) -> dict[str, float]:
    """What it takes, in ms and bytes."""
    port = free_port()
    with ExitStack() as stack:
        paths = [bench.fresh("ram") for _ in range(2)]
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        source = stack.enter_context(Guest(paths[0], mib=size, boot=f"{STEADY} fill=1:{used}"))
        source.wait_for_line("= filled", PATIENCE)
        target = stack.enter_context(Guest(paths[1], mib=size, incoming=True))
        for guest, names in ((source, ["postcopy-ram"]), (target, ["postcopy-ram", "postcopy-blocktime"])):
            capabilities = [{"capability": name, "state": True} for name in names]
            guest.qmp("migrate-set-capabilities", capabilities=capabilities)
        source.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "max-postcopy-bandwidth": 0})
        target.qmp("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        waits = Waits(target.pid)
        begun = time.monotonic()
        source.qmp("migrate", uri=f"tcp:127.0.0.1:{port}")
        until(lambda: source.qmp("query-migrate")["status"] == "active", "the migration begins")
        source.qmp("migrate-start-postcopy")
        until(lambda: target.status() == "running", "the destination runs")
        runs = time.monotonic() - begun
        until(lambda: source.qmp("query-migrate")["status"] == "completed", "the migration is complete")
        total = time.monotonic() - begun
        told = source.qmp("query-migrate")
        stall = waits.end(target.socket)
        told_stall = target.qmp("query-migrate").get("postcopy-blocktime", 0)
        source.kill()
        target.check()
        found = {"runs": runs * 1e3, "total": total * 1e3, "stall": stall * 1e3, "all": told_stall}
        return found | {"bytes": told["ram"]["transferred"]}


class Moving:
    """tools/migrate, which makes all ready, and goes when it is told to; then the guest where it went."""

    def __init__(
        self, bench: Bench, stack: ExitStack, at: str | Path, command: list[str], source: Path, to: Path
    ) -> None:
        """``command`` is QEMU's, on ``source`` so far; ``at`` its QMP socket."""
        self.room = bench.fresh("moved")
        self.room.mkdir()
        self.to = to
        self.socket = str(self.room / "qmp")
        words = list(command)
        for option in ("-serial", "-qmp", "-chardev", "-pidfile"):
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
        words = [word.replace(str(source), str(to)) for word in words]
        words += ["-chardev", f"socket,id=s,path={self.room}/serial,server=on,wait=off,logfile={self.room}/log"]
        words += ["-serial", "chardev:s", "-pidfile", f"{self.room}/pid"]
        self.command = words
        tool = [ROOT / "tools" / "migrate", "--json", "--rounds", "0", "--hold", "--qmp", at, "--target-qmp"]
        tool += [self.socket, "--listen", "127.0.0.1", source, to, "--", *words]
        self.process = subprocess.Popen(
            [str(word) for word in tool], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        stack.callback(self.close)
        self.wait_for("ready")

    def wait_for(self, words: str) -> None:
        """Until it has said that."""
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if line.startswith(words):
                return
        raise RuntimeError(f"tools/migrate ended: {said[-1].strip() if said else 'it said nothing'}")

    def close(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.communicate()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.room / "pid").read_text()), signal.SIGKILL)

    def go(self, at: Mounted) -> dict[str, float]:
        """Move the guest; what that takes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        waits = Waits(int((self.room / "pid").read_text()))
        begun = time.monotonic()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.wait_for("the guest is there")
        runs = time.monotonic() - begun
        told: dict[str, object] = {}
        while last := [each for each in pulls(at) if each["path"] == self.to.name]:
            told = last[0]
            time.sleep(0.005)
        total = time.monotonic() - begun
        report = json.loads(self.process.stdout.read())
        found = {"runs": runs, "total": total, "all": float(str(told.get("demand_seconds", 0)))}
        found |= {"stopped": report["downtime"], "prepare": report["prepare"], "stall": waits.end(self.socket)}
        return {key: value * 1e3 for key, value in found.items()} | {"bytes": report["bytes"]}

    def check(self) -> None:
        """Have the guest compare all of its data."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.room / "serial"))
            line.sendall(b"verify\n")
            until(lambda: bool(re.search(r"^= verified .*\n", self._log(), re.MULTILINE)), "it has verified")
        assert "= verified ok" in self._log(), self._log()

    def _log(self) -> str:
        return (self.room / "log").read_text()


@case(
    "postcopy",
    f"a guest of {FULL[0]} MiB, {FULL[1]} in use, to another host and back, its memory after it;"
    f" {QUICK[0]} and {QUICK[1]} with --quick",
)
def postcopy(bench: Bench) -> list[Measure]:
    found = {
        "runs": Measure("until the destination runs", "ms", goals=[Goal(1.0, against=QEMU)]),
        "stall": Measure("time that its processor waited for memory", "ms", goals=[Goal(1.0, against=QEMU)]),
        "all": Measure("... as QEMU tells; of all who read, together, as ramfs does", "ms"),
        "stopped": Measure("time in which it ran nowhere", "ms"),
        "prepare": Measure("to make all ready for that, while it runs", "ms"),
        "total": Measure("until all is there", "ms", goals=[Goal(1.0, against=QEMU)]),
        "bytes": Measure(
            "bytes on the wire", "MiB", goals=[Goal(1.0, against=QEMU), Goal(0.2, subject=BACK, against=RAMFS)]
        ),
    }

    def note(name: str, seen: dict[str, float]) -> None:
        for key, value in seen.items():
            found[key].add(name, value / MIB if key == "bytes" else value)

    size, used = QUICK if bench.quick else FULL
    for _ in bench.each_round():
        note(QEMU, by_qemu(bench, size, used))
        with ExitStack() as stack:
            hosts = [stack.enter_context(peers.ramfs_mount(bench)) for _ in range(2)]
            home, there, back = hosts[0].root / "vm", hosts[1].root / "vm", hosts[0].root / "vm.back"
            home.mkdir()
            guest = stack.enter_context(Guest(home / "ram", mib=size, boot=f"{STEADY} fill=1:{used}"))
            guest.wait_for_line("= filled", PATIENCE)
            moved = Moving(bench, stack, guest.socket, guest.command, home, there)
            note(RAMFS, moved.go(hosts[1]))
            guest.process.wait(PATIENCE)
            moved.check()
            again = Moving(bench, stack, moved.socket, moved.command, there, back)
            note(BACK, again.go(hosts[0]))
            again.check()
    return list(found.values())
