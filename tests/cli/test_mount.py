"""Mounting and unmounting: from the command line, whatever is in the way."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import Place, call, needs_root, run
from harness import Mount, is_mounted

from ramfs.cli._mounts import mounted_at
from ramfs.cli.mount import PASSED


def test_in_the_background_it_returns_when_usable(place: Place) -> None:
    run("mount", place.store, place.path).ok()
    (place.path / "file").write_bytes(b"x" * 5000)
    assert place.status()["mountpoint"] == str(place.path)
    place.umount()
    assert not is_mounted(place.path)
    assert list(place.path.iterdir()) == []


def test_the_daemon_holds_nothing_of_its_starter(place: Place) -> None:
    """A shell that reads the command's output sees its end, though the daemon lives."""
    done = call(
        "sh", "-c", 'x=$("$0" -P -m ramfs mount "$1" "$2" 2>&1); echo "[$x]"', sys.executable, place.store, place.path
    )
    assert done.ok() == "[]\n"
    pid = place.status()["pid"]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    place.umount()


def test_umount_waits_until_the_store_is_closed(place: Place) -> None:
    for turn in range(3):
        place.mount()
        (place.path / f"file{turn}").write_bytes(os.urandom(1 << 20))
        place.umount()
        with contextlib.closing(sqlite3.connect(f"file:{place.store}/catalog.sqlite?mode=ro", uri=True)) as catalog:
            assert catalog.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone() == (1,)


def test_umount_8_and_a_mount_soon_after(place: Place) -> None:
    place.mount()
    program = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    call(*program, place.path).ok()
    deadline = time.monotonic() + 10
    while run("mount", place.store, place.path).code == 5:  # it ends on its own time
        assert time.monotonic() < deadline
    place.umount()


def test_fusermount3_unmounts(mounted_place: Place) -> None:
    call("fusermount3", "-u", mounted_place.path).ok()
    assert not is_mounted(mounted_place.path)


def test_a_busy_mount_is_told_with_its_users(mounted_place: Place) -> None:
    with open(mounted_place.path / "held", "wb"):
        run("umount", mounted_place.path).failed(8, mounted_place.path, "busy", f"({os.getpid()})", "--lazy")
        assert is_mounted(mounted_place.path)
    mounted_place.umount()


def test_a_mount_below_makes_it_busy(mounted_place: Place) -> None:
    below = mounted_place.path / "below"
    below.mkdir()
    run("mount", mounted_place.base / "other", below).ok()
    run("umount", mounted_place.path).failed(8, below)
    run("umount", below).ok()
    mounted_place.umount()


def test_lazy_umount_ends_with_the_last_user(mounted_place: Place) -> None:
    with open(mounted_place.path / "held", "wb", buffering=0) as held:
        run("umount", "--lazy", mounted_place.path).ok()
        assert not is_mounted(mounted_place.path)
        held.write(b"still here")
    deadline = time.monotonic() + 10
    while run("mount", mounted_place.store, mounted_place.path).code == 5:
        assert time.monotonic() < deadline
    assert (mounted_place.path / "held").read_bytes() == b"still here"
    mounted_place.umount()


@pytest.mark.parametrize("form", ["relative", "slash", "symlink", "dot"])
def test_a_mountpoint_can_be_written_in_many_ways(place: Place, form: str) -> None:
    (place.base / "link").symlink_to("mnt")
    written = {"relative": "mnt", "slash": f"{place.path}//", "symlink": "link", "dot": "./mnt/."}[form]
    run("mount", "store", written, cwd=place.base).ok()
    assert is_mounted(place.path)
    run("umount", written, cwd=place.base).ok()
    assert not is_mounted(place.path)


ODD = ["with space", "com,ma", "grün", "back\\slash", "quote'\"$(x)", "tab\tnewline\n", "hash#", "-dash", b"\xff\xfe"]


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_odd_names(shm: Path, name: str | bytes) -> None:
    text = os.fsdecode(name)
    place = Place(shm, shm / f"s{text}", shm / f"{text}m")
    place.path.mkdir()
    run("mount", "--", place.store.name, place.path.name, cwd=shm).ok()
    entry = mounted_at(str(place.path))
    assert entry is not None
    assert (entry.mountpoint, entry.source) == (str(place.path), str(place.store))
    run("umount", "--", place.path.name, cwd=shm).ok()


