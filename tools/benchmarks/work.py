"""A guest, or a process, that does nothing but the jobs of work.c, over memory that is resident."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.vm.guest import Guest

from .bench import HERE, KIB, MIB, PATIENCE, Bench, run


class Worker(Guest):
    """A guest whose only program is work.c, with ``used`` MiB of its memory in use.

    ``memory`` None: QEMU has its RAM for itself. It tells its events at a second QMP socket, and each tick to us.
    """

    def __init__(self, bench: Bench, memory: Path | None, *, mib: int, used: int, args: tuple[str, ...] = ()) -> None:
        room = bench.fresh("worker")
        room.mkdir()
        ticks, events = room / "ticks", room / "events"
        os.mkfifo(ticks)
        self._ticking = os.open(ticks, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self._ticking, True)
        self.ticked: list[float] = []
        """when it did, of CLOCK_MONOTONIC, in seconds"""
        debugcon = ["-chardev", f"file,id=ticks,path={ticks}", "-device", "isa-debugcon,iobase=0xe9,chardev=ticks"]
        second = ["-qmp", f"unix:{events},server=on,wait=off"]
        own = ["-initrd", str(initramfs(bench)), *debugcon, *second, *args]
        super().__init__(memory, mib=mib, boot=f"rdinit=/work work={used}", args=own)
        threading.Thread(target=self._hear, daemon=True).start()
        self._events = socket.socket(socket.AF_UNIX)
        try:
            self._events.connect(str(events))
            self._events.sendall(b'{"execute": "qmp_capabilities"}\n')
            self.cpu = int(self.qmp("query-cpus-fast")[0]["thread-id"])
        except BaseException:
            self.close()
            raise

    def wait_until_ready(self) -> None:
        """It has booted, and stored into all that it uses."""
        self.wait_for_line("= ready", PATIENCE)

    def close(self) -> None:
        super().close()
        self._events.close()

    def work(self, job: str, count: int) -> float:
        """Seconds that a job takes, by the guest's clock."""
        return int(self.say(f"{job} {count}", PATIENCE)) / 1e9

    def cpu_seconds(self) -> float:
        """Of its virtual processor, so far."""
        return int(Path(f"/proc/{self.pid}/task/{self.cpu}/schedstat").read_text().split()[0]) / 1e9

    @contextmanager
    def dirtying(self, mib: float) -> Iterator[None]:
        """It stores into so many MiB each second."""
        self.say(f"steady {int(mib * KIB)}")
        yield
        self.say("calm")

    def events(self) -> list[Mapping[str, Any]]:
        """What QEMU has told since the last time."""
        self._events.setblocking(False)
        told = b""
        while True:
            try:
                told += self._events.recv(1 << 16)
            except BlockingIOError:
                break
        return [event for line in told.splitlines() if "event" in (event := json.loads(line))]

    def _hear(self) -> None:
        with os.fdopen(self._ticking, "rb", buffering=0) as pipe:
            while count := len(pipe.read(KIB)):
                self.ticked += [time.monotonic()] * count


class Process:
    """The same program as a process that maps a new file."""

    def __init__(self, bench: Bench, path: Path, used: int) -> None:
        path.touch()
        os.truncate(path, used * MIB)
        command = [program(bench), str(used), path]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self.process.pid
        self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def work(self, job: str, count: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{job} {count}\n")
        self.process.stdin.flush()
        return int(self._answer()) / 1e9

    def cpu_seconds(self) -> float:
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().removeprefix("= ")


def program(bench: Bench) -> Path:
    made = bench.scratch / "work"
    if not made.exists():
        run(["gcc", "-O2", "-Wall", "-static", HERE / "work.c", "-o", made])
    return made


def initramfs(bench: Bench) -> Path:
    """One that has the program alone; the kernel brings the console."""
    made = bench.scratch / "work.cpio"
    if not made.exists():
        program(bench)
        done = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-O", made], cwd=bench.scratch, input=b"work\n", check=False
        )
        if done.returncode:
            raise RuntimeError("cpio makes no initramfs")
    return made
