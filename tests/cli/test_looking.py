"""What can be seen of a mount: status, metrics, du."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Place, call, needs_root, run

from ramfs.cli._text import human, printable
from ramfs.supervisor.client import ask

PAGE = 4096


def write_pages(path: Path, pages: int, first: int = 0, total: int | None = None) -> None:
    with open(path, "r+b" if path.exists() else "w+b") as file:
        if total is not None:
            file.truncate(total * PAGE)
        os.pwrite(file.fileno(), os.urandom(pages * PAGE), first * PAGE)


def counts(path: Path) -> dict[str, int]:
    return dict(json.loads(os.getxattr(path, "user.ramfs.pages")))


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- status ---


def everything(*args: str) -> str:
    """`ramfs status` of all mounts. Others on this machine may be in any state, which costs a line each."""
    done = run("status", *args, env={"COLUMNS": "200"})
    assert done.code == 0, done
    return done.out


def test_status_table(mounted_place: Place) -> None:
    place = mounted_place
    with open(place.path / "[bold]ram", "wb"):
        out = run("status", place.path, env={"COLUMNS": "200"}).ok()
    for words in (str(place.path), str(place.store), f"pid {place.status()['pid']}", "[bold]ram", str(os.getpid())):
        assert words in out
    assert str(place.path) in everything()


def test_status_json(mounted_place: Place) -> None:
    place = mounted_place
    (place.path / "vm").mkdir()
    one = json.loads(run("status", "--json", place.path / "vm").ok())
    all_ = json.loads(everything("--json"))
    assert one["mountpoint"] == str(place.path)
    assert one["store"] == str(place.store)
    assert isinstance(one["pid"], int)
    assert one["pid"] in {each["pid"] for each in all_}
    assert os.readlink(f"/proc/{one['pid']}/exe") == os.path.realpath(sys.executable)


def start_watching(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "ramfs", "status", "--watch", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_status_watch_json(mounted_place: Place) -> None:
    watch = start_watching("--json", mounted_place.path)
    assert watch.stdout is not None
    looks = [json.loads(watch.stdout.readline()) for _ in range(3)]
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=10)
    assert (watch.returncode, err) == (0, "")
    uptimes = [look["uptime_seconds"] for look in looks]
    assert uptimes == sorted(set(uptimes))


def test_status_watch_ends_with_the_mount(mounted_place: Place) -> None:
    watch = start_watching("--json", mounted_place.path)
    assert watch.stdout is not None
    watch.stdout.readline()
    while run("umount", mounted_place.path).code:  # it may be reading just now
        pass
    _, err = watch.communicate(timeout=10)
    assert watch.returncode == 8
    assert str(mounted_place.path) in err


def test_status_watch_on_a_terminal(mounted_place: Place) -> None:
    master, slave = os.openpty()
    watch = subprocess.Popen(
        [sys.executable, "-P", "-m", "ramfs", "status", "-w", mounted_place.path],
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while shown.count(b"daemon") < 2:
        shown += os.read(master, 65536)
    watch.send_signal(signal.SIGINT)
    assert watch.wait(10) == 0
    os.close(master)
    assert b"Traceback" not in shown


@needs_root
def test_through_another_place_where_it_is_bound(mounted_place: Place) -> None:
    place = mounted_place
    (place.path / "vm").mkdir()
    write_pages(place.path / "vm/ram", 3)
    bound = place.base / "bound"
    bound.mkdir()
    call("mount", "--bind", place.path / "vm", bound).ok()
    try:
        assert json.loads(run("status", "--json", bound).ok())["mountpoint"] == str(place.path)
        mine = [each for each in json.loads(everything("--json")) if each["store"] == str(place.store)]
        assert len(mine) == 1
        assert run("du", "--pages", bound / "ram").ok().split()[-5:-1] == ["3", "0", "0", "0"]
        run("clone", bound, bound / "inner").ok()
        assert (place.path / "vm/inner/ram").read_bytes() == (place.path / "vm/ram").read_bytes()
    finally:
        call("umount", bound).ok()


def test_status_tells_of_the_daemons_before(mounted_place: Place) -> None:
    place = mounted_place
    facts = place.status()["supervisor"]
    assert f"pid {facts['pid']}, 1 daemons so far, of which 0 died" in run("status", place.path).ok()
    killed = place.status()["pid"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: place.status()["pid"] != killed)
    run("upgrade", place.path).ok()
    now = place.status()["supervisor"]
    assert now == {"pid": facts["pid"], "starts": 3, "crashes": 1, "why": now["why"]}
    out = run("status", place.path, env={"COLUMNS": "200"}).ok()
    assert f"pid {facts['pid']}, 3 daemons so far, of which 1 died" in out
    assert f"last start  {now['why']}" in re.sub(" +│ +", "  ", out)
    place.umount()


def test_status_of_a_mount_whose_daemons_die(mounted_place: Place) -> None:
    place = mounted_place
    facts = ask(str(place.store), "status")
    while facts["state"] != "halted":
        if facts["daemon"] is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(facts["daemon"], signal.SIGKILL)
        time.sleep(0.02)
        facts = ask(str(place.store), "status")
    words = (place.path, "8 daemons died", "ended by signal 9", "ramfs upgrade", "ramfs umount --abort")
    run("status", place.path).failed(8, *words)
    (line,) = (line for line in run("status").err.splitlines() if str(place.path) in line)
    assert all(str(word) in line for word in words)
    run("upgrade", place.path).ok()
    assert "9 daemons so far, of which 8 died" in run("status", place.path, env={"COLUMNS": "200"}).ok()
    place.umount()


def test_status_of_a_daemon_that_is_stopped(mounted_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramfs.cli import _mounts, status
    from ramfs.errors import MountError

    monkeypatch.setattr(_mounts, "PATIENCE", 0.3)
    entry = _mounts.mounted_at(str(mounted_place.path))
    assert entry is not None
    pid = mounted_place.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(MountError, match=f"process {pid}, hangs or is stopped; once that is killed another one goes"):
        status.read_status(entry)
    os.kill(pid, signal.SIGKILL)
    assert mounted_place.status()["pid"] != pid
    mounted_place.umount()


# --- metrics ---

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (\S+)(?: -?\d+)?")


def parse_metrics(text: str) -> dict[str, dict[str, float]]:
    """Prometheus' text format 0.0.4, strictly: families in one piece, each with HELP and TYPE, nothing twice."""
    families: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    helped: list[str] = []
    assert text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if match := re.fullmatch(rf"# HELP ({_NAME}) (.+)", line):
            assert match[1] not in helped, line
            helped.append(match[1])
        elif match := re.fullmatch(rf"# TYPE ({_NAME}) (counter|gauge)", line):
            assert match[1] == helped[-1], line
            assert match[1] not in kinds, line
            kinds[match[1]] = match[2]
            families[match[1]] = {}
        else:
            found = _SAMPLE.fullmatch(line)
            assert found, line
            assert found[1] == helped[-1] == list(kinds)[-1], line
            assert (found[2] or "") not in families[found[1]], line
            families[found[1]][found[2] or ""] = float(found[3])
    for name, kind in kinds.items():
        assert families[name], name
        assert name.endswith("_total") == (kind == "counter"), name
    return families


