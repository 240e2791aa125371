"""A daemon that is killed at any step: nothing acknowledged is lost, nothing half done shows, fsck is clean.

RAMFS_KILL_ALL=1 kills at every step; otherwise at some.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import unmeasured
from store import killed
from store.killed import State, states, work
from storekit import Kit

from ramfs.errors import FileError, StoreError
from ramfs.store.repair import check_store
from ramfs.units import PAGE

SCRIPT = Path(__file__).with_name("killed.py")
STRIDE = 1 if os.environ.get("RAMFS_KILL_ALL") else 11


def read(kit: Kit, path: str) -> bytes | None:
    try:
        return kit.read(path)
    except FileError:
        return None


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Not measured: who is killed could not tell anything anyway."""
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=unmeasured()
    )


def cut(data: bytes | None, at: int) -> bytes:
    return (data or b"")[at : at + PAGE]


def judge(directory: Path, acknowledged: int, why: str) -> None:
    """The store has what was acknowledged; of the step under way it has each page before or after."""
    expected = states()
    before, after = expected[acknowledged], expected[min(acknowledged + 1, len(expected) - 1)]
    name = work()[acknowledged][0] if acknowledged < len(work()) else "the end"
    why = f"{why}, during {name!r}"
    directory.mkdir(exist_ok=True)
    try:
        report = check_store(str(directory))
        assert not report.damaged, f"{why}: {report}"
    except StoreError as error:
        if acknowledged or "is not a ramfs store" not in str(error):  # or not yet: its making was cut short
            raise
    with Kit(directory) as kit:
        found = {path: read(kit, path) for path in sorted(before.keys() | after.keys())}
        for path, data in found.items():
            allowed = [before.get(path), after.get(path)]
            if data in allowed:
                continue
            assert data is not None, f"{why}: {path} is gone"
            assert not path.startswith((".snap/", "e/")), f"{why}: {path} is half a copy"
            # A write of several pages is no transaction; but no page is torn, and new bytes never lack their size.
            assert len(data) in {0, *(len(there or b"") for there in allowed)}, f"{why}: {path} has {len(data)} bytes"
            for at in range(0, len(data), PAGE):
                page = cut(data, at)
                pages = {cut(there, at)[: len(page)].ljust(len(page), b"\0") for there in allowed}
                assert page in pages | {bytes(len(page))}, f"{why}: page {at // PAGE} of {path}"
        kit.collect(2)
        kit.digest()
        kit.merge()
        kit.collect(2)
        assert {path: read(kit, path) for path in found} == found, why
    report = check_store(str(directory))
    assert report.findings == [], f"{why}: {report}"
    everything_goes(directory, found)


def everything_goes(directory: Path, found: dict[str, bytes | None]) -> None:
    """All space comes back."""
    with Kit(directory) as kit:
        for snapshot in {path.split("/")[1] for path, data in found.items() if path.startswith(".snap/") and data}:
            kit.delete_snapshot(snapshot)
        for path, data in found.items():
            if data is not None and not path.startswith(".snap/"):
                kit.unlink(path)
        kit.collect(3)
    assert os.listdir(directory / "layers") == []
    assert os.listdir(directory / "tables") == []


def test_the_work_does_what_it_says(tmp_path: Path) -> None:
    killed.run(str(tmp_path / "s"), lambda number: None)
    expected: State = states()[-1]
    with Kit(tmp_path / "s") as kit:
        assert {path: kit.read(path) for path in expected} == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", range(2))
def test_killed_at_a_step(shm: Path, start: int) -> None:
    """Odd steps die before their call, even ones after it."""
    command = [sys.executable, str(SCRIPT), "fork", str(shm), str(1 + start), "100000", str(2 * STRIDE)]
    done = run(command)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 300 // STRIDE
    for when, acknowledged in kills:
        directory = shm / f"{when:05}"
        judge(directory, acknowledged, f"killed at step {when}")
        shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "unlink"])
def test_killed_within_sqlite(shm: Path, call: str) -> None:
    """The catalog's own writes can only be met from outside: strace kills at the nth call."""
    step = {"pwrite64": 37, "fdatasync": 9, "unlink": 3}[call] if STRIDE > 1 else 1
    for when in range(1, 10_000, step):
        directory = shm / f"{call}-{when}"
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        command += ["-e", f"inject={call}:signal=KILL:when={when}", sys.executable, str(SCRIPT), "once", str(directory)]
        done = run(command)
        assert "Traceback" not in done.stderr, done.stderr
        acknowledged = [int(line) for line in done.stdout.split()]
        judge(directory, acknowledged[-1] if acknowledged else 0, f"killed at {call} number {when}")
        shutil.rmtree(directory)
        if done.returncode == 0:
            break
    assert when > step


def test_a_store_that_is_killed_while_it_recovers(tmp_path: Path) -> None:
    """Recovery can be cut short and begun again."""
    kit = Kit(tmp_path / "s")
    kit.write("f", 0, os.urandom(5 * PAGE))
    kit.copy("f", "g")
    kit.write("g", 0, os.urandom(PAGE))
    good = kit.read("f"), kit.read("g")
    kit.kill()
    for _ in range(5):
        kit = Kit(tmp_path / "s")
        assert (kit.read("f"), kit.read("g")) == good
        kit.kill()
    assert not check_store(str(tmp_path / "s")).damaged
