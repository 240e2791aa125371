"""Sources that are lost: touches wait, nothing is given up, nothing is fetched twice, and nobody else is held up."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arrival.conftest import MB, control, nbdkit, pull, pulls, steer, wait_until_here
from arrival.test_like import Server
from arrival.test_verified import Touch, seal
from harness import RAMFS, Mount
from mount.posix import PAGE, eventually, opened, pattern, read, status
from nbd.servers import make_authority, make_certificate

RAM = "pc.ram@0x0"
MIB = 8
LOST = "lost the connection|cannot be reached|trying again"


@pytest.fixture
def served(tmp_path: Path) -> Path:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / RAM).write_bytes(pattern(MIB * MB))
    seal(directory)
    return directory


def uncached(path: Path) -> bytes:
    """The bytes of a file, by requests to the daemon."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return read(path)


def test_a_crowd_that_waits_holds_up_nobody_else(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """Neither other files of the mount, nor another pull."""
    mounted.expect(LOST)
    other = mounted.path / "other"
    other.write_bytes(pattern(4 * MB, 3))
    os.sync()
    with nbdkit(tmp_path / "2", "file", f"dir={served}") as second:
        with nbdkit(tmp_path / "1", "file", f"dir={served}") as first:
            pull(mounted, first, "lost", like=False, paused=True)
            pull(mounted, second, "kept", like=False, paused=True)
        crowd = [Touch(mounted.path / "lost" / RAM, page) for page in range(0, 2000, 10)]
        eventually(lambda: pulls(mounted)[0]["state"] == "waiting", "the state is told")
        began = time.monotonic()
        assert uncached(other) == pattern(4 * MB, 3)
        with opened(other) as fd:
            os.pwrite(fd, b"written", 5)
            os.fsync(fd)
        assert Touch(mounted.path / "kept" / RAM, 700).end(5) == pattern(MIB * MB)[700 * PAGE : 701 * PAGE]
        steer(mounted, "kept", paused=False)
        eventually(lambda: len(pulls(mounted)) == 1, "the other pull ends")
        assert time.monotonic() - began < 10
        assert all(touch.waits for touch in crowd)
        steer(mounted, "lost", uri=second, paused=False)
        for touch, page in zip(crowd, range(0, 2000, 10), strict=True):
            assert touch.end(10) == pattern(MIB * MB)[page * PAGE : (page + 1) * PAGE]
        wait_until_here(mounted)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Mount]:
    """A mount as before Linux 6.9, with no judgement of what it said."""
    mount = Mount(tmp_path / "store", tmp_path / "mnt", env={"RAMFS_NO_RESEND": "1"}).start()
    try:
        mount.wait_until_supervised()
        yield mount
    finally:
        mount.abandon()


def test_before_linux_6_9_what_waits_beyond_what_is_kept_is_lost_with_the_daemon(
    old: Mount, served: Path, tmp_path: Path
) -> None:
    """256 requests are kept for the next daemon, and how many were not is told."""
    mount = old
    with nbdkit(tmp_path / "1", "file", f"dir={served}") as uri:
        pull(mount, uri, like=False, paused=True)

    def crowd(first: int, count: int) -> dict[int, Touch]:
        return {page: Touch(mount.path / "vm" / RAM, page) for page in range(first, first + 3 * count, 3)}

    def unkept() -> int:
        return int(status(mount.path)["connection"]["unkept"])

    touches = crowd(1, 200)
    eventually(lambda: pulls(mount)[0]["state"] == "waiting", "the state is told")
    assert unkept() == 0
    touches |= crowd(601, 120)
    eventually(lambda: unkept() >= 120 - (256 - 200), "some are not kept")
    time.sleep(0.5)
    lost = unkept()  # with requests of other kinds, such as the one that has just told
    mount.kill_daemon()
    with nbdkit(tmp_path / "1", "file", f"dir={served}"):

        def is_answered() -> bool:
            waiting = sum(touch.waits for touch in touches.values())
            return waiting <= min(lost, len(touches) - 200)

        eventually(is_answered, "what was kept is answered", 30)
        ended = {page: touch for page, touch in touches.items() if not touch.waits}
        assert len(ended) >= 200
        for page, touch in ended.items():
            assert touch.end() == pattern(MIB * MB)[page * PAGE : (page + 1) * PAGE]
        assert len(touches) - len(ended) >= 120 - (256 - 200), "that many could be kept after all"
    assert subprocess.run([*RAMFS, "umount", "--abort", mount.path], check=False).returncode == 0
    for touch in touches.values():
        touch.thread.join(10)
        assert not touch.waits


