"""``ramfs umount``."""

import fcntl
import os
import time
from typing import Final

import click

from ramfs.cli._mounts import FSTYPE, mounted_at, mounts
from ramfs.cli.mount import unmount
from ramfs.errors import MountError, UsageError

#: Seconds that the daemon may take to write what is still to be written.
_PATIENCE: Final = 120.0


@click.command("umount")
@click.argument("mountpoint")
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when the last user is gone.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; returns when the store is closed and can be mounted again."""
    if not mountpoint:
        raise UsageError("MOUNTPOINT is empty: give the path of a mount")
    entry = mounted_at(mountpoint)
    if entry is None:
        raise MountError(f"{mountpoint} is not mounted; `ramfs status` and findmnt -t {FSTYPE} list what is")
    if entry.fstype != FSTYPE:
        raise MountError(f"{mountpoint} is a mount of type {entry.fstype}, not of ramfs: use umount(8)")
    unmount(entry.mountpoint, lazy=lazy)
    bound_elsewhere = any(other.device == entry.device for other in mounts())
    if not lazy and not bound_elsewhere and entry.source.startswith("/"):
        _wait_closed(entry.source)


def _wait_closed(store: str) -> None:
    """Wait until the daemon has given the store's lock back."""
    try:
        fd = os.open(os.path.join(store, "lock"), os.O_RDONLY)
    except OSError:
        return  # another user's store, or one that is gone: the daemon ends by itself
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)
        raise MountError(
            f"the daemon has not closed {store} after {_PATIENCE:.0f} s: its disk is slow, "
            "or another mount namespace has the mount too"
        )
    finally:
        os.close(fd)
