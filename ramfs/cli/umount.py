"""``ramfs umount``."""

import fcntl
import os
import time

import click

from ramfs.cli._mounts import FSTYPE, mounted_at
from ramfs.cli.mount import unmount
from ramfs.errors import MountError

#: Seconds that the daemon may take to write what is still to be written.
_PATIENCE = 120.0


@click.command("umount")
@click.argument("mountpoint", type=click.Path())
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when the last user is gone.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; returns when the store is closed and can be mounted again."""
    mountpoint = os.path.abspath(mountpoint)
    entry = mounted_at(mountpoint)
    if entry is None:
        raise MountError(f"{mountpoint} is not mounted")
    if entry.fstype != FSTYPE:
        raise MountError(f"{mountpoint} is a mount of type {entry.fstype}, not of ramfs: use umount(8)")
    unmount(entry.mountpoint, lazy=lazy)
    if not lazy:
        _wait_closed(os.path.join(entry.source, "lock"))


def _wait_closed(lock: str) -> None:
    """Wait until the daemon has given the store's lock back."""
    try:
        fd = os.open(lock, os.O_RDONLY)
    except OSError:
        return  # the store's name does not fit into mountinfo, or is another user's: the daemon ends by itself
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)
        raise MountError("the daemon has not closed its store yet: look at its log, and for a slow disk wait")
    finally:
        os.close(fd)
