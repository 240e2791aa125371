"""`ramfs pull`, `recover`, `pause`, `resume`, and how `status` shows what arrives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arrival.conftest import control
from arrival.conftest import nbdkit as server
from cli.conftest import NOBODY, Outcome, call, needs_root, run
from harness import Mount
from mount.posix import errno_of, eventually, fails, pattern, read, status
from nbd.servers import make_authority, make_certificate, nbdkit

MB = 1 << 20
RAM = pattern(4 * MB)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One for all tests; each has its own names on it."""
    base = tmp_path_factory.mktemp("pull")
    with Mount(base / "store", base / "mnt") as mount:
        yield mount


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server has."""
    directory = tmp_path_factory.mktemp("served")
    (directory / "pc.ram@0x0").write_bytes(RAM)
    (directory / "state").write_bytes(b"state")
    return directory


@pytest.fixture(scope="module")
def uri(served: Path) -> Iterator[str]:
    with nbdkit("file", f"dir={served}") as uri:
        yield uri


def pulls(mount: Mount) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = status(mount.path)["pulls"]
    return found


def start(*args: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A command that is not waited for."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "ramfs", *map(str, args)], cwd=cwd,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], number: int | None = None) -> Outcome:
    """How it ended, by a signal or by itself."""
    if number is not None:
        process.send_signal(number)
    out, err = process.communicate(timeout=20)
    return Outcome(process.returncode, out, err)


# --- what it does ---


def test_the_directory_is_there(mount: Mount, uri: str, served: Path) -> None:
    """With a path of the socket that is relative to where the command runs."""
    path = Path(uri.partition("socket=")[2])
    directory = mount.path / "there"
    before = mount.path.stat().st_nlink
    out = run("pull", f"nbd+unix:///?socket={path.name}", directory, "--wait", cwd=path.parent).ok()
    assert re.fullmatch(
        rf"{directory}: 2 files, 4.0 MiB, from {re.escape(uri)}; unverified: the source has no manifest of it\n"
        r"all of it is here, after \S+ m?s\n", out,
    )  # fmt: skip
    assert sorted(os.listdir(directory)) == ["pc.ram@0x0", "state"]
    assert mount.path.stat().st_nlink == before + 1
    assert read(directory / "pc.ram@0x0") == RAM
    assert pulls(mount) == []
    assert run("pause", directory).ok() == f"{directory}: nothing arrives there, all of it is here\n"


def test_a_snapshot_of_ramfs_is_verified(mount: Mount, tmp_path: Path) -> None:
    """And one file of it can be pulled alone, though the manifest tells of more."""
    origin = mount.path / "origin"
    origin.mkdir()
    (origin / "pc.ram@0x0").write_bytes(RAM)
    (origin / "none").touch()
    (origin / ".snap" / "s").mkdir()
    with nbdkit("file", f"dir={origin}/.snap/s") as uri:
        told = json.loads(run("pull", "--json", "--wait", uri, mount.path / "all").ok())
        assert told.items() >= {"files": 2, "bytes": len(RAM), "verified": True, "path": f"{mount.path}/all"}.items()
        assert told["seconds"] > 0
        one = uri.replace("///", "///pc.ram@0x0")
        assert "1 file, 4.0 MiB" in run("pull", "--wait", one, mount.path / "one").ok()
    assert os.listdir(mount.path / "one") == ["pc.ram@0x0"]
    assert sorted(os.listdir(mount.path / "all")) == ["none", "pc.ram@0x0"]
    assert read(mount.path / "one" / "pc.ram@0x0") == read(mount.path / "all" / "pc.ram@0x0") == RAM


def test_an_export_without_a_name(mount: Mount, served: Path) -> None:
    with nbdkit("file", served / "pc.ram@0x0") as uri:
        run("pull", "--wait", uri, mount.path / "unnamed").ok()
    assert read(mount.path / "unnamed" / "default") == RAM


def test_an_export_of_size_0(mount: Mount) -> None:
    with nbdkit("memory", "size=0") as uri:
        assert "1 file, 0 B" in run("pull", "--wait", uri, mount.path / "nothing").ok()
    assert (mount.path / "nothing" / "default").stat().st_size == 0


def test_a_local_directory_with_any_names(mount: Mount, tmp_path: Path) -> None:
    """Relative to where the command runs; and the daemon after that one knows the names as well."""
    names = ["\udcff", "a/b/c", "line\nbreak"]
    for name in names:
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(RAM[:9000])
    run("pull", "--paused", "file:files", mount.path / "names", cwd=tmp_path).ok()
    mount.kill_daemon()
    run("resume", mount.path / "names").ok()
    eventually(lambda: not pulls(mount), "all is here")
    for name in names:
        assert read(mount.path / "names" / name) == RAM[:9000]


def test_a_deep_name(mount: Mount) -> None:
    name = "/".join(["d"] * 1500)
    with nbdkit("eval", f"list_exports=printf 'NAMES\n{name}\n'", "get_size=echo 4096", "pread=printf %4096s") as uri:
        run("pull", "--wait", uri, mount.path / "deep").ok()
    assert read(mount.path / "deep" / name) == b" " * 4096


def test_tls(mount: Mount, served: Path, tmp_path: Path) -> None:
    """With certificates in a directory that is named as it is seen from where the command runs."""
    for name in ("server", "client", "stranger"):
        (tmp_path / name).mkdir()
    make_authority(tmp_path)
    make_certificate(tmp_path, "server", "DNS:localhost,IP:127.0.0.1")
    make_certificate(tmp_path, "client", "DNS:client")
    make_authority(tmp_path / "stranger")
    for name in ("server", "client"):
        (tmp_path / name / "ca-cert.pem").write_bytes((tmp_path / "ca-cert.pem").read_bytes())
        for kind in ("cert", "key"):
            (tmp_path / f"{name}-{kind}.pem").rename(tmp_path / name / f"{name}-{kind}.pem")
    words = ["--tls=require", f"--tls-certificates={tmp_path / 'server'}", "--tls-verify-peer"]
    with nbdkit(*words, "file", f"dir={served}") as plain:
        uri = plain.replace("nbd+unix", "nbds+unix")
        run("pull", "--wait", f"{uri}&tls-certificates=client", mount.path / "tls", cwd=tmp_path).ok()
        assert read(mount.path / "tls" / "pc.ram@0x0") == RAM
        for bad, code, word in [
            (plain, 12, "TLS"),
            (f"{uri}&tls-certificates=stranger", 12, "trusted"),
            (f"{uri}&tls-certificates=missing", 12, tmp_path / "missing"),
            (uri, 12, "trusted"),
        ]:
            run("pull", bad, mount.path / "untrusted", cwd=tmp_path).failed(code, word)
    assert not (mount.path / "untrusted").exists()


# --- what it refuses ---


def test_nothing_is_left_of_what_cannot_be(mount: Mount, uri: str, tmp_path: Path) -> None:
    new = mount.path / "new"
    (mount.path / "frozen" / ".snap" / "s").mkdir(parents=True)
    (mount.path / "file").touch()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"nbd://127.0.0.1:{closed.getsockname()[1]}/"
        run("pull", nobody, new).failed(11, nobody, "Connection refused")
    run("pull", "nbd+unix:///?socket=nobody", new, cwd=tmp_path).failed(11, tmp_path / "nobody", "No such file")
    run("pull", uri.replace("///", "///nonsense"), new).failed(12, "nonsense", "no such export")
    for path in (f"{tmp_path}/none", f"{mount.path}/file"):
        error = control(mount, {"pull": {"uri": f"file:{path}", "parent": "", "name": "new"}})["error"]
        assert error["exit"] == 12
        assert path in error["message"]
    run("pull", uri, mount.path / "frozen").failed(1, "exists")
    run("pull", uri, mount.path / ".snap").failed(1, "exists")
    run("pull", uri, mount.path / "frozen" / ".snap" / "t").failed(1, "frozen/.snap/t", "Read-only")
    run("pull", uri, mount.path / "file" / "new").failed(1, "file is not a directory")
    run("pull", uri, mount.path / ("n" * 256)).failed(1, "File name too long")
    run("pull", uri, tmp_path / "new").failed(8, tmp_path, "does not lie in a ramfs mount")
    assert not new.exists()
    assert pulls(mount) == []


@pytest.mark.parametrize(
    "names",
    [r"../x", r"ok\n..", r"/x", r"a//b", r"x/", r".snap", r"a/.guest", "x" * 256, r"a\na/b", r"default\n", r"\377"],
    ids=ascii,
)
def test_names_that_cannot_be(mount: Mount, names: str) -> None:
    """Of the exports of a server."""
    with nbdkit("eval", f"list_exports=printf 'NAMES\n{names}\n'", "get_size=echo 4096", "pread=exit 1") as uri:
        error = control(mount, {"pull": {"uri": uri, "parent": "", "name": "hostile"}})["error"]
    assert (error["exit"], error["errno"]) == (13, errno.EIO)
    assert error["message"].startswith(uri)
    assert error["message"].isascii()
    assert error["message"].isprintable()
    assert not (mount.path / "hostile").exists()


def test_a_server_that_has_nothing(mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with nbdkit("file", f"dir={tmp_path}/empty") as uri:
        run("pull", uri, mount.path / "empty").failed(12, uri, "nothing to pull")
    assert not (mount.path / "empty").exists()


def test_raw_commands_that_mean_nothing(mount: Mount, uri: str) -> None:
    for words in ('{"rate": 1e999}', '{"wait": -1}', '{"uri": 7}', '{"uri": "\\udcff"}', '{"name": "a/b"}'):
        request = {"uri": uri, "parent": "", "name": "raw", **json.loads(words)}
        with pytest.raises(OSError, match="Invalid argument"), open(mount.path / ".ramfs/control", "r+b", 0) as file:
            file.write(json.dumps({"pull": request}).encode())
    with pytest.raises(OSError, match="busy"), open(mount.path / ".ramfs/control", "r+b", 0) as file:
        file.write(json.dumps({"pull": {"uri": uri, "parent": "", "name": ".ramfs"}}).encode())


@needs_root
def test_only_who_may(uri: str, public: Path) -> None:
    """The mount's owner; others are told what is in the way."""
    with Mount(public / "store", public / "mnt") as closed:
        ramfs = [*NOBODY, sys.executable, "-P", "-m", "ramfs", "pull", uri]
        call(*ramfs, closed.path / "new").failed(1, closed.path, "Permission denied")
    with Mount(public / "store", public / "mnt", options=("allow_other",)) as opened:
        opened.path.chmod(0o777)
        call(*ramfs, opened.path / "new").failed(1, "only the mount's owner")
        assert not (opened.path / "new").exists()


