"""The contenders: each a context manager that serves one file for the length of its block.

What a peer keeps lies on tmpfs, so no disk decides anything. `prepare` makes the file's
contents: before the peer starts for those that serve an existing file, and through the
mount for ramfs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .bench import Bench, Unavailable, mounted, run, serving, unmount

Prepare = Callable[[Path], None]

BLOCK_FILE = "pc.ram@0x0"


@dataclass(frozen=True)
class Served:
    path: Path  # the file to map
    pids: Sequence[int] = ()  # of those who serve it
    mount: Path | None = None
    store: Path | None = None  # of ramfs


Peer = Callable[[Bench, Prepare], AbstractContextManager[Served]]


@contextmanager
def tmpfs(bench: Bench, prepare: Prepare) -> Iterator[Served]:
    """The floor: the file itself, with nobody between."""
    raw = bench.fresh("tmpfs.raw")
    try:
        prepare(raw)
        yield Served(raw)
    finally:
        raw.unlink(missing_ok=True)


@contextmanager
def _exported(bench: Bench, node: str) -> Iterator[Served]:
    """qemu-storage-daemon's FUSE export of a node.

    Its attributes change at every look, and it keeps no cache across opens, so the probes
    open it once and never stat it. io_uring was faster than its thread pool where tried.
    """
    point = bench.fresh("storage-daemon")
    point.touch()
    export = f"type=fuse,id=ram,node-name=ram,mountpoint={point},writable=on"
    command = ["qemu-storage-daemon", "--blockdev", f"node-name=ram,{node}", "--export", export]
    try:
        with serving(command, lambda: mounted(point)) as pid:
            yield Served(point, [pid], point)
    finally:
        unmount(point)


@contextmanager
def storage_daemon(bench: Bench, prepare: Prepare) -> Iterator[Served]:
    """A raw file, exported."""
    with tmpfs(bench, prepare) as raw, _exported(bench, f"driver=file,filename={raw.path},aio=io_uring") as served:
        yield served


@contextmanager
def storage_daemon_overlay(bench: Bench, prepare: Prepare) -> Iterator[Served]:
    """A qcow2 overlay of a raw file, exported."""
    overlay = bench.fresh("overlay.qcow2")
    with tmpfs(bench, prepare) as raw, ExitStack() as stack:
        stack.callback(overlay.unlink, missing_ok=True)
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", raw.path, "-F", "raw", overlay])
        below = "backing.driver=raw,backing.file.driver=file"
        backing = f"{below},backing.file.filename={raw.path},backing.file.aio=io_uring"
        node = f"driver=qcow2,file.driver=file,file.filename={overlay},file.aio=io_uring,{backing}"
        yield stack.enter_context(_exported(bench, node))


@contextmanager
def nbdfuse(bench: Bench, prepare: Prepare, *options: str) -> Iterator[Served]:
    """nbdfuse over nbdkit's file plugin, through a Unix socket; with filters and what they are told, by options."""
    with tmpfs(bench, prepare) as raw:
        socket, point = bench.fresh("nbd.sock"), bench.fresh("nbdfuse")
        point.mkdir()
        filters = [word for word in options if word.startswith("--")]
        told = [word for word in options if word not in filters]
        # Filters that keep pages do so in a file there.
        kit = ["env", f"TMPDIR={bench.scratch}", "nbdkit", "--foreground", "--unix", str(socket)]
        server = [*kit, *filters, "file", str(raw.path), *told]
        client = ["nbdfuse", f"{point}/ram", "--unix", str(socket)]
        with serving(server, socket.exists) as server_pid, serving(client, lambda: mounted(point)) as client_pid:
            try:
                yield Served(point / "ram", [server_pid, client_pid], point)
            finally:
                unmount(point)


def nbdfuse_with(*options: str) -> Peer:
    return lambda bench, prepare: nbdfuse(bench, prepare, *options)


@dataclass(frozen=True)
class Mounted:
    """A ramfs mount: its root, its store and the daemon that serves it."""

    root: Path
    store: Path
    pid: int

    def others(self) -> tuple[int, int]:
        """The supervisor, and the daemon that stands by; which it does some seconds after the mount is there."""
        supervisor = int(json.loads((self.root / ".ramfs" / "status.json").read_text())["supervisor"]["pid"])
        until = time.monotonic() + 20
        while time.monotonic() < until:
            pids = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
            standby = [int(pid) for pid in pids if int(pid) != self.pid]
            # Nothing more to import: it waits for a message.
            if standby and "skb_wait" in Path(f"/proc/{standby[0]}/wchan").read_text():
                return supervisor, standby[0]
            time.sleep(0.05)
        raise RuntimeError("no daemon stands by")


@contextmanager
def ramfs_mount(bench: Bench, below: Path | None = None, options: Sequence[str] = ()) -> Iterator[Mounted]:
    """A mount with a store on tmpfs, or in the directory ``below``."""
    store, root = bench.fresh("store"), bench.fresh("ramfs")
    store = store if below is None else below / store.name
    root.mkdir()
    if not Path(bench.ramfs[0]).exists():
        raise Unavailable(f"{bench.ramfs[0]} does not exist; tools/setup makes it")
    daemon = -1  # a descriptor: another process may have the number of one that was killed
    try:
        given = [word for option in options for word in ("-o", option)]
        _detached([*bench.ramfs, "mount", *given, str(store), str(root)])
        pid = int(json.loads((root / ".ramfs" / "status.json").read_text())["pid"])
        daemon = os.pidfd_open(pid)
        yield Mounted(root, store, pid)
    finally:
        if mounted(root):
            subprocess.run(
                [*bench.ramfs, "umount", str(root)], check=False, capture_output=True, start_new_session=True
            )
        unmount(root)
        if daemon >= 0:
            _gone(daemon)
        run(["rm", "-rf", store])


@contextmanager
def ramfs(bench: Bench, prepare: Prepare) -> Iterator[Served]:
    with ramfs_mount(bench) as at:
        (at.root / "vm").mkdir()
        block = at.root / "vm" / BLOCK_FILE
        prepare(block)
        yield Served(block, [at.pid], at.root, at.store)


def _detached(command: Sequence[str]) -> None:
    """Run a command that leaves a daemon behind; a pipe would stay open for as long as that lives."""
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=60,
            start_new_session=True,
        )
        if done.returncode:
            log.seek(0)
            raise RuntimeError((log.read().strip() or f"{command[0]} failed").splitlines()[-1])


def _gone(daemon: int) -> None:
    """Wait for the daemon to end, as only then may the store be removed; stop it if it does not."""
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, number)
        if select.select([daemon], [], [], 10)[0]:
            break
    os.close(daemon)
