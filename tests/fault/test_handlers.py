"""An exception that nobody foresaw: EIO to that caller, logged with its request, and the daemon lives."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import BTIME, errno_of, eventually, fails, opened, pattern, read, statx

# Runs in the daemon before anything else: what raises is the real code's own callee.
TROUBLE = """
import stat
import ramfs.fuse.fileattr, ramfs.fuse.statx, ramfs.namespace, ramfs.pager

def trouble(room, name, when):
    real = getattr(room, name)
    def wrapper(*args, **kwargs):
        if when(*args, **kwargs):
            raise RuntimeError(f"trouble in {name}")
        return real(*args, **kwargs)
    setattr(room, name, wrapper)

Namespace, Pager = ramfs.namespace.Namespace, ramfs.pager.Pager
trouble(Namespace, "lookup", lambda self, parent, name: name == b"lookup")
trouble(Namespace, "make", lambda self, parent, name, *args, **kwargs: name == b"make")
trouble(Namespace, "rename", lambda self, parent, name, *args, **kwargs: name == b"rename")
trouble(Namespace, "set_xattr", lambda self, ino, name, value: name == b"user.trouble")
trouble(Namespace, "forget", lambda self, ino, count: True)
trouble(Namespace, "freeze", lambda self, directory, name: name == b"freeze")
trouble(Pager, "write", lambda self, image, offset, data: bytes(data[:7]) == b"trouble")
trouble(Pager, "share", lambda self, source, start, *args, **kwargs: start == 4096)
trouble(Pager, "truncate", lambda self, image, size: size == 4242)
trouble(ramfs.fuse.statx, "reply", lambda entry, btime: stat.S_ISFIFO(entry.st_mode))
trouble(ramfs.fuse.fileattr, "answer", lambda command, given, room, immutable: command == 0x4242)
trouble(Pager, "has_garbage", lambda self: True)
"""


@pytest.fixture
def troubled(tmp_path: Path, make_mount: Callable[..., Mount]) -> Iterator[Mount]:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(TROUBLE)
    mount = make_mount(env={"PYTHONPATH": str(tmp_path / "patch")})
    mount.expect(r"ERROR: (.*unexpected error|forget|housekeeping)|Traceback")
    return mount


def test_it_is_eio_and_logged_and_the_daemon_lives(troubled: Mount) -> None:
    root = troubled.path
    (root / "f").write_bytes(pattern(3 * 4096))
    (root / "g").touch()
    (root / "rename").touch()
    os.mkfifo(root / "pipe")

    def ioctl(command: int) -> None:
        with opened(root / "f", os.O_RDONLY) as fd:
            fcntl.ioctl(fd, command)

    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: os.stat(root / "lookup"),
        "make": lambda: os.mkdir(root / "make"),
        "rename": lambda: os.rename(root / "rename", root / "x"),
        "set_xattr": lambda: os.setxattr(root / "f", "user.trouble", b"1"),
        "freeze": lambda: os.mkdir(root / ".snap" / "freeze"),
        "write": lambda: (root / "g").write_bytes(b"trouble"),
        "truncate": lambda: os.truncate(root / "f", 4242),
        "reply": lambda: statx(root / "pipe", BTIME),
        "answer": lambda: ioctl(0x4242),
    }
    for name, call in calls.items():
        assert errno_of(call) == errno.EIO, name
        assert f"trouble in {name}" in troubled.log, name
    with opened(root / "f") as one, opened(root / "g") as two, fails(errno.EIO):
        os.copy_file_range(one, two, 4096, 4096, 0)
    assert "user.trouble" in troubled.log, "the log has the request"
    assert "b'make'" in troubled.log
    assert troubled.log.count("RuntimeError: trouble in write") == 1
    eventually(lambda: "trouble in has_garbage" in troubled.log, "housekeeping has failed and gone on")
    assert troubled.running
    assert read(root / "f") == pattern(3 * 4096)
    assert sorted(os.listdir(root)) == ["f", "g", "pipe", "rename"]
    assert os.listdir(root / ".snap") == []
    (root / "f").unlink()
    (root / "new").write_bytes(b"goes on")
    assert read(root / "new") == b"goes on"