TOUCHES = {
    "a mapped read": "m = mmap.mmap(fd, 0); print(m[5000])",
    "a mapped read without read-ahead": "m = mmap.mmap(fd, 0); m.madvise(mmap.MADV_RANDOM); print(m[5000])",
    "a mapped store": "m = mmap.mmap(fd, 0); m[5000] = 1",
    "read": "os.pread(fd, 10, 5000)",
    "a direct read": "m = mmap.mmap(-1, 4096); f = os.open(path, os.O_RDONLY | os.O_DIRECT); os.preadv(f, [m], 4096)",
    "write": "os.pwrite(fd, b'x', 5000)",
    "truncate": "os.truncate(path, 5000)",
    "fallocate": "os.posix_fallocate; subprocess.run(['fallocate', '-p', '-o', '5000', '-l', '100', path])",
}


class Toucher:
    """A process that does something to a file which has to wait."""

    def __init__(self, path: Path, what: str) -> None:
        code = f"import mmap, os, subprocess, sys; path = sys.argv[1]; fd = os.open(path, os.O_RDWR); {TOUCHES[what]}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, path], stdout=subprocess.DEVNULL, start_new_session=True
        )

    def kill(self) -> float:
        """Kill it and all that it has started; how long they took to die."""
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        eventually(lambda: not _group(self.process.pid), "all are dead")
        return time.monotonic() - began


