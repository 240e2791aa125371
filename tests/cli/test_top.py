"""`ramfs top`: what a mount does, once, several times, and until q."""

from __future__ import annotations

import json
import mmap
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import run
from harness import Mount, readable

PAGE = 4096


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """With a directory that has a file open, and one that arrives from a slow source."""
    base = tmp_path_factory.mktemp("top")
    with Mount(base / "store", base / "mnt") as mount:
        vm = mount.path / "vms" / "vm"
        vm.mkdir(parents=True)
        (vm / "ram").write_bytes(os.urandom(30 * PAGE) + bytes(10 * PAGE))
        (vm / ".snap" / "s").mkdir()
        (base / "raw").write_bytes(os.urandom(1000 * PAGE))
        run("pull", f"fault:delay=20ms:file:{base / 'raw'}", mount.path / "pulled", "--paused").ok()
        with open(vm / "ram", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[:PAGE] = b"m" * PAGE
            memory.flush()
            yield mount


def test_a_look_as_json(mount: Mount) -> None:
    [pulled] = (path for path in (mount.path / "pulled").iterdir() if path.is_file())
    with open(pulled, "rb") as file:
        file.read(PAGE)
    [sample] = map(json.loads, run("top", mount.path, "--json", "-d", "0.2").ok().splitlines())
    [vm] = sample["directories"]
    assert (vm["path"], vm["files"], vm["pids"]) == ("vms/vm", 1, [os.getpid()])
    assert (vm["owned_bytes"], vm["shared_bytes"], vm["zero_bytes"]) == (PAGE, 29 * PAGE, 10 * PAGE)
    assert (vm["resident_bytes"], vm["absent_bytes"]) == (30 * PAGE, 0)
    reads = [each for each in sample["slowest_requests"] if each["request"] == "read"]
    assert reads
    assert reads[0]["seconds"] >= 0.02
    assert sample["slowest_requests"] == sorted(sample["slowest_requests"], key=lambda each: -each["seconds"])


def test_rates_are_those_between_two_looks(mount: Mount) -> None:
    command = [sys.executable, "-m", "ramfs", "top", str(mount.path), "--json", "-n", "3", "-d", "0.5"]
    done = threading.Event()

    def write() -> None:
        with open(mount.path / "busy", "wb", buffering=0) as file:
            while not done.is_set():
                os.pwrite(file.fileno(), b"x" * PAGE, 0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        out = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True).stdout
    finally:
        done.set()
        writer.join()
    samples = [json.loads(line) for line in out.splitlines()]
    assert len(samples) == 3
    for sample in samples:
        rates = sample["per_second"]
        assert rates["writes"] > 10
        assert rates["written_bytes"] == pytest.approx(PAGE * rates["writes"], rel=0.01)


def test_a_look_for_people(mount: Mount) -> None:
    out = run("top", mount.path, "--once", "-d", "0.1").ok()
    for words in (str(mount.path.name), "vms/vm", "120.0 KiB", f" {os.getpid()}", "writes", "pulled"):
        assert words in out.replace("\n", " "), words


def test_q_ends_it(mount: Mount) -> None:
    ours, theirs = pty.openpty()
    try:
        command = ["env", "TERM=xterm", sys.executable, "-m", "ramfs", "top", str(mount.path), "-d", "3600"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            seen = b""
            while b"vms/vm" not in seen:
                assert readable(ours, 30)
                seen += os.read(ours, 1 << 16)
            os.write(ours, b"q")
            assert process.wait(30) == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_what_is_no_mount(mount: Mount, tmp_path: Path) -> None:
    run("top", tmp_path).failed(8, "is not mounted")
    run("top", mount.path, "-d", "0").failed(2, "--delay")
