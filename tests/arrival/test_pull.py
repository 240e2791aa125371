"""A directory whose pages are still at a server."""

from __future__ import annotations

import mmap
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from arrival.conftest import MB, counts, nbdkit, pull, pulls, sparse_file, steer, wait_until_here
from harness import Mount
from mount.posix import eventually, opened, read

PAGE = 4096
MIB = 16


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A directory with a sparse file, and that file's bytes."""
    directory = tmp_path_factory.mktemp("served")
    data = sparse_file(directory / "pc.ram@0x0", MIB)
    (directory / "state").write_bytes(b"device state" * 100)
    (directory / "empty").write_bytes(b"")
    return directory, data


@pytest.fixture
def uri(served: tuple[Path, bytes], tmp_path: Path) -> Iterator[str]:
    with nbdkit(tmp_path / "nbd", "file", f"dir={served[0]}") as uri:
        yield uri


def settled(mount: Mount) -> dict[str, Any]:
    """What is told of a paused pull when the kernel has read ahead all that it wants."""
    told: list[dict[str, Any]] = []
    eventually(lambda: told.append(pulls(mount)[0]) or told[-2:-1] == told[-1:], "nothing comes any more")
    return told[-1]


def test_it_is_there_at_once_and_then_here(mounted: Mount, uri: str, served: tuple[Path, bytes]) -> None:
    told = pull(mounted, uri)
    directory = mounted.path / "vm"
    assert told["files"] == 3
    assert sorted(os.listdir(directory)) == ["empty", "pc.ram@0x0", "state"]
    assert (directory / "pc.ram@0x0").stat().st_size == len(served[1])
    wait_until_here(mounted)
    assert read(directory / "pc.ram@0x0") == served[1]
    assert (directory / "state").read_bytes() == b"device state" * 100
    found = counts(directory / "pc.ram@0x0")
    assert (found["absent"], found["zero"]) == (0, MIB // 4 * MB // PAGE)
    assert not list((mounted.store / "layers").glob("*.here"))
    mounted.restart()
    assert read(directory / "pc.ram@0x0") == served[1]


def test_what_is_touched_comes_and_no_more(mounted: Mount, uri: str, served: tuple[Path, bytes]) -> None:
    pull(mounted, uri, paused=True)
    path = mounted.path / "vm" / "pc.ram@0x0"
    assert read(path, 5 * MB + 77, 100) == served[1][5 * MB + 77 : 5 * MB + 177]
    (told,) = pulls(mounted)
    assert told["state"] == "paused"
    assert told["demand_faults"] >= 1
    assert PAGE <= told["fetched_bytes"] <= 2 * MB
    found = counts(path)
    assert found["absent"] * PAGE == len(served[1]) + -len(served[1]) % PAGE - told["fetched_bytes"]
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    assert read(path) == served[1]


def test_mapped(mounted: Mount, uri: str, served: tuple[Path, bytes]) -> None:
    pull(mounted, uri, paused=True)
    with opened(mounted.path / "vm" / "pc.ram@0x0") as fd, mmap.mmap(fd, MIB * MB) as memory:
        for page in (0, 700, 1030, 4000):
            assert memory[page * PAGE : page * PAGE + 64] == served[1][page * PAGE : page * PAGE + 64]
        memory[9 * MB + 5 : 9 * MB + 8] = b"abc"
        expected = bytearray(served[1][: MIB * MB])
        expected[9 * MB + 5 : 9 * MB + 8] = b"abc"
        steer(mounted, "vm", paused=False)
        wait_until_here(mounted)
        assert memory[:] == expected


def test_writes_before_the_pages_are_here(mounted: Mount, uri: str, served: tuple[Path, bytes]) -> None:
    """A page that is overwritten whole is never fetched; of one that is not, the rest is."""
    pull(mounted, uri, paused=True)
    path = mounted.path / "vm" / "pc.ram@0x0"
    expected = bytearray(served[1])

    def write(offset: int, data: bytes) -> None:
        with opened(path) as fd:
            assert os.pwrite(fd, data, offset) == len(data)
        expected[offset : offset + len(data)] = data

    write(2 * MB, b"w" * 64 * PAGE)
    assert pulls(mounted)[0]["fetched_bytes"] == 0
    write(4 * MB + 100, b"part")
    assert pulls(mounted)[0]["fetched_bytes"] == PAGE
    write(6 * MB - 10, b"x" * (PAGE + 20))
    assert pulls(mounted)[0]["fetched_bytes"] == 3 * PAGE
    with opened(path) as fd:
        subprocess.run(["fallocate", "-p", "-o", str(8 * MB), "-l", str(MB), path], check=True)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    expected[8 * MB : 9 * MB] = bytes(MB)
    assert pulls(mounted)[0]["fetched_bytes"] == 3 * PAGE
    os.truncate(path, 13 * MB + 300)
    os.truncate(path, 14 * MB)
    expected[13 * MB + 300 :] = bytes(MB - 300)
    assert pulls(mounted)[0]["fetched_bytes"] == 4 * PAGE
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    assert read(path) == expected


def test_clones_and_snapshots_share_what_arrives(mounted: Mount, uri: str, served: tuple[Path, bytes]) -> None:
    pull(mounted, uri, paused=True)
    root = mounted.path
    subprocess.run(["cp", "-r", root / "vm", root / "clone"], check=True)
    os.mkdir(root / "vm" / ".snap" / "s")
    subprocess.run(["cp", "-r", root / "vm" / ".snap" / "s", root / "second"], check=True)
    assert pulls(mounted)[0]["fetched_bytes"] == 0
    assert read(root / "clone" / "pc.ram@0x0", MB, 10) == served[1][MB : MB + 10]
    once = pulls(mounted)[0]["fetched_bytes"]
    for name in ("vm", "second", "vm/.snap/s"):
        assert read(root / name / "pc.ram@0x0", MB, 10) == served[1][MB : MB + 10]
    assert pulls(mounted)[0]["fetched_bytes"] == once
    shutil.rmtree(root / "vm", ignore_errors=True)
    os.rmdir(root / "vm" / ".snap" / "s")
    shutil.rmtree(root / "vm")
    steer(mounted, "second", paused=False)
    wait_until_here(mounted)
    for name in ("clone", "second"):
        assert read(root / name / "pc.ram@0x0") == served[1]


def test_deleted_before_it_is_here(mounted: Mount, uri: str) -> None:
    pull(mounted, uri, paused=True)
    shutil.rmtree(mounted.path / "vm")
    eventually(lambda: not list((mounted.store / "layers").iterdir()), "the layers are gone")
    eventually(lambda: not pulls(mounted), "so is the pull")


def test_a_pull_that_was_told_of_outlives_power_loss(mounted: Mount, uri: str, served: tuple[Path, bytes]) -> None:
    pull(mounted, uri, paused=True)
    path = mounted.path / "vm" / "pc.ram@0x0"
    assert read(path, 0, MB) == served[1][:MB]
    settled(mounted)  # nbdkit may end of a connection that breaks in the middle of an answer
    mounted.kill()
    db = sqlite3.connect(mounted.store / "catalog.sqlite")  # the next mount believes that the machine went down
    db.execute("UPDATE meta SET value = 'another' WHERE key = 'boot_id'")
    db.commit()
    db.close()
    mounted.start()
    assert path.stat().st_size == len(served[1])
    assert read(path, 0, MB) == served[1][:MB]
    assert pulls(mounted)[0]["fetched_bytes"] >= MB, "what was not synced counts as here"
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    assert read(path) == served[1]


@pytest.mark.parametrize("how", ["kill_daemon", "kill", "restart"])
def test_the_next_daemon_goes_on(mounted: Mount, uri: str, served: tuple[Path, bytes], how: str) -> None:
    pull(mounted, uri, paused=True)
    path = mounted.path / "vm" / "pc.ram@0x0"
    assert read(path, 0, MB) == served[1][:MB]
    before = settled(mounted)
    getattr(mounted, how)()
    if how == "kill":
        mounted.start()
    eventually(lambda: pulls(mounted) and pulls(mounted)[0]["here_bytes"] == before["here_bytes"], "it goes on")
    assert pulls(mounted)[0]["state"] == "paused"
    assert read(path, 0, MB) == served[1][:MB]
    assert pulls(mounted)[0]["fetched_bytes"] == 0, "what was here was fetched again"
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    assert read(path) == served[1]
