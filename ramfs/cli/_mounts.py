"""Finding mounts in /proc/self/mountinfo."""

import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ramfs.errors import FileError, MountError, UsageError
from ramfs.supervisor import client as supervisor

FSTYPE: Final = "fuse.ramfs"

#: Seconds that a daemon may take to answer a question about itself.
PATIENCE: Final = 5.0
#: Seconds after which it is asked whether there is one at all.
_SOON: Final = 0.5

T = TypeVar("T")


def ask(mountpoint: str, question: Callable[[], T], patience: float | None = None) -> T:
    """The answer to a question that touches a path, likely of a mount.

    Raises MountError when there is none in time, because its daemon hangs, or none serves; or OSError.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(question())
        except Exception as exc:  # noqa: BLE001  (raised again below)
            errors.append(exc)

    thread = threading.Thread(target=work, daemon=True)  # the kernel lets go of it when the command ends
    thread.start()
    patience = PATIENCE if patience is None else patience
    thread.join(min(patience, _SOON))
    if thread.is_alive():
        place = place_of(mountpoint)
        over = [entry for entry in mounts() if os.path.commonpath((entry.mountpoint, place)) == entry.mountpoint]
        entry = max(over, key=lambda entry: len(entry.mountpoint))
        if _supervisor(entry).get("state") != "halted":
            thread.join(max(0.0, patience - _SOON))
        if thread.is_alive():
            raise MountError(_unserved(entry))
    if errors:
        raise errors[0]
    return answers[0]


def _supervisor(entry: "MountEntry") -> dict[str, Any]:
    """What the supervisor of a mount says of itself; nothing when there is none, or not for us."""
    try:
        return supervisor.ask(entry.source, "status", patience=PATIENCE)
    except MountError:
        return {}


def _unserved(entry: "MountEntry") -> str:
    """What to say and to do about a mount whose daemon does not answer."""
    where, facts = entry.mountpoint, _supervisor(entry)
    match facts.get("state"):
        case "halted":
            return f"{where} is not served: {facts.get('halted', facts['why'])}"
        case "serving":
            return (
                f"{where} does not answer: its daemon, process {facts['daemon']}, hangs or is stopped; "
                "once that is killed another one goes on"
            )
        case "starting":
            return f"{where} does not answer yet: its supervisor, process {facts['pid']}, is starting a daemon"
    return f"{where} does not answer: its daemon hangs, or is stopped; end that daemon first"


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of mountinfo (proc(5))."""

    device: int
    root: str
    """what of the file system lies at the mountpoint: ``/``, or for a bind mount a directory below"""
    mountpoint: str
    fstype: str
    source: str


def _unescape(text: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text))


def mounts() -> list[MountEntry]:
    """All mounts that this process sees, in the order they were made."""
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file.read().split(b"\n")[:-1]:
            fields, _, rest = line.partition(b" - ")
            parts, (fstype, source, *_) = fields.split(b" "), rest.split(b" ")
            major, _, minor = parts[2].partition(b":")
            found.append(
                MountEntry(
                    os.makedev(int(major), int(minor)),
                    _unescape(parts[3]),
                    _unescape(parts[4]),
                    _unescape(fstype),
                    _unescape(source),
                )
            )
    return found


def place_of(mountpoint: str) -> str:
    """The absolute path without symlinks of a mountpoint. Never asks a file system that is mounted there."""
    path = os.path.abspath(mountpoint)
    for _ in range(40):
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        try:
            path = os.path.abspath(os.path.join(os.path.dirname(path), os.readlink(path)))
        except OSError:  # EINVAL: no symlink. The kernel knows that of a mount's root by itself.
            break
    return path


def mounted_at(mountpoint: str) -> MountEntry | None:
    """The uppermost mount at exactly this place. Looks at names only, so it works where the mount hangs."""
    place = place_of(mountpoint)
    for entry in reversed(mounts()):
        if entry.mountpoint == place:
            return entry
    return None


