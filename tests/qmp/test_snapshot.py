"""`ramfs snapshot`: what it does to the guest and leaves in the directory, whatever goes wrong, and when."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from qmp.conftest import Directory, finish
from qmp.proxy import Proxy
from vm.guest import Guest

Machine = Callable[..., Guest]

#: The commands at which something can happen before the snapshot is made, in their order.
STEPS = [
    "query-status",
    "query-migrate-parameters",
    "migrate-set-capabilities",
    "stop",
    "getfd",
    "migrate",
    "query-migrate",
]


def test_saves_the_state_freezes_and_goes_on(directory: Directory, machine: Machine) -> None:
    guest = machine()
    done = directory.snapshot("one", "--qmp", str(guest.socket), "--json")
    assert (done.code, done.err) == (0, "")
    assert directory.snapshots() == ["one"]
    assert directory.names() == [".snap", "ram0", "state"]
    state = (directory.path / "state").stat()
    assert stat.S_IMODE(state.st_mode) == 0o600
    assert 10_000 < state.st_size < 4 << 20, "the RAM is in the state"
    report = done.report
    assert report["snapshot"] == str(directory.path / ".snap" / "one")
    assert report["state_bytes"] == state.st_size
    assert 0 < report["save"] + report["freeze"] < report["pause"] < 10
    assert [each["running"] for each in report["rounds"]][-1] is False
    assert report["notes"] == []
    assert guest.status() == "running"


def test_the_guest_stays_stopped_for_another_to_go_on(directory: Directory, machine: Machine) -> None:
    guest = machine()
    begun = time.time()
    done = directory.snapshot("one", "--qmp", str(guest.socket), "--stop", "--json")
    assert (done.code, done.err) == (0, "")
    assert begun < done.report["stopped_at"] < time.time()
    assert done.report["pause"] is None
    assert directory.snapshots() == ["one"]
    assert not guest.qmp("query-status")["running"]
    guest.qmp("cont")
    done = directory.snapshot("two", "--qmp", str(guest.socket), "--stop")
    assert re.fullmatch(r"the guest was stopped [\d.]+ m?s ago and stays so", done.out.splitlines()[-1])
    guest.qmp("cont")
    done = directory.snapshot("two", "--qmp", str(guest.socket), "--stop")
    assert done.code != 0
    assert guest.status() == "running", "it failed"
    done = directory.snapshot("three", "--stop")
    assert (done.code, directory.snapshots()) == (2, ["one", "two"])
    assert "give its socket" in done.err


def test_leaves_qemu_as_it_was(directory: Directory, machine: Machine) -> None:
    guest = machine()
    before = [guest.qmp("query-migrate-capabilities"), guest.qmp("query-migrate-parameters")]
    assert directory.snapshot("one", "--qmp", str(guest.socket)).code == 0
    assert [guest.qmp("query-migrate-capabilities"), guest.qmp("query-migrate-parameters")] == before


def test_tells_people_rounds_and_pause(directory: Directory, machine: Machine) -> None:
    guest = machine()
    done = directory.snapshot("one", "--qmp", str(guest.socket))
    lines = done.out.splitlines()
    assert lines[0].startswith("round 1: ")
    assert lines[-4].endswith("guest stopped")
    assert [line.split()[0] for line in lines[-3:]] == ["state:", "frozen", "the"]
    assert lines[-1].startswith("the guest paused for ")


def test_nobody_reads_what_it_says(directory: Directory, machine: Machine) -> None:
    guest = machine()
    process = directory.start("one", "--qmp", str(guest.socket))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert finish(process).code == 0
    assert directory.snapshots() == ["one"]
    assert guest.status() == "running"


def test_without_a_guest_only_freezes(directory: Directory) -> None:
    (directory.path / "ram0").write_bytes(b"x" * 10_000)
    done = directory.snapshot("one", "--json")
    assert done.code == 0
    assert directory.snapshots() == ["one"]
    assert (directory.path / "state").read_text() == "older"
    assert done.report["pause"] is None
    assert done.report["state_bytes"] is None


@pytest.mark.parametrize("step", STEPS)
def test_qemu_dies(directory: Directory, machine: Machine, tmp_path_short: Path, step: str) -> None:
    guest = machine()
    with Proxy(guest.socket, tmp_path_short / "qmp", {step: lambda _: guest.kill()}) as proxy:
        done = directory.snapshot("one", "--qmp", str(proxy.path))
    assert proxy.passed[-1] == step
    assert done.code == 9
    assert len(done.err.splitlines()) == 1
    assert "ended or closed its QMP socket" in done.err
    directory.assert_untouched()


def test_qemu_dies_after_the_snapshot_is_made(directory: Directory, machine: Machine, tmp_path_short: Path) -> None:
    guest = machine()
    with Proxy(guest.socket, tmp_path_short / "qmp", {"cont": lambda _: guest.kill()}) as proxy:
        done = directory.snapshot("one", "--qmp", str(proxy.path))
    assert done.code == 9
    assert "is complete, but the guest does not go on" in done.err
    assert directory.snapshots() == ["one"]
    assert directory.names() == [".snap", "ram0", "state"]
    assert (directory.path / "state").stat().st_size > 10_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
@pytest.mark.parametrize("step", STEPS)
def test_interrupted(
    directory: Directory, machine: Machine, tmp_path_short: Path, step: str, number: signal.Signals
) -> None:
    guest = machine()
    process: subprocess.Popen[str]

    def interrupt(_: object) -> None:
        os.kill(process.pid, number)

    with Proxy(guest.socket, tmp_path_short / "qmp", {step: interrupt}) as proxy:
        process = directory.start("one", "--qmp", str(proxy.path))
        done = finish(process)
    assert done.code == 128 + number
    assert len(done.err.splitlines()) == 1
    assert f"interrupted by {number.name}" in done.err
    directory.assert_untouched()
    assert guest.status() == "running"


def test_interrupted_when_the_snapshot_is_made_already(
    directory: Directory, machine: Machine, tmp_path_short: Path
) -> None:
    guest = machine()
    process: subprocess.Popen[str]
    with Proxy(guest.socket, tmp_path_short / "qmp", {"cont": lambda _: os.kill(process.pid, signal.SIGINT)}) as proxy:
        process = directory.start("one", "--qmp", str(proxy.path))
        done = finish(process)
    assert (done.code, done.err) == (0, "")
    assert directory.snapshots() == ["one"]
    assert guest.status() == "running"


def test_a_device_that_cannot_be_saved(directory: Directory, machine: Machine) -> None:
    guest = machine("-blockdev", "null-co,node-name=disk", "-device", "nvme,drive=disk,serial=1")
    done = directory.snapshot("one", "--qmp", str(guest.socket))
    assert done.code == 9
    assert "QEMU refuses to save the guest: State blocked by non-migratable device" in done.err
    assert len(done.err.splitlines()) == 1
    directory.assert_untouched()
    assert guest.status() == "running"


def test_the_state_cannot_be_written(directory: Directory, machine: Machine, tmp_path_short: Path) -> None:
    guest = machine()
    with Proxy(guest.socket, tmp_path_short / "qmp", {}, substitute="/dev/full") as proxy:
        done = directory.snapshot("one", "--qmp", str(proxy.path))
    assert done.code == 9
    assert "No space left on device" in done.err
    directory.assert_untouched()
    assert guest.status() == "running"
    assert directory.snapshot("one", "--qmp", str(guest.socket)).code == 0, "a second try is spoilt"


def test_the_freeze_fails(directory: Directory, machine: Machine, tmp_path_short: Path) -> None:
    guest = machine()
    os.chmod(directory.path / "state", 0o640)
    os.utime(directory.path / "state", ns=(1, 2))

    def somebody_is_quicker(_: object) -> None:
        (directory.path / ".snap" / "one").mkdir(exist_ok=True)

    with Proxy(guest.socket, tmp_path_short / "qmp", {"query-migrate": somebody_is_quicker}) as proxy:
        done = directory.snapshot("one", "--qmp", str(proxy.path))
    assert done.code == 1
    assert "exists" in done.err
    (directory.path / ".snap" / "one").rmdir()
    directory.assert_untouched()
    state = (directory.path / "state").stat()
    assert (stat.S_IMODE(state.st_mode), state.st_mtime_ns) == (0o640, 2)
    assert guest.status() == "running"


def test_the_freeze_fails_where_no_state_was(directory: Directory, machine: Machine, tmp_path_short: Path) -> None:
    guest = machine()
    (directory.path / "state").unlink()

    def somebody_is_quicker(_: object) -> None:
        (directory.path / ".snap" / "one").mkdir(exist_ok=True)

    with Proxy(guest.socket, tmp_path_short / "qmp", {"query-migrate": somebody_is_quicker}) as proxy:
        assert directory.snapshot("one", "--qmp", str(proxy.path)).code == 1
    assert directory.names() == [".snap", "ram0"]


def test_the_guest_cannot_be_continued(directory: Directory, machine: Machine, tmp_path_short: Path) -> None:
    guest = machine()
    no = {"error": {"class": "GenericError", "desc": "not today"}}
    hooks = {"migrate": lambda _: no, "cont": lambda _: no}
    with Proxy(guest.socket, tmp_path_short / "qmp", hooks) as proxy:
        done = directory.snapshot("one", "--qmp", str(proxy.path))
    assert done.code == 9
    assert "refuses to save the guest: not today; the guest stays stopped" in done.err
    directory.assert_untouched()


def test_a_stopped_guest_stays_stopped(directory: Directory, machine: Machine) -> None:
    guest = machine()
    guest.qmp("stop")
    done = directory.snapshot("one", "--qmp", str(guest.socket))
    assert done.code == 0
    assert "was stopped before and stays so" in done.out
    assert not guest.qmp("query-status")["running"]
    again = directory.snapshot("two", "--qmp", str(guest.socket))
    assert again.code == 9
    assert "has not run since" in again.err
    assert directory.snapshots() == ["one"]
    guest.qmp("cont")
    assert directory.snapshot("two", "--qmp", str(guest.socket)).code == 0
    assert guest.status() == "running"


def test_another_guest(directory: Directory, machine: Machine, shm: Path) -> None:
    with Guest(shm / "elsewhere", mib=16, kernel=False) as guest:
        assert guest.status() == "running"  # QEMU has made its memory
        (shm / "elsewhere").unlink()
        done = directory.snapshot("one", "--qmp", str(guest.socket), "--json")
    assert done.code == 0
    assert "maps no file of" in done.report["notes"][0]


def test_a_private_mapping(directory: Directory) -> None:
    with Guest(directory.path / "ram0", mib=16, kernel=False, share=False) as guest:
        done = directory.snapshot("one", "--qmp", str(guest.socket))
    assert done.code == 0
    assert "maps ram0 privately" in done.err


def test_a_killed_command_leaves_nothing_for_the_next(directory: Directory, machine: Machine) -> None:
    guest = machine()
    (directory.path / ".state.abcdefgh").write_text("left")
    assert directory.snapshot("one", "--qmp", str(guest.socket)).code == 0
    assert directory.names() == [".snap", "ram0", "state"]


def test_two_at_once(directory: Directory) -> None:
    fd = os.open(directory.path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        done = directory.snapshot("one")
    finally:
        os.close(fd)
    assert done.code == 1
    assert "another ramfs snapshot" in done.err


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "x" * 256])
def test_bad_names(directory: Directory, name: str) -> None:
    done = directory.snapshot(name)
    assert done.code == 3
    assert len(done.err.splitlines()) == 1
    assert directory.snapshots() == []


def test_a_name_that_is_taken(directory: Directory, machine: Machine) -> None:
    guest = machine()
    (directory.path / ".snap" / "one").mkdir()
    done = directory.snapshot("one", "--qmp", str(guest.socket))
    assert done.code == 1
    assert "exists" in done.err
    assert (directory.path / "state").read_text() == "older"


def test_not_a_mount(tmp_path: Path) -> None:
    for path, code, what in [
        (tmp_path, 8, "is not on a ramfs mount"),
        (tmp_path / "missing", 1, "No such file"),
        (Path(__file__), 1, "not a directory"),
    ]:
        done = Directory(path).snapshot("one")
        assert (done.code, len(done.err.splitlines())) == (code, 1)
        assert what in done.err


@pytest.mark.parametrize(("socket", "what"), [("missing", "No such file"), ("ram", "is not a socket")])
def test_bad_sockets(directory: Directory, socket: str, what: str) -> None:
    (directory.path / "ram").write_text("")
    done = directory.snapshot("one", "--qmp", str(directory.path / socket))
    assert done.code == 9
    assert len(done.err.splitlines()) == 1
    assert what in done.err
    assert directory.snapshots() == []


def test_a_socket_whose_qemu_is_gone(directory: Directory, machine: Machine) -> None:
    guest = machine()
    guest.kill()
    done = directory.snapshot("one", "--qmp", str(guest.socket))
    assert done.code == 9
    assert "Connection refused" in done.err
