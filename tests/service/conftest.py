"""Service managers: a small one of our own, which shows what it is told, and systemd itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import children, is_mounted, readable, unmount

BIN = Path(sys.executable).parent
UNITS = Path(__file__).parents[2] / "systemd"
LOAD = Path(__file__).parent / "load.py"
PATIENCE = 30.0


def eventually(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Load:
    """The program load.py on a file of a mount."""

    def __init__(self, path: Path, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(LOAD), str(path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._begun = self._process.stdout.readline() == "begun\n"

    def end(self) -> float:
        """End it; returns the seconds of its longest access. It must have met neither a wrong byte nor a signal."""
        own = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(next(iter(children(own)), own), signal.SIGTERM)  # the child of nsenter, if that started it
        out, err = self._process.communicate(timeout=PATIENCE)
        assert (self._begun, self._process.returncode, err) == (True, 0, "")
        return float(out)


# --- a service manager that shows what it is told ---

# Becomes a service as systemd starts one: what was kept are descriptors 3 and up, by names.
AS_A_SERVICE = """
import json, os, sys
kept, command = json.loads(sys.argv[1]), sys.argv[2:]
for number, fd in enumerate(kept.values(), 3):
    os.dup2(fd, number)
    os.close(fd)
if kept:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(kept)), LISTEN_FDNAMES=":".join(kept))
os.execv(command[0], command)
"""


class Manager:
    """Starts `ramfs mount -f` with NOTIFY_SOCKET, keeps the descriptors that it gets and passes them on."""

    def __init__(self, base: Path) -> None:
        self.store, self.path, self.log = base / "store", base / "mnt", base / "log"
        self.path.mkdir()
        self.kept: dict[str, int] = {}
        self.told: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(base / "notify"))

    def start(self, store: Path | None = None) -> subprocess.Popen[bytes]:
        """Start the service; does not wait."""
        self.told = []
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", AS_A_SERVICE, json.dumps(self.kept),
                 sys.executable, "-P", "-m", "ramfs", "mount", "-f", store or self.store, self.path],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=tuple(self.kept.values()),
                env={**os.environ, "NOTIFY_SOCKET": self._socket.getsockname()},
            )  # fmt: skip
        return self.process

    def wait_for(self, word: str) -> None:
        """Take what the service tells, until it tells this or ends."""
        deadline = time.monotonic() + PATIENCE
        while word not in self.told:
            assert self.process is not None
            assert time.monotonic() < deadline, (word, self.told)
            if not readable(self._socket.fileno(), 0.05):
                assert self.process.poll() is None, self.log.read_text()
                continue
            self._take()

    def _take(self) -> None:
        data, fds, _, _ = socket.recv_fds(self._socket, 4096, 1)
        lines = data.decode().splitlines()
        self.told += lines
        facts = dict(line.split("=", 1) for line in lines)
        if "FDSTORE" in facts:
            assert facts["FDPOLL"] == "0"
            assert facts["FDNAME"] not in self.kept
            # Above the numbers that they will have in the service, and none that is taken.
            self.kept[facts["FDNAME"]] = fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 100)
            os.close(fds[0])
        if "FDSTOREREMOVE" in facts:
            os.close(self.kept.pop(facts["FDNAME"]))

    def serve(self) -> None:
        """Start the service and wait until it is ready."""
        self.start()
        self.wait_for("READY=1")

    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.path / ".ramfs/status.json").read_text()))

    def kill(self) -> None:
        """SIGKILL the supervisor, then what it started: as systemd does with KillMode=mixed."""
        assert self.process is not None
        pids = children(self.process.pid)
        gone = [os.pidfd_open(pid) for pid in pids]
        self.process.kill()
        self.process.wait()
        for fd in gone:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            readable(fd, PATIENCE)
            os.close(fd)

    def end(self) -> int:
        """Wait for the end of the service, whose mount was taken down, and hear its last words."""
        assert self.process is not None
        code = self.process.wait(PATIENCE)
        while readable(self._socket.fileno(), 0):
            self._take()
        return code

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for fd in self.kept.values():
            os.close(fd)
        if is_mounted(self.path):
            unmount(self.path, lazy=True)
        self._socket.close()


@pytest.fixture
def manager(shm: Path) -> Iterator[Manager]:
    manager = Manager(shm)
    yield manager
    manager.close()


# --- systemd ---

# In namespaces of its own, also for control groups: it sees itself as the first process of a container.
BOOT = """
mount -t cgroup2 cgroup "$BASE/cgroup"
mkdir "$BASE/cgroup/$NAME"
echo $$ > "$BASE/cgroup/$NAME/cgroup.procs"
umount "$BASE/cgroup"
exec unshare --cgroup --pid --fork --kill-child --mount-proc sh -euc '
    mount -t tmpfs run /run
    mount -t tmpfs cgroup /sys/fs/cgroup
    mount -t cgroup2 cgroup /sys/fs/cgroup
    mount -t tmpfs bin /usr/local/bin
    ln -s "$RAMFS" /usr/local/bin/ramfs
    exec env -i container=ramfs-tests PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$BASE/units" \\
        SYSTEMD_GENERATOR_PATH="$BASE/none" SYSTEMD_ENVIRONMENT_GENERATOR_PATH="$BASE/none" \\
        /lib/systemd/systemd --system --unit=basic.target --log-target=console --log-level=warning --show-status=no
