"""A directory whose source is told when it is there already, and whose digests later still."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from arrival.conftest import MB, control, counts, pull, pulls, steer, wait_until_here
from arrival.test_like import MIB, RAM, Server, change, server
from arrival.test_verified import Touch, seal, spoil
from harness import Mount
from mount.posix import PAGE, eventually, opened, read

from ramfs.source.manifest import NAME
from ramfs.store.repair import check_store

__all__ = ["server"]

SIZE = MIB * MB + 1234
NEW = 22 * PAGE


def held(mount: Mount, sizes: dict[str, object], name: str = "vm.2", **options: object) -> dict[str, object]:
    return control(mount, {"pull": {"sizes": sizes, "parent": "", "name": name, "paused": True, **options}})


@pytest.mark.parametrize("killed", [False, True])
def test_the_source_and_then_its_digests(mounted: Mount, server: Server, killed: bool) -> None:
    """Nobody gets anything until there is a source; what came before the digests came is compared with them."""
    pull(mounted, server.uri)
    wait_until_here(mounted)
    server.taken()
    data, new = change(server.directory)
    manifest = (server.directory / NAME).read_bytes()
    (server.directory / NAME).unlink()

    told = held(mounted, {RAM: SIZE})
    assert told["error"] is None
    assert (told["verified"], told["wanted_bytes"]) == (False, (MIB * MB // PAGE + 1) * PAGE)
    ram = mounted.path / "vm.2" / RAM
    assert ram.stat().st_size == SIZE
    touch = Touch(ram, 105)
    eventually(lambda: pulls(mounted)[0]["demand_faults"] or touch.waits, "somebody waits")
    (now,) = pulls(mounted)
    assert (now["state"], now["source"], now["fetched_bytes"]) == ("waiting", "", 0)
    assert "ramfs recover" in now["error"]
    if killed:
        mounted.expect("takes over")
        mounted.kill_daemon()
    with opened(ram, os.O_RDWR) as fd:
        assert os.pwrite(fd, b"w" * PAGE, 500 * PAGE) == PAGE
    assert touch.waits
    assert server.taken() == {}

    steer(mounted, "vm.2", uri=server.uri)
    assert touch.end() == data[105 * PAGE : 106 * PAGE]
    (now,) = pulls(mounted)
    assert (now["state"], now["verified"]) == ("paused", False)
    before = sum(server.taken().values())
    assert 0 < before <= 64 * PAGE

    os.mkdir(mounted.path / "vm.2" / ".snap" / "early")
    (server.directory / NAME).write_bytes(manifest)
    spoil(server.directory / RAM, 110)  # only comes if it did not before
    steer(mounted, "vm.2", uri=server.uri)
    assert pulls(mounted)[0]["verified"]
    assert counts(ram)["absent"] <= new // PAGE, "what is held here is lacking"
    (server.directory / RAM).write_bytes(data)
    steer(mounted, "vm.2", paused=False)
    wait_until_here(mounted)
    assert before + sum(server.taken().values()) <= NEW + 64 * PAGE
    expected = bytearray(data)
    expected[500 * PAGE : 501 * PAGE] = b"w" * PAGE
    for path in (ram, mounted.path / "vm.2" / ".snap" / "early" / RAM):
        assert read(path) == expected
    mounted.restart()
    assert read(ram) == expected
    mounted.umount()
    assert not check_store(str(mounted.store)).findings
    mounted.start()


def test_digests_of_something_else(mounted: Mount, server: Server) -> None:
    """What came before is not what they say: they are not taken, and all goes on as it was."""
    data = (server.directory / RAM).read_bytes()
    (server.directory / NAME).unlink()
    held(mounted, {RAM: SIZE}, "vm")
    steer(mounted, "vm", uri=server.uri)
    ram = mounted.path / "vm" / RAM
    assert Touch(ram, 105).end() == data[105 * PAGE : 106 * PAGE]
    spoil(server.directory / RAM, 105)
    seal(server.directory)
    (server.directory / RAM).write_bytes(data)
    told = control(mounted, {"arrival": {"path": "vm", "uri": server.uri}})
    assert "1 pages that came before are not what it promises" in told["error"]["message"]
    assert not pulls(mounted)[0]["verified"]
    steer(mounted, "vm", paused=False)
    wait_until_here(mounted)
    assert read(ram) == data


@pytest.mark.parametrize("true", [True, False])
def test_zeros_that_are_told(mounted: Mount, server: Server, true: bool) -> None:
    """They are not fetched. If they are none the digests bring it to light."""
    data = (server.directory / RAM).read_bytes()
    manifest = (server.directory / NAME).read_bytes()
    (server.directory / NAME).unlink()
    held(mounted, {RAM: SIZE}, "vm")
    hole = 3 * MB // PAGE
    runs = [[hole + 4, hole + 100], [hole + 200, hole + 256]] if true else [[hole - 2, hole + 4]]
    steer(mounted, "vm", zeros={RAM: [*runs, [1 << 30, 1 << 31]], "another": [[0, 1]]})
    ram = mounted.path / "vm" / RAM
    assert counts(ram)["zero"] == sum(stop - first for first, stop in runs)
    steer(mounted, "vm", uri=server.uri)
    assert Touch(ram, runs[0][0]).end() == bytes(PAGE)
    assert server.taken() == {}
    (server.directory / NAME).write_bytes(manifest)
    told = control(mounted, {"arrival": {"path": "vm", "uri": server.uri, "paused": False}})
    if not true:
        assert "2 pages that came before are not what it promises" in told["error"]["message"]
        return
    assert told["error"] is None
    steer(mounted, "vm", zeros={RAM: [[0, 2]]})  # too late: there are digests
    wait_until_here(mounted)
    assert read(ram) == data


def test_zeros_that_cannot_be(mounted: Mount) -> None:
    for zeros in (7, [1], {"a": 1}, {"a": [1]}, {"a": [[1]]}, {"a": [[2, 2]]}, {"a": [[-1, 2]]}, {"a": [["0", 2]]}):
        with pytest.raises(OSError, match="Invalid"):
            control(mounted, {"arrival": {"path": "", "zeros": zeros}})


@pytest.mark.parametrize(
    "sizes", [{}, {"a": -1}, {"a": 1 << 63}, {"a": "x"}, ["a"], 7, {"a": 1, "a/b": 1}, {".snap": 1}, {"../a": 1}]
)
def test_sizes_that_cannot_be(mounted: Mount, sizes: object) -> None:
    command = {"pull": {"sizes": sizes, "parent": "", "name": "vm"}}
    try:
        told = control(mounted, command)
    except OSError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017
    else:
        assert told["error"]["message"]
    assert not Path(mounted.path / "vm").exists()