def _group(number: int) -> list[str]:
    """The processes of a group that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == number and state not in "ZX":
                found.append(path.parent.name)
    return found


def test_who_waits_can_be_killed(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """And nobody else: signals that it handles do not disturb who waits."""
    mounted.expect(LOST)
    with nbdkit(tmp_path / "1", "file", f"dir={served}") as uri:
        for number in range(len(TOUCHES) + 1):
            pull(mounted, uri, f"vm{number}", like=False, paused=True)
    handler = "import signal; signal.signal(signal.SIGUSR1, lambda *_: None); "
    code = f"{handler}import mmap, os, sys; f = os.open(sys.argv[1], 0); m = mmap.mmap(f, 0, prot=1); m.madvise(1)"
    path = mounted.path / f"vm{len(TOUCHES)}" / RAM
    survivor = subprocess.Popen([sys.executable, "-c", f"{code}; sys.exit(m[5000] % 200)", path])
    touchers = [Toucher(mounted.path / f"vm{number}" / RAM, what) for number, what in enumerate(TOUCHES)]
    eventually(lambda: sum(each["state"] == "waiting" for each in pulls(mounted)) == len(TOUCHES) + 1, "all wait")
    survivor.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert all(each.process.poll() is None for each in touchers)
    for what, toucher in zip(TOUCHES, touchers, strict=True):
        assert toucher.kill() < 1, what
    survivor.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert survivor.poll() is None
    with nbdkit(tmp_path / "2", "file", f"dir={served}") as uri:
        for number in range(len(TOUCHES) + 1):
            steer(mounted, f"vm{number}", uri=uri, paused=False)
        assert survivor.wait(10) == pattern(MIB * MB)[5000] % 200
        wait_until_here(mounted)
    for number in range(len(TOUCHES)):
        assert read(mounted.path / f"vm{number}" / RAM) == pattern(MIB * MB), "nothing was done for the dead"


def fetched(directory: Path, mounted: Mount, name: str) -> None:
    """All is here, and right."""
    wait_until_here(mounted)
    assert read(mounted.path / name / RAM) == (directory / RAM).read_bytes()


def test_a_server_that_is_killed_and_comes_back(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """What was fetched by then is not fetched again."""
    mounted.expect(LOST)
    place = tmp_path / "nbd"
    with Server(served, place) as server:
        pull(mounted, server.uri, rate=2 * MB)
        eventually(lambda: pulls(mounted)[0]["here_bytes"] > MB, "some is here")
    touch = Touch(mounted.path / "vm" / RAM, 2000)
    eventually(lambda: pulls(mounted)[0]["attempts"] > 2, "it is tried again and again")
    told = pulls(mounted)[0]
    assert told["state"] == "waiting"
    assert "cannot be reached" in told["error"]
    assert 0 < time.time() - told["since"] < 20
    assert 'ramfs_pulls{state="waiting"} 1' in (mounted.path / ".ramfs" / "metrics").read_text()
    assert touch.waits
    with Server(served, tmp_path / "later") as server:
        place.unlink(missing_ok=True)
        os.symlink("later", place)  # nobody else knows that it is back
        assert touch.end(10) == pattern(MIB * MB)[2000 * PAGE : 2001 * PAGE]
        steer(mounted, "vm", rate=0)
        fetched(served, mounted, "vm")
        assert sum(server.taken().values()) == MIB * MB - told["here_bytes"]


def test_another_source(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """It needs not to be a server of the same kind, and one that has not all files is refused."""
    mounted.expect(LOST)
    (served / "state").write_bytes(pattern((MIB + 1) * MB, 4))  # larger, so it comes last
    seal(served)
    with nbdkit(tmp_path / "1", "file", f"dir={served}") as uri:
        pull(mounted, uri, rate=8 * MB)
        eventually(lambda: pulls(mounted)[0]["here_bytes"] > MB, "some is here")
    touch = Touch(mounted.path / "vm" / RAM, 2000)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(served / RAM, half / RAM)
    told = control(mounted, {"arrival": {"path": "vm", "uri": f"file:{half}"}})
    assert "state" in told["error"]["message"]
    other = shutil.copytree(served, tmp_path / "other")
    os.truncate(other / RAM, MB)
    told = control(mounted, {"arrival": {"path": "vm", "uri": f"file:{other}"}})
    assert f"has {MB} bytes" in told["error"]["message"]
    assert touch.waits
    assert pulls(mounted)[0]["source"] == uri
    before = pulls(mounted)[0]["here_bytes"]
    fetched_before = pulls(mounted)[0]["fetched_bytes"]
    steer(mounted, "vm", uri=f"file:{served}")
    assert touch.end(2) == pattern(MIB * MB)[2000 * PAGE : 2001 * PAGE]
    now = pulls(mounted)[0]
    assert now["source"] == f"file:{served}"
    assert now["fetched_bytes"] - fetched_before == now["here_bytes"] - before
    steer(mounted, "vm", rate=0)
    fetched(served, mounted, "vm")


@contextlib.contextmanager
def mute(path: Path) -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(50)
        yield f"nbd+unix:///?socket={path}"


@pytest.mark.parametrize("how", ["never answered", "says nothing", "hangs"])
def test_a_source_that_is_of_no_use(mounted: Mount, served: Path, tmp_path: Path, how: str) -> None:
    """Another one is taken at once, whatever becomes of the first."""
    mounted.expect(LOST + "|does not")
    with nbdkit(tmp_path / "2", "file", f"dir={served}") as second, contextlib.ExitStack() as until:
        with nbdkit(tmp_path / "1", "file", f"dir={served}") as first:
            pull(mounted, first, paused=True)
            if how == "never answered":
                mounted.umount()
            if how == "hangs":
                os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGSTOP)
                touch = Touch(mounted.path / "vm" / RAM, 700)
                time.sleep(0.3)
                began = time.monotonic()
                steer(mounted, "vm", uri=second)
                assert touch.end(2) == pattern(MIB * MB)[700 * PAGE : 701 * PAGE]
                assert time.monotonic() - began < 2
        if how == "never answered":
            mounted.start()
        if how == "says nothing":
            (tmp_path / "1").unlink(missing_ok=True)
            until.enter_context(mute(tmp_path / "1"))
        touch = Touch(mounted.path / "vm" / RAM, 900)
        if how != "hangs":
            time.sleep(0.5)
            assert touch.waits
            began = time.monotonic()
            steer(mounted, "vm", uri=second)
            assert time.monotonic() - began < 2
        assert touch.end(2) == pattern(MIB * MB)[900 * PAGE : 901 * PAGE]
        steer(mounted, "vm", paused=False)
        fetched(served, mounted, "vm")


def test_a_pull_from_a_mute_server_fails(mounted: Mount, tmp_path: Path) -> None:
    """Or is given up by whoever asked for it."""
    with mute(tmp_path / "1") as uri:
        with (mounted.path / ".ramfs" / "control").open("r+b", buffering=0) as file:
            file.write(b'{"pull": {"uri": "%s", "parent": "", "name": "vm"}}' % uri.encode())
            time.sleep(0.2)
        assert pull(mounted, f"file:{mounted.store / 'catalog.sqlite'}", "vm")["files"] == 1


@pytest.mark.parametrize("how", ["vanish", "resize", "error"])
def test_an_export_that_is_not_what_it_was(mounted: Mount, served: Path, tmp_path: Path, how: str) -> None:
    mounted.expect(f"{LOST}|has no|bytes instead|cannot")
    (served / "other").write_bytes(pattern(PAGE, 2))
    seal(served)
    with nbdkit(tmp_path / "1", "file", f"dir={served}") as uri:
        pull(mounted, uri, paused=True)
    if how == "vanish":
        (served / RAM).rename(served / "aside")
    elif how == "resize":
        os.truncate(served / RAM, MB)
    words = ["--filter=error", "error-rate=100%", "error=EIO"] if how == "error" else []
    with nbdkit(tmp_path / "1", *words[:1], "file", f"dir={served}", *words[1:]):
        touch = Touch(mounted.path / "vm" / RAM, 5)
        message = {"vanish": "No such file|has no|does not|not", "resize": f"has {MB} bytes", "error": ""}[how]
        eventually(lambda: pulls(mounted)[0]["error"], "the state is told")
        time.sleep(0.3)
        assert any(word in pulls(mounted)[0]["error"] for word in message.split("|"))
        assert touch.waits
        if how == "vanish":
            (served / "aside").rename(served / RAM)
        elif how == "resize":
            (served / RAM).write_bytes(pattern(MIB * MB))
        if how != "error":
            assert touch.end(10) == pattern(MIB * MB)[5 * PAGE : 6 * PAGE], "it goes on by itself"
    with nbdkit(tmp_path / "1", "file", f"dir={served}"):
        assert touch.end(10) == pattern(MIB * MB)[5 * PAGE : 6 * PAGE]
        steer(mounted, "vm", paused=False)
        fetched(served, mounted, "vm")


def test_who_prefers_an_error_gets_it(mounted: Mount, served: Path, tmp_path: Path) -> None:
    mounted.expect(LOST + "|given up")
    with nbdkit(tmp_path / "1", "file", f"dir={served}") as uri:
        pull(mounted, uri, paused=True, wait=1)
    began = time.monotonic()
    touch = Touch(mounted.path / "vm" / RAM, 5)
    touch.thread.join(10)
    assert touch.error == errno.EIO
    assert 0.9 < time.monotonic() - began < 3
    began = time.monotonic()
    touch = Touch(mounted.path / "vm" / RAM, 5)
    touch.thread.join(10)
    assert touch.error == errno.EIO
    assert time.monotonic() - began < 0.5, "it is lost already"
    with nbdkit(tmp_path / "1", "file", f"dir={served}"):

        def is_back() -> bool:
            touch = Touch(mounted.path / "vm" / RAM, 5)
            touch.thread.join(10)
            return not touch.error

        eventually(is_back, "the source is back")
        assert read(mounted.path / "vm" / RAM, 5 * PAGE, PAGE) == pattern(MIB * MB)[5 * PAGE : 6 * PAGE]
        steer(mounted, "vm", paused=False)
        fetched(served, mounted, "vm")


def test_tls_expired_meanwhile(mounted: Mount, served: Path, tmp_path: Path) -> None:
    mounted.expect(f"{LOST}|certificate")
    make_authority(tmp_path)
    make_certificate(tmp_path, "server", "DNS:localhost,IP:127.0.0.1")
    words = ["--tls=require", f"--tls-certificates={tmp_path}", "file", f"dir={served}"]
    place = tmp_path / "nbd"
    uri = f"nbds+unix:///?socket={place}&tls-certificates={tmp_path}&tls-hostname=localhost"
    with nbdkit(place, *words):
        pull(mounted, uri, paused=True)
    make_certificate(tmp_path, "server", "DNS:localhost,IP:127.0.0.1", expired=True)
    with nbdkit(place, *words):
        touch = Touch(mounted.path / "vm" / RAM, 5)
        eventually(lambda: "certificate" in pulls(mounted)[0]["error"], "the state is told")
        assert touch.waits
    make_certificate(tmp_path, "server", "DNS:localhost,IP:127.0.0.1")
    with nbdkit(place, *words):
        assert touch.end(10) == pattern(MIB * MB)[5 * PAGE : 6 * PAGE]
        steer(mounted, "vm", paused=False)
        fetched(served, mounted, "vm")