'
"""
CLEAR = 'mount -t cgroup2 cgroup "$BASE/cgroup"; find "$BASE/cgroup/$NAME" -depth -type d -exec rmdir {} +'


@dataclass
class Systemd:
    """A systemd in which the unit is installed; its mounts are seen by what runs in it alone."""

    base: Path
    inside: list[str]
    """a command's first words: enters its namespaces"""

    def __call__(self, *command: object, check: bool = True) -> str:
        """The output of a command in there."""
        done = subprocess.run(
            [*self.inside, *map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr + self.log()
        return done.stdout

    def run_beside(self, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        """A Python program in there, started; it has written a line."""
        process = subprocess.Popen(
            [*self.inside, sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline()
        return process

    def log(self) -> str:
        """What the services have logged."""
        return "".join(path.read_text() for path in self.base.glob("*.log"))

    def show(self, unit: str) -> dict[str, str]:
        """Facts about a unit."""
        return dict(line.split("=", 1) for line in self("systemctl", "show", unit).splitlines())


@dataclass
class Service:
    """One instance of the unit."""

    systemd: Systemd
    name: str

    @property
    def unit(self) -> str:
        return f"ramfs@{self.name}"

    @property
    def store(self) -> Path:
        return self.systemd.base / f"{self.name}.store"

    @property
    def path(self) -> Path:
        return self.systemd.base / self.name

    def ctl(self, verb: str) -> None:
        """systemctl, which waits until it is done."""
        self.systemd("systemctl", verb, self.unit)

    def show(self) -> dict[str, str]:
        return self.systemd.show(self.unit)

    def status(self) -> dict[str, Any]:
        """What the daemon says."""
        return dict(json.loads(self.systemd("cat", self.path / ".ramfs/status.json")))

    def kill(self, pid: object) -> None:
        """SIGKILL a process, by its number in there."""
        self.systemd("kill", "-KILL", pid)


def first_process(parent: subprocess.Popen[bytes]) -> int:
    """The process id of systemd, out here."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert parent.poll() is None, "systemd was not started"
        for pid in children(parent.pid):  # before it the shell's commands
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return pid
        time.sleep(0.02)
    raise AssertionError("systemd was not started in time")


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    base = tmp_path_factory.mktemp("systemd")
    for name in ("cgroup", "none", "units"):
        (base / name).mkdir()
    for name in ("sysinit", "basic"):
        (base / "units" / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    for name, kind in (("ramfs@", "conf"), ("ramfs-export@", "export")):
        (base / "units" / f"{name}.service").write_text((UNITS / f"{name}.service").read_text())
        extra = base / "units" / f"{name}.service.d"
        extra.mkdir()
        (extra / "here.conf").write_text(
            f"[Service]\nEnvironmentFile=\nEnvironmentFile={base}/%i.{kind}\nStandardError=append:{base}/%i.{kind}.log\n"
        )
    env = {**os.environ, "BASE": str(base), "NAME": f"ramfs-tests-{os.getpid()}", "RAMFS": str(BIN / "ramfs")}
    alone = ["unshare", "--mount", "--propagation=private", "--uts", "--ipc", "--net", "sh", "-euc"]
    with open(base / "systemd.log", "wb") as log:
        parent = subprocess.Popen([*alone, BOOT], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
    try:
        first = first_process(parent)
        inside = ["nsenter", f"--target={first}", *"--mount --pid --cgroup --uts --ipc --net".split()]
        running = [*inside, "systemctl", "is-system-running", "--quiet"]
        eventually(
            lambda: subprocess.run(running, capture_output=True, check=False).returncode == 0,
            "systemd does not come up",
        )
        yield Systemd(base, inside)
    finally:
        parent.kill()  # and so systemd, and so all its processes
        parent.wait()
        deadline = time.monotonic() + PATIENCE
        while subprocess.run([*alone, CLEAR], env=env, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "control groups are left"
            time.sleep(0.05)


@pytest.fixture
def service(systemd: Systemd, request: pytest.FixtureRequest) -> Service:
    """An instance of the unit, not started."""
    service = Service(systemd, request.node.name.removeprefix("test_"))
    service.path.mkdir()
    (systemd.base / f"{service.name}.conf").write_text(f"STORE={service.store}\nMOUNTPOINT={service.path}\n")
    return service