# --- while it is made, and while it arrives ---


@contextlib.contextmanager
def slow(served: Path) -> Iterator[str]:
    """A server that takes its time with each connection."""
    with nbdkit("--filter=delay", "file", f"dir={served}", "delay-open=500ms") as uri:
        yield uri


def wait_until_asked(process: subprocess.Popen[str], directory: Path) -> None:
    """Until a command has asked the daemon, which has not done it yet."""
    control = str(directory.parent / ".ramfs/control")

    def asked() -> bool:
        with contextlib.suppress(FileNotFoundError), os.scandir(f"/proc/{process.pid}/fd") as fds:  # closed meanwhile
            return any(os.readlink(fd.path) == control for fd in fds)
        return False

    eventually(asked, "the daemon is asked")
    time.sleep(0.1)
    assert not directory.exists()


def test_interrupted_while_it_is_made(mount: Mount, served: Path) -> None:
    directory = mount.path / "interrupted"
    with slow(served) as uri:
        process = start("pull", uri, directory)
        wait_until_asked(process, directory)
        done = end(process, signal.SIGINT)
        assert (done.code, done.out, done.err.strip()) == (130, "", "ramfs: interrupted")
        time.sleep(1.7)  # it would be there by now
    assert not directory.exists()
    assert pulls(mount) == []


