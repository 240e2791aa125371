"""Asking the daemon for something, by ``.ramfs/control`` of its mount (fuse/virtual.py)."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import Any

from ramfs.cli._mounts import MountEntry
from ramfs.errors import FileError


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
