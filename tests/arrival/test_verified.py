"""Pages are compared with the manifest of their source, and a wrong one is never given out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from arrival.conftest import MB, control, counts, nbdkit, pull, pulls, sparse_file, steer, wait_until_here
from harness import Mount
from mount.posix import PAGE, errno_of, eventually, fails, opened, pattern, read
from source.cases import manifest_of

from ramfs.image.digest import KNOWN_LOST, digest_padded
from ramfs.source.manifest import NAME
from ramfs.store.repair import check_store

RAM = "pc.ram@0x0"
MIB = 8
BAD = 7
"""the page that is wrong at some servers"""


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A directory with a manifest."""
    directory = tmp_path / "served"
    directory.mkdir()
    sparse_file(directory / RAM, MIB)
    (directory / "state").write_bytes(b"device state" * 100)
    (directory / "empty").touch()
    seal(directory)
    return directory


def seal(directory: Path) -> None:
    """Give a directory a manifest of what it has now."""
    (directory / NAME).unlink(missing_ok=True)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    (directory / NAME).write_bytes(manifest_of(files))


def spoil(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE + 100)
        file.write(b"something else")


def digested(store: Path) -> dict[int, bool]:
    """Of each layer: does it count as digested? Of a store that is not mounted."""
    with contextlib.closing(sqlite3.connect(store / "catalog.sqlite")) as catalog:
        return {number: bool(flag) for number, flag in catalog.execute("SELECT id, digested FROM layers")}


