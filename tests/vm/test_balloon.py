"""Guests that give memory back: the balloon, and free page reporting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import UNMEASURED, Mount
from mount.posix import eventually
from vm.conftest import Lab, cp, ramfs, snapshot
from vm.guest import MIB, PAGE, Guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

MUCH = 100  # MiB that the guest takes and gives
#: What a balloon of that size is sure to get.
MOST = 85 * MIB
#: What the guest's kernel reports of it by itself: not the pages in its own lists, nor pieces below 2 MiB, of which
#: there are more or fewer (on a plain tmpfs as well: 78 to 99 MiB were reported of 100).
REPORTED = 60 * MIB
GUEST_MIB = 256


def stored(mount: Mount) -> int:
    """Bytes that the layers of the store take."""
    return sum(path.stat().st_blocks * 512 for path in (mount.store / "layers").glob("*.ram"))


def counts(path: Path) -> dict[str, int]:
    """Bytes of a file by state, from `ramfs du`."""
    done = ramfs("du", "--json", path)
    assert (done.returncode, done.stderr) == (0, ""), done
    return {state: pages * PAGE for state, pages in json.loads(done.stdout)["total"].items()}


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab(env=UNMEASURED)  # a balloon is a request for each page


def boot(lab: Lab, memory: Path, device: str = "", mib: int = GUEST_MIB) -> Guest:
    return lab.boot(memory, mib=mib, args=["-device", f"virtio-balloon-pci,id=balloon{device}"])


def inflate(guest: Guest, size: int) -> None:
    """Let the guest have only that many bytes, and wait until it has obeyed."""
    guest.qmp("balloon", value=size)
    eventually(lambda: guest.qmp("query-balloon")["actual"] == size, f"the guest has {size} bytes", timeout=60)


def test_what_the_guest_frees_is_reported(lab: Lab) -> None:
    memory = lab.directory("vm") / "ram0"
    # What is being reported the guest cannot use meanwhile, so it needs more than it takes twice.
    guest = boot(lab, memory, ",free-page-reporting=on", mib=2 * GUEST_MIB)
    for seed in (2, 3):
        assert guest.say(f"take {seed} {MUCH}") == "taken ok"
        before, full = counts(memory), stored(lab.mount)
        assert before["owned"] > (MUCH + 16) * MIB
        guest.say("give")
        eventually(lambda full=full: full - stored(lab.mount) >= REPORTED, "what was freed is a hole", timeout=60)  # type: ignore[misc]
        after = counts(memory)
        assert after["zero"] - before["zero"] >= REPORTED
        assert before["owned"] - after["owned"] >= REPORTED
    guest.check([1] * 8)
    assert guest.errors == ""


def test_a_balloon_takes_from_its_own_guest_only(lab: Lab) -> None:
    vm, copy = lab.directory("vm"), lab.mount.path / "copy"
    parent = boot(lab, vm / "ram0")
    assert parent.say(f"take 2 {MUCH}") == "taken ok"
    parent.say("give")
    snapshot(vm, "one", parent.socket)
    frozen = vm / ".snap" / "one" / "ram0"
    digest = hashlib.sha256(frozen.read_bytes()).digest()
    small = (GUEST_MIB - MUCH - 10) * MIB

    # In a clone: it lets go of pages that it shared.
    cp("-r", vm / ".snap" / "one", copy)
    clone = lab.resume(copy / "ram0", copy / "state", mib=GUEST_MIB, args=["-device", "virtio-balloon-pci,id=balloon"])
    before = counts(copy / "ram0")
    inflate(clone, small)
    after = counts(copy / "ram0")
    assert after["zero"] - before["zero"] >= MOST
    assert before["shared"] - after["shared"] >= MOST
    clone.check([1] * 8)
    assert hashlib.sha256(frozen.read_bytes()).digest() == digest
    parent.check([1] * 8)

    # In the parent: the room comes back with the last snapshot that has the pages.
    full = stored(lab.mount)
    inflate(parent, small)
    assert hashlib.sha256(frozen.read_bytes()).digest() == digest
    (vm / ".snap" / "one").rmdir()
    eventually(lambda: full - stored(lab.mount) >= MOST, "the pages of the balloon are gone")
    clone.check([1] * 8)

    # And back again.
    for guest in (parent, clone):
        inflate(guest, GUEST_MIB * MIB)
        assert guest.say(f"take 3 {MUCH}") == "taken ok"
        guest.check([1] * 8)
        guest.tick_on()
        assert guest.errors == ""
