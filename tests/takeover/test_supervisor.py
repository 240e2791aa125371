"""The supervisor: small, patient up to a point, and obeyed when no daemon serves or one hangs."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import Mount, children, is_mounted, readable
from mount.posix import Process, eventually, opened, pattern, read, status
from takeover.conftest import Request, Victim, freed, fsck

from ramfs.errors import MountError
from ramfs.supervisor import process
from ramfs.supervisor.client import ask
from ramfs.supervisor.link import Link

MB = 1 << 20
DATA = pattern(MB)


def ramfs(*words: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ramfs", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=timeout
    )


def supervisor_of(mount: Mount) -> int:
    assert mount.process is not None
    return mount.process.pid


def told(mount: Mount) -> dict[str, Any]:
    """What the supervisor tells of itself."""
    return ask(str(mount.store), "status")


def gone(pid: int, timeout: float = 20) -> bool:
    """Wait for the end of a process, which need not be a child."""
    try:
        exited = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return readable(exited, timeout)
    finally:
        os.close(exited)


def kill_serving(mount: Mount, times: int = 1) -> None:
    """SIGKILL the daemon as soon as there is one, over and over."""
    mount.expect(r"was ended by signal 9; going on")
    killed = {0}
    while len(killed) <= times:
        pid = told(mount)["daemon"] or 0
        if pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            assert gone(pid)
        time.sleep(0.01)


def halt(mount: Mount) -> None:
    """Let daemons die until no other is started."""
    mount.expect(r"daemons died within")
    kill_serving(mount, process.CRASHES)
    eventually(lambda: told(mount)["state"] == "halted", "the supervisor has given up")


def store_and_wait(path: Path) -> Callable[[], Any]:
    """What a client does that has dirty pages of a file when the daemon dies, and then asks for another."""

    def work() -> mmap.mmap:
        with opened(path) as fd:
            memory = mmap.mmap(fd, MB)
        memory[:5] = b"dirty"
        return memory

    return work


class Waiting:
    """A process that asks the mount for something, and may have to wait."""

    def __init__(self, *command: object) -> None:
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @property
    def waits(self) -> bool:
        return self.process.poll() is None

    def end(self, timeout: float = 20) -> tuple[int, str]:
        """Its exit status and what it said."""
        said, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, said + errors


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount with a file; what each test makes of it, it judges itself."""
    mount = Mount(tmp_path / "store", tmp_path / "mnt").start()
    eventually((mount.store / "supervisor").exists, "the supervisor listens")
    (mount.path / "f").write_bytes(DATA)
    (mount.path / "d").mkdir()
    with freed(mount):
        try:
            yield mount
        finally:
            mount.abandon()


