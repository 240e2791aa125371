"""A guest that goes on from a snapshot asks for less when another one has done so before it."""

from __future__ import annotations

import pytest
from mount.posix import counters, eventually
from vm.conftest import Lab, cp, snapshot
from vm.guest import PAGE, Guest

from ramfs.image.working_set import NAME, page_count, parse

pytestmark = pytest.mark.vm


def asked(lab: Lab) -> int:
    told = counters(lab.mount.path)
    return told["reads"] - told["reads_ahead"]


def test_the_second_clone_asks_for_a_tenth_at_most(lab: Lab) -> None:
    vm = lab.directory("vm")
    parent = lab.boot(vm / "ram")
    snapshot(vm, "warm", parent.socket)
    parent.close()
    warm = vm / ".snap" / "warm"

    def resume(name: str, pages: int) -> tuple[Guest, int]:
        """A clone that has ticked and looked at all of its data, and what it asked for."""
        copy = lab.mount.path / name
        cp("-r", warm, copy)
        before = asked(lab)
        guest = lab.start(copy / "ram", incoming=True)
        eventually(lambda: counters(lab.mount.path)["read_ahead_bytes"] >= pages * PAGE, "it is read ahead")
        guest.load(copy / "state")
        guest.wait_for_tick()
        guest.check([1] * 8)
        return guest, asked(lab) - before

    first, without = resume("first", 0)
    first.close()
    eventually((warm / NAME).exists, "it is recorded")
    pages = page_count(parse((warm / NAME).read_bytes())[b"ram"])
    second, spared = resume("second", pages)
    assert spared * 10 <= without, f"{spared} of {without} READs are left"
    # What it stores stays its own.
    second.say("overwrite 5 3")
    second.tick_on()
    second.check([1, 1, 1, 5, 1, 1, 1, 1])
