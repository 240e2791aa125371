from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from vm.guest import Guest, images


class Lab:
    """A mount with its store in memory, or a directory there, and the guests that live on it."""

    def __init__(self, mount: Mount, path: Path | None = None) -> None:
        self.mount = mount
        self.path = path or mount.path
        self.guests: list[Guest] = []

    def directory(self, name: str) -> Path:
        path = self.path / name
        path.mkdir()
        return path

    def boot(self, memory: Path, **more: Any) -> Guest:
        """Start a guest that ticks five times a second, and wait for its first tick."""
        guest = self.start(memory, **{"boot": "tick=0.2 fill=1:16", **more})
        guest.wait_for_tick()
        return guest

    def resume(self, memory: Path, state: Path, **more: Any) -> Guest:
        """Start a guest from a saved state, and wait until it has ticked."""
        guest = self.start(memory, incoming=True, **more)
        guest.load(state)
        guest.wait_for_tick()
        return guest

    def start(self, memory: Path, **more: Any) -> Guest:
        guest = Guest(memory, **more)
        self.guests.append(guest)
        return guest

    def close(self) -> None:
        # All are ended before one is cleared away: the mount has a last user the sooner.
        for guest in self.guests:
            guest.kill()
        for guest in self.guests:
            guest.close()


def ramfs(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ramfs", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def snapshot(directory: Path, name: str, socket: Path) -> dict[str, Any]:
    done = ramfs("snapshot", directory, name, "--qmp", socket, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    return dict(json.loads(done.stdout))


def cp(*args: object) -> None:
    subprocess.run(["cp", *map(str, args)], stdin=subprocess.DEVNULL, timeout=60, check=True)


def assert_goes_on_from(clone: Guest, earliest: int, latest: int) -> None:
    """The clone's first tick follows one of the parent's in that range, the last before it was stopped.

    One more is let pass: the line of a tick may have been cut in two, with its head in the parent's output.
    """
    first = clone.ticks[0]
    assert earliest + 1 <= first <= latest + 2, f"the clone begins at tick {first}"
    assert_no_tick_is_missing(clone)


def assert_no_tick_is_missing(guest: Guest) -> None:
    ticks = guest.ticks
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))


@pytest.fixture(scope="session", autouse=True)
def guest_images() -> None:
    """Have the guest built before the first test's time runs."""
    images()


@pytest.fixture
def make_lab(shm: Path) -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(options: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Lab:
        lab = Lab(Mount(shm / f"store{len(made)}", shm / f"mnt{len(made)}", options, env=env))
        made.append(lab)
        lab.mount.start()
        return lab

    yield make
    for lab in made:
        lab.close()
        lab.mount.__exit__(None, None, None)


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


@pytest.fixture(scope="module")
def shared(module_shm: Path) -> Iterator[Mount]:
    """A mount for all tests of a module."""
    with Mount(module_shm / "store", module_shm / "mnt") as mount:
        yield mount


@pytest.fixture
def corner(shared: Mount, tmp_path: Path) -> Iterator[Lab]:
    """A directory of its own on the module's mount, removed at the end."""
    assert shared.running, f"the daemon has died: {shared.log}"
    lab = Lab(shared, shared.path / tmp_path.name)
    lab.path.mkdir()
    yield lab
    lab.close()
    for directory in lab.path.iterdir():
        for snapshot in (directory / ".snap").iterdir():
            snapshot.rmdir()
    shutil.rmtree(lab.path)
