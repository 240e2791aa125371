"""A debugger opens the core of a guest of 16 GiB: while it runs, in a snapshot, and as a file that was copied."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tests.vm.guest import Guest

from . import peers
from .bench import GIB, MIB, PATIENCE, ROOT, Bench, run
from .cases import FULL, RAMFS, case, turns
from .stats import Goal, Measure

LIVE, FROZEN, COPY = RAMFS, "ramfs, a snapshot", "a sparse copy of it on tmpfs"
SIZE, USED = 16 * GIB, 64
#: Prints seconds since the guest has booted.
UPTIME = "print(uptime())"


def read_bytes(root: Path) -> int:
    """What the daemon has been asked for by READ."""
    return int(json.loads((root / ".ramfs" / "status.json").read_text())["requests"]["read_bytes"])


def drop(path: Path) -> None:
    """Have nothing of a file cached that is not dirty."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@case("debugger", f"drgn opens the core of a guest of 16 GiB, {USED} MiB filled, and reads its uptime", when=FULL)
def debugger(bench: Bench) -> list[Measure]:
    took = Measure("drgn opens the core and tells the uptime, process start included", "ms", goals=[Goal(1000.0)])
    asked = Measure("read from the mount for that", "MiB")
    copied = Measure("making the file that drgn opens", "ms")
    with peers.ramfs_mount(bench) as at:
        home, symbols, copy = at.root / "vm", bench.fresh("symbols"), bench.fresh("copy")
        home.mkdir()
        with Guest(home / "ram", mib=SIZE // MIB, boot=f"tick=1 fill=1:{USED}") as guest:
            guest.wait_for_line("= filled", PATIENCE)
            guest.wait_for_tick()
            run([*bench.ramfs, "snapshot", home, "warm", "--qmp", guest.socket])
            cores = {LIVE: home / ".guest" / "vmcore", FROZEN: home / ".snap" / "warm" / ".guest" / "vmcore"}
            if not bench.quick:  # it takes most of a minute to make
                cores[COPY] = copy
            run([ROOT / "tools" / "symbols", cores[FROZEN], symbols])
            for _, name in turns(bench, list(cores)):
                if name == COPY:
                    copy.unlink(missing_ok=True)
                    begun = time.perf_counter()
                    run(["cp", "--sparse=always", cores[FROZEN], copy])
                    copied.add(name, (time.perf_counter() - begun) * 1e3)
                else:
                    drop(cores[name])
                before, begun = read_bytes(at.root), time.perf_counter()
                said = run([symbols / "drgn", "-q", "-c", cores[name], "-e", UPTIME])
                took.add(name, (time.perf_counter() - begun) * 1e3)
                asked.add(name, (read_bytes(at.root) - before) / MIB)
                if not 0 < float(said) < PATIENCE:
                    raise RuntimeError(f"drgn says that the guest runs for {said} s")
            copy.unlink(missing_ok=True)
    return [took, asked, copied]
