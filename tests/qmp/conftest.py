from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vm.guest import Guest


@dataclass
class Outcome:
    """How a run of `ramfs` ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


@dataclass
class Directory:
    """A directory as `ramfs snapshot` sees one on a mount, on an ordinary file system.

    `.snap` is a plain directory here, so a freeze makes an empty directory: enough to see what the command
    does before and after. What a freeze keeps is tested in tests/mount and tests/vm.
    """

    path: Path

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ramfs", "snapshot", str(self.path), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def snapshot(self, *args: str) -> Outcome:
        return finish(self.start(*args))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())

    def snapshots(self) -> list[str]:
        return sorted(path.name for path in (self.path / ".snap").iterdir())

    def assert_untouched(self) -> None:
        """No half snapshot remains, no temporary file, and the older state is the older state."""
        assert self.snapshots() == []
        assert self.names() == [".snap", "ram0", "state"]
        assert (self.path / "state").read_text() == "older"


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


@pytest.fixture
def directory(shm: Path) -> Directory:
    (shm / ".snap").mkdir()
    (shm / "state").write_text("older")
    return Directory(shm)


@pytest.fixture
def machine(directory: Directory) -> Iterator[Callable[..., Guest]]:
    """Start a QEMU whose RAM is `ram0` of the directory, with nothing to boot."""
    made: list[Guest] = []

    def start(*args: str) -> Guest:
        made.append(Guest(directory.path / "ram0", mib=32, kernel=False, args=args))
        return made[-1]

    yield start
    for guest in made:
        guest.close()


@pytest.fixture
def tmp_path_short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name, of which there is not much."""
    with tempfile.TemporaryDirectory(prefix="qmp-", dir="/tmp") as path:
        yield Path(path)
