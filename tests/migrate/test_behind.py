"""tools/migrate --rounds 0: the memory comes after the guest, and is compared when the guest runs there already."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import numpy as np
import pytest
from arrival.conftest import pulls
from migrate.tool import Pair, Tool, assert_goes_on_here, assert_went, boot
from mount.posix import PAGE, eventually
from vm.guest import Guest

from ramfs.cli._states import states
from ramfs.image.lineage import PageState

pytestmark = pytest.mark.vm

NO_ROUNDS = ("--rounds", "0")


def test_a_guest_whose_qemu_wants_all_of_its_memory_first(pair: Pair, migrate: Callable[..., Tool]) -> None:
    """... gets it when it has stopped; and until it is let go it runs on here."""
    guest = boot(pair)
    tool = migrate(guest, *NO_ROUNDS, "--hold")
    assert_goes_on_here(pair, guest, tool, 1, "standard input ended without a line; the guest runs on here")

    guest.command[:] = [word.replace("share=on", "share=on,prealloc=on") for word in guest.command]
    tool = migrate(guest, *NO_ROUNDS, "--hold", held=True)
    tool.wait_for("ready; a line on standard input lets it go")
    with pytest.raises(ProcessLookupError):  # memory that nobody can give yet is not waited for
        os.kill(int((tool.room / "pid").read_text()), 0)
    guest.tick_on()
    tool.let_go()
    assert tool.ended() == 0, tool.lines
    assert_went(pair, guest, tool)


def before_it_is_frozen(tool: Tool, guest: Guest, change: Callable[[], None]) -> None:
    """Do something when the guest runs there and QEMU here has not ended."""
    tool.wait_for("start there")
    guest.process.send_signal(signal.SIGSTOP)
    tool.wait_for("the guest is there")
    change()
    guest.process.send_signal(signal.SIGCONT)


def test_memory_that_changes_behind_the_guest_is_found_out(pair: Pair, migrate: Callable[..., Tool]) -> None:
    guest = boot(pair)
    tool = migrate(guest, *NO_ROUNDS)
    (ram,) = os.listdir(guest.memory)

    def zeros() -> list[int]:
        """Pages that were told to be zeros."""
        return list(np.flatnonzero(states(str(tool.target / ram)) == PageState.ZERO))

    def change() -> None:
        eventually(lambda: bool(zeros()), "zeros are told")
        with (guest.memory / ram).open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x", zeros()[-1] * PAGE)

    before_it_is_frozen(tool, guest, change)
    assert tool.ended() == 1, tool.lines
    said = re.search(
        r"1 pages that came before are not what it promises: the guest that runs there may have read something else; "
        r"as it was when it stopped here, it is in (\S+)$",
        tool.lines[-1],
    )
    assert said, tool.lines
    assert set(os.listdir(said[1])) == {ram, "state"}
    guest.process.wait(20)
    assert tool.say("verify").startswith("verified ok seeds=1,1,1,1,1,1,1,1 ")


def test_a_guest_that_cannot_be_frozen_arrives_unverified(pair: Pair, migrate: Callable[..., Tool]) -> None:
    guest = boot(pair)
    tool = migrate(guest, *NO_ROUNDS)
    before_it_is_frozen(tool, guest, (guest.memory / "state").mkdir)
    assert tool.ended() == 0, tool.lines
    assert any(re.search("cannot be frozen, so what arrives is not verified: ", line) for line in tool.lines)
    assert_went(pair, guest, tool)
    assert not pulls(pair.on_b.mount)
    assert os.listdir(guest.memory / ".snap") == []
