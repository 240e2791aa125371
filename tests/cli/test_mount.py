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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.conftest import Place, call, needs_root, run
from harness import Mount, children, is_mounted, readable

from ramfs import __version__
from ramfs.cli._mounts import mounted_at
from ramfs.cli.mount import PASSED
from ramfs.supervisor import process
from ramfs.supervisor.client import ask
from ramfs.supervisor.unmounting import unmount_command


def test_in_the_background_it_returns_when_usable(place: Place) -> None:
    run("mount", place.store, place.path).ok()
    (place.path / "file").write_bytes(b"x" * 5000)
    assert place.status()["mountpoint"] == str(place.path)
    place.umount()
    assert not is_mounted(place.path)
    assert list(place.path.iterdir()) == []


def test_nothing_is_held_of_the_starter(place: Place) -> None:
    """A shell that reads the command's output sees its end, though supervisor and daemon live."""
    done = call(
        "sh", "-c", 'x=$("$0" -P -m ramfs mount "$1" "$2" 2>&1); echo "[$x]"', sys.executable, place.store, place.path
    )
    assert done.ok() == "[]\n"
    supervisor = place.status()["supervisor"]["pid"]
    wait_for(lambda: len(children(supervisor)) == 2)  # one stands by
    for pid in (supervisor, *children(supervisor)):
        wait_for(lambda pid=pid: os.readlink(f"/proc/{pid}/cwd") == "/")
        assert os.getsid(pid) != os.getsid(0)
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    place.umount()


def test_commands_are_taken_as_soon_as_it_is_usable(place: Place) -> None:
    for _ in range(3):
        place.mount()
        assert ask(str(place.store), "status")["state"] == "serving"
        place.umount()
        assert not (place.store / "supervisor").exists()


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


