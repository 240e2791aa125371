"""How a mount is taken down from outside."""

import os


def unmount_command(mountpoint: str, *, lazy: bool) -> list[str]:
    """The program and its arguments: as root umount(8), else fusermount3. ``mountpoint`` is what mountinfo has."""
    if os.geteuid() == 0:
        # -c: or it asks the file system what it is, and waits for ever where no daemon serves.
        return ["umount", "-i", "-c", *(["-l"] if lazy else []), "--", mountpoint]
    return ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
