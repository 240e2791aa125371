"""A guest in QEMU for a test: started, heard on its serial line, driven, measured and ended by its pid.

    with Guest(memory=mount.path / "vm" / "ram0") as guest:
        guest.wait_for_tick()
        assert guest.say("verify").startswith("verified ok")

What the guest understands on its serial line is told in tools/guest.d/init.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ramfs import qmp

MIB = 1 << 20
PAGE = 4096

#: The pages of one part of the data that the guest fills, for each MiB that it was told to fill.
PART_PAGES_PER_MIB = 32

#: Spares a boot a fifth of the processor's time: the kernel tests neither its ciphers nor its clocks.
_SOONER = "cryptomgr.notests no_timer_check tsc=reliable"

_TREE = Path(__file__).parents[2]
_TICK = re.compile(r"tick (\d+)")

Style = Literal["-mem-path", "backend"]


@functools.cache
def images() -> tuple[Path, Path]:
    """Kernel and initramfs, built when they are missing."""
    out = subprocess.run([_TREE / "tools" / "guest"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    kernel, initrd = out.stdout.decode().splitlines()
    return Path(kernel), Path(initrd)


def listens(path: Path) -> bool:
    """Does somebody listen at a socket? Its name is there a moment earlier; and QEMU takes one connection only."""
    accepts = "00010000"  # __SO_ACCEPTCON
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(words[-1] == str(path) and words[3] == accepts for words in lines)


class GuestFailed(AssertionError):
    """QEMU ended, or the guest did not do what was expected in time; the message has what both said."""


@dataclass(frozen=True)
class Usage:
    """Host memory behind the guest's RAM, in pages, as smaps has it."""

    resident: int
    private_dirty: int
    shared: int
    anonymous: int
    """pages of its own, of no file (those of a file on tmpfs are always dirty)"""