def test_a_daemon_that_dies_alone_is_replaced(mounted_place: Place) -> None:
    place = mounted_place
    (place.path / "before").write_bytes(b"before")
    with open(place.path / "open", "w+b", buffering=0) as file:
        file.write(b"acknowledged")
        died = place.kill_daemon()
        assert (place.path / "before").read_bytes() == b"before"
        status = place.status()
        assert status["pid"] != died
        assert (status["supervisor"]["starts"], status["supervisor"]["crashes"]) == (2, 1)
        assert f"process {died}" in status["supervisor"]["why"]
        assert "signal 9" in status["supervisor"]["why"]
        assert os.pread(file.fileno(), 100, 0) == b"acknowledged"
    # Nobody else gets the store, and what looks at the mount sees nothing special.
    run("mount", place.store, make_place_beside(place)).failed(5, place.store, place.path, status["pid"])
    assert json.loads(run("status", "--json", place.path).ok())["pid"] == status["pid"]
    place.umount()
    with contextlib.closing(sqlite3.connect(f"file:{place.store}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        assert catalog.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone() == (1,)


def test_the_store_is_locked_while_no_daemon_serves(mounted_place: Place) -> None:
    place, other = mounted_place, make_place_beside(mounted_place)
    for _ in range(2):
        place.kill_daemon()
        run("mount", place.store, other).failed(5, place.store, place.path)
        assert place.status()["mountpoint"] == str(place.path)
    place.umount()


@pytest.mark.parametrize("end", ["signal", "umount"])
def test_a_supervisor_that_is_killed(shm: Path, end: str) -> None:
    """The daemon says so, goes on, and ends in order when it is told."""
    mount = Mount(shm / "store", shm / "mnt").start()
    assert mount.process is not None
    fd = os.open(mount.path / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 20)
    with mmap.mmap(fd, 1 << 20) as memory:
        memory[5000:5005] = b"dirty"
        daemon = mount.pid
        mount.process.kill()
        wait_for(lambda: "the supervisor is gone: the next time a daemon of" in mount.log)
        memory[9000:9005] = b"still"
        run("upgrade", mount.path).failed(8, mount.store, "no supervisor")
        ended = os.pidfd_open(daemon)
        if end == "signal":
            os.kill(daemon, signal.SIGTERM)
            assert readable(ended, 20)
    if end == "umount":
        os.close(fd)
        run("umount", mount.path).ok()
        assert readable(ended, 20)
    else:
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)
        assert "SIGTERM: flushing and unmounting" in mount.log
    os.close(ended)
    assert not is_mounted(mount.path)
    mount.process.wait()
    assert f"unmounted {mount.path}\n" in mount.log
    mount.expect("the supervisor is gone")
    with mount.start():
        assert (mount.path / "ram").read_bytes()[5000:9005:4000] == b"ds"


def test_a_mount_without_a_daemon_says_what_to_do(mounted_place: Place) -> None:
    """Daemons that cannot start are given up some time; the mount stays, and can be had again."""
    place = mounted_place
    (place.path / "kept").write_bytes(b"kept")
    tables = place.store / "tables"
    tables.rename(place.base / "away")
    tables.touch()  # no directory: the next daemons cannot go on
    place.kill_daemon()
    try:
        wait_for(lambda: ask(str(place.store), "status")["state"] == "halted", 60)
        assert "started no other" in (place.store / "daemon.log").read_text()
        for command in (["status"], ["mount", place.store]):
            run(*command, place.path).failed(8, "ramfs upgrade", "umount --abort", place.path)
        assert is_mounted(place.path)
        tables.unlink()
        (place.base / "away").rename(tables)
        assert str(place.path) in run("upgrade", place.path).ok()
    except BaseException:
        run("umount", "--abort", place.path)  # for nothing else would end
        raise
    assert (place.path / "kept").read_bytes() == b"kept"
    place.umount()
    place.mount()
    assert (place.path / "kept").read_bytes() == b"kept"
    place.umount()


def test_no_place_for_the_socket_of_the_supervisor(place: Place) -> None:
    """No mount fails for it, and no daemon goes unreplaced."""
    with Mount(place.store, place.path):
        pass
    (place.store / "supervisor").mkdir()
    with Mount(place.store, place.path) as mount:
        mount.expect("cannot have a socket for commands")
        wait_for(lambda: "cannot have a socket for commands (Is a directory)" in mount.log)
        run("upgrade", place.path).failed(8, place.store, "no supervisor")
        mount.kill_daemon()
        (place.path / "file").write_bytes(b"x")
    (place.store / "supervisor").rmdir()


def test_upgrade_replaces_the_daemon(mounted_place: Place) -> None:
    place = mounted_place
    with open(place.path / "open", "w+b", buffering=0) as file:
        file.write(b"acknowledged")
        before = place.status()["pid"]
        said = json.loads(run("upgrade", "--json", place.path).ok())
        assert said == {"mountpoint": str(place.path), "pid": place.status()["pid"], "version": __version__}
        assert said["pid"] != before
        text = run("upgrade", place.path).ok()
        assert text == f"{place.path} is served by ramfs {__version__} now, process {place.status()['pid']}\n"
        assert os.pread(file.fileno(), 100, 0) == b"acknowledged"
    assert place.status()["supervisor"]["crashes"] == 0
    place.umount()


def test_abort_frees_who_waits(mounted_place: Place) -> None:
    place = mounted_place
    (place.path / "kept").write_bytes(b"kept")
    command = ["sh", "-c", 'read go; exec touch "$0/new"', place.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as waiting:
        os.kill(place.status()["pid"], signal.SIGSTOP)
        assert waiting.stdin is not None
        waiting.stdin.write(b"go\n")
        waiting.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        run("umount", "--abort", place.path).ok()
        assert waiting.wait(10) != 0
    assert mounted_at(str(place.path)) is None
    place.mount()
    assert (place.path / "kept").read_bytes() == b"kept"
    place.umount()


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


#: Those that do not contradict each other, in one mount.
ASKED = (
    {"ro", "nosuid", "nodev", "noexec", "noatime", "sync", "dirsync", "allow_other"},
    {"rw", "suid", "dev", "exec", "atime", "async", "allow_root"},
)


@needs_root
@pytest.mark.parametrize("options", ASKED, ids=["restricting", "permitting"])
def test_every_option_that_is_passed_on_is_known_there(place: Place, options: set[str]) -> None:
    assert set().union(*ASKED, {"default_permissions"}) == PASSED
    place.mount("-o", ",".join(sorted(options)))
    flags = set(call("findmnt", "--noheadings", "--output", "OPTIONS", place.path).ok().strip().split(","))
    told = {"ro", "rw", "nosuid", "nodev", "noexec", "noatime", "sync", "dirsync", "allow_other"}
    assert options & told <= flags
    assert not {f"no{option}" for option in options} & flags
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
    assert "told to stop: flushing and unmounting" in mount.log
    with mount.start():
        assert (mount.path / "ram").read_bytes()[5000:5005] == b"dirty"


def test_sighup_is_no_end(shm: Path) -> None:
    with Mount(shm / "store", shm / "mnt") as mount:
        assert mount.process is not None
        daemon = mount.pid
        os.kill(daemon, signal.SIGHUP)
        mount.process.send_signal(signal.SIGHUP)
        (mount.path / "x").touch()
        time.sleep(0.1)
        assert mount.running
        assert mount.pid == daemon


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(place: Place, abstract: bool) -> None:
    """First it gets what must outlive the supervisor, then it hears that the mount is ready."""
    address = f"@ramfs-test-{os.getpid()}" if abstract else str(place.base / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.settimeout(20)
        service.bind("\0" + address[1:] if abstract else address)
        mount = Mount(place.store, place.path, env={"NOTIFY_SOCKET": address}).start()
        for name in ("lock", "ledger", "fuse"):
            data, fds, _, _ = socket.recv_fds(service, 4096, 8)
            (fd,) = fds
            os.close(fd)
            assert data.decode().splitlines() == ["FDSTORE=1", f"FDNAME={name}", "FDPOLL=0"]
        told, fds, _, _ = socket.recv_fds(service, 4096, 8)
        assert (told.decode().splitlines(), fds) == (["READY=1", f"STATUS=Serving {place.path}"], [])
        assert os.stat(place.path).st_ino == 1
        mount.terminate()
        assert service.recv(4096) == b"STOPPING=1"
        removed = [service.recv(4096).decode().splitlines() for _ in range(3)]
        assert sorted(removed) == [["FDSTOREREMOVE=1", f"FDNAME={name}"] for name in ("fuse", "ledger", "lock")]


def test_a_notify_socket_that_is_gone_is_no_harm(place: Place) -> None:
    with Mount(place.store, place.path, env={"NOTIFY_SOCKET": str(place.base / "gone")}) as mount:
        (mount.path / "x").touch()


def test_in_the_foreground_it_logs_to_standard_error(place: Place) -> None:
    with Mount(place.store, place.path) as mount:
        wait_for(lambda: "mounted" in mount.log)
    assert f"ramfs: INFO: mounted {place.store} at {place.path}\n" in mount.log
    assert f"ramfs: INFO: unmounted {place.path}\n" in mount.log
    assert not (place.store / "daemon.log").exists()


def wait_for(ready: Callable[[], object], patience: float = 10) -> None:
    deadline = time.monotonic() + patience
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("true", [True, False])
def test_the_journal_gets_priorities(place: Place, true: bool) -> None:
    """JOURNAL_STREAM is inherited by everything in a service; it counts where standard error is that stream."""
    (place.store / "supervisor").mkdir(parents=True)  # so that the supervisor has something to say too
    with open(place.base / "stream", "w+b") as stream:
        stat = os.fstat(stream.fileno())
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "ramfs", "mount", "-f", place.store, place.path],
            stdin=subprocess.DEVNULL,
            stderr=stream,
            env={**os.environ, "JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino if true else 1}"},
        )
        wait_for(lambda: "cannot have a socket" in (place.base / "stream").read_text())
        place.umount()
        assert daemon.wait(10) == 0
    mounted, warning, *_ = (place.base / "stream").read_text().splitlines()
    assert mounted.startswith("<6>mounted " if true else "ramfs: INFO: mounted ")
    assert warning.startswith(f"<4>{place.store} cannot" if true else f"ramfs: WARNING: {place.store} cannot")
    (place.store / "supervisor").rmdir()


# A daemon that looks for syslog elsewhere.
_DAEMON = """
import sys
import ramfs.cli, ramfs.cli.mount as mount
mount.SYSLOG = sys.argv[1]
sys.exit(ramfs.cli.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def _in_the_background(place: Place, syslog: Path) -> Iterator[None]:
    """Like a mount in the background, but for the place of syslog. The supervisor has something to say too."""
    (place.store / "supervisor").mkdir(parents=True)
    daemon = [sys.executable, "-P", "-c", _DAEMON, syslog, "mount", "--link", process.LINK, "--quiet", "--"]
    settings = process.Settings(
        command=[*map(str, daemon), str(place.store), str(place.path)],
        store=str(place.store),
        mountpoint=str(place.path),
        unmount=unmount_command(str(place.path), lazy=True),
        ready=-1,
        log=str(place.store / "daemon.log"),
        syslog=str(syslog),
    )
    supervisor = subprocess.Popen([sys.executable, "-I", "-S", process.SCRIPT, json.dumps(settings._asdict())])
    yield
    place.umount()
    assert supervisor.wait(10) == 0
    (place.store / "supervisor").rmdir()


def test_in_the_background_it_logs_to_syslog(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(place.base / "log"))
        syslog.settimeout(10)
        with _in_the_background(place, place.base / "log"):
            daemon, supervisor = (syslog.recv(4096).decode() for _ in range(2))
    assert re.match(rf"<30>ramfs\[\d+\]: mounted {place.store} at ", daemon)
    assert re.match(rf"<28>ramfs\[\d+\]: {place.store} cannot have a socket ", supervisor)
    assert not (place.store / "daemon.log").exists()


@pytest.mark.parametrize("left_over", [False, True])
def test_without_syslog_it_logs_into_the_store(place: Place, left_over: bool) -> None:
    if left_over:  # a socket that nobody listens at
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
            syslog.bind(str(place.base / "log"))
    file = place.store / "daemon.log"
    with _in_the_background(place, place.base / "log"):
        wait_for(lambda: file.exists() and "cannot have a socket" in file.read_text())
    log = file.read_text()
    assert f"INFO: mounted {place.store} at {place.path}\n" in log
    assert f"INFO: unmounted {place.path}\n" in log
    assert f" WARNING: {place.store} cannot have a socket " in log
    place.mount()  # the log does not make the store a stranger
    place.umount()


def test_debug_logs_more(place: Place) -> None:
    with Mount(place.store, place.path, ["debug"]) as mount:
        wait_for(lambda: "mounted" in mount.log)
    assert "DEBUG" in mount.log
