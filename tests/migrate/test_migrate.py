"""tools/migrate: a running guest moves to another host, or goes on where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from arrival.conftest import pulls, wait_until_here
from migrate.tool import TREE, Pair, Tool, assert_goes_on_here, assert_went, boot
from mount.posix import eventually
from vm.guest import MIB

pytestmark = pytest.mark.vm

PORT = 5000


@pytest.fixture
def rsh(pair: Pair) -> Iterator[str]:
    """A command prefix that runs commands on B over the cable."""
    words = [sys.executable, str(TREE / "tests" / "migrate" / "rsh.py")]
    with subprocess.Popen([*pair.b.prefix, *words, "serve", str(PORT)], stdin=subprocess.DEVNULL) as server:
        eventually(lambda: pair.b.listens(PORT), "it listens")
        yield " ".join([*words, pair.b.address, str(PORT)])
        server.kill()


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
    stopped = "RSH_STOPS={room}/qmp.migrate"  # so whoever asks later clears away what it leaves
    tool = migrate(guest, *at_once, on=f"env RSH_BREAKS=before {stopped} {rsh}")
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
