"""Guests whose memory the kernel serves from the store, without the daemon: dense clones, and live files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from disk import reflink_disk
from harness import Mount
from vm.conftest import Lab, assert_goes_on_from, assert_no_tick_is_missing, cp, snapshot
from vm.guest import MIB, PAGE, PART_PAGES_PER_MIB

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def readonly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("readonly") / "readonly.so"
    source = Path(__file__).with_name("readonly.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def test_dense_clones_fault_in_the_store(lab: Lab, readonly: Path) -> None:
    vm = lab.directory("vm")
    parent = lab.boot(vm / "ram0")
    snapshot(vm, "template", parent.socket)
    parent.close()
    template = vm / ".snap" / "template"
    before = (template / "ram0").read_bytes()

    def status() -> Any:
        return json.loads((lab.mount.path / ".ramfs" / "status.json").read_bytes())

    clones = []
    for number in range(3):
        here = lab.mount.path / f"dense{number}"
        cp("-al", template, here)
        env = {"LD_PRELOAD": str(readonly), "READONLY": str(here / "ram0")}
        clones.append(lab.resume(here / "ram0", template / "state", share=False, env=env))
    told = status()
    assert (told["native"]["files"], told["native"]["refused"]) == (1, "")
    for number, clone in enumerate(clones):
        clone.say(f"overwrite {20 + number} 2")
        clone.say(f"overwrite {30 + number} 5")
    for number, clone in enumerate(clones):
        clone.check([1, 1, 20 + number, 1, 1, 30 + number, 1, 1])
        assert 2 * 16 * PART_PAGES_PER_MIB <= clone.usage().anonymous < clone.mib * MIB // PAGE // 8
    # Nobody reads the states any more, and the memory never went through the daemon.
    pages = (status()["requests"]["read_bytes"] - told["requests"]["read_bytes"]) // PAGE
    assert pages < 8, f"{pages} pages were asked of the daemon"
    for clone in clones:
        clone.close()
    assert (template / "ram0").read_bytes() == before


def test_guests_run_on_live_files(tmp_path: Path, shm: Path) -> None:
    """A store on XFS: no page of a guest goes through the daemon, nor of its clone; a snapshot is a reflink."""
    with reflink_disk(shm, "xfs", 600 * MIB) as disk, Mount(disk / "store", tmp_path / "mnt") as mount:
        mount.expect("signal 9; going on")
        lab = Lab(mount)
        try:
            vm = lab.directory("vm")
            parent = lab.boot(vm / "ram0")

            def live() -> set[str]:
                told = json.loads((mount.path / ".ramfs" / "status.json").read_bytes())
                return {file["path"] for file in told["open_files"] if file["live"]}

            assert live() == {"vm/ram0"}
            earliest = parent.ticks[-1]
            report = snapshot(vm, "one", parent.socket)
            latest = parent.ticks[-1]
            assert report["rounds"][0]["bytes"] > MIB
            cp("-r", vm / ".snap" / "one", mount.path / "clone")
            clone = lab.resume(mount.path / "clone" / "ram0", mount.path / "clone" / "state")
            assert live() == {"vm/ram0", "clone/ram0"}
            assert_goes_on_from(clone, earliest, latest)
            parent.say("overwrite 2 0")
            clone.say("overwrite 3 7")
            mount.kill_daemon()
            parent.tick_on()
            clone.tick_on()
            parent.check([2] + [1] * 7)
            clone.check([1] * 7 + [3])
            # From the running guest's own directory, while it is stopped.
            parent.qmp("stop")
            snapshot(vm, "two", parent.socket)
            cp("-r", vm, mount.path / "again")
            parent.qmp("cont")
            again = lab.resume(mount.path / "again" / "ram0", mount.path / "again" / "state")
            again.check([2] + [1] * 7)
            assert_no_tick_is_missing(parent)
        finally:
            lab.close()