def niceness(pid: int) -> tuple[int, str]:
    """That of a process, all its threads, and of its session where the scheduler shares out among those."""
    group = Path(f"/proc/{pid}/autogroup")
    (each,) = {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
    return each, group.read_text().split()[-1] if group.exists() else ""


@pytest.mark.skipif(os.geteuid() != 0, reason="going before others needs a privilege")
def test_who_takes_over_goes_before_others_until_it_has(mount: Mount) -> None:
    def standby() -> int:
        eventually(lambda: told(mount)["standby"], "a daemon stands by")
        return int(told(mount)["standby"])

    usual = niceness(standby())
    urgent = process.URGENT, str(process.URGENT) if usual[1] else ""
    pid = standby()
    assert niceness(supervisor_of(mount)) == urgent
    os.kill(pid, signal.SIGSTOP)  # so that there is time to look
    kill_serving(mount)
    eventually(lambda: told(mount)["daemon"] == pid, "it is its turn")
    assert niceness(pid) == urgent
    os.kill(pid, signal.SIGCONT)
    assert niceness(standby()) == usual
    assert niceness(pid) == usual
    assert {niceness(each)[0] for each in children(pid)} == {usual[0]}, "and what it has started"
    assert read(mount.path / "f") == DATA


def test_it_is_small_and_needs_the_standard_library_alone(mount: Mount) -> None:
    pid = supervisor_of(mount)
    kill_serving(mount)
    eventually(lambda: told(mount)["standby"], "another daemon stands by")
    facts = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(facts["VmHWM"].split()[0]) < 20 << 10, facts["VmHWM"]
    assert facts["Threads"] == "1"
    assert "site-packages" not in Path(f"/proc/{pid}/maps").read_text()
    code = (
        f"import runpy, sys; runpy.run_path({process.SCRIPT!r}); print(*{{n.partition('.')[0] for n in sys.modules}})"
    )
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    assert set(loaded.stdout.split()) <= {*sys.stdlib_module_names, "__main__", "sitecustomize"}
    # It holds nothing of the mount, whose last user it could be.
    assert not any(os.readlink(fd).startswith(str(mount.path)) for fd in Path(f"/proc/{pid}/fd").iterdir())
    mount.umount()


def test_a_daemon_that_keeps_dying_is_given_up_and_the_connection_kept(mount: Mount) -> None:
    began = time.monotonic()
    with Process(store_and_wait(mount.path / "f")):
        halt(mount)
        assert time.monotonic() - began > 1.5, "the supervisor did not wait longer each time"
        assert mount.log.count("daemons died within") == 1
        assert f"ramfs upgrade {mount.path}" in mount.log
        assert f"ramfs umount --abort {mount.path}" in mount.log
        reader = Waiting("sha256sum", mount.path / "f")
        seen = ramfs("status", mount.path)
        assert seen.returncode == MountError.exit_code
        assert "Traceback" not in seen.stderr
        assert reader.waits
        done = ramfs("upgrade", mount.path, "--json")
        assert done.returncode == 0, done
        code, said = reader.end()
        assert code == 0, said
    facts = told(mount)
    assert (facts["state"], facts["crashes"]) == ("serving", process.CRASHES)
    assert json.loads(done.stdout)["pid"] == facts["daemon"] == mount.pid
    assert read(mount.path / "f") == b"dirty" + DATA[5:]
    kill_serving(mount)  # and it is patient again
    assert read(mount.path / "f", 5) == DATA[5:]
    mount.umount()
    fsck(mount.store)


def test_abort_frees_those_who_wait_for_ever(mount: Mount) -> None:
    client = Process(store_and_wait(mount.path / "f"))
    halt(mount)
    reader = Waiting("stat", mount.path / "d" / "new")
    time.sleep(0.3)
    assert reader.waits
    os.kill(client.pid, signal.SIGKILL)  # its dirty pages cannot be written
    pid, left = supervisor_of(mount), children(supervisor_of(mount))
    done = ramfs("umount", "--abort", mount.path)
    assert (done.returncode, done.stderr) == (0, ""), done
    code, said = reader.end()
    assert code != 0
    assert "not connected" in said or "connection abort" in said
    client.end()
    assert not is_mounted(mount.path)
    assert gone(pid)
    assert all(map(gone, left))
    assert mount.process is not None
    assert mount.process.wait(5) != 0
    fsck(mount.store)
    mount.start()
    assert read(mount.path / "f", 5) == DATA[5:]
    mount.umount()


def test_abort_of_a_daemon_that_hangs(mount: Mount) -> None:
    daemon = mount.pid
    os.kill(daemon, signal.SIGSTOP)
    reader = Waiting("stat", mount.path / "d" / "new")
    time.sleep(0.3)
    assert reader.waits
    done = ramfs("umount", "--abort", mount.path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert reader.end()[0] != 0
    assert gone(daemon)
    assert gone(supervisor_of(mount))
    assert not is_mounted(mount.path)
    fsck(mount.store)


def test_one_upgrade_after_the_other(mount: Mount) -> None:
    """An upgrade is done when the supervisor, which is another program then, takes the next command."""
    pids = {mount.pid}
    for _ in range(3):
        done = ramfs("upgrade", mount.path, "--json")
        assert (done.returncode, done.stderr) == (0, ""), done
        pids.add(json.loads(done.stdout)["pid"])
        assert told(mount)["pid"] == supervisor_of(mount)
        assert read(mount.path / "f") == DATA
    assert len(pids) == 4
    assert told(mount)["crashes"] == 0
    mount.umount()


def test_upgrade_replaces_a_daemon_that_hangs(mount: Mount) -> None:
    daemon = mount.pid
    os.kill(daemon, signal.SIGSTOP)
    mount.expect("signal 9; going on")
    reader = Waiting("sha256sum", mount.path / "f")
    done = ramfs("upgrade", mount.path)
    assert done.returncode == 0, done
    assert reader.end()[0] == 0
    assert gone(daemon)
    mount.umount()


def test_unmount_while_no_daemon_serves(mount: Mount) -> None:
    halt(mount)
    pid = supervisor_of(mount)
    done = ramfs("umount", mount.path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert gone(pid)
    assert mount.process is not None
    assert mount.process.wait(5) == 0
    fsck(mount.store)
    mount.start()
    assert read(mount.path / "f") == DATA
    mount.umount()


def test_who_asks_what_every_daemon_dies_of_can_be_killed(tmp_path: Path, assassin: Path) -> None:
    """Though a daemon has read the request, so that the kernel alone would have him wait for the answer."""
    victim = Victim(tmp_path, assassin)
    mount = victim.mount
    mount.expect("daemons died within")
    with mount, freed(mount):
        mount.wait_until_supervised()
        victim.assassin.aim(Request.MKDIR, kills=1 << 20)
        asking = Waiting("mkdir", mount.path / "d")
        eventually(lambda: told(mount)["state"] == "halted", "the supervisor has given up")
        assert asking.waits
        asking.process.kill()
        asking.process.communicate(timeout=10)
        assert asking.process.returncode == -signal.SIGKILL
        done = ramfs("umount", mount.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert mount.process is not None
        assert mount.process.wait(5) == 0
    fsck(mount.store)


def test_sigterm_while_no_daemon_serves(mount: Mount) -> None:
    halt(mount)
    reader = Waiting("stat", mount.path / "d" / "new")
    time.sleep(0.2)
    mount.terminate()
    assert reader.end()[0] != 0
    fsck(mount.store)


def test_sigterm_while_the_next_daemon_is_held_back(mount: Mount) -> None:
    """What guests have stored is flushed first: a daemon is started for that."""
    with Process(store_and_wait(mount.path / "f")):
        kill_serving(mount, process.PATIENT + 3)
        assert told(mount)["state"] == "starting"
        mount.terminate()
    fsck(mount.store)
    mount.start()
    assert read(mount.path / "f") == b"dirty" + DATA[5:]
    mount.umount()


def test_the_one_that_stands_by_dies(mount: Mount) -> None:
    mount.expect("the daemon that stood by was ended by signal 9; will try again")
    kill_serving(mount)  # after the first death another one stands by soon
    eventually(lambda: told(mount)["standby"], "a daemon stands by")
    serving = mount.pid
    os.kill(told(mount)["standby"], signal.SIGKILL)
    eventually(lambda: "the daemon that stood by" in mount.log, "that is told")
    assert (told(mount)["daemon"], told(mount)["crashes"]) == (serving, 1)
    kill_serving(mount)
    assert read(mount.path / "f") == DATA
    mount.umount()


def test_the_supervisor_dies(mount: Mount) -> None:
    mount.expect("the supervisor is gone: the next time a daemon")
    kill_serving(mount)
    eventually(lambda: told(mount)["standby"], "a daemon stands by")
    facts, pid = told(mount), supervisor_of(mount)
    assert mount.process is not None
    os.kill(pid, signal.SIGKILL)
    mount.process.wait()
    assert gone(facts["standby"]), "who stands by for nobody ends"
    assert read(mount.path / "f") == DATA
    (mount.path / "g").write_bytes(DATA)
    refused = ramfs("upgrade", mount.path)
    assert refused.returncode == MountError.exit_code
    assert "no supervisor" in refused.stderr
    done = ramfs("umount", mount.path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert gone(facts["daemon"])
    fsck(mount.store)
    mount.start()
    assert read(mount.path / "g") == DATA
    mount.umount()


def test_without_a_supervisor_sigterm_unmounts(mount: Mount) -> None:
    daemon = mount.pid
    assert mount.process is not None
    mount.process.kill()
    mount.process.wait()
    eventually(lambda: "the supervisor is gone" in mount.log, "the daemon has seen it")
    os.kill(daemon, signal.SIGTERM)
    assert gone(daemon)
    assert not is_mounted(mount.path)
    fsck(mount.store)


def broken_installation(base: Path) -> Path:
    """An interpreter whose ramfs cannot be imported."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base], check=True)
    python = base / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    package = Path(site.stdout.strip()) / "ramfs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import numbers_py")
    return python


def no_program(base: Path) -> Path:
    return base / "none"


def no_python(base: Path) -> Path:
    return Path("/bin/false")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (no_program, "none does not start: No such file or directory; the one before goes on serving"),
        (no_python, r"the new daemon exited with 1 \(.*\): the one before goes on serving"),
        (broken_installation, r"the new daemon exited with 1 \(.*\): the one before goes on serving"),
    ],
)
def test_an_upgrade_to_what_is_broken(mount: Mount, tmp_path: Path, made: Callable[[Path], Path], said: str) -> None:
    mount.expect("numbers_py|Traceback")
    serving = mount.pid
    with pytest.raises(MountError, match=said):
        ask(str(mount.store), "upgrade", python=str(made(tmp_path / "broken")))
    assert mount.pid == serving == told(mount)["daemon"]
    assert read(mount.path / "f") == DATA
    kill_serving(mount)  # nor is what was broken started for it
    assert read(mount.path / "f", 1) == DATA[1:]
    assert ramfs("upgrade", mount.path).returncode == 0
    mount.umount()


def test_why_an_upgrade_failed_is_told_also_from_the_background(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "store", tmp_path / "mnt")
    mount.path.mkdir()
    assert ramfs("mount", mount.store, mount.path).returncode == 0
    try:
        with pytest.raises(MountError, match="No module named 'numbers_py'"):
            ask(str(mount.store), "upgrade", python=str(broken_installation(tmp_path / "broken")))
        done = ramfs("upgrade", mount.path)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert status(mount.path)["supervisor"]["crashes"] == 0
    finally:
        done = ramfs("umount", mount.path)
    assert (done.returncode, done.stderr) == (0, ""), done


def other_version(base: Path, change: str) -> Path:
    """An installation that is like this one but for a line of code run before it."""
    python = base / "python"
    code = f"import sys; sys.argv[0] = 'ramfs'; {change}; from ramfs.cli import main; sys.exit(main())"
    base.mkdir()
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    return python


def test_an_upgrade_to_a_version_with_other_records(mount: Mount, tmp_path: Path) -> None:
    """It could not know what the kernel has: refused before anything is given up."""
    serving = mount.pid
    python = other_version(tmp_path / "other", "import ramfs.ledger as l; l.VERSION += 1")
    with pytest.raises(MountError, match="another format, and cannot take over: the one before goes on serving"):
        ask(str(mount.store), "upgrade", python=str(python))
    assert mount.pid == serving
    assert read(mount.path / "f") == DATA
    kill_serving(mount)
    assert read(mount.path / "f", 1) == DATA[1:]
    mount.umount()


def test_an_upgrade_to_a_version_that_dies_when_it_takes_over(mount: Mount, tmp_path: Path) -> None:
    mount.expect("exited with 3; going on")
    serving = mount.pid
    python = other_version(tmp_path / "other", "import os, ramfs.daemon as d; d.Daemon.run = lambda self: os._exit(3)")
    reader = Waiting("sh", "-c", f"for i in $(seq 100); do sha256sum {mount.path}/f; stat {mount.path}/d/$i; done")
    with pytest.raises(MountError, match=r"the new daemon exited with 3 .*: one as before takes over again"):
        ask(str(mount.store), "upgrade", python=str(python))
    assert "not connected" not in reader.end()[1]
    assert read(mount.path / "f") == DATA
    assert gone(serving)
    assert told(mount)["crashes"] == 1
    mount.umount()


def test_a_daemon_that_dies_before_the_mount_is_ready(tmp_path: Path, assassin: Path) -> None:
    """Nobody has anything of it yet: the command fails, with a word, and leaves nothing."""
    victim = Victim(tmp_path, assassin)
    for request in (Request.INIT, Request.GETATTR):
        victim.assassin.aim(request)
        victim.mount.path.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "ramfs", "mount", victim.mount.store, victim.mount.path],
            env={**os.environ, **victim.mount.env}, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert victim.assassin.killed == 1
        assert done.returncode != 0
        assert done.stderr == "ramfs: WARNING: the daemon was ended by signal 9 before the mount was ready\n"
        assert not is_mounted(victim.mount.path)
        with contextlib.suppress(FileNotFoundError):
            fsck(victim.mount.store)
    victim.assassin.disarm()
    with victim.mount as mount:
        (mount.path / "f").write_bytes(DATA)


def test_a_supervisor_that_dies_with_words_unread() -> None:
    """The kernel tells that by an error, which ends no daemon."""

    async def wait_for_orders(link: Link) -> list[str]:
        return [order async for order in link.orders()]

    for said in ("stand_by", "ready"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link = Link(theirs.detach())
        if said == "ready":
            link.ready("1")
        else:
            threading.Timer(0.1, ours.close).start()
            assert link.stand_by("1", 1) is None
        ours.close()
        assert trio.run(wait_for_orders, link) == []
        link._socket.close()
