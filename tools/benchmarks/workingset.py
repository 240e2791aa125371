"""A guest goes on from a snapshot: without, and with what another one has asked for before; here, and from a server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.vm.guest import Guest

from . import peers
from .arrival import nbdkit, pull, pulls
from .bench import PATIENCE, Bench, run
from .cases import case, turns
from .peers import Mounted
from .stats import Goal, Measure

WITHOUT, WITH = "ramfs, nothing recorded", "ramfs"
FAR, FAR_WITH, WARM = (f"ramfs, over NBD{how}" for how in (", nothing recorded", "", ", pull --warm"))
#: MiB of the guest, and how much of that it has filled.
SIZE, USED = 256, 64
#: A server that is some way off, as filters of nbdkit: bits a second, and how long each read takes besides.
NETWORK = ["--filter=delay", "--filter=rate", "rate=10G", "delay-read=1ms"]
NAME = "ramfs.workingset"


def asked(at: Mounted) -> int:
    """READs that the daemon got from guests."""
    told = json.loads((at.root / ".ramfs" / "status.json").read_text())["requests"]
    return int(told["reads"] - told["reads_ahead"])


@contextmanager
def frozen(bench: Bench, at: Mounted) -> Iterator[Path]:
    """The snapshots ``warm`` and ``cold`` of a guest that ticks, the same; its directory."""
    home = at.root / "vm"
    home.mkdir()
    with Guest(home / "ram", mib=SIZE, boot=f"tick=0.1 fill=1:{USED}") as guest:
        guest.wait_for_line("= filled", PATIENCE)
        guest.wait_for_tick()
        run([*bench.ramfs, "snapshot", home, "warm", "--qmp", guest.socket, "--stop"])
        (home / ".snap" / "cold").mkdir()
    yield home / ".snap"


def resumed(at: Mounted, directory: Path, begun: float) -> dict[str, float]:
    """What it takes until a guest has ticked, and until it has looked at its data."""
    before = asked(at)
    with Guest(directory / "ram", mib=SIZE, incoming=True) as guest:
        started = time.monotonic()
        guest.load(directory / "state")
        guest.wait_for_tick()
        ticked = time.monotonic()
        seen = {"reads": asked(at) - before, "tick": (ticked - started) * 1e3, "start": (ticked - begun) * 1e3}
        guest.check([1] * 8)
        return seen | {"all reads": asked(at) - before, "verified": (time.monotonic() - started) * 1e3}


def wait_until_recorded(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("nothing was recorded")
        time.sleep(0.01)


@case(
    "workingset", f"a guest of {SIZE} MiB, {USED} filled, goes on from a snapshot; what another asked for is read ahead"
)
def workingset(bench: Bench) -> list[Measure]:
    goals = [Goal(0.1, against=WITHOUT), Goal(0.1, subject=WARM, against=FAR)]
    found = {
        "reads": Measure("READs of the guest until its first tick", "", goals=goals),
        "all reads": Measure(f"READs of the guest until it has checked {USED} MiB", "", goals=goals),
        "tick": Measure("from the load of its state until the first tick", "ms"),
        "start": Measure("from QEMU's start (over NBD: the pull) until the first tick", "ms"),
        "verified": Measure(f"from the load of its state until it has checked {USED} MiB", "ms"),
    }
    with ExitStack() as stack:
        here, there = (stack.enter_context(peers.ramfs_mount(bench)) for _ in range(2))
        snapshots = stack.enter_context(frozen(bench, here))
        recorded = snapshots / "warm" / NAME
        contenders = [WITHOUT, WITH, FAR, FAR_WITH, WARM]
        if bench.quick:
            contenders.remove(FAR_WITH)
        for _, name in turns(bench, contenders):
            if name == WITHOUT:
                recorded.unlink(missing_ok=True)
            place = (here if name in (WITHOUT, WITH) else there).root / bench.fresh("vm").name
            with ExitStack() as serving:
                if name in (WITHOUT, WITH):
                    run(["cp", "-r", recorded.parent, place])
                    seen = resumed(here, place, time.monotonic())
                    wait_until_recorded(recorded)
                else:
                    served = snapshots / ("cold" if name == FAR else "warm")
                    kit = nbdkit(served, *NETWORK, ready=bench.fresh("nbdkit.pid"))
                    uri = serving.enter_context(kit)
                    begun = time.monotonic()
                    pull(there, uri, place.name, like=False)
                    while name == WARM and any(each["first_bytes"] for each in pulls(there)):
                        time.sleep(0.01)
                    seen = resumed(there, place, begun)
                run(["rm", "-r", place])
            for key, value in seen.items():
                found[key].add(name, value)
    return list(found.values())
