"""``ramfs umount``."""

import fcntl
import os
import time
from typing import Final

import click

from ramfs.cli._mounts import MountEntry, mounted_at, mounts, whole_mount
from ramfs.cli.mount import unmount
from ramfs.errors import MountError
from ramfs.supervisor.client import ask

#: Seconds that the daemon may take to write what is still to be written.
_PATIENCE: Final = 120.0
#: Where the kernel lets a connection be cut (Documentation/filesystems/fuse.rst).
_CONNECTIONS: Final = "/sys/fs/fuse/connections"


@click.command("umount")
@click.argument("mountpoint")
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when the last user is gone.")
@click.option("--abort", is_flag=True, help="Fail all that waits for the mount: for one whose daemon does not answer.")
def umount(mountpoint: str, lazy: bool, abort: bool) -> None:
    """Unmount MOUNTPOINT; returns when the store is closed and can be mounted again.

    With --abort what its users have mapped and not written back is lost to them, and they die when they touch it.
    The store keeps all that was written to it.
    """
    entry = whole_mount(mountpoint)
    if abort:
        _abort(entry)
        return
    unmount(entry.mountpoint, lazy=lazy)
    bound_elsewhere = any(other.device == entry.device for other in mounts())
    if not lazy and not bound_elsewhere and entry.source.startswith("/"):
        _wait_closed(entry.source)


def _abort(entry: MountEntry) -> None:
    """Cut the connection to the kernel, by way of the supervisor, else of the kernel itself."""
    try:
        ask(entry.source, "abort")
    except MountError as exc:
        control = f"{_CONNECTIONS}/{os.minor(entry.device)}/abort"
        try:
            with open(control, "w") as file:
                file.write("1")
        except OSError as refused:
            raise MountError(f"{exc}; nor can {control} be written ({refused.strerror}): try as root") from None
    if mounted_at(entry.mountpoint) == entry:
        unmount(entry.mountpoint, lazy=True)


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
