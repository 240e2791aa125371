"""tools/migrate in a test, and what is true when it has ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import children
from hosts import Host
from mount.posix import eventually
from vm.conftest import Lab, assert_no_tick_is_missing
from vm.guest import Guest

TREE = Path(__file__).parents[2]


class Pair(NamedTuple):
    """Two hosts, and on each a mount with its guests."""

    a: Host
    b: Host
    on_a: Lab
    on_b: Lab


class Tool:
    """tools/migrate on host A, with what it says; with `back` on host B, for the guest that went there.

    `held` gives it a standard input, as `--hold` wants.
    """

    def __init__(
        self,
        pair: Pair,
        guest: Guest,
        room: Path,
        *options: str,
        on: str = "",
        qemu: Sequence[str] = (),
        back: Tool | None = None,
        held: bool = False,
    ) -> None:
        self.room = room
        self.lines: list[str] = []
        here, there, source, control = pair.a, pair.b, guest.memory, guest.socket
        self.target = pair.on_b.mount.path / "vm"
        if back is not None:
            here, there, source, control = there, here, back.target, back.room / "qmp"
            self.target = guest.memory.with_name("vm.back")
        words = list(guest.command)
        for option in ("-serial", "-qmp"):
            del words[words.index(option) : words.index(option) + 2]
        words = [word.replace(str(guest.memory), str(self.target)) for word in words]
        words += ["-chardev", f"socket,id=s,path={room}/serial,server=on,wait=off,logfile={room}/log"]
        words += ["-serial", "chardev:s", "-pidfile", f"{room}/pid"]
        words += qemu
        on = on.format(room=room) or " ".join(there.prefix)
        command = [TREE / "tools" / "migrate", "--qmp", control, "--on", on, "--listen", here.address]
        command += ["--target-python", sys.executable, "--target-qmp", room / "qmp", "--patience", "4", *options]
        command += [source, self.target, "--", *words]
        self.process = subprocess.Popen(
            [*here.prefix, *map(str, command)],
            stdin=subprocess.PIPE if held else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stdout.readline, ""))

    def wait_for(self, words: str, patience: float = 60) -> None:
        """Wait until it has said a line that begins so."""

        def said() -> bool:
            assert self.process.poll() is None or any(line.startswith(words) for line in self.lines), self.lines
            return any(line.startswith(words) for line in self.lines)

        eventually(said, f"it says {words!r}", patience)

    def ended(self, patience: float = 60) -> int:
        """Wait for its end; the exit status."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.lines}") from None
        self._listener.join()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._listener.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.room / "pid").read_text()), signal.SIGKILL)

    def let_go(self) -> None:
        """Give it the line that `--hold` waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.close()

    def server(self) -> int:
        """The process of nbdkit, whose parent starts it again."""
        found: list[int] = []

        def there() -> bool:
            for keeper in children(self.process.pid):
                with contextlib.suppress(OSError):
                    found.extend(pid for pid in children(keeper) if Path(f"/proc/{pid}/comm").read_text() == "nbdkit\n")
            return bool(found)

        eventually(there, "nbdkit serves")
        return found[0]

    # -- the guest there

    @property
    def ticks(self) -> list[int]:
        """Of the guest there."""
        with contextlib.suppress(FileNotFoundError):
            return [int(each) for each in re.findall(r"^tick (\d+)\r?$", (self.room / "log").read_text(), re.MULTILINE)]
        return []

    def say(self, command: str, patience: float = 60) -> str:
        """Give the guest there a command; its answer."""
        before = len((self.room / "log").read_text())
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.room / "serial"))
            line.sendall(f"{command}\n".encode())
            found: list[str] = []

            def answered() -> bool:
                text = (self.room / "log").read_text()[before:]
                found[:] = re.findall(r"^= (.*?)\r?$", text, re.MULTILINE)
                return bool(found)

            eventually(answered, f"the guest answers {command!r}", patience)
        return found[0]


def boot(pair: Pair) -> Guest:
    return pair.on_a.boot(pair.on_a.directory("vm"), boot="tick=0.2 fill=1:16")


def assert_goes_on_here(pair: Pair, guest: Guest, tool: Tool, status: int, said: str) -> None:
    """The guest runs on A, there is nothing left of it on B, and of the migration on neither."""
    assert tool.ended() == status, tool.lines
    assert re.search(said, tool.lines[-1]), tool.lines
    guest.tick_on()
    assert guest.say("verify").startswith("verified ok seeds=1,1,1,1,1,1,1,1 ")
    assert_no_tick_is_missing(guest)
    assert not tool.ticks
    assert os.listdir(guest.memory / ".snap") == []
    eventually(lambda: not os.listdir(pair.on_b.mount.path), "B is as before", 20)
    eventually(lambda: set(os.listdir(tool.room)) <= {"log", "serial", "pid"}, "the agent on B leaves nothing", 20)
    with contextlib.suppress(FileNotFoundError):
        pid = (tool.room / "pid").read_text().strip()
        # One that was killed is there until whoever has it now has noticed.
        eventually(lambda: not Path(f"/proc/{pid}/exe").exists(), "QEMU on B is gone", 20)


def assert_went(pair: Pair, guest: Guest, tool: Tool) -> None:
    """The guest ran until it stopped on A, and from there on B."""
    guest.process.wait(20)
    before = guest.ticks[-1]
    eventually(lambda: len(tool.ticks) > 2, "it ticks there", 60)
    assert tool.ticks[0] - before in {1, 2}  # a line may be cut in two
    assert tool.say("verify").startswith("verified ok seeds=1,1,1,1,1,1,1,1 ")
    assert tool.ticks == list(range(tool.ticks[0], tool.ticks[0] + len(tool.ticks)))
