"""The compiled extension: that it is found, that it says so when it is not, and what it asks of the kernel."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Mount

from ramfs.fuse.extension import pyfuse3


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 8, done
    assert "Traceback" not in done.stderr
    return done.stderr


def main(*arguments: str) -> str:
    return f"import sys; from ramfs.cli import main; sys.exit(main({list(arguments)!r}))"


def test_pyfuse3_that_came_first_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    daemon = main("mount", "--link", "99", str(tmp_path / "store"), str(tmp_path / "mnt"))
    said = run("import pyfuse3;" + daemon)
    assert said.count("\n") == 1
    assert "pyfuse3 was imported before ramfs could complete it" in said


@pytest.mark.parametrize("missing", ["int fuse_version(void) { return 39; }", "int fuse_version(void) { return 312; }"])
def test_a_libfuse_that_is_too_old_is_refused(tmp_path: Path, missing: str) -> None:
    library = tmp_path / "old.so"
    (tmp_path / "old.c").write_text(missing)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "old.c"], check=True)
    (tmp_path / "mnt").mkdir()
    said = run(
        main("mount", "-f", str(tmp_path / "store"), str(tmp_path / "mnt")),
        LD_PRELOAD=str(library),
    )
    assert said.count("\n") == 1
    assert "lacks what ramfs needs" in said
    assert not (tmp_path / "store").exists()


def test_a_reply_that_comes_too_late_is_no_error(
    caplog: pytest.LogCaptureFixture, expect_log: Callable[[str], None]
) -> None:
    """As for a RELEASE that was being answered while the mount was taken down."""
    expect_log("Input/output error")
    words = "fuse_release(): fuse_reply_* failed with %s"
    for code in (errno.ENOENT, errno.EIO):
        logging.getLogger("pyfuse3").error(words, os.strerror(code))
    assert caplog.messages == [words % os.strerror(errno.EIO)]
    handlers = Path(pyfuse3.__file__).with_name("handlers.pxi").read_text()
    assert f"log.error('{words}', strerror(-ret))" in handlers, "pyfuse3 says it in other words"


def test_limits_reach_the_kernel(mounted: Mount) -> None:
    settled = json.loads((mounted.path / ".ramfs/status.json").read_bytes())["connection"]
    assert settled["max_background"] == 65535
    assert settled["max_write"] == 1 << 20
    auto_inval_data, splice_read, explicit_inval_data = 1 << 12, 1 << 9, 1 << 25
    assert not settled["want"] & (auto_inval_data | splice_read)
    assert settled["want"] & explicit_inval_data or not settled["capable"] & explicit_inval_data


def test_reads_and_writes_are_answered_at_once(mounted: Mount) -> None:
    def answered() -> int:
        status = json.loads((mounted.path / ".ramfs/status.json").read_bytes())
        return int(status["connection"]["answered"])

    before = answered()
    (mounted.path / "f").write_bytes(b"x" * 4096)
    assert answered() >= before + 2  # the WRITE, and the READ of the status


def test_a_write_is_one_request(mounted: Mount, tmp_path: Path) -> None:
    """The kernel does not ask for security.capability before each: the INIT reply was completed."""
    trace = tmp_path / "trace"
    with open(mounted.path / "file", "wb", buffering=0) as file:
        file.write(b"first")
        with subprocess.Popen(
            ["strace", "-f", "-qq", "-e", "trace=writev", "-o", trace, "-p", str(mounted.pid)]
        ) as strace:
            while not trace.exists() or f"{mounted.pid} " not in trace.read_text():
                file.write(b"wait until the tracer is there")
            before = len(trace.read_text().splitlines())
            for page in range(100):
                os.pwrite(file.fileno(), b"page" * 1024, page << 12)
            strace.terminate()
    assert len(trace.read_text().splitlines()) - before < 150


def test_requests_of_a_megabyte(mounted: Mount) -> None:
    status = mounted.path / ".ramfs/status.json"
    before = json.loads(status.read_bytes())["requests"]
    (mounted.path / "file").write_bytes(os.urandom(8 << 20))
    after = json.loads(status.read_bytes())["requests"]
    assert after["writes"] - before["writes"] <= 16
    assert after["written_bytes"] - before["written_bytes"] == 8 << 20
