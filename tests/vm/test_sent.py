"""A guest that goes on, on another mount, from a snapshot that was sent there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vm.conftest import Lab, assert_goes_on_from, snapshot

pytestmark = pytest.mark.vm


def transfer(source: Path, target: Path, *options: str) -> None:
    ramfs = [sys.executable, "-m", "ramfs"]
    send, receive = shlex.join([*ramfs, "send", *options, str(source)]), shlex.join([*ramfs, "receive", str(target)])
    subprocess.run(["bash", "-o", "pipefail", "-c", f"{send} | {receive}"], check=True, timeout=100)


def test_a_guest_resumes_from_a_received_snapshot(make_lab: Callable[..., Lab]) -> None:
    here, there = make_lab(), make_lab()
    vm, target = here.directory("vm"), there.mount.path / "vm"
    guest = here.boot(vm / "pc.ram@0x0")
    snapshot(vm, "one", guest.socket)
    transfer(vm / ".snap/one", target, "--zstd")
    guest.say("overwrite 7 3")
    guest.tick_on()
    earliest = guest.ticks[-1]
    snapshot(vm, "two", guest.socket)
    latest = guest.ticks[-1]
    transfer(vm / ".snap/two", target, "-i", "one")
    guest.close()
    clone = there.resume(target / "pc.ram@0x0", target / "state", share=True)
    assert_goes_on_from(clone, earliest, latest)
    clone.check([1, 1, 1, 7, 1, 1, 1, 1])
    clone.say("overwrite 9 0")
    clone.tick_on()
