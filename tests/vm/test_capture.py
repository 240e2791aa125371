"""Guests that map their memory privately become clones by ramfs capture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vm.conftest import Lab, assert_no_tick_is_missing, cp, ramfs, snapshot
from vm.guest import MIB, PAGE, PART_PAGES_PER_MIB

pytestmark = pytest.mark.vm


def capture(directory: Path, pid: int, socket: Path) -> dict[str, Any]:
    done = ramfs("capture", directory, "--pid", pid, "--qmp", socket, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    return dict(json.loads(done.stdout))


def test_a_dense_clone_is_cloned(make_lab: Callable[..., Lab]) -> None:
    """With a graphics card, whose memory is in no file."""
    lab, card = make_lab(["template_rdwr"]), {"args": ["-vga", "std"]}
    vm, here = lab.directory("vm"), lab.mount.path / "dense"
    parent = lab.boot(vm / "ram0", **card)
    snapshot(vm, "template", parent.socket)
    parent.close()
    cp("-al", vm / ".snap" / "template", here)
    guest = lab.resume(here / "ram0", here / "state", share=False, **card)
    guest.say("overwrite 20 2")
    told = ramfs("capture", here, "--pid", parent.pid + (1 << 22), "--qmp", guest.socket)
    assert (told.returncode, told.stderr.count("\n")) == (1, 1)
    report = capture(here, guest.pid, guest.socket)
    [file] = report["files"]
    # What it was told to write, and what a kernel does besides.
    assert 16 * PART_PAGES_PER_MIB <= file["pages"] < guest.mib * MIB // PAGE // 8
    assert report["state_bytes"] < 2 * MIB  # no RAM of the guest's
    last = guest.ticks[-1]
    guest.say("overwrite 30 5")
    guest.tick_on()

    clone = lab.resume(here / "ram0", here / "state", **card)
    assert clone.ticks[0] <= last + 2
    clone.check([1, 1, 20, 1, 1, 1, 1, 1])
    guest.check([1, 1, 20, 1, 1, 30, 1, 1])
    assert_no_tick_is_missing(clone)
    assert_no_tick_is_missing(guest)


def test_a_guest_of_mem_path_is_cloned(lab: Lab) -> None:
    vm = lab.directory("vm")
    guest = lab.boot(vm, style="-mem-path")
    guest.say("overwrite 9 3")
    capture(vm, guest.pid, guest.socket)
    guest.check([1, 1, 1, 9, 1, 1, 1, 1])
    cp("-r", vm, lab.mount.path / "copy")
    for here in (vm, lab.mount.path / "copy"):
        clone = lab.resume(here, here / "state", style="-mem-path")
        clone.check([1, 1, 1, 9, 1, 1, 1, 1])
        clone.say("overwrite 4 4")
    guest.tick_on()
    guest.check([1, 1, 1, 9, 1, 1, 1, 1])
    assert_no_tick_is_missing(guest)
