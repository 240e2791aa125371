"""What it costs to capture a guest that maps its memory privately, beside the same work by hand."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import peers
from .bench import KIB, Bench, run
from .cases import FULL, RAMFS, case, turns
from .stats import Goal, Measure

HERE, TMPFS = "by hand, to a file on the mount", "by hand, to tmpfs"
#: Bytes of a run of pages that were written, and how far they are apart.
LAYOUTS = {
    "in runs of 2 MiB": (2048 * KIB, 8192 * KIB),
    "in runs of 32 KiB": (32 * KIB, 128 * KIB),
    "in runs of 8 KiB": (8 * KIB, 32 * KIB),
}


@contextmanager
def holder(bench: Bench, path: Path, *arguments: int) -> Iterator[tuple[int, int]]:
    """A process that has stored into its private mapping of a file; its id, and the address of that."""
    command = [bench.program("capture"), "hold", path, bench.size, *arguments]
    process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@case(
    "capture", "ramfs capture of a quarter of a private mapping; reading and writing these pages alone, in C", when=FULL
)
def capture(bench: Bench) -> list[Measure]:
    found = []
    layouts = dict(list(LAYOUTS.items())[:: 2 if bench.quick else 1])
    for index, (label, (length, stride)) in enumerate(layouts.items()):
        pause = Measure(f"capture of {bench.size >> 22} MiB {label}", "ms", goals=[Goal(2.0, against=HERE)])
        whole = Measure(f"the same, the command from its start to its end, {label}", "ms")
        found += [pause, whole]
        with peers.ramfs_mount(bench) as at:
            vm = at.root / "vm"
            vm.mkdir()
            bench.fill(vm / peers.BLOCK_FILE, bench.size)
            (vm / ".snap" / "s").mkdir()
            for number, name in turns(bench, [RAMFS, HERE, TMPFS], len(layouts) - index - 1):
                clone = at.root / f"clone{number}{name}"
                run(["cp", "-al", vm / ".snap" / "s", clone])
                with holder(bench, clone / peers.BLOCK_FILE, length, stride, number + 1) as (pid, address):
                    if name == RAMFS:
                        begun = time.perf_counter()
                        report = json.loads(run([*bench.ramfs, "capture", clone, "--pid", str(pid), "--json"]))
                        whole.add(name, (time.perf_counter() - begun) * 1e3)
                        pause.add(name, report["pause"] * 1e3)
                        if report["files"][0]["pages"] * 4 != bench.size // (4 * KIB):
                            raise RuntimeError(f"captured {report['files'][0]['pages']} pages")
                    else:
                        out = at.root / "copy" if name == HERE else bench.fresh("copy")
                        seen = bench.probe("capture", "copy", pid, address, bench.size, out)
                        pause.add(name, seen["seconds"] * 1e3)
                        out.unlink()
                run(["rm", "-r", clone])
    return found