def test_the_daemon_dies_while_it_is_made(mount: Mount, served: Path) -> None:
    directory = mount.path / "twice"
    with slow(served) as uri:
        process = start("pull", uri, directory)
        wait_until_asked(process, directory)
        mount.kill_daemon()
        assert end(process).ok().startswith(f"{directory}: 2 files, 4.0 MiB")
        run("pause", directory).ok()
        assert (directory / "state").read_bytes() == b"state"
        shutil.rmtree(directory)
        eventually(lambda: not pulls(mount), "the pull has ended")


def test_interrupted_while_it_arrives(mount: Mount, uri: str) -> None:
    directory = mount.path / "goes-on"
    process = start("pull", "--wait", "--rate=1M", uri, directory)
    eventually(directory.exists, "the directory is there")
    done = end(process, signal.SIGINT)
    assert done.code == 130
    assert done.err == f"ramfs: interrupted; {directory} goes on arriving, until `ramfs pause` or until it is removed\n"
    (pull,) = pulls(mount)
    assert (pull["path"], pull["state"]) == ("goes-on", "arriving")
    run("resume", "--rate=0", directory).ok()
    eventually(lambda: not pulls(mount), "all is here")
    assert read(directory / "pc.ram@0x0") == RAM


def test_on_a_terminal(mount: Mount, uri: str) -> None:
    """A bar, and of `status --watch` a row."""
    master, slave = os.openpty()
    commands = [("pull", "--wait", "--rate=2M", uri, mount.path / "terminal"), ("status", "-w", mount.path)]
    pull, watch = (
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ramfs", *map(str, command)], stdin=slave, stdout=slave, stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"}, start_new_session=True,
        )
        for command in commands
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while b"all of it is here" not in shown:
        shown += os.read(master, 1 << 16)
    watch.send_signal(signal.SIGINT)
    assert (pull.wait(10), watch.wait(10)) == (0, 0)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"\d+% \S+ MiB left in \S+ m?s, \S+ MiB/s, 0 demand faults", text), text
    assert re.search(
        r"terminal from \S+: arriving, \d+% of 4.0 MiB, \S+ MiB/s, \S+ m?s left, limited to 2.0 MiB/s, unverified", text
    ), text
    assert "Traceback" not in text


