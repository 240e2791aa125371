"""Finding mounts in /proc/self/mountinfo."""

import os
import re
from dataclasses import dataclass

from ramfs.errors import MountError

FSTYPE = "fuse.ramfs"


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of mountinfo (proc(5))."""

    device: int
    mountpoint: str
    fstype: str
    source: str


def _unescape(text: str) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text)))


def mounts() -> list[MountEntry]:
    """All mounts that this process sees, in the order they were made."""
    found = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.partition(" - ")
            parts, (fstype, source, *_) = fields.split(" "), rest.split(" ")
            major, _, minor = parts[2].partition(":")
            found.append(
                MountEntry(os.makedev(int(major), int(minor)), _unescape(parts[4]), fstype, _unescape(source))
            )
    return found


def mounted_at(mountpoint: str) -> MountEntry | None:
    """The uppermost mount at exactly this place. Looks at names only, so it works where the mount hangs."""
    place = _real(mountpoint)
    for entry in reversed(mounts()):
        if entry.mountpoint == place:
            return entry
    return None


def _real(path: str) -> str:
    """The path with the symlinks of its parents resolved, without a look at its last part."""
    head, tail = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(head), tail)


def mount_of(path: str) -> MountEntry:
    """The ramfs mount that an existing path lies in. Raises MountError."""
    device = os.stat(path).st_dev
    for entry in reversed(mounts()):
        if entry.device == device:
            if entry.fstype != FSTYPE:
                break
            return entry
    raise MountError(f"{path} does not lie in a ramfs mount: name a path below a mountpoint of `ramfs mount`")


def relative(path: str, entry: MountEntry) -> str:
    """An existing path's way from the root of its mount."""
    return os.path.relpath(os.path.realpath(path), entry.mountpoint)


def running(path: str | None) -> list[MountEntry]:
    """The ramfs mount of a path, or all of them."""
    if path is not None:
        return [mount_of(path)]
    return [entry for entry in mounts() if entry.fstype == FSTYPE]
