"""Real guests on a real mount: booted, frozen, cloned and resumed, and asked what became of their memory."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Mount
from qmp.proxy import Proxy
from vm.conftest import Lab, assert_goes_on_from, assert_no_tick_is_missing, cp, ramfs, snapshot
from vm.guest import MIB, PAGE, PART_PAGES_PER_MIB, Guest, GuestFailed

pytestmark = pytest.mark.vm

#: How QEMU gets its RAM: name of the file in the VM's directory, or none for QEMU's own; and how it maps it.
WAYS = {
    "-mem-path DIR": ("", {"style": "-mem-path"}),
    "mem-path=DIR": ("", {}),
    "mem-path=DIR/ram0": ("ram0", {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_clones_run_beside_their_parent(corner: Lab, way: str) -> None:
    name, options = WAYS[way]
    vm = corner.directory("vm")
    parent = corner.boot(vm / name, **options)
    assert [path.name for path in vm.iterdir()] == [name or "pc.ram@0x0"]
    assert (vm / (name or "pc.ram@0x0")).stat().st_size == parent.mib * MIB

    earliest = parent.ticks[-1]
    report = snapshot(vm, "one", parent.socket)
    latest = parent.ticks[-1]
    parent.tick_on()
    if way == "-mem-path DIR":
        # This way maps privately, so QEMU sends the RAM along; nothing else is different.
        assert "privately" in report["notes"][0]
    else:
        assert report["notes"] == []
        assert report["state_bytes"] < 2 * MIB

    for share in (True, False):
        copy = corner.path / f"share-{share}"
        cp("-r", vm / ".snap" / "one", copy)
        parent.say("overwrite 2 0")
        clone = corner.resume(copy / name, copy / "state", share=share, **options)
        assert_goes_on_from(clone, earliest, latest)
        clone.check([1] * 8)
        clone.say("overwrite 3 0")
        clone.say("overwrite 4 7")
        clone.tick_on()
        parent.check([2] + [1] * 7)
        clone.check([3] + [1] * 6 + [4])
        clone.close()
    parent.tick_on()
    assert_no_tick_is_missing(parent)


def test_a_directory_serves_one_guest_at_a_time(lab: Lab) -> None:
    vm = lab.directory("vm")
    parent = lab.boot(vm)
    lab.mount.expect("in use|busy|EBUSY")
    try:
        second = lab.start(vm)
        second.process.wait(20)
        said = second.errors
    except GuestFailed as error:  # it was quicker
        said = str(error)
    assert "busy" in said
    parent.tick_on()
    parent.check()
    parent.close()
    assert (vm / "pc.ram@0x0").stat().st_size == parent.mib * MIB


def test_a_stopped_guest_is_cloned_from_its_live_directory(corner: Lab) -> None:
    vm, copy = corner.directory("vm"), corner.path / "copy"
    parent = corner.boot(vm / "ram0")
    parent.qmp("stop")
    last = parent.ticks[-1]
    snapshot(vm, "one", parent.socket)
    assert not parent.qmp("query-status")["running"]
    cp("-r", vm, copy)
    assert sorted(path.name for path in copy.iterdir()) == ["ram0", "state"]
    assert list((copy / ".snap").iterdir()) == []

    clone = corner.resume(copy / "ram0", copy / "state")
    assert_goes_on_from(clone, last, last)
    assert parent.ticks[-1] == last
    parent.qmp("cont")
    parent.tick_on()
    clone.say("overwrite 5 3")
    parent.check([1] * 8)
    clone.check([1, 1, 1, 5, 1, 1, 1, 1])
    assert_no_tick_is_missing(parent)


def test_three_generations(corner: Lab) -> None:
    seeds = [1] * 8
    line = [corner.boot(corner.directory("g0") / "ram0")]
    expected = [list(seeds)]
    for generation in (1, 2, 3):
        before, here = corner.path / f"g{generation - 1}", corner.path / f"g{generation}"
        snapshot(before, "next", line[-1].socket)
        cp("-r", before / ".snap" / "next", here)
        line.append(corner.resume(here / "ram0", here / "state", share=True))
        # Each writes to a part of its own and to one that all write to.
        seeds[generation] = seeds[7] = 10 + generation
        line[-1].say(f"overwrite {10 + generation} {generation}")
        line[-1].say(f"overwrite {10 + generation} 7")
        expected.append(list(seeds))
    for guest, each in zip(line, expected, strict=True):
        guest.tick_on(1)
        guest.check(each)

    # Its forebears go, one after the other; the youngest keeps what it had of them.
    for generation in (0, 1, 2):
        line[generation].close()
        (corner.path / f"g{generation}" / ".snap" / "next").rmdir()
        shutil.rmtree(corner.path / f"g{generation}")
        line[3].check(expected[3])
    # Not from the page cache alone: the mapping of a fresh clone is filled from the store.
    snapshot(corner.path / "g3", "last", line[3].socket)
    cp("-r", corner.path / "g3" / ".snap" / "last", corner.path / "g4")
    corner.resume(corner.path / "g4" / "ram0", corner.path / "g4" / "state").check(expected[3])


def test_dense_clones_share_their_template(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(["template_rdwr"])
    vm = lab.directory("vm")
    parent = lab.boot(vm / "ram0")
    snapshot(vm, "template", parent.socket)
    parent.close()
    template = vm / ".snap" / "template"

    clones = []
    for number in range(8):
        here = lab.mount.path / f"dense{number}"
        cp("-al", template, here)
        assert (here / "ram0").stat().st_ino == (template / "ram0").stat().st_ino
        clones.append(lab.resume(here / "ram0", here / "state", share=False))
    for number, clone in enumerate(clones):
        clone.say(f"overwrite {20 + number} 2")
        clone.say(f"overwrite {30 + number} 5")
    for number, clone in enumerate(clones):
        clone.check([1, 1, 20 + number, 1, 1, 30 + number, 1, 1])

    told_to_write = 2 * 16 * PART_PAGES_PER_MIB
    with open(template / "ram0", "rb") as file:
        frozen = np.frombuffer(file.read(), np.uint64).reshape(-1, PAGE // 8)
    for clone in clones:
        clone.qmp("stop")
        private = clone.usage().private_dirty
        ram = np.frombuffer(clone.ram(), np.uint64).reshape(-1, PAGE // 8)
        changed = int(np.count_nonzero((ram != frozen).any(axis=1)))
        # Each costs what it wrote. The kernel of the guest writes too: stacks, page tables, its log; and
        # some of that is the same as before, which makes a page private but not different.
        assert told_to_write <= changed <= private
        assert private <= 1.25 * changed + 256, f"{private} private pages for {changed} changed ones"
        assert private < clone.mib * MIB // PAGE // 8
    assert template.joinpath("ram0").read_bytes() == frozen.tobytes()


def test_a_snapshot_under_constant_writing(corner: Lab) -> None:
    vm, copy = corner.directory("vm"), corner.path / "copy"
    begun = time.monotonic()
    parent = corner.boot(vm / "ram0", boot="tick=0.2 fill=1:32")
    parent.say("churn 8192")
    report = snapshot(vm, "one", parent.socket)
    took = time.monotonic() - begun
    cp("-r", vm / ".snap" / "one", copy)
    clone = corner.resume(copy / "ram0", copy / "state")
    clone.check([1] * 8)
    parent.check([1] * 8)
    # The first round had to flush what was filled; the last one, for which the guest waited, much less.
    flushed = [each["bytes"] for each in report["rounds"]]
    if None not in flushed and took < 30:  # then the kernel begins to do it by itself
        assert flushed[0] > 32 * MIB
        assert flushed[-1] < flushed[0] / 2


def test_frozen_memory_stays(corner: Lab) -> None:
    vm = corner.directory("vm")
    parent = corner.boot(vm / "ram0")
    snapshot(vm, "one", parent.socket)
    frozen = vm / ".snap" / "one" / "ram0"
    before = frozen.read_bytes()
    parent.say("overwrite 2 0")
    snapshot(vm, "two", parent.socket)
    assert frozen.read_bytes() == before
    after = (vm / ".snap" / "two" / "ram0").read_bytes()
    # What the guest was told to write is in the second one only, and the rest of its data is in both.
    pages = {after[at : at + PAGE] for at in range(0, len(after), PAGE)}
    old = {before[at : at + PAGE] for at in range(0, len(before), PAGE)}
    assert len(pages - old) >= 16 * PART_PAGES_PER_MIB
    assert len(pages & old) >= 7 * 16 * PART_PAGES_PER_MIB


def test_memory_is_read_live(corner: Lab) -> None:
    vm = corner.directory("vm")
    parent = corner.boot(vm / "ram0")
    # Written while the file is read by another process, in a command line that only the guest knows.
    parent.say("say an-unlikely-word-71c9")
    with open(vm / "ram0", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped.find(b"an-unlikely-word-71c9") >= 0
    parent.check()


# --- what goes wrong ---


@pytest.fixture(scope="module")
def warm(shared: Mount) -> Path:
    """A snapshot of a guest that has booted: to go on from it takes a tenth of the time."""
    lab = Lab(shared, shared.path / "warm")
    lab.path.mkdir()
    try:
        snapshot(lab.path, "one", lab.boot(lab.path / "ram0").socket)
    finally:
        lab.close()
    return lab.path / ".snap" / "one"


def gone_on(corner: Lab, warm: Path) -> tuple[Path, Guest]:
    """A directory with nothing but the memory of a guest, and that guest, which runs."""
    vm = corner.path / "vm"
    cp("-r", warm, vm)
    guest = corner.resume(vm / "ram0", vm / "state")
    (vm / "state").unlink()
    return vm, guest


def assert_nothing_was_made(vm: Path, state: bytes) -> None:
    assert list((vm / ".snap").iterdir()) == []
    assert sorted(path.name for path in vm.iterdir()) == ["ram0", "state"]
    assert (vm / "state").read_bytes() == state


@pytest.mark.parametrize("step", ["stop", "migrate", "query-migrate"])
def test_qemu_is_killed_in_the_middle(corner: Lab, warm: Path, tmp_path: Path, step: str) -> None:
    vm, parent = gone_on(corner, warm)
    (vm / "state").write_bytes(b"older")
    with Proxy(parent.socket, parent.socket.with_name("proxy"), {step: lambda _: parent.kill()}) as proxy:
        done = ramfs("snapshot", vm, "one", "--qmp", proxy.path)
    assert done.returncode == 9
    assert len(done.stderr.splitlines()) == 1
    assert_nothing_was_made(vm, b"older")


def test_qemu_refuses(corner: Lab) -> None:
    vm = corner.directory("vm")
    (vm / "state").write_bytes(b"older")
    cannot_be_saved: dict[str, Any] = {
        "args": ["-blockdev", "null-co,node-name=disk", "-device", "nvme,drive=disk,serial=1"]
    }
    parent = corner.boot(vm / "ram0", **cannot_be_saved)
    done = ramfs("snapshot", vm, "one", "--qmp", parent.socket)
    assert done.returncode == 9
    assert "non-migratable device" in done.stderr
    assert_nothing_was_made(vm, b"older")
    parent.tick_on()
    assert_no_tick_is_missing(parent)
    parent.check()


def test_the_name_is_taken_at_the_last_moment(corner: Lab, warm: Path) -> None:
    vm, parent = gone_on(corner, warm)
    (vm / "state").write_bytes(b"older" * 10_000)

    def somebody_is_quicker(_: object) -> None:
        if not (vm / ".snap" / "one").exists():
            (vm / ".snap" / "one").mkdir()

    with Proxy(parent.socket, parent.socket.with_name("proxy"), {"query-migrate": somebody_is_quicker}) as proxy:
        done = ramfs("snapshot", vm, "one", "--qmp", proxy.path)
    assert done.returncode == 1
    assert "exists" in done.stderr
    (vm / ".snap" / "one").rmdir()
    assert_nothing_was_made(vm, b"older" * 10_000)
    parent.tick_on()


def test_the_guest_goes_on_though_the_mount_hangs(corner: Lab, warm: Path) -> None:
    vm, parent = gone_on(corner, warm)
    daemon = corner.mount.pid
    hooks = {"stop": lambda _: os.kill(daemon, signal.SIGSTOP)}
    try:
        with Proxy(parent.socket, parent.socket.with_name("proxy"), hooks) as proxy:
            process = subprocess.Popen(
                [sys.executable, "-m", "ramfs", "snapshot", vm, "one", "--qmp", proxy.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            while "stop" not in proxy.passed:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.3)  # into the flush, which cannot end
            assert "cont" not in proxy.passed
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 5
            while "cont" not in proxy.passed:
                assert time.monotonic() < deadline, "the guest is not continued"
                time.sleep(0.01)
            # The temporary file can be removed only when the mount answers again.
            os.kill(daemon, signal.SIGCONT)
            _, said = process.communicate(timeout=30)
    finally:
        os.kill(daemon, signal.SIGCONT)
    assert process.returncode == 130
    assert "interrupted by SIGINT" in said
    assert sorted(path.name for path in vm.iterdir()) == ["ram0"]
    assert list((vm / ".snap").iterdir()) == []
    parent.tick_on()
    parent.check()


def test_no_qemu_behind_the_socket(corner: Lab) -> None:
    vm = corner.directory("vm")
    done = ramfs("snapshot", vm, "one", "--qmp", vm / "nowhere")
    assert done.returncode == 9
    assert len(done.stderr.splitlines()) == 1
    assert list((vm / ".snap").iterdir()) == []
