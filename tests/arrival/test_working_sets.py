"""What guests ask for first comes first, when the source can tell; and is read ahead as it comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arrival.conftest import nbdkit, pull, pulls, steer, wait_until_here
from harness import Mount, caches_emptied, were_caches_emptied
from mount.posix import PAGE, Mapping, counters, eventually, opened, pattern, read

from ramfs.image.working_set import NAME, RECORD, pack, parse

MB = 1 << 20
SIZE = 32 * MB
#: Pages, in order: 3 MiB in all, from the end to the beginning.
FIRST = [(6000, 256), (4000, 256), (100, 256)]


def made(directory: Path) -> Path:
    """A directory with the memory of a guest, and what its clones ask for first."""
    directory.mkdir()
    (directory / "ram").write_bytes(pattern(SIZE))
    records = np.array([(number, *each) for number, each in enumerate(FIRST)], RECORD)
    (directory / NAME).write_bytes(pack({b"ram": records}))
    return directory


def here(mount: Mount) -> set[int]:
    """The pages that have come."""
    (path,) = (mount.store / "layers").glob("*.here")
    return set(np.flatnonzero(np.frombuffer(path.read_bytes(), np.uint8)).tolist())


def test_it_comes_first_and_is_read_ahead(mounted: Mount, tmp_path: Path) -> None:
    wanted = {page for first, count in FIRST for page in range(first, first + count)}
    with nbdkit(tmp_path / "nbd", "file", f"dir={made(tmp_path / 'served')}") as uri:
        pull(mounted, uri, paused=True)
        with opened(mounted.path / "vm" / "ram") as fd:
            mapping = Mapping(fd)
        assert here(mounted) == set()  # not even that, while it is paused
        assert pulls(mounted)[0]["first_bytes"] == len(wanted) * PAGE
        seen: list[set[int]] = [set()]
        emptied = caches_emptied()
        steer(mounted, "vm", paused=False, rate=2 * MB)
        while not wanted <= seen[-1]:
            seen.append(here(mounted))
        assert any(wanted > part > set() for part in seen)
        # Nothing else before it but the pieces that were on their way beside the last one of it.
        assert all(len(part - wanted) <= 512 for part in seen if not wanted <= part)
        eventually(lambda: counters(mounted.path)["read_ahead_bytes"] == len(wanted) * PAGE, "it is read ahead")
        before = counters(mounted.path)["reads"]
        for first, count in FIRST:
            assert mapping.bytes(first * PAGE, count * PAGE) == pattern(SIZE)[first * PAGE : (first + count) * PAGE]
        assert counters(mounted.path)["reads"] == before or were_caches_emptied(emptied)
        mapping.close()
        steer(mounted, "vm", rate=0)
        wait_until_here(mounted)
    assert os.listdir(mounted.path / "vm") == ["ram"]
    assert read(mounted.path / "vm" / "ram") == pattern(SIZE)
    assert pulls(mounted) == []


def test_who_waits_for_it_has_it(mounted: Mount, tmp_path: Path) -> None:
    with nbdkit(tmp_path / "nbd", "file", f"dir={made(tmp_path / 'served')}") as uri:
        command = [sys.executable, "-m", "ramfs", "pull", "--warm", "--rate=4M", "--json", uri, mounted.path / "vm"]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        assert told["first_bytes"] == sum(count for _, count in FIRST) * PAGE
        mounted.kill_daemon()  # the next one knows it as well
        (now,) = pulls(mounted)
        assert now["first_bytes"] == 0
        assert here(mounted) >= {page for first, count in FIRST for page in range(first, first + count)}
        assert now["here_bytes"] < now["total_bytes"]
        steer(mounted, "vm", rate=0)
        wait_until_here(mounted)
    done = subprocess.run(
        [*command[:4], "--warm", "--paused", uri, mounted.path / "two"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert "--warm would never end" in done.stderr


@pytest.mark.parametrize("damage", ["cut off", "flipped", "beyond", "huge", "something else"])
def test_a_wrong_one_does_no_harm(mounted: Mount, tmp_path: Path, damage: str) -> None:
    directory = made(tmp_path / "served")
    good = (directory / NAME).read_bytes()
    beyond = np.array([(0, 8000, 1000), (1, 0xFFFFFFF0, 0xFFFFFFFF)], RECORD)
    texts = {
        "cut off": good[:-1],
        "flipped": good[:50] + bytes([good[50] ^ 1]) + good[51:],
        "beyond": pack({b"ram": beyond, b"../etc": beyond}),
        "huge": good + bytes(9 * MB),
        "something else": b"hello",
    }
    (directory / NAME).write_bytes(texts[damage])
    if damage in ("cut off", "flipped"):
        mounted.expect("is not used: it")
    with nbdkit(tmp_path / "nbd", "file", f"dir={directory}") as uri:
        pull(mounted, uri)
        with opened(mounted.path / "vm" / "ram") as fd:
            assert os.pread(fd, 1, 0) == pattern(1)
        wait_until_here(mounted)
    assert read(mounted.path / "vm" / "ram") == pattern(SIZE)
    assert parse(good).keys() == {b"ram"}
