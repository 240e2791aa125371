"""A guest that runs on, on another host, while its memory is still arriving there."""

from __future__ import annotations

import time

import pytest
from arrival.conftest import pull, pulls, served_on, steer, wait_until_here
from migrate.tool import Pair
from mount.posix import eventually
from vm.conftest import assert_goes_on_from, assert_no_tick_is_missing, snapshot
from vm.guest import MIB

pytestmark = pytest.mark.vm

FILLED = 48


def test_the_cable_is_pulled_while_a_guest_arrives(pair: Pair) -> None:
    """It stalls for as long, also when the daemon dies meanwhile, and nothing is lost."""
    vm = pair.on_a.directory("vm")
    guest = pair.on_a.boot(vm, boot=f"tick=0.2 fill=1:{FILLED}")
    earliest = guest.ticks[-1]
    snapshot(vm, "leaving", guest.socket)
    latest = guest.wait_for_tick()
    guest.kill()

    mount = pair.on_b.mount
    with served_on(pair.a, vm / ".snap" / "leaving") as uri:
        pair.b.lose(1)
        assert pull(mount, uri, rate=2 * MIB)["verified"]
        moved = pair.on_b.resume(mount.path / "vm", mount.path / "vm" / "state")
        assert_goes_on_from(moved, earliest, latest)
        assert pulls(mount)[0]["here_bytes"] < pulls(mount)[0]["total_bytes"]

        pair.a.cut()
        mount.expect("trying again")
        moved.ask("verify")
        time.sleep(5)
        mount.kill_daemon()
        time.sleep(5)
        assert not moved.answers(), "it has checked memory that cannot be there"
        pair.a.mend()
        moved.wait_for_line("= verified", 90)
        moved.check([1] * 8)
        steer(mount, "vm", rate=0)
        wait_until_here(mount, 90)
    moved.check([1] * 8)
    moved.tick_on()
    assert_no_tick_is_missing(moved)
    eventually(lambda: not pulls(mount), "nothing is waited for")