# --- a source that is lost ---


@pytest.fixture
def lost(mount: Mount, served: Path, tmp_path: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[str]]]:
    """Serves at the same place each time it is called."""
    mount.expect("pull from .* trying again")
    directory = Path(tempfile.mkdtemp(prefix="ramfs-nbd-"))
    yield lambda: server(directory / "s", "file", f"dir={served}")
    shutil.rmtree(directory)


Again = Callable[[], contextlib.AbstractContextManager[str]]


def test_waiting_for_a_lost_source(mount: Mount, lost: Again) -> None:
    directory = mount.path / "waits"
    with lost() as uri:
        process = start("pull", "--wait", "--rate=1M", uri, directory)
        eventually(directory.exists, "the directory is there")
    assert process.stderr is not None
    assert re.match(r"ramfs: nbd.*; waiting, and going on when it is back\n", process.stderr.readline())
    (pull,) = pulls(mount)
    assert (pull["state"], pull["path"]) == ("waiting", "waits")
    shown = run("status", mount.path, env={"COLUMNS": "400"}).ok()
    assert re.search(r"waits from .*: waiting, \d+% of 4.0 MiB, .*unverified, nbd.*, for \S+ m?s now", shown), shown
    assert 'ramfs_pulls{state="waiting"} 1' in (mount.path / ".ramfs/metrics").read_text()
    with lost():
        assert process.stderr.readline() == "ramfs: going on\n"
        run("resume", "--rate=0", directory / "pc.ram@0x0").ok()
        done = end(process)
    assert (done.code, done.err) == (0, "")
    assert "all of it is here" in done.out
    assert read(directory / "pc.ram@0x0") == RAM


