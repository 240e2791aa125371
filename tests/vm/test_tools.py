"""tools/guest and tools/demo do what they say, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import mounts
from vm.guest import images

pytestmark = pytest.mark.vm

TOOLS = Path(__file__).parents[2] / "tools"


def guest(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOLS / "guest", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_guest_is_built_once() -> None:
    kernel, initrd = images()
    before = [path.stat() for path in (kernel, initrd)]
    done = guest()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{kernel}\n{initrd}\n", "")
    assert [path.stat() for path in (kernel, initrd)] == before


def test_other_images_are_taken(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / 'a "kernel"', tmp_path / "initrd"
    kernel.touch()
    initrd.touch()
    done = guest("--kernel", kernel, "--initrd", initrd, "--output", tmp_path / "unused", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"kernel": str(kernel), "initrd": str(initrd)}
    assert not (tmp_path / "unused").exists()
    done = guest("--initrd", initrd)
    assert done.stdout.splitlines() == [str(images()[0]), str(initrd)]


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--kernel", "/missing"], "cannot read /missing"),
        (["--kernel"], "needs a value"),
        (["--output", ""], "needs a value"),
        (["--colour"], "does not know --colour"),
    ],
)
def test_wrong_arguments(args: list[str], what: str) -> None:
    done = guest(*args)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert what in done.stderr


def demo(**more: object) -> subprocess.Popen[str]:
    # Without the wrapper, which would set up what this very test runs in.
    return subprocess.Popen(
        [sys.executable, TOOLS / "demo.d" / "demo.py", *map(str, images())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def left_behind(process: subprocess.Popen[str]) -> list[str]:
    mark = f"ramfs-demo-{process.pid}-"
    found = [str(path) for path in mounts() if mark in str(path)]
    for base in ("/dev/shm", "/tmp"):
        found += [name for name in os.listdir(base) if name.startswith(mark)]
    for other in Path("/proc").glob("[0-9]*"):
        try:
            words = (other / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if mark.encode() in words:
            found.append(words.decode(errors="replace"))
    return found


def assert_nothing_left_behind(process: subprocess.Popen[str]) -> None:
    # The mount and the store are given back a moment before the daemon has ended.
    deadline = time.monotonic() + 5
    while (left := left_behind(process)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_the_demo_shows_two_guests() -> None:
    with demo() as process:
        out, _ = process.communicate(timeout=110)
    assert process.returncode == 0, out
    assert "One guest became two, and both run, one of them on another host." in out
    assert "Traceback" not in out
    assert_nothing_left_behind(process)


@pytest.mark.parametrize("at", ["2. Boot", "11. Pull"])
def test_the_demo_is_interrupted(at: str) -> None:
    with demo() as process:
        assert process.stdout is not None
        for line in process.stdout:
            if at in line:
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert_nothing_left_behind(process)