# --- refused ---


def test_a_mountpoint_that_is_none(place: Place) -> None:
    (place.base / "file").touch()
    run("mount", place.store, place.base / "missing").failed(8, place.base / "missing", "does not exist")
    run("mount", place.store, place.base / "file").failed(8, place.base / "file", "not a directory")
    assert not place.store.exists()


def test_store_and_mountpoint_within_each_other(place: Place) -> None:
    place.mount()
    place.umount()
    (place.store / "inside").mkdir()
    run("mount", place.store, place.store / "inside").failed(8, place.store, "inside")
    run("mount", place.path / "inside", place.path).failed(8, place.path, "hide")
    run("mount", place.path, place.path).failed(8, place.path)
    (place.base / "link").symlink_to("store/inside")
    run("mount", place.store, place.base / "link").failed(8, place.store)


@pytest.mark.parametrize("how", ["-f", None])
def test_a_store_that_is_none(place: Place, how: str | None) -> None:
    args = [] if how is None else [how]
    (place.base / "file").touch()
    foreign = place.base / "foreign"
    foreign.mkdir()
    (foreign / "letter").touch()
    run("mount", *args, place.base / "file", place.path).failed(4, place.base / "file", "not a directory")
    run("mount", *args, foreign, place.path).failed(4, foreign, "not a ramfs store")
    assert os.listdir(foreign) == ["letter"]


@pytest.mark.parametrize("how", ["-f", None])
def test_a_store_in_use_names_the_first(place: Place, how: str | None) -> None:
    place.mount()
    other = make_place_beside(place)
    args = [] if how is None else [how]
    run("mount", *args, place.store, other).failed(5, place.store, place.path, place.status()["pid"])
    place.umount()


def make_place_beside(place: Place) -> Path:
    other = place.base / "other"
    other.mkdir()
    return other


def test_the_code_of_a_daemon_that_fails_in_the_background(place: Place) -> None:
    place.mount()
    place.umount()
    with contextlib.closing(sqlite3.connect(place.store / "catalog.sqlite")) as catalog:
        catalog.execute("UPDATE meta SET value = 999 WHERE key = 'version'")
        catalog.commit()
    run("mount", place.store, place.path).failed(6, place.store, "999")
    (place.store / "catalog.sqlite").write_bytes(b"no database at all" * 1000)
    for side in place.store.glob("catalog.sqlite-*"):
        side.unlink()
    run("mount", place.store, place.path).failed(7, place.store, "fsck")
    assert not is_mounted(place.path)


def test_over_a_mount_of_ours(mounted_place: Place) -> None:
    run("mount", mounted_place.base / "second", mounted_place.path).failed(
        8, mounted_place.path, "mounted already", mounted_place.store
    )
    mounted_place.umount()