def test_failing_instead(mount: Mount, lost: Again) -> None:
    directory = mount.path / "fails"
    with lost() as uri:
        process = start("pull", "--wait", "--rate=1M", "--deadline=0.3", uri, directory)
        eventually(directory.exists, "the directory is there")
    done = end(process)
    assert done.code == 11
    assert "what is touched fails until it is back" in done.err.splitlines()[-1]
    with fails(errno.EIO):
        read(directory / "pc.ram@0x0", 3 * MB, 1)
    with lost():
        eventually(lambda: not errno_of(lambda: read(directory / "pc.ram@0x0", 3 * MB, 1)), "it is back")
        run("resume", "--rate=0", directory).ok()
        eventually(lambda: not pulls(mount), "all is here")
    assert read(directory / "pc.ram@0x0") == RAM


def test_on_error_eio_waits_a_little(mount: Mount, lost: Again) -> None:
    """As long as a server may take to be started again; the option alone is tried, for that is 10 s."""
    with lost() as uri:
        run("pull", "--paused", "--on-error=eio", uri, mount.path / "eio").ok()
    assert [(pull["wait"], pull["state"]) for pull in pulls(mount)] == [(10, "paused")]
    assert "fails 10 s after its source was lost" in run("status", mount.path, env={"COLUMNS": "400"}).ok()
    shutil.rmtree(mount.path / "eio")
    eventually(lambda: not pulls(mount), "the pull has ended")


def test_another_source(mount: Mount, lost: Again, served: Path, tmp_path: Path) -> None:
    """For one file it may have another name. Told of a clone, a snapshot, a file; who waits goes on."""
    vm, one = mount.path / "moves", mount.path / "moves-one"
    with lost() as uri:
        run("pull", "--paused", uri, vm).ok()
        run("pull", "--paused", uri.replace("///", "///pc.ram@0x0"), one).ok()
    subprocess.run(["cp", "-r", vm, mount.path / "clone"], check=True)
    (vm / ".snap" / "s").mkdir()
    reader = subprocess.Popen(["cat", vm / "state"], stdout=subprocess.PIPE)
    (tmp_path / "other").write_bytes(RAM)
    (tmp_path / "short").write_bytes(b"short")
    run("recover", vm, "--source=file:nothing", cwd=tmp_path).failed(12, tmp_path / "nothing")
    run("recover", one, "--source=file:short", cwd=tmp_path).failed(14, "5 bytes instead of 4194304")
    assert {pull["state"] for pull in pulls(mount)} <= {"paused", "waiting"}
    out = run("recover", mount.path / "clone", "--source", f"file:{served.name}", cwd=served.parent).ok()
    assert out == f"{mount.path}/clone: goes on from file:{served}\n"
    assert reader.communicate(timeout=10) == (b"state", None)
    assert run("pause", vm / ".snap" / "s", "--json").ok() == (
        json.dumps({"path": f"{vm}/.snap/s", "pulls": 1, "paused": True}) + "\n"
    )
    run("recover", one / "pc.ram@0x0", "--source=file:other", cwd=tmp_path).ok()
    mount.kill_daemon()  # the next one knows all that
    for directory in (vm / ".snap" / "s" / "pc.ram@0x0", one):
        run("resume", directory).ok()
    eventually(lambda: not pulls(mount), "all is here")
    for path in (vm, one, mount.path / "clone", vm / ".snap" / "s"):
        assert read(path / "pc.ram@0x0") == RAM


def test_removed_before_it_is_here(mount: Mount, uri: str) -> None:
    directory = mount.path / "removed"
    process = start("pull", "--wait", "--rate=100K", uri, directory)
    eventually(directory.exists, "the directory is there")
    time.sleep(0.3)
    shutil.rmtree(directory)
    done = end(process)
    assert (done.code, done.err) == (1, f"ramfs: {directory} was removed or renamed before all of it was here\n")