def test_metrics(mounted_place: Place) -> None:
    place = mounted_place
    before = parse_metrics((place.path / ".ramfs/metrics").read_text())
    write_pages(place.path / "ram", 10)
    after = parse_metrics((place.path / ".ramfs/metrics").read_text())
    assert set(after) == set(before)
    assert all(name.startswith("ramfs_") for name in after)
    written = after["ramfs_written_bytes_total"][""] - before["ramfs_written_bytes_total"][""]
    assert written == 10 * PAGE
    assert after["ramfs_images"]['state="total"'] == 1
    for name, samples in after.items():
        if name.endswith("_total"):
            assert all(samples[labels] >= value for labels, value in before[name].items()), name


def test_the_files_of_dot_ramfs_are_not_listed(mounted_place: Place) -> None:
    assert os.listdir(mounted_place.path) == []
    assert {"status.json", "metrics"} <= set(os.listdir(mounted_place.path / ".ramfs"))


# --- du ---


@pytest.fixture
def parent(mounted_place: Place) -> Path:
    """A directory with a file of 16 pages, of which 6 are stored."""
    directory = mounted_place.path / "parent"
    directory.mkdir()
    write_pages(directory / "ram", 6, 4, 16)
    return directory


@pytest.mark.parametrize("how", ["cp", "ramfs"])
def test_a_clone_owns_nothing_and_then_exactly_what_it_writes(parent: Path, how: str) -> None:
    clone = parent.parent / "clone"
    assert counts(parent / "ram") == {"owned": 6, "shared": 0, "zero": 10, "absent": 0, "total": 16}
    if how == "cp":
        call("cp", "-r", parent, clone).ok()
    else:
        run("clone", parent, clone).ok()
    for path in (parent, clone):
        assert counts(path / "ram") == {"owned": 0, "shared": 6, "zero": 10, "absent": 0, "total": 16}
    write_pages(clone / "ram", 3, 5)  # three that were shared
    assert counts(clone / "ram") == {"owned": 3, "shared": 3, "zero": 10, "absent": 0, "total": 16}
    assert counts(parent / "ram") == {"owned": 3, "shared": 3, "zero": 10, "absent": 0, "total": 16}
    write_pages(clone / "ram", 2, 0)  # two that were zero
    assert counts(clone / "ram") == {"owned": 5, "shared": 3, "zero": 8, "absent": 0, "total": 16}
    with open(clone / "ram", "r+b") as file:
        os.pwrite(file.fileno(), bytes(4 * PAGE), 0)  # and back
    assert counts(clone / "ram") == {"owned": 3, "shared": 3, "zero": 10, "absent": 0, "total": 16}
    (parent / "ram").unlink()
    eventually(lambda: counts(clone / "ram")["owned"] == 6)  # when the kernel has forgotten the other


