"""A guest goes to another host, and its memory follows: by ramfs, and by QEMU's postcopy-ram. Both over loopback."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.vm.guest import Guest

from . import peers
from .arrival import pulls
from .bench import MIB, PATIENCE, Bench, run, serving
from .cases import RAMFS, case
from .peers import Mounted
from .stats import Goal, Measure

QEMU, BACK = "QEMU's postcopy-ram", "ramfs, and back again"
#: MiB of the guest, and how much of that it has filled.
SIZE, USED = 1024, 300


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


def by_qemu(bench: Bench) -> dict[str, float]:
    """What it takes, in ms and bytes."""
    port = free_port()
    with ExitStack() as stack:
        paths = [bench.fresh("ram") for _ in range(2)]
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        source = stack.enter_context(Guest(paths[0], mib=SIZE, boot=f"fill=1:{USED}"))
        source.wait_for_line("= filled", PATIENCE)
        target = stack.enter_context(Guest(paths[1], mib=SIZE, incoming=True))
        for guest, names in ((source, ["postcopy-ram"]), (target, ["postcopy-ram", "postcopy-blocktime"])):
            capabilities = [{"capability": name, "state": True} for name in names]
            guest.qmp("migrate-set-capabilities", capabilities=capabilities)
        source.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "max-postcopy-bandwidth": 0})
        target.qmp("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        begun = time.monotonic()
        source.qmp("migrate", uri=f"tcp:127.0.0.1:{port}")
        until(lambda: source.qmp("query-migrate")["status"] == "active", "the migration begins")
        source.qmp("migrate-start-postcopy")
        until(lambda: target.status() == "running", "the destination runs")
        runs = time.monotonic() - begun
        until(lambda: source.qmp("query-migrate")["status"] == "completed", "the migration is complete")
        total = time.monotonic() - begun
        told = source.qmp("query-migrate")
        stall = target.qmp("query-migrate").get("postcopy-blocktime", 0)
        source.kill()
        target.check()
        return {"runs": runs * 1e3, "total": total * 1e3, "stall": stall, "bytes": told["ram"]["transferred"]}


def pull(at: Mounted, uri: str, name: str, like: str | None) -> None:
    command: dict[str, object] = {"uri": uri, "parent": "", "name": name}
    if like is not None:
        command["like"] = like
    with (at.root / ".ramfs" / "control").open("r+b", buffering=0) as file:
        file.write(json.dumps({"pull": command}).encode())
        until(lambda: json.loads(os.pread(file.fileno(), 1 << 16, 0))["finished"], "the directory is there")
        told = json.loads(os.pread(file.fileno(), 1 << 16, 0))
    if told["error"]:
        raise RuntimeError(told["error"]["message"])


def move(
    bench: Bench, guest: Guest, source: Path, to: Mounted, stack: ExitStack, *, like: str | None = None
) -> tuple[dict[str, float], Guest]:
    """Take a guest from a directory of one mount to another mount; what that takes, and the guest there."""
    name = bench.fresh("moved").name
    begun = time.monotonic()
    run([*bench.ramfs, "snapshot", source, name, "--qmp", guest.socket, "--stop"])
    frozen, port = source / ".snap" / name, free_port()
    ready = bench.fresh("nbdkit.pid")
    command = [
        "nbdkit",
        "--foreground",
        "-r",
        "-i",
        "127.0.0.1",
        "-p",
        str(port),
        "-P",
        str(ready),
        "file",
        f"dir={frozen}",
    ]
    stack.enter_context(serving(command, ready.exists))
    pull(to, f"nbd://127.0.0.1:{port}/", name, like)
    there = stack.enter_context(Guest(to.root / name / "ram", mib=SIZE, incoming=True))
    there.load(to.root / name / "state")
    runs = time.monotonic() - begun
    told: dict[str, object] = {}
    last: list[dict[str, object]] = []
    while last := [each for each in pulls(to) if each["path"] == name]:
        told = last[0]
        time.sleep(0.005)
    total = time.monotonic() - begun
    guest.kill()
    there.check()
    manifest = (frozen / "ramfs.manifest").stat().st_size
    fetched = float(str(told.get("fetched_bytes", 0)))
    stall = float(str(told.get("demand_seconds", 0)))
    return {"runs": runs * 1e3, "total": total * 1e3, "stall": stall * 1e3, "bytes": fetched + manifest}, there


@case("postcopy", f"a guest of {SIZE} MiB, {USED} in use, to another host and back, its memory after it")
def postcopy(bench: Bench) -> list[Measure]:
    found = {
        "runs": Measure("until the destination runs", "ms", goals=[Goal(1.0, against=QEMU)]),
        "stall": Measure("time that its processor waited for memory", "ms", goals=[Goal(1.0, against=QEMU)]),
        "total": Measure("until all is there", "ms", goals=[Goal(1.0, against=QEMU)]),
        "bytes": Measure(
            "bytes on the wire", "MiB", goals=[Goal(1.0, against=QEMU), Goal(0.2, subject=BACK, against=RAMFS)]
        ),
    }

    def note(name: str, seen: dict[str, float]) -> None:
        for key, value in seen.items():
            found[key].add(name, value / MIB if key == "bytes" else value)

    for _ in range(bench.rounds):
        note(QEMU, by_qemu(bench))
        with ExitStack() as stack:
            hosts = [stack.enter_context(peers.ramfs_mount(bench)) for _ in range(2)]
            home = hosts[0].root / "vm"
            home.mkdir()
            guest = stack.enter_context(Guest(home / "ram", mib=SIZE, boot=f"fill=1:{USED}"))
            guest.wait_for_line("= filled", PATIENCE)
            there, moved = move(bench, guest, home, hosts[1], stack)
            note(RAMFS, there)
            at = next(each for each in hosts[1].root.iterdir() if each.is_dir())
            like = f"vm/.snap/{next((home / '.snap').iterdir()).name}"
            note(BACK, move(bench, moved, at, hosts[0], stack, like=like)[0])
    return list(found.values())
