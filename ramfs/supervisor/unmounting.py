"""How a mount is taken down from outside."""

import os


def unmount_command(mountpoint: str, *, lazy: bool) -> list[str]:
    """The program and its arguments: as root umount(8), else fusermount3."""
    if os.geteuid() == 0:
        return ["umount", "-i", *(["-l"] if lazy else []), "--", mountpoint]
    return ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
