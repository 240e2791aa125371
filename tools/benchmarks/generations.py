"""Generations: what has changed between two of them, and their way to another mount."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

from . import peers
from .bench import GIB, KIB, Bench, run
from .cases import FULL, RAMFS, XFS, case, dense, filler, made_digests, rate, serve, turns, xfs_directory
from .peers import Peer
from .stats import Goal, Measure


@case(
    "diff",
    "what has changed between two generations of 64 GiB, of 16 with --quick; extents of reflinks on XFS",
    when=FULL,
)
def diff(bench: Bench) -> list[Measure]:
    size = (16 if bench.quick else 64) * GIB
    resident, written = size // 32, 5000
    title = f"diff of two generations of {size // GIB} GiB, process start included"
    took = Measure(title, "ms", goals=[Goal(500.0)])
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


@case("send", "a snapshot into a pipe and out of one; cat of the same file", when=FULL)
def send(bench: Bench) -> list[Measure]:
    cat = "cat of the same file"
    sent = Measure("snapshot into a pipe", "GB/s", goals=[Goal(0.8, True, cat)], less_is_better=False)
    received = Measure("snapshot out of a pipe", "GB/s", goals=[Goal(0.7, True, cat)], less_is_better=False)
    with serve(bench, {RAMFS: peers.ramfs}, dense(bench)) as up:
        if RAMFS not in up:
            return []
        block = up[RAMFS].path
        frozen = block.parent / ".snap" / "one"
        frozen.mkdir()
        made_digests(up[RAMFS])
        stream, plain, target = bench.fresh("stream"), bench.fresh("plain"), block.parent.parent / "target"
        ramfs = shlex.join(bench.ramfs)
        run(["bash", "-c", f"{ramfs} send {frozen} > {stream}"])
        run(["cp", block, plain])
        commands = {
            RAMFS: (f"{ramfs} send {frozen} | cat > /dev/null", f"cat {stream} | {ramfs} receive {target}"),
            cat: (f"cat {frozen / block.name} | cat > /dev/null", f"cat {plain} | cat > {target}"),
        }
        for _, name in turns(bench, list(commands)):
            for measure, command in zip((sent, received), commands[name], strict=True):
                begun = time.perf_counter()
                run(["bash", "-o", "pipefail", "-c", command])
                measure.add(name, rate(bench.size, time.perf_counter() - begun))
            if target.is_dir():
                run(["cmp", block, target / block.name])
                (target / ".snap" / "one").rmdir()
            run(["rm", "-rf", target])
        for path in (stream, plain):
            path.unlink()
    return [sent, received]