class Touch:
    """Somebody who reads a page in a thread of his own."""

    def __init__(self, path: Path, page: int, length: int = PAGE) -> None:
        self.data = b""
        self.error = 0
        self.thread = threading.Thread(target=self._run, args=(path, page, length), daemon=True)
        self.thread.start()

    def _run(self, path: Path, page: int, length: int) -> None:
        with opened(path, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            try:
                self.data = os.pread(fd, length, page * PAGE)
            except OSError as error:
                self.error = error.errno or -1

    @property
    def waits(self) -> bool:
        return self.thread.is_alive()

    def end(self, timeout: float = 20) -> bytes:
        self.thread.join(timeout)
        assert not self.waits, "it still waits"
        assert not self.error, errno.errorcode[self.error]
        return self.data


def test_here_without_being_hashed_again(mounted: Mount, served: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        assert pull(mounted, uri)["verified"]
        layers = mounted.store / "layers"
        promised = {path.name: path.read_bytes() for path in layers.glob("*.xxh3")}
        assert len(promised) == 2
        wait_until_here(mounted)
        assert not list(layers.glob("*.new"))
    for name in (RAM, "state", "empty"):
        assert read(mounted.path / "vm" / name) == (served / name).read_bytes()
    assert counts(mounted.path / "vm" / RAM)["zero"] == MIB // 4 * MB // PAGE
    mounted.umount()
    assert digested(mounted.store) == {1: True, 2: True}
    assert {path.name: path.read_bytes() for path in layers.glob("*.xxh3")} == promised
    assert not check_store(str(mounted.store)).findings
    mounted.start()


def test_a_wrong_page_waits_for_a_source_that_has_it(mounted: Mount, served: Path, tmp_path: Path) -> None:
    expected = (served / RAM).read_bytes()
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        mounted.expect("page 7 of pc.ram@0x0 is not what its manifest says")
        pull(mounted, f"fault:corrupt=page{BAD}:{uri}")
        path = mounted.path / "vm" / RAM
        touch = Touch(path, BAD)
        eventually(lambda: counts(path)["absent"] == 1, "all others come")
        assert read(path, (BAD + 1) * PAGE) == expected[(BAD + 1) * PAGE :]
        eventually(lambda: pulls(mounted)[0]["state"] == "waiting", "the state is told")
        told = pulls(mounted)[0]
        assert "page 7 of pc.ram@0x0 is not what its manifest says" in told["error"]
        assert touch.waits
        before = told["fetched_bytes"]
        steer(mounted, "vm", uri=uri)
        assert touch.end(2) == expected[BAD * PAGE : (BAD + 1) * PAGE]
        wait_until_here(mounted, 2)
        assert read(path) == expected
    assert before == len(expected) - MIB // 4 * MB - PAGE + (-len(expected) % PAGE) + PAGE  # "state" is a page


def test_neighbours_of_a_wrong_page_are_not_held_up(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """Also when they were asked for in one piece, and nothing streams."""
    expected = (served / RAM).read_bytes()
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        mounted.expect("page 7 of pc.ram@0x0")
        pull(mounted, f"fault:corrupt=page{BAD}:{uri}", paused=True)
        subprocess.run(["cp", "-r", mounted.path / "vm", mounted.path / "clone"], check=True)
        whole = Touch(mounted.path / "vm" / RAM, 0, 64 * PAGE)
        neighbour = Touch(mounted.path / "clone" / RAM, BAD + 3)  # the kernel has asked for that of the other file
        assert neighbour.end() == expected[(BAD + 3) * PAGE : (BAD + 4) * PAGE]
        eventually(lambda: pulls(mounted)[0]["error"], "the error is told")
        assert whole.waits
        steer(mounted, "vm", uri=uri)
        assert whole.end(2) == expected[: 64 * PAGE]


def test_what_changes_under_its_server_is_not_taken(mounted: Mount, served: Path, tmp_path: Path) -> None:
    expected = (served / RAM).read_bytes()
    good = shutil.copytree(served, tmp_path / "good")
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri, nbdkit(tmp_path / "2", "file", f"dir={good}") as two:
        pull(mounted, uri, paused=True)
        path = mounted.path / "vm" / RAM
        assert Touch(path, 1000).end() == expected[1000 * PAGE : 1001 * PAGE]
        for page in (3, 500, 1030):
            spoil(served / RAM, page)
        touches = {page: Touch(path, page) for page in (3, 500, 1030, 1031)}
        mounted.expect("is not what its manifest says")
        assert touches.pop(1031).end() == expected[1031 * PAGE : 1032 * PAGE]
        eventually(lambda: "manifest" in pulls(mounted)[0]["error"], "the error is told")
        assert all(touch.waits for touch in touches.values())
        steer(mounted, "vm", uri=two, paused=False)
        for page, touch in touches.items():
            assert touch.end(2) == expected[page * PAGE : (page + 1) * PAGE]
        wait_until_here(mounted)
        assert read(path) == expected


@pytest.mark.parametrize("how", ["kill_daemon", "restart"])
def test_the_next_daemon_compares_too(mounted: Mount, served: Path, tmp_path: Path, how: str) -> None:
    """By what it kept: the manifest is not there any more."""
    expected = (served / RAM).read_bytes()
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        pull(mounted, uri, paused=True)
        (served / NAME).write_bytes(b"is no manifest any more" * 10)
        getattr(mounted, how)()
        eventually(lambda: pulls(mounted), "it goes on")
        assert pulls(mounted)[0]["verified"]
        spoil(served / RAM, BAD)
        mounted.expect("page 7 of pc.ram@0x0 is not what its manifest says")
        touch = Touch(mounted.path / "vm" / RAM, BAD)
        eventually(lambda: "manifest" in pulls(mounted)[0]["error"], "the error is told")
        assert touch.waits
        with (served / RAM).open("r+b") as file:
            file.write(expected[:MB])
        steer(mounted, "vm", uri=uri, paused=False)
        assert touch.end(2) == expected[BAD * PAGE : (BAD + 1) * PAGE]
        wait_until_here(mounted)
    assert read(mounted.path / "vm" / RAM) == expected
    mounted.umount()
    assert all(digested(mounted.store).values())
    mounted.start()


def test_digests_that_the_store_has_lost(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """What was to be compared does not come uncompared."""
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        pull(mounted, uri, paused=True)
        mounted.umount()
        digests = {path: path.read_bytes() for path in (mounted.store / "layers").glob("*.xxh3")}
        for path in digests:
            os.truncate(path, 0)
        mounted.start()
        touch = Touch(mounted.path / "vm" / RAM, 0)
        mounted.expect("has lost digests that were promised")
        eventually(lambda: "has lost digests" in pulls(mounted)[0]["error"], "the error is told")
        assert touch.waits
        for path, data in digests.items():
            path.write_bytes(data)
        steer(mounted, "vm", uri=uri)
        assert touch.end(2) == (served / RAM).read_bytes()[:PAGE]


def lose(directory: Path, page: int) -> None:
    """Let the manifest say that a page of the RAM is lost."""
    whole = bytearray((directory / NAME).read_bytes())
    data = (directory / RAM).read_bytes()
    at = whole.index(digest_padded(data[page * PAGE : (page + 1) * PAGE]))
    whole[at : at + 16] = KNOWN_LOST
    whole[32:48] = bytes(16)
    whole[32:48] = xxhash.xxh3_128_digest(bytes(whole))
    (directory / NAME).write_bytes(whole)


def test_a_page_that_its_source_has_lost(mounted: Mount, served: Path, tmp_path: Path) -> None:
    """Nobody can have it: reading it is an error at once, and the pull comes to its end."""
    lose(served, 20)
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        mounted.expect("1 pages are lost there|lost")
        assert pull(mounted, uri)["lost_bytes"] == PAGE
        wait_until_here(mounted)
    path = mounted.path / "vm" / RAM
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with fails(errno.EIO):
            os.pread(fd, PAGE, 20 * PAGE)
        assert os.pread(fd, PAGE, 21 * PAGE) == (served / RAM).read_bytes()[21 * PAGE : 22 * PAGE]
        os.pwrite(fd, bytes(PAGE), 20 * PAGE)
        assert os.pread(fd, PAGE, 20 * PAGE) == bytes(PAGE)


def damage(directory: Path, how: Callable[[bytearray], None]) -> None:
    whole = bytearray((directory / NAME).read_bytes())
    how(whole)
    (directory / NAME).write_bytes(whole)


def set_bytes(at: int, data: bytes) -> Callable[[bytearray], None]:
    def change(whole: bytearray) -> None:
        whole[at : at + len(data)] = data

    return change


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (set_bytes(1000, b"x"), "damaged"),
        (set_bytes(8, b"\2"), "version 2"),
        (lambda whole: whole.__delitem__(slice(-5000, None)), "calls itself"),
    ],
    ids=["damaged", "newer", "cut off"],
)
def test_a_manifest_that_cannot_be_used(
    mounted: Mount, served: Path, tmp_path: Path, how: Callable[[bytearray], None], message: str
) -> None:
    damage(served, how)
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        error = refused(mounted, uri)
    assert message in error["message"]


def refused(mount: Mount, uri: str) -> dict[str, Any]:
    """The error of a pull that leaves nothing."""
    told = control(mount, {"pull": {"uri": uri, "parent": "", "name": "vm"}})
    assert told["error"] is not None
    assert "\n" not in told["error"]["message"]
    assert errno_of(lambda: os.stat(mount.path / "vm")) == errno.ENOENT
    assert not list((mount.store / "layers").iterdir())
    error: dict[str, Any] = told["error"]
    return error


def test_a_manifest_of_other_files(mounted: Mount, served: Path, tmp_path: Path) -> None:
    os.rename(served / "state", served / "states")
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        assert "state" in refused(mounted, uri)["message"]
        (served / "state").write_bytes(b"x")
        assert "1200 by its manifest" in refused(mounted, uri)["message"]
        shutil.copy(served / "states", served / "state")
        with (served / "state").open("ab") as state:
            state.write(bytes(4096 - 1200))  # a server that rounds up
        assert not pull(mounted, uri)["verified"], "one file is not in it"
        wait_until_here(mounted)
    assert (mounted.path / "vm" / "states").read_bytes() == (served / "states").read_bytes()
    assert (mounted.path / "vm" / "state").read_bytes() == (served / "states").read_bytes()


def test_no_manifest_but_a_file_of_that_name(mounted: Mount, served: Path, tmp_path: Path) -> None:
    (served / NAME).write_bytes(pattern(5000))
    with nbdkit(tmp_path / "nbd", "file", f"dir={served}") as uri:
        assert not pull(mounted, uri)["verified"]
        wait_until_here(mounted)
