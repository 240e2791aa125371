"""`ramfs send` and `ramfs receive` between two mounts: all comes along, or nothing changes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pwd
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import NOBODY, Outcome, needs_root, run
from cli.test_generations import differing, grow_generations, pages_of, unique
from harness import Mount
from mount.posix import eventually

PAGE, MB = 4096, 1 << 20
RAMFS = [sys.executable, "-P", "-m", "ramfs"]


@pytest.fixture(scope="module")
def mounts(module_shm: Path) -> Iterator[tuple[Mount, Mount]]:
    with Mount(module_shm / "a", module_shm / "here") as a, Mount(module_shm / "b", module_shm / "there") as b:
        yield a, b


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user may enter."""
    base = Path(tempfile.mkdtemp(prefix="ramfs-public-", dir="/var/tmp"))
    base.chmod(0o755)
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def here(mounts: tuple[Mount, Mount], request: pytest.FixtureRequest) -> Path:
    """A directory that is sent from."""
    path = mounts[0].path / request.node.name
    path.mkdir()
    return path


@pytest.fixture
def there(mounts: tuple[Mount, Mount], request: pytest.FixtureRequest) -> Path:
    """A directory on another mount to receive in, of which nothing may stay hidden."""
    path = mounts[1].path / request.node.name
    path.mkdir()
    return path


def sent(*args: object) -> bytes:
    done = subprocess.run([*RAMFS, "send", *map(str, args)], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    return done.stdout


def received(directory: Path, stream: bytes, *args: object) -> Outcome:
    command = [*RAMFS, "receive", *map(str, args), str(directory)]
    done = subprocess.run(command, input=stream, capture_output=True, check=False, timeout=60)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def piped(snapshot: Path, directory: Path, *args: object, receive: tuple[object, ...] = ()) -> dict[str, Any]:
    """Through a pipe, as to another host; what the receiver tells."""
    send = shlex.join([*RAMFS, "send", *map(str, args), str(snapshot)])
    take = shlex.join([*RAMFS, "receive", "--json", *map(str, receive), str(directory)])
    script = f"set -o pipefail; {send} | {take}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return dict(json.loads(done.stdout))


def snap(directory: Path, name: str) -> Path:
    path = directory / ".snap" / name
    path.mkdir()
    return path


def tree(top: Path) -> dict[str, tuple[Any, ...]]:
    """All that can be seen of a directory."""
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        told = path.lstat()
        names = os.listxattr(path, follow_symlinks=False)
        found[str(path.relative_to(top))] = (
            stat.S_IFMT(told.st_mode), stat.S_IMODE(told.st_mode), told.st_uid, told.st_gid, told.st_mtime_ns,
            told.st_nlink, told.st_rdev, [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names],
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )  # fmt: skip
    return found


def same(a: Path, b: Path) -> None:
    one, other = tree(a), tree(b)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name][-1] == other[name][-1], name
        assert one[name][:-1] == other[name][:-1], name


