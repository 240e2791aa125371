"""Generations: what has changed between two of them."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

from . import peers
from .bench import GIB, KIB, Bench, run
from .cases import RAMFS, XFS, case, filler, serve, turns, xfs_directory
from .peers import Peer
from .stats import Goal, Measure


@case("diff", "what has changed between two generations of 64 GiB; extents of reflinks on XFS")
def diff(bench: Bench) -> list[Measure]:
    size, resident, written = 64 * GIB, 2 * GIB, 5000
    took = Measure("diff of two generations of 64 GiB, process start included", "ms", goals=[Goal(500.0)])
    contenders: dict[str, Peer] = {RAMFS: peers.ramfs, EXTENTS: xfs_directory}
    with serve(bench, contenders, filler(bench, size, 64 * KIB, size * 64 * KIB // resident)) as up:
        pairs: dict[str, tuple[Path, Path]] = {}
        for name, served in up.items():
            block = served.path
            pairs[name] = (
                block,
                block.parent / ".snap" / "old" / block.name if name == RAMFS else block.with_name("old"),
            )
            if name == RAMFS:
                pairs[name][1].parent.mkdir()
            else:
                run(["cp", "--reflink=always", block, pairs[name][1]])
            bench.scatter(block, size, written, 1)
            run(["sync", "-f", block])
        for _, name in turns(bench, list(up)):
            block, old = pairs[name]
            begun = time.perf_counter()
            if name == RAMFS:
                told = json.loads(run([*bench.ramfs, "diff", "--json", old.parent, block.parent]))
                if not written * 0.99 < told["changed"] <= written:
                    raise RuntimeError(f"{told['changed']} pages changed, and {written} were written")
            else:
                listed = [f"xfs_io -r -c 'fiemap -v' {shlex.quote(str(path))} | tail -n +3" for path in (old, block)]
                run(["bash", "-c", f"diff <({listed[0]}) <({listed[1]}) > /dev/null || test $? = 1"])
            took.add(name, (time.perf_counter() - begun) * 1e3)
    return [took]


EXTENTS = f"xfs_io fiemap of both ({XFS}) and diff"
