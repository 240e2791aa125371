"""Asking the daemon for something, by ``.ramfs/control`` of its mount (fuse/virtual.py)."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from ramfs.cli._mounts import MountEntry
from ramfs.errors import FileError, MountError, RamfsError

#: Bytes read in one request.
_PART: Final = 1 << 20
#: Seconds between two looks at what goes on: at first often, for it may be a matter of milliseconds.
_FIRST: Final = 0.005
_PERIOD: Final = 0.05


class DaemonReplaced(MountError):
    """The daemon that was asked is not there any more, and the one that is knows nothing of it."""


@contextlib.contextmanager
def asked(mount: MountEntry, command: dict[str, Any], instead: str = "", *, told: bool = False) -> Iterator[int]:
    """Give a command; a descriptor to which what was begun belongs, which if ``told`` reads as how far it is.

    To be told needs more of a permission. Raises OSError, FileError (EACCES).
    """
    control = os.path.join(mount.mountpoint, ".ramfs/control")
    try:
        fd = os.open(control, (os.O_RDWR if told else os.O_WRONLY) | os.O_CLOEXEC)
    except PermissionError:
        hint = f": {instead}" if instead else ""
        raise FileError(errno.EACCES, f"you may not write {control}, which only the mount's owner may{hint}") from None
    try:
        os.write(fd, json.dumps(command).encode())
        yield fd
    finally:
        os.close(fd)


def follow(fd: int, show: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Wait until a command has finished, and tell ``show`` before; the last that is told. Raises DaemonReplaced."""
    pause = _FIRST
    while not (told := _read(fd))["finished"]:
        show(told)
        time.sleep(pause)
        pause = min(2 * pause, _PERIOD)
    return told


def _read(fd: int) -> dict[str, Any]:
    text = part = os.pread(fd, _PART, 0)
    while len(part) == _PART:  # so long is only that of the end, which changes no more
        part = os.pread(fd, _PART, len(text))
        text += part
    try:
        told: dict[str, Any] = json.loads(text)
    except ValueError:
        raise DaemonReplaced("the daemon was replaced meanwhile: run the command again") from None
    return told


class ToldError(RamfsError):
    """An error that the daemon told, with the exit code of its class there."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.errno = error["errno"]
        self.exit_code = error["exit"]


def outcome(mount: MountEntry, command: dict[str, Any]) -> dict[str, Any]:
    """Give a command and wait until it has finished. Raises ToldError, DaemonReplaced, OSError, FileError."""
    with asked(mount, command, told=True) as fd:
        told = follow(fd)
    if told["error"] is not None:
        raise ToldError(told["error"])
    return told