def whole_mount(mountpoint: str) -> MountEntry:
    """The ramfs mount at exactly this place. Raises UsageError, MountError."""
    if not mountpoint:
        raise UsageError("MOUNTPOINT is empty: give the path of a mount")
    entry = mounted_at(mountpoint)
    if entry is None:
        raise MountError(f"{mountpoint} is not mounted; `ramfs status` and findmnt -t {FSTYPE} list what is")
    if entry.fstype != FSTYPE:
        raise MountError(f"{mountpoint} is a mount of type {entry.fstype}, not of ramfs: use umount(8)")
    return entry


def running() -> list[MountEntry]:
    """All ramfs mounts, each once, however often it is bound to other places."""
    found: dict[int, MountEntry] = {}
    for entry in mounts():
        if entry.fstype == FSTYPE and (entry.device not in found or found[entry.device].root != "/" == entry.root):
            found[entry.device] = entry
    return list(found.values())


def locate(path: str) -> tuple[MountEntry, str]:
    """The ramfs mount that an existing path lies in, and the path's way from the root of that mount.

    Raises MountError, or OSError where there is no such path.
    """

    def look() -> tuple[str, int]:
        real = os.path.realpath(path)
        return real, os.stat(real).st_dev

    try:
        real, device = ask(path, look)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise OSError(exc.errno, exc.strerror, path) from None
        raise MountError(
            f"{path} lies in a mount whose daemon has died: unmount it (ramfs umount) and mount the store again"
        ) from None
    same = [entry for entry in mounts() if entry.device == device and entry.fstype == FSTYPE]
    if not same:
        raise MountError(f"{path} does not lie in a ramfs mount: name a path below a mountpoint of `ramfs mount`")
    # It may be bound to several places. The way is that of the place which the path goes through.
    over = [entry for entry in same if os.path.commonpath((entry.mountpoint, real)) == entry.mountpoint]
    through = max(over, key=lambda entry: len(entry.mountpoint), default=same[-1])
    whole = next((entry for entry in same if entry.root == "/"), None)
    if whole is None:
        raise MountError(f"{path} lies in a part of a ramfs mount, and the whole of it is mounted nowhere in sight")
    return whole, os.path.relpath(os.path.join(through.root, os.path.relpath(real, through.mountpoint)), "/")


def locate_new(path: str) -> tuple[MountEntry, str, str]:
    """Where a directory that is to be made will lie: the mount, the way to its parent, its name.

    Raises FileError, OSError where it cannot be, MountError.
    """
    parent, name = os.path.split(path.rstrip("/") or "/")
    if os.path.lexists(path):
        raise FileError(errno.EEXIST, f"{path} exists: choose another name, or remove it first")
    try:
        is_directory = stat.S_ISDIR(os.stat(parent or ".").st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_directory = False
    if not is_directory:
        raise FileError(errno.ENOENT, f"{parent} is not a directory: make it first")
    return *locate(parent or "."), name


def users(mountpoint: str) -> list[str]:
    """What uses a mount, as far as /proc tells: ``qemu-system-x86 (1234)``, or a mount below it."""
    inside = mountpoint.rstrip("/") + "/"

    def uses(process: str) -> bool:
        links = [f"{process}/cwd", f"{process}/root", *(entry.path for entry in os.scandir(f"{process}/fd"))]
        for link in links:
            try:
                if f"{os.readlink(link)}/".startswith(inside):
                    return True
            except FileNotFoundError:  # closed meanwhile
                continue
        with open(f"{process}/maps", errors="surrogateescape") as maps:
            return any(f" {inside}" in line for line in maps)

    found = [f"the mount at {entry.mountpoint}" for entry in mounts() if entry.mountpoint.startswith(inside)]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            if uses(f"/proc/{pid}"):
                with open(f"/proc/{pid}/comm", errors="replace") as comm:
                    found.append(f"{comm.read().strip()} ({pid})")
        except OSError:  # another user's, or gone
            continue
    return found
