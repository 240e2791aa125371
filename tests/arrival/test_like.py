"""A later generation: only what is not held here already crosses the network."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arrival.conftest import MB, control, counts, nbdkit, pull, pulls, sparse_file, steer, wait_until_here
from arrival.test_verified import seal
from harness import Mount
from mount.posix import NOBODY, PAGE, eventually, in_child, opened, pattern, read, status

from ramfs.source.manifest import NAME
from ramfs.store.repair import check_store

RAM = "pc.ram@0x0"
MIB = 8
STORED = MIB * MB // 4 * 3 + PAGE
"""bytes that there are of the first generation, in whole pages"""


class Server:
    """nbdkit, and what was read from it."""

    def __init__(self, directory: Path, place: Path) -> None:
        self.directory = directory
        self._log = place.with_suffix(".log")
        self._names: dict[str, str] = {}
        self._seen = 0
        self._context = nbdkit(place, "--filter=log", "file", f"dir={directory}", f"logfile={self._log}")

    def __enter__(self) -> Server:
        self.uri = self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.__exit__(None, None, None)

    def taken(self) -> dict[str, int]:
        """Bytes that were read of each export since the last time."""
        found: dict[str, int] = {}
        lines = self._log.read_text().splitlines()
        for line in lines[self._seen :]:
            if connected := re.search(r"connection=(\d+) Connect export=(\S*) ", line):
                self._names[connected[1]] = connected[2].strip('"')
            elif was := re.search(r"connection=(\d+) Read .*count=(0x[0-9a-f]+)", line):
                name = self._names[was[1]]
                found[name] = found.get(name, 0) + int(was[2], 16)
        self._seen = len(lines)
        return {name: count for name, count in found.items() if name != NAME}

    def connections(self, name: str) -> int:
        """How many there were to an export, of what :meth:`taken` has looked at."""
        return list(self._names.values()).count(name)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """With a directory of the first generation."""
    directory = tmp_path / "served"
    directory.mkdir()
    sparse_file(directory / RAM, MIB)
    (directory / "state").write_bytes(b"device state" * 100)
    seal(directory)
    with Server(directory, tmp_path / "nbd") as server:
        yield server


def change(directory: Path) -> tuple[bytes, int]:
    """The next generation: the RAM, and how many bytes of it are new."""
    data = bytearray((directory / RAM).read_bytes())
    data[100 * PAGE : 120 * PAGE] = pattern(20 * PAGE, 9)
    data[300 * PAGE : 310 * PAGE] = bytes(10 * PAGE)
    data[3 * MB + 5] = 1  # was a hole
    data[-3:] = b"end"
    (directory / RAM).write_bytes(data)
    seal(directory)
    return bytes(data), 22 * PAGE


def test_only_what_has_changed(mounted: Mount, server: Server) -> None:
    told = pull(mounted, server.uri, "vm")
    assert (told["like"], told["taken_bytes"], told["wanted_bytes"]) == (None, 0, STORED + PAGE)
    wait_until_here(mounted)
    assert sum(server.taken().values()) == MIB * MB // 4 * 3 + 1234 + 1200
    assert server.connections("state") == 1, "it streams from the connection that its size was asked on"
    assert server.connections(RAM) <= 2, "... and urgent reads have another one"
    data, new = change(server.directory)
    told = pull(mounted, server.uri, "vm.2", paused=True)
    assert told["like"] == "vm"
    assert (told["taken_bytes"], told["wanted_bytes"]) == (STORED - (20 + 10 + 1) * PAGE + PAGE, new)
    (now,) = pulls(mounted)
    assert now["total_bytes"] - now["here_bytes"] == new
    assert now["taken_bytes"] == STORED - 31 * PAGE, "the state is here, and is none of the files that arrive"
    assert now["zero_bytes"] == now["total_bytes"] - new - now["taken_bytes"]
    assert counts(mounted.path / "vm.2" / RAM)["absent"] == 22
    steer(mounted, "vm.2", paused=False)
    wait_until_here(mounted)
    assert server.taken() == {RAM: new - PAGE + 1234}
    assert read(mounted.path / "vm.2" / RAM) == data
    assert (mounted.path / "vm.2" / "state").read_bytes() == b"device state" * 100
    shutil.rmtree(mounted.path / "vm")
    assert read(mounted.path / "vm.2" / RAM) == data
    mounted.restart()
    assert read(mounted.path / "vm.2" / RAM) == data
    mounted.umount()
    assert not check_store(str(mounted.store)).findings
    mounted.start()


def test_what_is_all_here_needs_no_server(mounted: Mount, server: Server) -> None:
    pull(mounted, server.uri, "vm")
    wait_until_here(mounted)
    server.taken()
    layers = sorted(os.listdir(mounted.store / "layers"))
    told = pull(mounted, server.uri, "vm.again")
    assert (told["wanted_bytes"], told["taken_bytes"]) == (0, STORED + PAGE)
    assert not pulls(mounted)
    assert server.taken() == {}
    assert sorted(os.listdir(mounted.store / "layers")) == layers
    assert read(mounted.path / "vm.again" / RAM) == (server.directory / RAM).read_bytes()


def test_the_newest_generation_of_the_name(mounted: Mount, server: Server) -> None:
    """Snapshots count as of when they were made; other names do not count."""

    def like(name: str, **more: Any) -> str | None:
        told = pull(mounted, server.uri, name, paused=True, **more)
        shutil.rmtree(mounted.path / name)
        found: str | None = told["like"]
        return found

    root = mounted.path
    for name in ("other", "vm10", "vm.1", "vm.2"):
        (root / name).mkdir()
        (root / name / RAM).write_bytes(b"")
    assert like("vm") == "vm.2"
    (root / "vm.1" / ".snap" / "a").mkdir()
    (root / "vm.1" / ".snap" / "b").mkdir()
    assert like("vm") == "vm.1/.snap/b"
    assert like("vm", parent=".") == "vm.1/.snap/b"
    assert like("vm", like=False) is None
    assert like("vm", like="other") == "other"
    assert like("vm", like="vm.1") == "vm.1/.snap/b"
    assert like("vm", like="vm.1/.snap/a") == "vm.1/.snap/a"
    assert like("new") is None
    (root / "vm").write_bytes(b"a file")
    assert like("vm.3") == "vm.1/.snap/b"
    for wrong in ("nothing", "vm", "vm.1/.snap"):
        told = control(mounted, {"pull": {"uri": server.uri, "parent": "", "name": "vm.3", "like": wrong}})
        assert f"cannot take pages from /{wrong}" in told["error"]["message"]
    assert not (root / "vm.3").exists()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "live"])
def test_from_a_directory_that_changes(mounted: Mount, server: Server, frozen: bool) -> None:
    """What is taken is what it had, and what it does later is its own."""
    data = (server.directory / RAM).read_bytes()
    live = mounted.path / "mine"
    live.mkdir()
    with (live / RAM).open("wb") as file:
        file.write(data[: 4 * MB])
    if frozen:
        (live / ".snap" / "s").mkdir()
        (live / RAM).write_bytes(pattern(4 * MB, 5))
    images = in_catalog(mounted, "images")
    told = pull(mounted, server.uri, "vm", like="mine", paused=True)
    assert in_catalog(mounted, "images") == images + 2, "the frozen copy is gone"
    assert told["taken_bytes"] == 3 * MB
    with opened(live / RAM) as fd:
        os.pwrite(fd, b"x" * 2 * MB, 0)
        os.fsync(fd)
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    assert server.taken()[RAM] == len(data) - 2 * MB - 3 * MB
    assert read(mounted.path / "vm" / RAM) == data
    with opened(mounted.path / "vm" / RAM) as fd:
        os.pwrite(fd, b"y" * 100, MB)
    assert read(live / RAM, MB, 100) == b"x" * 100
    if frozen:
        os.rmdir(live / ".snap" / "s")
    shutil.rmtree(live)
    assert read(mounted.path / "vm" / RAM, 0, MB) == data[:MB]


def in_catalog(mount: Mount, table: str) -> int:
    """Rows, by what status.json tells."""
    return int(status(mount.path)[table]["total"])


def test_files_of_other_lengths(mounted: Mount, server: Server) -> None:
    """The last page of a shorter file is no page of a longer one; that of a longer one may be."""
    data = (server.directory / RAM).read_bytes()
    for name, length in (("short", 5 * PAGE + 700), ("long", len(data) + 3 * PAGE)):
        (mounted.path / name).mkdir()
        (mounted.path / name / RAM).write_bytes(data.ljust(length, b"\0")[:length])
    told = pull(mounted, server.uri, "a", like="short", paused=True)
    assert told["taken_bytes"] == 5 * PAGE
    told = pull(mounted, server.uri, "b", like="long")
    assert (told["taken_bytes"], told["wanted_bytes"]) == (STORED, PAGE)
    steer(mounted, "a", paused=False)
    wait_until_here(mounted)
    for name in "ab":
        assert read(mounted.path / name / RAM) == data


def test_what_a_crash_left_behind_the_end_is_not_taken(mounted: Mount, server: Server) -> None:
    """The last page of a shorter file looks the same, but for what nobody is to see."""
    data = bytearray((server.directory / RAM).read_bytes())
    data[5 * PAGE + 700 : 6 * PAGE] = bytes(PAGE - 700)
    (server.directory / RAM).write_bytes(data)
    seal(server.directory)
    (mounted.path / "short").mkdir()
    (mounted.path / "short" / RAM).write_bytes(data[: 5 * PAGE + 700])
    mounted.umount()
    (layer,) = (mounted.store / "layers").glob("*.ram")
    with layer.open("r+b") as file:
        file.seek(5 * PAGE + 700)
        file.write(b"left behind")
    mounted.start()
    assert pull(mounted, server.uri, "vm", like="short")["taken_bytes"] == 5 * PAGE
    wait_until_here(mounted)
    assert read(mounted.path / "vm" / RAM) == data


def test_from_what_is_still_arriving(mounted: Mount, server: Server) -> None:
    """What is here by now is taken. What is not is fetched: the first source may never come back."""
    data = (server.directory / RAM).read_bytes()
    pull(mounted, server.uri, "vm", paused=True)
    with opened(mounted.path / "vm" / RAM, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, 16 * PAGE, 40 * PAGE)
    told = pull(mounted, server.uri, "vm.2", paused=True)
    assert (told["like"], told["taken_bytes"]) == ("vm", 16 * PAGE)
    steer(mounted, "vm.2", paused=False)
    assert len(pulls(mounted)) == 2
    eventually(lambda: len(pulls(mounted)) == 1, "the second needs nothing of the first")
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    for name in ("vm", "vm.2"):
        assert read(mounted.path / name / RAM) == data


def test_chained(make_mount: Callable[..., Mount], server: Server, tmp_path: Path) -> None:
    """A snapshot of what is still arriving, verified, has a manifest, and is pulled from there."""
    data = (server.directory / RAM).read_bytes()
    second, third = make_mount("second"), make_mount("third")
    pull(second, server.uri, "vm", paused=True)
    with opened(second.path / "vm" / RAM) as fd:
        os.pwrite(fd, pattern(2 * PAGE, 7), 50 * PAGE)
    (second.path / "vm" / ".snap" / "s").mkdir()
    assert counts(second.path / "vm" / RAM)["absent"] * PAGE == STORED - 2 * PAGE
    with nbdkit(tmp_path / "2", "file", f"dir={second.path / 'vm' / '.snap' / 's'}") as uri:
        assert pull(third, uri, "vm")["verified"]
        wait_until_here(third)
        assert read(third.path / "vm" / RAM) == data[: 50 * PAGE] + pattern(2 * PAGE, 7) + data[52 * PAGE :]
        assert (third.path / "vm" / "state").read_bytes() == b"device state" * 100
    assert sum(server.taken().values()) == MIB * MB // 4 * 3 + 1234 + 1200 - 2 * PAGE, "each page comes once"


def test_nobody_takes_what_he_may_not_read(make_mount: Callable[..., Mount], server: Server) -> None:
    mount = make_mount(options=["allow_other"])
    os.chown(mount.path, NOBODY, NOBODY)
    for above in (mount.path, *mount.path.parents):
        if above.stat().st_mode & 0o011 != 0o011:
            above.chmod(above.stat().st_mode | 0o011)
    command = mount.path / ".ramfs" / "control"
    eventually(lambda: in_child(lambda: os.access(command, os.R_OK | os.W_OK), user=NOBODY), "he may pull")
    for name, mode in (("secret", 0o600), ("open", 0o644)):
        (mount.path / name).mkdir()
        shutil.copy(server.directory / RAM, mount.path / name / RAM)
        (mount.path / name / RAM).chmod(mode)
    mount.expect("lost the connection|cannot be reached")

    def taken(like: str) -> int:
        def work() -> int:
            told = pull(mount, server.uri, f"of.{like}", like=like, paused=True)
            return int(told["taken_bytes"])

        return in_child(work, user=NOBODY)

    assert taken("secret") == 0
    assert taken("open") == STORED
