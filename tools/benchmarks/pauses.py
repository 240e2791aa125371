"""A snapshot of a guest that stores into its memory at a steady rate: by ramfs, and by what QEMU has itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ramfs import qmp

from . import peers
from .bench import MIB, PATIENCE, Bench, run
from .cases import RAMFS, case, disk, turns
from .peers import Mounted
from .stats import Curve
from .work import Worker

XFS = "ramfs, store on XFS (native)"
SAVEVM, MIGRATE, BACKGROUND = "QEMU savevm (qcow2)", "QEMU migrate to a file", "QEMU background-snapshot to a file"
NOTHING = "without a snapshot"
#: Seconds between two ticks of the guest, and how long it is looked at before a snapshot, and after it.
TICK, BEFORE, AFTER = 0.002, 0.4, 0.2

Snapshot = Callable[[], dict[str, float]]


def by_ramfs(bench: Bench, at: Mounted, worker: Worker) -> dict[str, float]:
    report = json.loads(run([*bench.ramfs, "snapshot", at.root / "vm", "s", "--qmp", worker.socket, "--json"]))
    return {"rounds": len(report["rounds"]), "told": report["pause"] * 1e3}


def by_savevm(worker: Worker) -> dict[str, float]:
    if said := worker.qmp("human-monitor-command", **{"command-line": "savevm s"}):
        raise RuntimeError(f"savevm: {said.strip()}")
    return {}


def by_migration(worker: Worker, path: Path, *, background: bool) -> dict[str, float]:
    async def save() -> None:
        async with qmp.connect(worker.socket) as guest:
            if await guest.capability("background-snapshot") is None:
                raise RuntimeError("this QEMU has no background-snapshot")
            await guest.set_capability("background-snapshot", background)
            await guest.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
            try:
                await guest.hand_over(fd)
            finally:
                os.close(fd)
            await guest.execute("migrate", {"uri": f"fd:{qmp.FD_NAME}"})
            until = time.monotonic() + PATIENCE
            while (told := await guest.execute("query-migrate"))["status"] != "completed":
                if told["status"] in ("failed", "cancelled") or time.monotonic() > until:
                    raise RuntimeError(f"{'background-snapshot' if background else 'migrate'}: {told}")
                await asyncio.sleep(0.001)
            if not background:
                await guest.cont()

    asyncio.run(save())
    return {}


def written(pid: int) -> int:
    """Bytes that a process has given to write(2) and its relatives."""
    words = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(words["wchar"])


def paused(worker: Worker) -> float:
    """Milliseconds from the guest's stop to its start, as QEMU tells."""
    total, since = 0.0, None
    for event in worker.events():
        at = event["timestamp"]["seconds"] * 1e3 + event["timestamp"]["microseconds"] / 1e3
        if event["event"] == "STOP":
            since = at
        elif event["event"] == "RESUME" and since is not None:
            total, since = total + at - since, None
    return total


def seen(worker: Worker, begin: float, end: float) -> dict[str, float]:
    """What the guest had of that time: its longest gap, and how much of it went by without a tick, in ms."""
    ticked = [begin, *(at for at in worker.ticked if begin < at < end), end]
    gap = max(after - before for before, after in itertools.pairwise(ticked))
    return {"gap": gap * 1e3, "lost": max(0.0, end - begin - TICK * (len(ticked) - 2)) * 1e3}


@case("pauses", "a snapshot of a guest that stores into half of its memory all the time, by how fast it does")
def pauses(bench: Bench) -> list[Curve]:
    rates = (128,) if bench.quick else (16, 64, 256, 1024)
    mib = bench.size // MIB
    over = "MiB stored into each second"
    found = {
        "pause": Curve("the guest is stopped, as QEMU tells", "ms", over),
        "gap": Curve("the longest that the guest did not tick (it does each 2 ms)", "ms", over),
        "lost": Curve("time that the guest lost until 0.2 s after it", "ms", over),
        "total": Curve("the whole command", "ms", over),
        "bytes": Curve("written for it", "MiB", over),
        "rounds": Curve("rounds of flushes, the last with the guest stopped", "", over, logarithmic=False),
        "told": Curve("the pause that ramfs snapshot tells", "ms", over),
    }
    with ExitStack() as stack:
        own = bench.fresh("vmstate.qcow2")
        run(["qemu-img", "create", "-q", "-f", "qcow2", own, "64M"])
        drive = f"if=none,id=s,format=qcow2,file={own}"
        file = bench.fresh("state")
        stack.callback(own.unlink, missing_ok=True)
        stack.callback(file.unlink, missing_ok=True)
        grounds = {RAMFS: stack.enter_context(peers.ramfs_mount(bench))}
        if not bench.quick:
            grounds[XFS] = stack.enter_context(peers.ramfs_mount(bench, stack.enter_context(disk(bench))))
        qemu = stack.enter_context(Worker(bench, None, mib=mib, used=mib // 2, args=("-drive", drive)))
        who: dict[str, tuple[Worker, int, Snapshot]] = {
            SAVEVM: (qemu, qemu.pid, lambda: by_savevm(qemu)),
            MIGRATE: (qemu, qemu.pid, lambda: by_migration(qemu, file, background=False)),
            BACKGROUND: (qemu, qemu.pid, lambda: by_migration(qemu, file, background=True)),
        }
        for name, at in grounds.items():
            (at.root / "vm").mkdir()
            guest = stack.enter_context(Worker(bench, at.root / "vm" / "ram", mib=mib, used=mib // 2))
            who[name] = guest, at.pid, lambda at=at, guest=guest: by_ramfs(bench, at, guest)  # type: ignore[misc]
        for guest, *_ in who.values():
            guest.wait_until_ready()
        for _, name in turns(bench, [*grounds, SAVEVM, MIGRATE, BACKGROUND]):
            guest, writer, take = who[name]
            for rate in rates:
                with guest.dirtying(rate):
                    guest.ticked.clear()
                    time.sleep(BEFORE)
                    guest.events()
                    before, begun = written(writer), time.monotonic()
                    told = take()
                    done = time.monotonic()
                    told |= {"total": (done - begun) * 1e3, "bytes": (written(writer) - before) / MIB}
                    time.sleep(AFTER)
                    told |= {"pause": paused(guest)} | seen(guest, begun, done + AFTER)
                for key, value in seen(guest, begun - BEFORE, begun).items():
                    found[key].add(NOTHING, rate, value)
                for key, value in told.items():
                    found[key].add(name, rate, value)
                if name in grounds:
                    (grounds[name].root / "vm" / ".snap" / "s").rmdir()
                elif name == SAVEVM:
                    qemu.qmp("human-monitor-command", **{"command-line": "delvm s"})
    return list(found.values())