class Guest:
    """One QEMU with RAM in `memory`: a file, a directory in which QEMU makes its own, or None for no file at all.

    `style` tells how QEMU gets it: as a memory backend, or by the option -mem-path, which maps privately.
    With `incoming` the guest waits for `load`. `boot` is added to the kernel command line; `args` to QEMU's, `env` to
    its environment.
    """

    def __init__(
        self,
        memory: Path | None,
        *,
        style: Style = "backend",
        share: bool = True,
        mib: int = 128,
        incoming: bool = False,
        boot: str = "",
        kernel: bool = True,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.memory = memory
        self.mib = mib
        self._private = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))  # a socket's path is short
        self.socket = self._private / "qmp"
        command = ["qemu-system-x86_64", "-accel", "tcg", "-m", str(mib), "-display", "none", "-nodefaults"]
        command += ["-no-user-config", "-no-reboot", "-serial", "stdio"]
        command += ["-qmp", f"unix:{self.socket},server=on,wait=off"]
        if memory is None:
            command += ["-machine", "pc"]
        elif style == "backend":
            backend = f"memory-backend-file,id=pc.ram,size={mib}M,mem-path={memory}"
            command += ["-object", f"{backend},share={'on' if share else 'off'}"]
            command += ["-machine", "pc,memory-backend=pc.ram"]
        else:
            command += ["-machine", "pc", "-mem-path", str(memory)]
        if kernel:
            linux, initrd = images()
            line = f"console=ttyS0 quiet panic=-1 {_SOONER} {boot}"
            command += ["-kernel", str(linux), "-initrd", str(initrd), "-append", line]
        if incoming:
            command += ["-incoming", "defer"]
        self.command = [*command, *args]
        self.lines: list[str] = []
        self._asked = 0
        self._heard = threading.Condition()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._wait(lambda: listens(self.socket), 20, "has no QMP socket")
        except BaseException:
            self.close()
            raise

    # --- life ---

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU at once and clear up; does nothing a second time."""
        self.kill()
        self._listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()
        shutil.rmtree(self._private, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL QEMU, as a crash would end it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def errors(self) -> str:
        """What QEMU said on standard error."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")

    # --- the serial line ---

    def ask(self, command: str) -> None:
        """Give the guest a command, and do not wait for its answer."""
        self._asked = len(self.lines)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def answers(self) -> list[str]:
        """What it has answered to the last command."""
        return [line[2:] for line in self.lines[self._asked :] if line.startswith("= ")]

    def say(self, command: str, timeout: float = 30) -> str:
        """Give the guest a command and return its answer."""
        self.ask(command)
        self._wait(lambda: bool(self.answers()), timeout, f"did not answer {command!r}")
        return self.answers()[0]

    def wait_for_line(self, pattern: str, timeout: float = 30) -> str:
        """Wait until the guest has said a line in which the regular expression is found."""
        found: list[str] = []

        def heard() -> bool:
            found[:] = [line for line in self.lines if re.search(pattern, line)]
            return bool(found)

        self._wait(heard, timeout, f"said nothing like {pattern!r}")
        return found[0]

    @property
    def ticks(self) -> list[int]:
        """The ticks heard so far. A line that was cut in two by a snapshot does not count."""
        return [int(match[1]) for line in list(self.lines) if (match := _TICK.fullmatch(line))]

    def wait_for_tick(self, more_than: int = -1, timeout: float = 30) -> int:
        """Wait for a tick above the given one, and return the last one."""
        self._wait(lambda: bool(self.ticks) and self.ticks[-1] > more_than, timeout, f"did not tick past {more_than}")
        return self.ticks[-1]

    def tick_on(self, count: int = 2) -> None:
        """Wait until it has ticked that much further."""
        self.wait_for_tick((self.ticks or [-1])[-1] + count - 1)

    def check(self, seeds: Sequence[int] | None = None) -> None:
        """Have the guest compare all of its data with the seeds it was made from."""
        answer = self.say("verify")
        assert answer.startswith("verified ok"), answer
        if seeds is not None:
            assert f"seeds={','.join(map(str, seeds))} " in answer, answer

    # --- QMP ---

    def qmp(self, command: str, **arguments: object) -> Any:
        async def ask() -> Any:
            async with qmp.connect(self.socket) as talk:
                return await talk.execute(command, arguments or None)

        return asyncio.run(ask())

    def status(self) -> str:
        return str(self.qmp("query-status")["status"])

    def load(self, state: Path, *, go_on: bool = True) -> None:
        """Resume from a state; the guest then runs unless told otherwise."""

        async def talk() -> None:
            async with qmp.connect(self.socket) as guest:
                await guest.load_state(state)
                if go_on:
                    await guest.cont()

        try:
            asyncio.run(talk())
        except qmp.QmpError as error:
            raise self._failure(f"did not load {state}: {error}") from error

    # --- host memory ---

    def usage(self) -> Usage:
        """What the mapping of the RAM costs the host, over all of its parts."""
        totals = {"Anonymous": 0, "Rss": 0, "Private_Dirty": 0, "Shared_Clean": 0, "Shared_Dirty": 0}
        within = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            fields = line.split()
            if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", fields[0]):
                within = line.endswith(str(self.memory))
            elif within and (name := fields[0].rstrip(":")) in totals:
                totals[name] += int(fields[1]) * 1024 // PAGE
        shared = totals["Shared_Clean"] + totals["Shared_Dirty"]
        return Usage(totals["Rss"], totals["Private_Dirty"], shared, totals["Anonymous"])

    def ram(self) -> bytearray:
        """The RAM as the guest sees it; stop the guest before. Reads the mapping, private pages included."""
        spans = []
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            if line.endswith(str(self.memory)):
                fields = line.split()
                begin, end = (int(part, 16) for part in fields[0].split("-"))
                spans.append((int(fields[2], 16), begin, end))
        ram = bytearray(self.mib * MIB)
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            for offset, begin, end in spans:
                done = 0
                while done < end - begin:
                    memory.seek(begin + done)
                    at = offset + done
                    got = memory.readinto(memoryview(ram)[at : at + min(end - begin - done, 4 * MIB)])
                    assert got
                    done += got
        return ram

    # --- within ---

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            with self._heard:
                self.lines.append(raw.decode(errors="replace").rstrip("\r\n"))
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        with self._heard:
            while not ready():
                if self.process.poll() is not None:
                    raise self._failure(f"ended with {self.process.returncode} and {what}")
                if time.monotonic() > deadline:
                    raise self._failure(f"{what} within {timeout} s")
                # Not only the serial line is waited for; the other things give no sign.
                self._heard.wait(0.02)

    def _failure(self, what: str) -> GuestFailed:
        said = "\n".join(self.lines[-20:])
        return GuestFailed(f"QEMU {self.pid} {what}\nstandard error: {self.errors}\nlast lines:\n{said}")
