"""tools/migrate: a running guest moves to another host, or goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from arrival.conftest import pulls, wait_until_here
from harness import children
from migrate.conftest import Pair
from mount.posix import eventually
from vm.conftest import assert_no_tick_is_missing
from vm.guest import MIB, Guest

pytestmark = pytest.mark.vm

TREE = Path(__file__).parents[2]
PORT = 5000


class Tool:
    """tools/migrate on host A, with what it says; with `back` on host B, for the guest that went there."""

    def __init__(
        self,
        pair: Pair,
        guest: Guest,
        room: Path,
        *options: str,
        on: str = "",
        qemu: Sequence[str] = (),
        back: Tool | None = None,
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
        on = on or " ".join(there.prefix)
        command = [TREE / "tools" / "migrate", "--qmp", control, "--on", on, "--listen", here.address]
        command += ["--target-python", sys.executable, "--target-qmp", room / "qmp", "--patience", "4", *options]
        command += [source, self.target, "--", *words]
        self.process = subprocess.Popen(
            [*here.prefix, *map(str, command)],
            stdin=subprocess.DEVNULL,
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


@pytest.fixture
def migrate(pair: Pair, tmp_path: Path) -> Iterator[Callable[..., Tool]]:
    made: list[Tool] = []

    def make(guest: Guest, *options: str, **more: Any) -> Tool:
        room = tmp_path / str(len(made))
        room.mkdir()
        made.append(Tool(pair, guest, room, *options, **more))
        return made[-1]

    yield make
    for tool in made:
        tool.close()


def boot(pair: Pair) -> Guest:
    return pair.on_a.boot(pair.on_a.directory("vm"), boot="tick=0.2 fill=1:16")


@pytest.fixture
def rsh(pair: Pair) -> Iterator[str]:
    """A command prefix that runs commands on B over the cable."""
    words = [sys.executable, str(TREE / "tests" / "migrate" / "rsh.py")]
    with subprocess.Popen([*pair.b.prefix, *words, "serve", str(PORT)], stdin=subprocess.DEVNULL) as server:
        eventually(lambda: pair.b.listens(PORT), "it listens")
        yield " ".join([*words, pair.b.address, str(PORT)])
        server.kill()


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
    eventually(lambda: set(os.listdir(tool.room)) <= {"log", "serial", "pid"}, "B's agent has ended", 20)
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


def test_a_guest_moves_while_it_writes_and_comes_back(pair: Pair, migrate: Callable[..., Tool]) -> None:
    guest = boot(pair)
    guest.say("churn 2048")
    tool = migrate(guest, "--json", "--small", "1M")
    assert tool.ended() == 0, tool.lines
    assert_went(pair, guest, tool)
    report = json.loads(tool.lines[-1])
    first, *later = (each["bytes"] for each in report["rounds"])
    assert first > 16 * MIB
    assert later
    assert max(*later, report["behind"]["bytes"]) < first / 5, "what was not changed came again"
    assert 0 < report["downtime"] < 20
    assert os.listdir(guest.memory / ".snap") == []
    assert os.listdir(pair.on_b.mount.path) == ["vm"]
    assert not pulls(pair.on_b.mount)

    tool.say("overwrite 2 0")
    gone = tool.ticks[-1]
    again = migrate(guest, "--json", "--rounds", "0", back=tool)
    assert again.ended() == 0, again.lines
    assert again.say("verify").startswith("verified ok seeds=2,1,1,1,1,1,1,1 ")
    assert gone < again.ticks[0] == tool.ticks[-1] + 1
    assert json.loads(again.lines[-1])["bytes"] < report["bytes"] / 5


def test_whatever_fails_it_runs_in_one_place(pair: Pair, migrate: Callable[..., Tool], rsh: str) -> None:
    guest = boot(pair)
    at_once = ("--rounds", "0")
    pair.on_b.mount.expect("trying again")

    tool = migrate(guest, *at_once, qemu=["-nonsense"])
    assert_goes_on_here(pair, guest, tool, 1, "QEMU ended: .*nonsense.*; the guest runs on here")
    tool = migrate(guest, *at_once, qemu=["-machine", "q35"])
    assert_goes_on_here(pair, guest, tool, 1, "cannot be started on the other host: .*; the guest goes on here")
    tool = migrate(guest)
    tool.wait_for("round 1: pull")
    tool.process.send_signal(signal.SIGINT)
    assert_goes_on_here(pair, guest, tool, 130, "interrupted by SIGINT; the guest (runs|goes) on here")
    pair.a.slow(20)  # or it goes on there before anybody can say no
    tool = migrate(guest, *at_once)
    tool.wait_for("start there")
    tool.process.send_signal(signal.SIGTERM)
    assert_goes_on_here(pair, guest, tool, 143, "interrupted by SIGTERM; the guest goes on here")
    pair.a.slow(10000)

    # The connection: before the order to go on it is clear who has the guest, and then the other host is asked.
    tool = migrate(guest, *at_once, on=rsh)
    tool.wait_for("stop")
    pair.b.cut()
    assert_goes_on_here(pair, guest, tool, 1, "nothing was heard for 4 s; the guest goes on here")
    pair.b.mend()
    tool = migrate(guest, *at_once, on=f"env RSH_BREAKS=before {rsh}")
    assert_goes_on_here(pair, guest, tool, 1, "lost before the guest went on there; the guest goes on here")

    # All the rest it survives.
    tool = migrate(guest, "--rounds", "1", on=f"env RSH_BREAKS=after {rsh}")
    for phase in ("round 1: pull", "pull of what is left"):
        tool.wait_for(phase)
        os.kill(tool.server(), signal.SIGKILL)
    pair.b.cut()
    time.sleep(1)
    pair.b.mend()
    assert tool.ended() == 0, tool.lines
    assert any("asking whether the guest runs there" in line for line in tool.lines)
    assert_went(pair, guest, tool)
    assert os.listdir(pair.on_b.mount.path) == ["vm"]


def test_the_guest_dies_when_it_has_been_saved(pair: Pair, migrate: Callable[..., Tool]) -> None:
    """It runs there, and goes on arriving when nobody waits for that."""
    guest = boot(pair)
    pair.a.slow(100)
    tool = migrate(guest, "--rounds", "0")
    tool.wait_for("start there")
    guest.kill()
    for said in ("the guest is there", "the guest runs there, and"):
        tool.wait_for(said)
        server = tool.server()
        tool.process.send_signal(signal.SIGINT)
    assert tool.ended() == 1
    left = re.search(r"kill -- -(\d+); rmdir (\S+)$", tool.lines[-1])
    assert left, tool.lines
    try:
        assert os.getpgid(server) == int(left[1])
        assert pulls(pair.on_b.mount)
        assert_went(pair, guest, tool)
        wait_until_here(pair.on_b.mount, 60)
    finally:
        subprocess.run(["sh", "-c", f"kill -- -{left[1]}; rmdir {left[2]}"], check=True)
    assert os.listdir(guest.memory / ".snap") == []
