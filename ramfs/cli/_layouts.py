"""The layout of a guest's memory: what QEMU says of it, and what a directory has (fuse/views.py)."""

import errno
import json
import os
import stat
from dataclasses import dataclass

from ramfs import qmp
from ramfs.errors import FileError
from ramfs.inspect.layout import Layout, to_text
from ramfs.inspect.memorymap import layout_of


def path_of(directory: str) -> str:
    """Where a directory has its layout."""
    return os.path.join(directory, ".guest", "layout.json")


def is_derived(directory: str) -> bool:
    """Has a directory a layout, which nobody has told it? (False where there are no layouts.) Raises OSError."""
    try:
        with open(path_of(directory), "rb") as file:
            return bool(json.load(file)["derived"])
    except FileNotFoundError:
        return False


def files_of(directory: str) -> dict[bytes, int]:
    """The regular files of a directory by name, with their sizes."""
    with os.scandir(os.fsencode(directory)) as entries:
        told = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return {name: status.st_size for name, status in told if stat.S_ISREG(status.st_mode)}


@dataclass(frozen=True)
class Told:
    """What QEMU says of its memory."""

    mtree: str
    ramblock: str
    paths: dict[str, str]
    """of memory backends that are files, by their ids"""
    machine: str
    pid: int | None

    def layout(self, directory: str, socket: str) -> Layout:
        """The layout of a directory. Raises QmpError, FileError, OSError."""
        files, here = files_of(directory), os.path.realpath(directory)
        backends: dict[bytes, bytes] = {}
        for name, path in self.paths.items():
            # One that is relative is so to where QEMU runs.
            where, file = os.path.split(os.path.realpath(os.path.join(f"/proc/{self.pid}/cwd", path)))
            if where == here and os.fsencode(file) in files:
                for block in (name, f"/objects/{name}"):
                    backends[block.encode()] = os.fsencode(file)
        layout = layout_of(self.mtree, self.ramblock, backends, files, self.machine)
        if not layout.ranges:
            raise FileError(
                errno.EINVAL,
                f"no RAM of the guest at {socket} is in a file of {directory}: start it with its memory there",
            )
        return layout


async def ask(guest: qmp.Qmp) -> Told:
    """Raises QmpError."""

    async def asked(path: str, name: str) -> str:
        return str(await guest.execute("qom-get", {"path": path, "property": name}))

    objects = [each["name"] for each in await guest.execute("qom-list", {"path": "/objects"}) if _is_backend(each)]
    paths = {name: await asked(f"/objects/{name}", "mem-path") for name in objects}
    machine = (await asked("/machine", "type")).removesuffix("-machine")
    return Told(
        await guest.monitor("info mtree -f"), await guest.monitor("info ramblock"), paths, machine, guest.peer()
    )


def _is_backend(child: dict[str, str]) -> bool:
    return child["type"] == "child<memory-backend-file>"


def store(directory: str, layout: Layout) -> None:
    """Let a directory have a layout. Raises OSError, FileError."""
    try:
        fd = os.open(path_of(directory), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, to_text(layout))
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno == errno.EROFS:
            raise FileError(
                errno.EROFS,
                f"{directory} is frozen, or links to frozen files, and keeps its layout: set that of a clone",
            ) from None
        raise