def test_over_a_daemon_that_hangs(mounted_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramfs.cli import _mounts, mount, status
    from ramfs.errors import MountError

    monkeypatch.setattr(_mounts, "PATIENCE", 0.2)
    entry = mounted_at(str(mounted_place.path))
    assert entry is not None
    pid = mounted_place.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(MountError, match="does not answer"):
            mount.check_places(str(mounted_place.store), str(mounted_place.path))
        with pytest.raises(MountError, match="does not answer"):
            status.read_status(entry)
        assert mounted_at(str(mounted_place.path)) == entry
    finally:
        os.kill(pid, signal.SIGCONT)
    mounted_place.umount()


@pytest.mark.parametrize("again", [1, 2])
def test_a_mount_whose_daemon_died(mounted_place: Place, again: int) -> None:
    place = mounted_place
    (place.path / "kept").write_bytes(b"kept")
    for _ in range(again):
        place.kill()
        for name in ("status", "du"):
            run(name, place.path).failed(8, place.path, "daemon")
        everything = run("status")
        assert everything.code == 0
        assert any(str(place.path) in line for line in everything.err.splitlines())
        done = run("mount", place.store, place.path)
        assert (done.code, done.out) == (0, "")
        assert done.err == f"ramfs: {place.path} was left behind by a daemon that died: unmounting it\n"
        assert (place.path / "kept").read_bytes() == b"kept"
    place.kill()
    run("umount", place.path).ok()
    assert mounted_at(str(place.path)) is None


def test_umount_of_what_is_not_mounted(place: Place) -> None:
    run("umount", place.path).failed(8, place.path, "not mounted")
    run("umount", place.base / "missing").failed(8, "missing", "not mounted")
    run("umount", "/proc").failed(8, "/proc", "umount(8)")


@needs_root
def test_umount_of_a_bound_place_leaves_the_other(mounted_place: Place) -> None:
    bound = make_place_beside(mounted_place)
    (mounted_place.path / "d").mkdir()
    call("mount", "--bind", mounted_place.path / "d", bound).ok()
    assert json.loads(run("status", "--json", bound).ok())["mountpoint"] == str(mounted_place.path)
    run("umount", bound).ok()
    assert mounted_place.status()["mountpoint"] == str(mounted_place.path)
    mounted_place.umount()


# --- options ---


@needs_root
@pytest.mark.parametrize("option", sorted(PASSED - {"default_permissions"}))
def test_every_option_that_is_passed_on_is_known_there(place: Place, option: str) -> None:
    place.mount("-o", option)
    flags = call("findmnt", "--noheadings", "--output", "OPTIONS", place.path).ok().strip().split(",")
    told = {"ro", "rw", "nosuid", "nodev", "noexec", "noatime", "sync", "dirsync", "allow_other"}
    if option in told:
        assert option in flags
    if option in {"suid", "dev", "exec", "async"}:
        assert f"no{option}" not in flags
    place.umount()


def test_options_in_pieces_and_those_of_fstab(place: Place) -> None:
    place.mount("-o", "noexec,,nofail", "-o", "x-systemd.automount,_netdev,defaults,relatime")
    flags = call("findmnt", "--noheadings", "--output", "OPTIONS", place.path).ok()
    assert "noexec" in flags
    place.umount()


def test_template_rdwr(place: Place) -> None:
    def open_frozen() -> None:
        fd = os.open(place.path / "vm/.snap/s/ram", os.O_RDWR)
        try:
            with pytest.raises(OSError, match="Read-only"):
                os.pwrite(fd, b"x", 0)
        finally:
            os.close(fd)

    place.mount()
    (place.path / "vm").mkdir()
    (place.path / "vm/ram").write_bytes(b"r" * 4096)
    (place.path / "vm/.snap/s").mkdir()
    with pytest.raises(OSError, match="Read-only") as caught:
        open_frozen()
    assert caught.value.errno == errno.EROFS
    place.umount()
    place.mount("-o", "template_rdwr")
    open_frozen()
    place.umount()


@needs_root
def test_the_kernel_is_tuned_when_the_mount_is_ready(mounted_place: Place) -> None:
    device = os.stat(mounted_place.path).st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    assert {name: (bdi / name).read_text().strip() for name in ("read_ahead_kb", "strict_limit", "max_ratio")} == {
        "read_ahead_kb": "512",
        "strict_limit": "0",
        "max_ratio": "100",
    }
    mounted_place.umount()


# --- signals, readiness, logs ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_keep_what_is_in_mapped_pages(shm: Path, number: signal.Signals) -> None:
    mount = Mount(shm / "store", shm / "mnt").start()
    fd = os.open(mount.path / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 20)
    with mmap.mmap(fd, 1 << 20) as memory:
        memory[5000:5005] = b"dirty"
        mount.terminate(number)
    with pytest.raises(OSError, match="not connected"):
        os.close(fd)
    assert re.search(rf"{number.name}: flushing and unmounting", mount.log)
    with mount.start():
        assert (mount.path / "ram").read_bytes()[5000:5005] == b"dirty"


def test_sighup_is_no_end(shm: Path) -> None:
    with Mount(shm / "store", shm / "mnt") as mount:
        os.kill(mount.pid, signal.SIGHUP)
        (mount.path / "x").touch()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(place: Place, abstract: bool) -> None:
    address = f"@ramfs-test-{os.getpid()}" if abstract else str(place.base / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.settimeout(20)
        service.bind("\0" + address[1:] if abstract else address)
        mount = Mount(place.store, place.path, env={"NOTIFY_SOCKET": address}).start()
        told = service.recv(4096).decode().splitlines()
        assert told == ["READY=1", f"STATUS=Serving {place.path}"]
        assert os.stat(place.path).st_ino == 1
        mount.terminate()
        assert service.recv(4096) == b"STOPPING=1"


def test_a_notify_socket_that_is_gone_is_no_harm(place: Place) -> None:
    with Mount(place.store, place.path, env={"NOTIFY_SOCKET": str(place.base / "gone")}) as mount:
        (mount.path / "x").touch()


def test_in_the_foreground_it_logs_to_standard_error(place: Place) -> None:
    with Mount(place.store, place.path) as mount:
        wait_for(lambda: "mounted" in mount.log)
    assert f"ramfs: INFO: mounted {place.store} at {place.path}\n" in mount.log
    assert f"ramfs: INFO: unmounted {place.path}\n" in mount.log
    assert not (place.store / "daemon.log").exists()


def wait_for(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("true", [True, False])
def test_the_journal_gets_priorities(place: Place, true: bool) -> None:
    """JOURNAL_STREAM is inherited by everything in a service; it counts where standard error is that stream."""
    with open(place.base / "stream", "w+b") as stream:
        stat = os.fstat(stream.fileno())
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "ramfs", "mount", "-f", place.store, place.path],
            stdin=subprocess.DEVNULL,
            stderr=stream,
            env={**os.environ, "JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino if true else 1}"},
        )
        wait_for(lambda: is_mounted(place.path))
        wait_for(lambda: stat_size(stream.fileno()))
        place.umount()
        assert daemon.wait(10) == 0
    text = (place.base / "stream").read_text()
    assert text.startswith("<6>mounted " if true else "ramfs: INFO: mounted ")


def stat_size(fd: int) -> int:
    return os.fstat(fd).st_size


# A daemon in the background, but for the background: its log goes where such a daemon's goes.
_BACKGROUND = """
import os, sys
import ramfs.cli, ramfs.cli.mount as mount
mount.SYSLOG = sys.argv[1]
reader, writer = os.pipe()
sys.exit(ramfs.cli.main(["mount", "-f", "--ready-fd", str(writer), *sys.argv[2:]]))
"""


def _serve_until_unmounted(place: Place, syslog: Path) -> None:
    daemon = subprocess.Popen([sys.executable, "-P", "-c", _BACKGROUND, syslog, place.store, place.path])
    wait_for(lambda: is_mounted(place.path))
    place.umount()
    assert daemon.wait(10) == 0


def test_in_the_background_it_logs_to_syslog(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(place.base / "log"))
        syslog.settimeout(10)
        _serve_until_unmounted(place, place.base / "log")
        line = syslog.recv(4096).decode()
    assert re.match(rf"<30>ramfs\[\d+\]: mounted {place.store} at ", line)
    assert not (place.store / "daemon.log").exists()


@pytest.mark.parametrize("left_over", [False, True])
def test_without_syslog_it_logs_into_the_store(place: Place, left_over: bool) -> None:
    if left_over:  # a socket that nobody listens at
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
            syslog.bind(str(place.base / "log"))
    _serve_until_unmounted(place, place.base / "log")
    log = (place.store / "daemon.log").read_text()
    assert f"INFO: mounted {place.store} at {place.path}\n" in log
    assert f"INFO: unmounted {place.path}\n" in log
    place.mount()  # the log does not make the store a stranger
    place.umount()


def test_debug_logs_more(place: Place) -> None:
    with Mount(place.store, place.path, ["debug"]) as mount:
        wait_for(lambda: "mounted" in mount.log)
    assert "DEBUG" in mount.log
