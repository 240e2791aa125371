"""Mounts that pull from real servers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from hosts import Host
from mount.posix import eventually, pattern, status

MB = 1 << 20


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the tests' own process a second takes 10 ms (inside.py), which a busy machine may take for nothing."""
    monkeypatch.setattr("ramfs.source.retry._OPENING", math.inf)


@contextlib.contextmanager
def nbdkit(socket: Path, *words: str | Path) -> Iterator[str]:
    """nbdkit on a socket, with these words for filters and plugin; the URI without an export."""
    pidfile = socket.with_suffix(".pid")  # written when the socket listens
    for left in (socket, pidfile):
        left.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["nbdkit", "-f", "-r", "-U", socket, "-P", pidfile, *words], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(pidfile.exists, "nbdkit listens")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def served_on(host: Host, directory: Path, *words: str) -> Iterator[str]:
    """A directory, served by nbdkit to other hosts; the URI without an export.

    It is started again when it ends, as its unit does: nbdkit 1.32 fails an assertion of its own (raw_send_socket) when
    a connection breaks while several threads answer on it.
    """
    command = ["nbdkit", "-f", "-r", "-i", host.address, *words, "file", f"dir={directory}"]
    again = ["sh", "-c", 'while :; do "$@"; sleep 0.2; done', "again"]
    process = subprocess.Popen(
        [*host.prefix, *again, *command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        eventually(lambda: host.listens(10809), "nbdkit listens")
        yield f"nbd://{host.address}/"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def control(mount: Mount, command: dict[str, Any], patience: float = 30) -> dict[str, Any]:
    """What comes of a command to `.ramfs/control`, when it has finished."""
    with (mount.path / ".ramfs" / "control").open("r+b", buffering=0) as file:
        file.write(json.dumps(command).encode())
        deadline = time.monotonic() + patience
        while True:
            told: dict[str, Any] = json.loads(os.pread(file.fileno(), 1 << 16, 0))
            if told["finished"]:
                return told
            assert time.monotonic() < deadline, f"{command} does not end"
            time.sleep(0.005)


def pull(mount: Mount, uri: str, name: str = "vm", **options: Any) -> dict[str, Any]:
    """Pull into a directory at the root."""
    told = control(mount, {"pull": {"uri": uri, "parent": "", "name": name, **options}})
    assert told["error"] is None, told
    return told


def steer(mount: Mount, name: str, **change: Any) -> None:
    """Change what arrives in a directory."""
    told = control(mount, {"arrival": {"path": name, **change}})
    assert told["error"] is None, told
    assert told["pulls"] == 1


def pulls(mount: Mount) -> list[dict[str, Any]]:
    """Those that lack something."""
    found: list[dict[str, Any]] = status(mount.path)["pulls"]
    return found


def wait_until_here(mount: Mount, patience: float = 30) -> None:
    eventually(lambda: not pulls(mount), "all is here", patience)


def counts(path: Path) -> dict[str, int]:
    """The pages of a file by state."""
    found: dict[str, int] = json.loads(os.getxattr(path, "user.ramfs.pages"))
    return found


def sparse_file(path: Path, mib: int, seed: int = 1) -> bytes:
    """A file of which each fourth MiB is a hole, with a ragged end; its bytes."""
    data = bytearray(pattern(mib * MB + 1234, seed))
    for hole in range(3, mib, 4):
        data[hole * MB : (hole + 1) * MB] = bytes(MB)
    with path.open("wb") as file:
        for at in range(mib):
            if at % 4 != 3:
                file.seek(at * MB)
                file.write(data[at * MB : (at + 1) * MB])
        file.seek(mib * MB)
        file.write(data[mib * MB :])
    return bytes(data)
