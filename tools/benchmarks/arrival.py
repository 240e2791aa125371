"""Memory that is still at a server: how fast all of it comes, and how fast what is touched."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import peers
from .bench import MIB, Bench, run, serving, unmount
from .cases import NBDFUSE, RAMFS, case, check_cold, rate, turns
from .peers import BLOCK_FILE, Mounted
from .stats import Goal, Measure

NBDCOPY, NO_EXTENTS = "nbdcopy to a file", "nbdcopy without extents"
HOST, PORT = "127.0.0.1", 10819
#: Bytes a second of the stream that runs beside the faults: it must not be over before they are.
BESIDE = 64 * MIB


@contextmanager
def nbdkit(directory: Path, *words: str, ready: Path | None = None) -> Iterator[str]:
    """nbdkit's file plugin on a directory, over loopback, with filters; its URI without an export."""
    ready = ready or directory.with_suffix(".pid")
    command = [
        "nbdkit",
        "--foreground",
        "-r",
        "-i",
        HOST,
        "-p",
        str(PORT),
        "-P",
        str(ready),
        *(word for word in words if word.startswith("-")),
        "file",
        f"dir={directory}",
        *(word for word in words if not word.startswith("-")),
    ]
    with serving(command, ready.exists):
        yield f"nbd://{HOST}:{PORT}/"


def pull(at: Mounted, uri: str, name: str, **options: object) -> None:
    """Let a directory appear."""
    command = {"pull": {"uri": uri, "parent": "", "name": name, **options}}
    with (at.root / ".ramfs" / "control").open("r+b", buffering=0) as file:
        file.write(json.dumps(command).encode())
        while not (told := json.loads(os.pread(file.fileno(), 1 << 16, 0)))["finished"]:
            time.sleep(0.001)
    if told["error"]:
        raise RuntimeError(told["error"]["message"])


def pulls(at: Mounted) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((at.root / ".ramfs" / "status.json").read_text())["pulls"]
    return found


def is_arriving(at: Mounted) -> bool:
    """Is there a layer that lacks something? Its states go when all is here and on disk."""
    return any(name.endswith(".here") for name in os.listdir(at.store / "layers"))


def remove(at: Mounted, name: str) -> None:
    """Take a directory away, and wait until its space is back: the next one is to find the same machine."""
    run(["rm", "-r", at.root / name])
    until = time.monotonic() + 20
    while any((at.store / "layers").iterdir()):
        if time.monotonic() > until:
            raise RuntimeError("the space of a directory that was removed does not come back")
        time.sleep(0.05)


@case("stream", "1 GiB from nbdkit over loopback until all is here; dense, and 70 % zeros")
def stream(bench: Bench) -> list[Measure]:
    dense = Measure("all of a dense file from nbdkit", "GB/s", goals=[Goal(0.9, True, NBDCOPY)], less_is_better=False)
    sparse = Measure(
        "all of a file with 70 % zeros from nbdkit", "GB/s", goals=[Goal(2.0, True, NO_EXTENTS)], less_is_better=False
    )
    with ExitStack() as stack:
        at = stack.enter_context(peers.ramfs_mount(bench))
        for measure, run_length, more in ((dense, 10, 1), (sparse, 3, 0)):
            directory = bench.fresh("served")
            directory.mkdir()
            stack.callback(run, ["rm", "-rf", directory])
            bench.fill(directory / BLOCK_FILE, bench.size, run_length * MIB, 10 * MIB)
            with nbdkit(directory) as uri:
                for number, name in turns(bench, [RAMFS, NBDCOPY, NO_EXTENTS], more):
                    copy = bench.fresh("copy")
                    begin = time.monotonic()
                    if name == RAMFS:
                        pull(at, uri, copy.name)
                        while is_arriving(at):  # to make status.json would be work for the daemon
                            time.sleep(0.002)
                    else:
                        options = ["--no-extents"] if name == NO_EXTENTS else []
                        run(["nbdcopy", *options, uri + BLOCK_FILE, copy])
                    measure.add(name, rate(bench.size, time.monotonic() - begin))
                    if name == RAMFS:
                        if number == 0:
                            run(["cmp", directory / BLOCK_FILE, at.root / copy.name / BLOCK_FILE])
                        remove(at, copy.name)
                    else:
                        copy.unlink()
    return [dense, sparse]


@case("demand", "cold random 4 KiB fault on memory that is at nbdkit, over loopback; alone, and beside the stream")
def demand(bench: Bench) -> list[Measure]:
    beside = f"{RAMFS}, beside a stream of {BESIDE // MIB} MiB/s"
    alone = f"{RAMFS}, alone"
    p50 = Measure("fault on a page that is at nbdkit, p50", "us", goals=[Goal(0.8, against=NBDFUSE)])
    p99 = Measure("fault on a page that is at nbdkit, p99", "us")
    tail = Measure("p99 beside the stream, p50 alone", "us", goals=[Goal(3.0, against=alone)])
    directory = bench.fresh("served")
    directory.mkdir()
    bench.fill(directory / BLOCK_FILE, bench.size)
    with ExitStack() as stack:
        stack.callback(run, ["rm", "-rf", directory])
        at = stack.enter_context(peers.ramfs_mount(bench))
        uri = stack.enter_context(nbdkit(directory))
        point = bench.fresh("nbdfuse")
        point.mkdir()
        client = ["nbdfuse", f"{point}/ram", uri + BLOCK_FILE]
        stack.callback(unmount, point)
        stack.enter_context(serving(client, (point / "ram").exists))
        for number, name in turns(bench, [RAMFS, NBDFUSE, beside]):
            if name == NBDFUSE:
                seen = bench.touch(point / "ram", access="private", advice="random", seed=number + 1)
            else:
                fresh = bench.fresh("vm").name
                pull(at, uri, fresh, paused=name == RAMFS, rate=0 if name == RAMFS else BESIDE)
                path = at.root / fresh / BLOCK_FILE
                seen = bench.touch(path, access="private", advice="random", seed=number + 1)
                check_cold(name, seen)
                if not pulls(at):
                    raise RuntimeError("the stream was over before the faults were")
                remove(at, fresh)
            if name == RAMFS:
                tail.add(alone, seen["p50_us"])
            if name == beside:
                tail.add(RAMFS, seen["p99_us"])
            p50.add(name, seen["p50_us"])
            p99.add(name, seen["p99_us"])
    return [p50, p99, tail]