@needs_root
def test_all_of_it_comes_along(here: Path, there: Path) -> None:
    vm = here / "vm"
    (vm / "sub/deep").mkdir(parents=True)
    (vm / "pc.ram@0x0").write_bytes(unique(300) + bytes(700 * PAGE) + unique(300) + b"end")
    (vm / "state").write_bytes(b"state")
    (vm / "empty").touch()
    (vm / "zeros").write_bytes(bytes(5 * PAGE))
    os.truncate(vm / "zeros", 1 << 33)
    os.link(vm / "state", vm / "sub/deep/hard")
    (vm / "sub/link").symlink_to("../nowhere")
    os.mkfifo(vm / "pipe", 0o640)
    os.mknod(vm / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(vm / "state", "user.note", b"\0\xff")
    os.setxattr(vm / "sub", "trusted.note", b"x")
    (vm / "sub" / os.fsdecode(b"\xff \n")).write_bytes(b"odd")
    (vm / "suid").write_bytes(b"x")
    os.chown(vm / "suid", 1234, 4321)
    (vm / "suid").chmod(0o6755)
    (vm / "sub").chmod(0o500)
    os.utime(vm / "sub", ns=(1, 10**18 + 7))
    ranges = [{"gpa": "0x7000", "size": "0x5000", "file": "pc.ram@0x0", "offset": "0x1000"}]
    (vm / ".guest/layout.json").write_text(json.dumps({"ranges": ranges, "machine": "pc"}))
    one = snap(vm, "one")
    stream = sent(one)
    assert len(stream) < (600 + 5) * (PAGE + 16) + 20_000  # no zeros
    assert received(there / "vm", stream).ok().startswith(f"{there}/vm: 6 files as of snapshot one; 2.4 MiB")
    (vm / "zeros").unlink()  # too large to be read here
    for top in (there / "vm", there / "vm/.snap/one"):
        assert (top / "zeros").stat().st_size == 1 << 33
    (there / "vm/zeros").unlink()
    for top in (vm, there / "vm"):
        os.utime(top, ns=(1, 1))
    same(vm, there / "vm")
    assert os.listdir(there) == ["vm"]
    assert os.listdir(there / "vm/.snap") == ["one"]
    for top in (there / "vm", there / "vm/.snap/one"):
        assert (top / ".guest/layout.json").read_text() == (one / ".guest/layout.json").read_text()
    (vm / ".guest/layout.json").unlink()
    piped(snap(vm, "two"), there / "vm", "-i", "one", receive=("--force",))
    assert json.loads((there / "vm/.guest/layout.json").read_text())["derived"]
    assert not json.loads((there / "vm/.snap/one/.guest/layout.json").read_text())["derived"]
    compressed = sent("--zstd", one)
    received(there / "again", compressed).ok()
    assert (there / "again/.snap/one/ramfs.manifest").read_bytes() == (one / "ramfs.manifest").read_bytes()


def test_generations_one_after_the_other(here: Path, there: Path, mounts: tuple[Mount, Mount]) -> None:
    vm, source = here / "vm", random.Random(5)
    vm.mkdir()
    generations = grow_generations(vm, source, 3)
    os.rename(vm / "sub/other", vm / "moved")
    (vm / "sub").rmdir()
    (vm / "sub").symlink_to("moved")
    generations.append(snap(vm, "3"))
    piped(generations[0], there / "vm")
    for old, new in itertools.pairwise(generations):
        told = piped(new, there / "vm", "-i", old.name, *(["--zstd"] if new.name == "2" else []))
        names = [path.relative_to(new) for path in new.rglob("*") if path.is_file() and not path.is_symlink()]
        size = 0
        for name in names:
            there_now = pages_of(new / name)
            size += sum(any(there_now[page]) for page in differing(old / name, new / name) if page < len(there_now))
        assert told["page_bytes"] == size * PAGE
        same(new, there / "vm")
        same(new, there / "vm/.snap" / new.name)
    assert os.listdir(there / "vm/.snap") == ["0", "1", "2", "3"]
    for each in generations:
        assert (there / "vm/.snap" / each.name / "ramfs.manifest").read_bytes() == (
            each / "ramfs.manifest"
        ).read_bytes()
    logged = json.loads(run("log", "--json", there / "vm").ok())["generations"]
    assert [(each["name"], each["parent"] and Path(each["parent"]).name) for each in logged] == [
        (None, "3"), ("3", "2"), ("2", "1"), ("1", "0"), ("0", None),
    ]  # fmt: skip
    # What is the same is not there twice, and is still there when the mount comes back.
    shared = json.loads(run("du", "--json", there / "vm").ok())["total"]
    assert shared["owned"] == 0
    mounts[1].restart()
    same(generations[3], there / "vm")


def test_what_does_not_fit_changes_nothing(here: Path, there: Path) -> None:
    vm = here / "vm"
    vm.mkdir()
    (vm / "ram").write_bytes(unique(50))
    one = snap(vm, "one")
    (vm / "ram").write_bytes(unique(40))
    two = snap(vm, "two")
    (vm / "ram").write_bytes(b"x")
    three = snap(vm, "three")
    complete, step, other = sent(one), sent("-i", one, two), sent("-i", "two", three)
    target = there / "vm"
    received(target, step).failed(1, "is not there", "receive that one first")
    received(target, complete).ok()
    received(target, complete).failed(1, "exists")
    received(target, other).failed(1, "(two)", "newest snapshot is another one, one")
    with open(target / "ram", "r+b") as file:
        file.write(b"y")
    before = tree(target)
    received(target, step).failed(1, "has changed since its newest snapshot, one", "--force")
    assert tree(target) == before
    assert os.listdir(there) == ["vm"]
    received(target, step, "--force").ok()
    assert (target / "ram").read_bytes() == (two / "ram").read_bytes()
    received(target, step).failed(1, "has a snapshot two already")
    (target / "new").touch()
    received(target, other).failed(1, "has changed")
    (target / "new").unlink()
    received(target, other).ok()
    (there / "plain").mkdir()
    received(there / "plain", step).failed(1, "it has no snapshot")
    for stream, code, words in (
        (b"", 11, "is empty"), (b"RAMFSSTR", 11, "ends in its first bytes"), (b"#!/bin/sh\n" * 9, 13, "no stream"),
        (complete[:8] + b"\2\0\0\0" + complete[12:], 13, "version 2"), (complete + b"!", 13, "behind its end"),
        (sent("--zstd", one)[:200], 11, "the stream end"), (sent("--zstd", one)[:40] + b"!" * 99, 13, "the stream"),
    ):  # fmt: skip
        received(there / "none", stream).failed(code, words)
        assert not (there / "none").exists()
    run("receive", "--abort", there / "none").ok()
    assert sorted(os.listdir(there)) == ["plain", "vm"]


def test_a_file_in_use_is_not_replaced(here: Path, there: Path) -> None:
    vm, target = here / "vm", there / "vm"
    vm.mkdir()
    (vm / "ram").write_bytes(unique(50))
    piped(snap(vm, "one"), target)
    (vm / "ram").write_bytes(unique(60))
    step = sent("-i", "one", snap(vm, "two"))
    with open(target / "ram", "r+b"):
        received(target, step).failed(1, "open for writing")
        assert os.listdir(target / ".snap") == ["one"]
    assert received(target, step).ok()
    assert (target / "ram").read_bytes() == (vm / "ram").read_bytes()
    assert os.listdir(there) == ["vm"]


@pytest.fixture(scope="module")
def step(mounts: tuple[Mount, Mount]) -> tuple[Path, Path]:
    """Two generations, the second with more than a few records."""
    vm = mounts[0].path / "step"
    vm.mkdir()
    for name in ("ram", "other"):
        (vm / name).write_bytes(unique(1000))
    one = snap(vm, "one")
    with open(vm / "ram", "r+b") as file:
        file.write(unique(600))
    with open(vm / "other", "r+b") as file:
        file.seek(500 * PAGE)
        file.write(bytes(20 * PAGE) + unique(300))
    return one, snap(vm, "two")


def token_of(directory: Path) -> str:
    return run("receive", "--token", directory).ok().strip()


def test_what_is_cut_off_goes_on_with_a_token(step: tuple[Path, Path], there: Path) -> None:
    one, two = step
    target = there / "vm"
    piped(one, target)
    stream = sent("-i", one, two)
    before = tree(target)
    for number, at in enumerate((100, len(stream) // 2, len(stream) - 1)):
        said = received(target, stream[:at]).failed(11, "the stream end")
        assert tree(target) == before
        assert os.listdir(target / ".snap") == ["one"]
        kept = at > len(stream) // 4
        assert sorted(os.listdir(there)) == ([".vm.receiving", "vm"] if kept else ["vm"]), number
        if kept:
            token = token_of(target)
            assert f"{target} is as it was, and what came is kept: go on with `ramfs send -t {token}`" in said
            rest = sent("-t", token, *(["--zstd"] if number == 1 else []))
            assert len(rest) < len(stream) - at + 3 * MB // 2
            stream_of_rest = rest
    # The rest may be cut off as well, and the beginning may come again.
    told = json.loads(received(target, stream_of_rest, "--json").ok())
    assert told["resumed"]
    same(two, target)
    same(two, target / ".snap/two")
    assert os.listdir(there) == ["vm"]
    run("receive", "--token", target).failed(1, "no interrupted receive")
    received(there / "new", sent(one)[: 3 * MB]).failed(11)
    received(there / "new", stream_of_rest).failed(1, "is not there")
    received(there / "new", sent(two)).failed(1, "of another snapshot", "--abort")
    run("receive", "--abort", there / "new").ok()
    assert os.listdir(there) == ["vm"]
    received(there / "new", sent(one)).ok()
    same(one, there / "new")
    received(there / "gone", sent("-t", token_for(one, 2))).failed(1, "from its start")
    assert sorted(os.listdir(there)) == ["new", "vm"]


def token_for(snapshot: Path, record: int) -> str:
    from ramfs.transfer.sending import identity
    from ramfs.transfer.stream import Token

    return Token(str(snapshot), None, identity(str(snapshot)), None, record).text()


def test_what_is_damaged_changes_nothing(step: tuple[Path, Path], there: Path) -> None:
    one, two = step
    target, source = there / "vm", random.Random(7)
    piped(one, target)
    stream = sent("-i", one, two)
    before = tree(target)
    for at in [20, 300, *(source.randrange(len(stream)) for _ in range(2))]:
        damaged = bytearray(stream)
        damaged[at] ^= 1 << source.randrange(8)
        done = received(target, bytes(damaged))
        assert done.code in {11, 13, 15}, (at, done)
        done.failed(done.code)
        assert tree(target) == before
        assert os.listdir(target / ".snap") == ["one"]
    received(target, stream).ok()
    same(two, target)
    assert os.listdir(there) == ["vm"]


def test_a_receiver_that_is_killed_and_a_daemon_that_is_replaced(
    step: tuple[Path, Path], there: Path, mounts: tuple[Mount, Mount]
) -> None:
    one, _ = step
    target, stream = there / "vm", sent(one)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        feeder = subprocess.Popen([*RAMFS, "receive", target], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert feeder.stdin is not None
        feeder.stdin.write(stream[: 5 * MB])
        feeder.stdin.flush()
        eventually((there / ".vm.receiving/tree/ram").exists, "it has begun")
        if signum == signal.SIGTERM:
            mounts[1].kill_daemon()
        feeder.send_signal(signum)
        _, said = feeder.communicate()
        assert feeder.returncode in {130, -signal.SIGKILL}
        assert (b"go on with" in said) == (signum == signal.SIGTERM)
        assert not target.exists()
        token_of(target)
    received(target, sent("-t", token_of(target))).ok()
    same(one, target)
    assert os.listdir(there) == ["vm"]


def test_pages_that_were_lost_in_between_are_found(step: tuple[Path, Path], there: Path) -> None:
    """As after a power loss: what was noted as here is not. The sender's manifest tells."""
    one, _ = step
    target = there / "vm"
    received(target, sent(one)[: 5 * MB]).failed(11)
    with open(there / ".vm.receiving/tree/other", "r+b") as file:
        file.write(bytes(PAGE))
    received(target, sent("-t", token_of(target))).failed(15, "not what was sent", "from its start")
    assert os.listdir(there) == []


@needs_root
def test_a_full_store(step: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = step
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "ramfs-test", small], check=True)
    try:
        with Mount(small / "store", tmp_path / "mnt") as mount:
            mount.expect("No space left on device|disk is full")
            ballast = mount.path / "ballast"
            ballast.write_bytes(unique(15 * MB // PAGE))
            target = mount.path / "vm"
            done = received(target, sent(one))
            assert "No space left" in done.failed(1, f"{target} is as it was")
            assert not target.exists()
            ballast.unlink()
            eventually(lambda: os.statvfs(mount.path).f_bavail * PAGE > 12 * MB, "there is room", timeout=60)
            rest = sent("-t", token_of(target)) if (mount.path / ".vm.receiving").exists() else sent(one)
            received(target, rest).ok()
            same(one, target)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_what_cannot_be_sent(step: tuple[Path, Path], here: Path) -> None:
    one, two = step
    run("send", one.parents[1]).failed(1, "is no snapshot")
    run("send", one / "ram").failed(1, "is no snapshot")
    run("send").failed(2, "SNAPSHOT")
    run("send", "-i", "none", two).failed(1, f"{two.parent}/none: No such file")
    run("send", "-t", "ramfs1-nonsense").failed(2, "no token")
    run("send", "-t", token_for(one, 0), two).failed(1, "not what the token is of")
    assert "less to send" in run("send", "-t", token_for(one, 1000)).err
    (here / "vm").mkdir()
    (here / "vm/ramfs.manifest").touch()
    run("send", snap(here / "vm", "own")).failed(1, "no manifest")


def test_a_snapshot_that_vanishes_and_a_reader_that_goes(here: Path, there: Path) -> None:
    vm = here / "vm"
    vm.mkdir()
    for name in ("a", "b"):
        (vm / name).write_bytes(unique(1000))
    one = snap(vm, "one")
    with subprocess.Popen([*RAMFS, "send", one], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sender:
        assert sender.stdout is not None
        assert sender.stderr is not None
        head = sender.stdout.read(MB)
        one.rmdir()
        rest = sender.stdout.read()
        said = sender.stderr.read().decode()
    assert sender.returncode == 1
    assert (said.count("\n"), "meanwhile" in said) == (1, True), said
    received(there / "vm", head + rest).failed(11, "ended")
    assert not (there / "vm").exists()
    two = snap(vm, "two")
    with subprocess.Popen([*RAMFS, "send", two], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sender:
        assert sender.stdout is not None
        assert sender.stderr is not None
        sender.stdout.read(100)
        sender.stdout.close()
        said = sender.stderr.read().decode()
    assert sender.returncode == 1
    assert (said.count("\n"), "gone before its end" in said) == (1, True), said
    # A file can be appended to, though the kernel copies nothing to one by itself.
    script = f"{shlex.join([*RAMFS, 'send', str(two)])} >> {shlex.quote(str(there / 'stream'))}"
    subprocess.run(["bash", "-c", script], check=True, timeout=60)
    received(there / "vm", (there / "stream").read_bytes()).ok()
    same(two, there / "vm")


def test_snapshots_go_with_an_exchange_only_when_asked_to(here: Path) -> None:
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / name).touch()
        snap(here / name, f"of-{name}")
    exchange(here / "a", here / "b")
    assert os.listdir(here / "b/.snap") == ["of-a"]
    os.setxattr(here / "a", "user.ramfs.heir", b"1")
    assert os.listxattr(here / "a") == []
    (here / "b/.snap/of-b").mkdir()
    with pytest.raises(OSError, match="exists") as refused:
        exchange(here / "a", here / "b")
    assert refused.value.errno == errno.EEXIST
    (here / "b/.snap/of-b").rmdir()
    exchange(here / "a", here / "b")
    assert os.listdir(here / "a/.snap") == []
    assert os.listdir(here / "b/.snap") == ["of-a", "of-b"]
    assert os.listdir(here / "b/.snap/of-a") == ["a"]
    assert (here / "b/.snap/of-a/..").stat().st_ino == (here / "b/.snap").stat().st_ino
    (here / "a/a").unlink()
    (here / "a").rmdir()
    (here / "b/.snap/of-a").rmdir()
    with pytest.raises(PermissionError):
        os.setxattr(here / "b/b", "user.ramfs.heir", b"1")


def exchange(one: Path, other: Path) -> None:
    from ramfs.transfer.receiving import _exchange

    _exchange(str(one), str(other))


@needs_root
def test_another_user_than_root(public: Path) -> None:
    with Mount(public / "store", public / "mnt", ["allow_other"]) as mount:
        mount.path.chmod(0o755)
        source, home = mount.path / "vm", mount.path / "home"
        for path in (source, home):
            path.mkdir(0o755)
        os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)
        (source / "ram").write_bytes(unique(20))
        (source / "ram").chmod(0o640)
        os.setxattr(source / "ram", "trusted.note", b"x")
        one = snap(source, "one")
        (source / "ram").write_bytes(unique(30))
        two = snap(source, "two")
        for stream in (sent(one), sent("-i", one, two)):
            command = [*NOBODY, *RAMFS, "receive", home / "vm"]
            done = subprocess.run(command, input=stream, capture_output=True, check=False, timeout=60)
            assert (done.returncode, done.stderr) == (0, b"")
        assert (home / "vm/ram").read_bytes() == (source / "ram").read_bytes()
        assert (home / "vm/ram").stat().st_uid == pwd.getpwnam("nobody").pw_uid
        assert os.listdir(home / "vm/.snap") == ["one", "two"]
        assert os.listdir(home) == ["vm"]
        refused = subprocess.run([*NOBODY, *RAMFS, "send", two], capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "may not read all files" in refused.stderr


def test_two_receivers_do_not_meet(step: tuple[Path, Path], there: Path) -> None:
    one, _ = step
    stream, target = sent(one), there / "vm"
    with subprocess.Popen([*RAMFS, "receive", target], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin is not None
        first.stdin.write(stream[: 3 * MB])
        first.stdin.flush()
        eventually((there / ".vm.receiving").exists, "it has begun")
        received(target, stream).failed(1, "another ramfs receive")
        run("receive", "--abort", target).failed(1, "another ramfs receive")
        first.stdin.write(stream[3 * MB :])
        first.stdin.close()
        assert first.wait(30) == 0
    same(one, target)
