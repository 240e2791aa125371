"""Directories that arrive over NBD while daemons die, and while many want the same pages: what the server was asked."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from arrival.conftest import MB, nbdkit, pull, pulls, sparse_file, wait_until_here
from harness import Mount
from mount.posix import PAGE, eventually, read

LOAD = Path(__file__).with_name("load.py")
#: Deaths that a supervisor bears with in a short time, and mounts: together as many as there are to be.
DEATHS, MOUNTS = 7, 3
#: What a daemon says when its server ends.
LOST = "lost the connection"


class Read(NamedTuple):
    """A read that the server was asked for: when its connection was made, and which pages."""

    connected: float
    pages: range


def reads(log: Path) -> list[Read]:
    """What nbdkit's log filter has noted."""
    line = re.compile(r"(\S+ \S+) connection=(\d+) (?:(Connect) |Read id=\d+ offset=(\w+) count=(\w+) )")
    connected: dict[str, float] = {}
    found = []
    for text in log.read_text().splitlines():
        match = line.match(text)
        if match is not None and match[3]:
            connected[match[2]] = dt.datetime.fromisoformat(match[1]).timestamp()
        elif match is not None:
            first, count = int(match[4], 16), int(match[5], 16)
            found.append(Read(connected[match[2]], range(first // PAGE, -(-(first + count) // PAGE))))
    return found


def test_daemons_die_while_memory_arrives(tmp_path: Path, shm: Path, make_mount: Callable[..., Mount]) -> None:
    """kill -9 of each of three daemons, seven times. What a page had is right; twice comes only what was under way."""
    served = shm / "served"
    served.mkdir()
    sparse_file(served / "ram", 24)
    rate = shm / "rate"
    rate.write_text("6M\n")
    with contextlib.ExitStack() as stack:
        drills = []
        for number in range(MOUNTS):
            log = shm / f"log{number}"
            words = ("--filter=log", "--filter=rate", "file", f"dir={served}", f"logfile={log}", "logappend=true")
            uri = stack.enter_context(nbdkit_again(shm / f"nbd{number}", *words, f"rate-file={rate}"))
            mount = make_mount(f"mnt{number}", store=shm / f"store{number}" if number else None)
            mount.expect(f"{LOST}|cannot be reached")
            pull(mount, uri)
            load = stack.enter_context(loading(mount.path / "vm" / "ram", served / "ram", number))
            drills.append((mount, log, load))
        deaths: dict[int, list[tuple[float, bytes]]] = defaultdict(list)
        for _ in range(DEATHS):
            for number, (mount, _, _) in enumerate(drills):
                (here,) = (mount.store / "layers").glob("*.here")
                deaths[number].append((time.time(), here.read_bytes()))
                mount.kill_daemon()
            for mount, _, _ in drills:
                pulls(mount)  # which another daemon tells
            time.sleep(0.1)
        rate.write_text("1G\n")
        for mount, _, load in drills:
            wait_until_here(mount, 60)
            looked, error = load.communicate(timeout=60)
            assert load.returncode == 0, error
            assert int(looked) > 100
    for number, (mount, log, _) in enumerate(drills):
        assert any(any(here) and not all(here) for _, here in deaths[number]), "none died in the middle"
        known: set[tuple[int, int]] = set()
        for connected, pages in reads(log):
            life = sum(at < connected for at, _ in deaths[number])
            for page in pages:
                assert not any(here[page] for _, here in deaths[number][:life]), f"page {page} was here in life {life}"
                assert LOST in mount.log or (life, page) not in known, f"page {page} was fetched twice in life {life}"
                known.add((life, page))
        assert {page for _, page in known} == {page for page in range(24 * MB // PAGE + 1) if page // 256 % 4 != 3}


@contextlib.contextmanager
def nbdkit_again(socket: Path, *words: str) -> Iterator[str]:
    """nbdkit, started again when it ends: 1.32 fails an assertion at times when a connection breaks."""
    command = ["nbdkit", "-f", "-r", "-U", socket, *words]
    again = ["sh", "-c", 'while :; do rm -f "$0"; "$@"; done', socket]
    process = subprocess.Popen(
        [*again, *command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        eventually(socket.exists, "nbdkit is there")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def loading(path: Path, source: Path, seed: int) -> Iterator[subprocess.Popen[str]]:
    """Somebody who uses a file as memory until told to end."""
    process = subprocess.Popen(
        [sys.executable, LOAD, path, source, str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("paused", [True, False])
def test_eight_clones_on_what_is_still_arriving(tmp_path: Path, shm: Path, mounted: Mount, paused: bool) -> None:
    """All of them want all of it at the same time, and each page is fetched once."""
    (shm / "served").mkdir()
    data = sparse_file(shm / "served" / "ram", 16)
    log = shm / "log"
    words = ("--filter=log", "--filter=rate", "file", f"dir={shm / 'served'}", f"logfile={log}", "rate=160M")
    with nbdkit(shm / "nbd", *words) as uri, contextlib.ExitStack() as stack:
        pull(mounted, uri, paused=paused)
        loads = []
        for number in range(8):
            clone = mounted.path / f"clone{number}"
            subprocess.run(["cp", "-r", mounted.path / "vm", clone], check=True)
            loads.append(stack.enter_context(loading(clone / "ram", shm / "served" / "ram", number)))
        for load in loads:
            _, error = load.communicate(timeout=60)
            assert load.returncode == 0, error
        read(mounted.path / "vm" / "ram", len(data) - 1)  # which nobody has looked at
        wait_until_here(mounted)
        assert read(mounted.path / "vm" / "ram") == data
    fetched = [page for each in reads(log) for page in each.pages]
    assert len(fetched) == len(set(fetched)), "some were fetched more than once"
    if not paused:  # then nobody has asked for zeros before guests touched them
        assert len(fetched) == 12 * MB // PAGE + 1, "known zeros were fetched, or something never was"