def test_a_snapshot_shares(parent: Path) -> None:
    (parent / ".snap/s").mkdir()
    assert counts(parent / "ram")["shared"] == counts(parent / ".snap/s/ram")["shared"] == 6
    (parent / ".snap/s").rmdir()
    eventually(lambda: counts(parent / "ram")["owned"] == 6)


def test_du_sees_what_was_stored_a_moment_ago(parent: Path) -> None:
    with open(parent / "ram", "r+b") as file, mmap.mmap(file.fileno(), 16 * PAGE) as memory:
        memory[0] = 1
        assert du(parent / "ram")["total"]["owned"] == 7


def du(path: Path) -> dict[str, Any]:
    return dict(json.loads(run("du", "--json", path).ok()))


def test_du_json(parent: Path) -> None:
    (parent / "sub").mkdir()
    (parent / "sub/empty").touch()
    (parent / "link").symlink_to("ram")
    told = du(parent)
    assert told["page_bytes"] == PAGE
    assert told["files"] == {
        str(parent / "ram"): {"owned": 6, "shared": 0, "zero": 10, "absent": 0, "total": 16},
        str(parent / "sub/empty"): {"owned": 0, "shared": 0, "zero": 0, "absent": 0, "total": 0},
    }
    assert told["total"] == {"owned": 6, "shared": 0, "zero": 10, "absent": 0, "total": 16}
    assert du(parent / "link")["total"]["owned"] == 6
    assert set(du(parent.parent)["files"]) == set(told["files"])


def test_du_text(parent: Path) -> None:
    (parent / "zz").touch()
    lines = run("du", "--pages", parent).ok().splitlines()
    assert [line.split() for line in lines] == [
        ["owned", "shared", "zero", "absent", "file"],
        ["6", "0", "10", "0", str(parent / "ram")],
        ["0", "0", "0", "0", str(parent / "zz")],
        ["6", "0", "10", "0", "total"],
    ]
    sizes = run("du", parent / "ram").ok().splitlines()
    assert sizes[1].split(maxsplit=8) == ["24.0", "KiB", "0", "B", "40.0", "KiB", "0", "B", str(parent / "ram")]
    assert len(sizes) == 2


def test_du_keeps_names_whole(parent: Path) -> None:
    """One line a file, the name as it is, however long and odd, so that scripts can use it."""
    for name in (b"[red]x" * 30, b"\xff\xfe", "grün".encode()):
        Path(os.fsdecode(os.fsencode(parent) + b"/" + name)).touch()
    lines = run("du", parent).ok().splitlines()
    names = {line.split("/parent/")[1] for line in lines if "/parent/" in line}
    assert names == {os.fsdecode(name) for name in (b"ram", b"[red]x" * 30, b"\xff\xfe", "grün".encode())}


def test_du_of_what_has_no_pages(mounted_place: Place) -> None:
    path = mounted_place.path
    os.mkfifo(path / "pipe")
    run("du", path / "pipe").failed(1, path / "pipe", "regular file")
    run("du", path / ".ramfs/status.json").failed(1, "status.json", "regular file")
    assert du(path)["files"] == {}


def test_text() -> None:
    assert [human(count) for count in (0, 1023, 1024, 1536, 5 << 30, 3 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB", "3.0 TiB",
    ]  # fmt: skip
    assert printable(os.fsdecode(b"a\xffb\n\x1b[31m\xc3\xbc")) == r"a\xffb\n\x1b[31mü"
