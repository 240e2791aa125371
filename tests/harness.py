"""A ramfs mount for a test: started in a process of its own, taken down, and held to account.

    with Mount(tmp_path / "store", tmp_path / "mnt") as mount:
        (mount.path / "file").write_bytes(b"...")

Leaving the block unmounts, and fails the test when the daemon did not exit 0 or has logged a warning, an
error or a traceback that `mount.expect(...)` did not announce.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

FS_TYPE = "fuse.ramfs"

#: What has coverage measure a process from its start; and where that is kept for the processes that it starts.
_MEASURED = "COVERAGE_PROCESS_CONFIG"
_KEPT = "RAMFS_TEST_COVERAGE"
_FRONT = f"""import os, sys
os.environ[{_MEASURED!r}] = os.environ.pop({_KEPT!r})
from ramfs.cli import main
sys.exit(main())"""

#: For `Mount(env=...)`, whose daemon is not measured then: for tests that keep it busy with what others cover.
UNMEASURED = {_MEASURED: "", _KEPT: ""}
#: `ramfs` in tests of something else than its command line: not measured, which takes a tenth of a second to start.
RAMFS = ["env", "-u", _MEASURED, sys.executable, "-m", "ramfs"]

_SUSPECT = re.compile(
    r"Traceback \(most recent call last\)|\b(WARNING|ERROR|CRITICAL)\b|\b(warning|error):|^Exception ignored"
)


class MountFailed(AssertionError):
    """The daemon did not come up, did not go down, or misbehaved; the message has its log."""


class Mount:
    """`ramfs mount -f STORE MOUNTPOINT` as a subprocess of the test: the supervisor, which starts the daemon.

    `options` go to `-o`; `args` are further arguments of `ramfs mount`; `env` is added to the environment, and
    `prefix` stands before the command: one that starts another in its own place, such as nsenter (see hosts.py).
    Its log is what the daemon wrote to standard output and error since the Mount was made, restarts
    included. The mountpoint is made when it is missing.
    """

    def __init__(
        self,
        store: Path | str,
        mountpoint: Path | str,
        options: Sequence[str] = (),
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.store = Path(store)
        self.path = Path(mountpoint)
        self.options = tuple(options)
        self.args = tuple(args)
        self.env = dict(env or {})
        self.prefix = tuple(prefix)
        self.process: subprocess.Popen[bytes] | None = None
        self._log = bytearray()
        self._log_file: int | None = None
        self._expected: list[re.Pattern[str]] = []

    # --- life ---

    def start(self, timeout: float = 30) -> Mount:
        """Start the daemon and return once the mount is there; raise MountFailed with the log if not."""
        assert not self.running, f"{self.path} is being served already"
        if not os.path.lexists(self.path):
            self.path.mkdir(parents=True)
        ramfs, env = front()
        command = [*self.prefix, *ramfs, "mount", "-f", *self.args]
        if self.options:
            command += ["-o", ",".join(self.options)]
        self._collect_log()
        self._log_file = os.memfd_create("ramfs-log")
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            self.process = subprocess.Popen(
                [*command, str(self.store), str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=self._log_file,
                stderr=self._log_file,
                # The handler lets the SIGABRT for a daemon that hangs show in the log where it hangs.
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **env, **self.env},
                # Out of reach of the ctrl-C that ends the test run: the harness unmounts.
                start_new_session=True,
            )
            exited = os.pidfd_open(self.process.pid)
            try:
                poll = select.poll()
                poll.register(mountinfo, select.POLLERR | select.POLLPRI)  # the table of mounts has changed
                poll.register(exited, select.POLLIN)
                deadline = time.monotonic() + timeout
                while not is_mounted(self.path):
                    if self.process.poll() is not None:
                        raise self._failure(f"the daemon exited {self.process.returncode} before it had mounted")
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self.process.kill()
                        self.process.wait()
                        raise self._failure(f"not mounted within {timeout} s")
                    poll.poll(left * 1000)
                    mountinfo.seek(0)
                    mountinfo.read()
            finally:
                os.close(exited)
        return self

    def umount(self, timeout: float = 60, *, check: bool = True) -> None:
        """Unmount, wait for the daemon's end, and with `check` hold it to exit status 0 and a clean log."""
        process = self._serving()
        try:
            unmount(self.path)
        except MountFailed as error:
            raise self._failure(str(error)) from None
        self._reap(process, timeout, "after its mount was gone")
        if check:
            self.check(process.returncode)

    def terminate(self, signum: int = signal.SIGTERM, timeout: float = 60, *, check: bool = True) -> None:
        """Send a signal that is to make the daemon unmount and end, as a service manager does."""
        process = self._serving()
        process.send_signal(signum)
        self._reap(process, timeout, f"after {signal.Signals(signum).name}")
        if check:
            assert not is_mounted(self.path), f"{self.path} is still mounted"
            self.check(process.returncode)

    def kill(self) -> None:
        """SIGKILL the daemon and its supervisor, as a crash of both would, and clear the dead mount away."""
        process = self._serving()
        self.expect("the supervisor is gone: the next time a daemon of")  # of a daemon that had the time to see it
        self._kill_all(process)
        self._collect_log()
        unmount(self.path, lazy=True)

    def wait_until_supervised(self) -> None:
        """Wait until the daemon has said that it serves, a little after the mount is there: others go on from now."""
        deadline = time.monotonic() + 30
        while not (self.store / "supervisor").is_socket():
            self._serving()
            assert time.monotonic() < deadline, f"{self}: the supervisor takes no commands"
            time.sleep(0.005)

    def kill_daemon(self) -> int:
        """SIGKILL the serving daemon alone; returns its process id. The supervisor lets another take over."""
        self.expect(r"the daemon before this one \(process \d+\) was ended by signal 9; going on")
        deadline = time.monotonic() + 20
        while not (self.store / "supervisor").exists():  # a mount that was never ready is not gone on with
            assert time.monotonic() < deadline, f"{self} does not get ready"
            time.sleep(0.005)
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        return pid

    @staticmethod
    def _kill_all(process: subprocess.Popen[bytes]) -> None:
        daemons = children(process.pid)
        process.kill()
        process.wait()
        for pid in daemons:
            exited = os.pidfd_open(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            readable(exited, 20)
            os.close(exited)

    def restart(self) -> Mount:
        """Unmount cleanly and mount the same store again."""
        self.umount()
        return self.start()

    def check(self, returncode: int) -> None:
        """Fail unless the daemon ended with 0 and logged nothing that was not announced by `expect`."""
        if returncode != 0:
            raise self._failure(f"the daemon exited {returncode}")
        suspects = [
            line
            for line in self.log.splitlines()
            if _SUSPECT.search(line) and not any(pattern.search(line) for pattern in self._expected)
        ]
        if suspects:
            raise self._failure(f"the daemon logged {suspects[0]!r}")

    def abandon(self) -> None:
        """Take everything down without any judgement, whatever state it is in."""
        if is_mounted(self.path):
            with contextlib.suppress(MountFailed):  # the daemon may just be doing so itself
                unmount(self.path, lazy=True)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            if self.process.returncode is None:
                self._kill_all(self.process)
        self._collect_log()

    def __enter__(self) -> Mount:
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon()
            if self.log:
                error.add_note(f"log of {self}:\n{self.log}")
        elif self.running:
            try:
                self.umount()
            except BaseException:
                self.abandon()
                raise

    # --- what it tells ---

    @property
    def running(self) -> bool:
        """True while the supervisor lives."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the serving daemon, from the lock of the store."""
        self._serving()
        found = re.match(r"process (\d+) ", (self.store / "lock").read_text())
        assert found, f"{self}: nobody has signed the lock of the store"
        return int(found[1])

    @property
    def log(self) -> str:
        """All that the daemon has written so far."""
        current = b"" if self._log_file is None else os.pread(self._log_file, 1 << 24, 0)
        return (bytes(self._log) + current).decode(errors="backslashreplace")

    def expect(self, pattern: str) -> None:
        """Announce that the log may have lines in which the regular expression `pattern` is found."""
        self._expected.append(re.compile(pattern))

    def __repr__(self) -> str:
        return f"Mount({self.store} on {self.path})"

    # --- within ---

    def _serving(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise MountFailed(f"{self} was never started")
        if self.process.poll() is not None:
            raise self._failure(f"the daemon is gone already, with exit status {self.process.returncode}")
        return self.process

    def _reap(self, process: subprocess.Popen[bytes], timeout: float, when: str) -> None:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in children(process.pid):
                os.kill(pid, signal.SIGABRT)
            self._kill_all(process)
            raise self._failure(f"the daemon was still there {timeout} s {when}") from None
        self._collect_log()

    def _collect_log(self) -> None:
        if self._log_file is not None:
            self._log += os.pread(self._log_file, 1 << 24, 0)
            os.close(self._log_file)
            self._log_file = None

    def _failure(self, what: str) -> MountFailed:
        return MountFailed(f"{self}: {what}; its log:\n{self.log or '(empty)'}")


#: Whether daemons are measured: not for tests of something else, as that is a third of what a short one takes in all.
daemons_measured = True


def front() -> tuple[list[str], dict[str, str]]:
    """`ramfs`, and what it needs in its environment so that coverage measures what it starts, but not itself.

    That is the daemon without what becomes its supervisor, which tests of the command line measure: it takes a tenth of
    a second of a processor for each mount.
    """
    measured = os.environ.get(_MEASURED)
    if not measured or not daemons_measured:
        return [sys.executable, "-m", "ramfs"], {_MEASURED: ""}
    return [sys.executable, "-c", _FRONT], {_MEASURED: "", _KEPT: measured}


def unmeasured() -> dict[str, str]:
    """The environment for processes of which coverage shall tell nothing: it takes a tenth of a second to start."""
    return {name: value for name, value in os.environ.items() if name != _MEASURED}


def readable(fd: int, timeout: float | None = None) -> bool:
    """Wait until a descriptor of any number, such as a process's, can be read."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def caches_emptied() -> int:
    """How often somebody has emptied the machine's caches (vm.drop_caches): tests that run beside this one do so."""
    told = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(told["drop_pagecache"]) + int(told["drop_slab"])


def were_caches_emptied(before: int) -> bool:
    """Has somebody, since :func:`caches_emptied` was so many? The kernel counts one when it is done, so wait for it."""
    deadline = time.monotonic() + 5
    while caches_emptied() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    return caches_emptied() > before


def children(pid: int) -> list[int]:
    """The processes that a supervisor has started: the daemon, and after a while one that stands by."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def mounts() -> Iterator[Path]:
    """Mountpoints of every ramfs mount that this process can see, the latest first."""
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        lines = mountinfo.read().splitlines()
    for line in reversed(lines):
        fields, _, rest = line.partition(b" - ")
        if rest.split(b" ", 1)[0].decode() == FS_TYPE:
            # Blanks and backslashes stand as octal escapes.
            point = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), fields.split(b" ")[4])
            yield Path(os.fsdecode(point))


def is_mounted(mountpoint: Path | str) -> bool:
    """True when a ramfs is mounted there; does not touch the mount, which may be dead."""
    # The parent alone is resolved: looking at the mountpoint itself may hang or fail.
    path = Path(os.path.abspath(mountpoint))
    return path.parent.resolve() / path.name in set(mounts())


def mounts_below(*bases: Path) -> list[Path]:
    """Ramfs mounts that lie below any of the directories, innermost first."""
    found = {point for point in mounts() if any(point.is_relative_to(base) for base in bases)}
    return sorted(found, key=lambda point: len(point.parts), reverse=True)


def unmount(mountpoint: Path | str, *, lazy: bool = False, patience: float = 5) -> None:
    """Call umount(8), or fusermount3 when not root; retry while busy, for a user may just be exiting."""
    program = ["umount", "-i"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    command = [*program, *(["-l" if os.geteuid() == 0 else "-z"] if lazy else []), str(mountpoint)]
    deadline = time.monotonic() + patience
    while True:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "busy" not in done.stderr or time.monotonic() > deadline:
            raise MountFailed(f"cannot unmount {mountpoint}: {done.stderr.strip()} ({_users(mountpoint)})")
        time.sleep(0.05)  # umount has no way to wait for the last user


def _users(mountpoint: Path | str) -> str:
    """Which processes use the mount, as far as /proc tells."""
    prefix = str(mountpoint)
    users = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links: Iterable[Path] = [process / "cwd", process / "exe", *(process / "fd").iterdir()]
            maps = (process / "maps").read_text(errors="replace")
            if prefix in maps or any(os.readlink(link).startswith(prefix) for link in links):
                users.add(f"{process.name} {(process / 'comm').read_text().strip()}")
    return f"used by {', '.join(sorted(users))}" if users else "no user of it found"
