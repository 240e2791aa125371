from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import front, is_mounted, mounts_below, unmount

# Not measured: nobody may write where coverage keeps its data.
NOBODY = ("env", "-u", "COVERAGE_PROCESS_CONFIG", "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
BIN = Path(sys.executable).parent

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@dataclass
class Outcome:
    """How a run of a command ended."""

    code: int
    out: str
    err: str

    def ok(self) -> str:
        """Its output; it must have succeeded in silence."""
        assert (self.code, self.err) == (0, ""), self
        return self.out

    def failed(self, code: int, *words: object) -> str:
        """Its message: one line on standard error that has all of the words, and nothing on standard output."""
        assert self.code == code, self
        assert self.out == "", self
        assert self.err.startswith("ramfs: "), self
        assert self.err.count("\n") == 1, self
        for word in words:
            assert str(word) in self.err, self
        return self.err


def run(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Outcome:
    """`ramfs` with these arguments."""
    return call(sys.executable, "-P", "-m", "ramfs", *args, env=env, cwd=cwd)


def call(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Outcome:
    done = subprocess.run(
        [os.fspath(arg) if isinstance(arg, Path) else str(arg) for arg in args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def in_namespace(script: str, **env: object) -> Outcome:
    """A shell script, as root, in a mount namespace of its own, where `ramfs` is installed system-wide.

    mount(8) looks for its helpers' programs in the usual places only, so /usr/local/bin gets one there.
    """
    install = 'mount -t tmpfs bin /usr/local/bin; ln -s "$BIN/ramfs" /usr/local/bin/ramfs; '
    command = ["unshare", "--mount", "--propagation=private", "sh", "-euc", install + script]
    return call(*command, env={"BIN": str(BIN), **{name: str(value) for name, value in env.items()}})


@dataclass
class Place:
    """A store and a mountpoint, for commands that mount."""

    base: Path
    store: Path
    path: Path

    def mount(self, *args: object) -> Place:
        ramfs, env = front()
        call(*ramfs, "mount", *args, self.store, self.path, env=env).ok()
        return self

    def umount(self) -> None:
        run("umount", self.path).ok()

    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.path / ".ramfs/status.json").read_text()))

    def kill_daemon(self) -> int:
        """SIGKILL the daemon alone; returns its process id."""
        pid = int(self.status()["pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """SIGKILL the supervisor and the daemon, and wait until the kernel has noticed."""
        status = self.status()
        for pid in (status["supervisor"]["pid"], status["pid"]):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.statvfs(self.path)
            except OSError:
                return
            time.sleep(0.01)
        raise AssertionError("the mount outlives its daemon")


def make_place(base: Path) -> Place:
    place = Place(base, base / "store", base / "mnt")
    place.path.mkdir()
    return place


@pytest.fixture
def place(shm: Path) -> Iterator[Place]:
    """A store to be and a mountpoint; unmounted at the end if the test left it so."""
    place = make_place(shm)
    yield place
    if is_mounted(place.path):
        unmount(place.path)


@pytest.fixture
def mounted_place(place: Place) -> Place:
    return place.mount()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user may enter."""
    base = Path(tempfile.mkdtemp(prefix="ramfs-public-", dir="/var/tmp"))
    base.chmod(0o755)
    yield base
    for point in mounts_below(base):
        unmount(point, lazy=True)
    shutil.rmtree(base, ignore_errors=True)
