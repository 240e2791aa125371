"""``ramfs layout``."""

import asyncio
import errno
import json
import os
import stat
import sys
from dataclasses import dataclass
from typing import Any

import click

from ramfs import qmp
from ramfs.cli._mounts import locate
from ramfs.cli._text import human, printable, write_line
from ramfs.errors import FileError, UsageError
from ramfs.inspect.layout import MAX_TEXT, Layout, parse, to_text
from ramfs.inspect.memorymap import layout_of


def _files(directory: str) -> dict[bytes, int]:
    """The regular files of a directory by name, with their sizes."""
    with os.scandir(os.fsencode(directory)) as entries:
        told = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return {name: status.st_size for name, status in told if stat.S_ISREG(status.st_mode)}


@dataclass(frozen=True)
class _Told:
    """What QEMU says of its memory."""

    mtree: str
    ramblock: str
    paths: dict[str, str]
    """of memory backends that are files, by their ids"""
    machine: str
    pid: int | None


async def _ask(socket: str) -> _Told:
    """Raises QmpError."""
    async with qmp.connect(socket) as guest:

        async def asked(path: str, name: str) -> str:
            return str(await guest.execute("qom-get", {"path": path, "property": name}))

        objects = [each["name"] for each in await guest.execute("qom-list", {"path": "/objects"}) if _is_backend(each)]
        paths = {name: await asked(f"/objects/{name}", "mem-path") for name in objects}
        machine = (await asked("/machine", "type")).removesuffix("-machine")
        return _Told(
            await guest.monitor("info mtree -f"), await guest.monitor("info ramblock"), paths, machine, guest.peer()
        )


def _is_backend(child: dict[str, str]) -> bool:
    return child["type"] == "child<memory-backend-file>"


def _layout_of(told: _Told, directory: str, socket: str) -> Layout:
    """The layout of a directory, as QEMU tells it. Raises QmpError, FileError."""
    files, here = _files(directory), os.path.realpath(directory)
    backends: dict[bytes, bytes] = {}
    for name, path in told.paths.items():
        # One that is relative is so to where QEMU runs.
        where, file = os.path.split(os.path.realpath(os.path.join(f"/proc/{told.pid}/cwd", path)))
        if where == here and os.fsencode(file) in files:
            for block in (name, f"/objects/{name}"):
                backends[block.encode()] = os.fsencode(file)
    layout = layout_of(told.mtree, told.ramblock, backends, files, told.machine)
    if not layout.ranges:
        raise FileError(
            errno.EINVAL, f"no RAM of the guest at {socket} is in a file of {directory}: start it with its memory there"
        )
    return layout


def _read(source: str) -> bytes:
    with click.open_file(source, "rb") as file:
        text: bytes = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise FileError(errno.EFBIG, f"{source} is longer than any layout: at most {MAX_TEXT} bytes")
    return text


def _store(directory: str, layout: Layout) -> None:
    path = os.path.join(directory, ".guest", "layout.json")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
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


@click.command("layout")
@click.argument("directory", metavar="DIR")
@click.option("--qmp", "socket", metavar="SOCKET", help="Ask the QEMU that listens at this QMP socket, and store it.")
@click.option("--from", "source", metavar="FILE", help="Store what FILE says, in the form of --json; - reads it here.")
@click.option("--derive", is_flag=True, help="Forget what is stored: names and sizes tell from now on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as .guest/layout.json has it.")
def layout(directory: str, socket: str | None, source: str | None, derive: bool, as_json: bool) -> None:
    """Tell where the files of DIR lie in the physical memory of its guest, or set that.

    Without being told, block files IDSTR@GPA lie at GPA, and RAM of 3.5 GiB or more goes on above 4 GiB as in QEMU's
    pc machine. Views of the memory are in DIR/.guest: physmem, vmcore, and each range.
    """
    if not directory:
        raise UsageError("DIR is empty: give a directory on a ramfs mount")
    if sum((socket is not None, source is not None, derive)) > 1:
        raise UsageError("--qmp, --from and --derive each set the layout: give one of them")
    locate(directory)
    if not os.path.isdir(directory):
        raise FileError(errno.ENOTDIR, f"{directory} is not a directory: a guest's memory is all files of one")
    path = os.path.join(directory, ".guest", "layout.json")
    if socket is not None:
        _store(directory, _layout_of(asyncio.run(_ask(socket)), directory, socket))
    elif source is not None:
        try:
            made = parse(_read(source), _files(directory))
        except FileError as exc:
            raise FileError(exc.errno, f"{source} is no layout for {directory}: {exc}") from None
        _store(directory, made)
    elif derive:
        os.unlink(path)
    with open(path, "rb", buffering=0) as file:
        text = file.read(MAX_TEXT * 4)
    if as_json:
        click.echo(text, nl=False)
        return
    _print(directory, json.loads(text))


def _print(directory: str, told: dict[str, Any]) -> None:
    show = printable if sys.stdout.isatty() else str
    rows = [(each, each["file"], f"at {each['offset']}") for each in told["ranges"]]
    rows += [(each, f"({each['block']}, in no file)", "") for each in told["elsewhere"]]
    rows += [(each, "(no file)", "") for each in told["gaps"]]
    lines: list[tuple[str, ...]] = [("from", "to", "size", "file", "")]
    for each, name, where in sorted(rows, key=lambda row: (int(row[0]["gpa"], 16), row[1])):
        gpa, size = int(each["gpa"], 16), int(each["size"], 16)
        lines.append((f"{gpa:#x}", f"{gpa + size:#x}", human(size), show(name), where))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        numbers = [cell.rjust(width) for cell, width in zip(line, widths, strict=False)]
        write_line("  ".join([*numbers, *line[3:]]).rstrip())
    for each in told.get("ignored", ()):
        click.echo(f"ramfs: {directory}: {each['file']} says that it is at {each['gpa']} too: ignored", err=True)
    if told["derived"]:
        write_line("derived from names and sizes; `ramfs layout --qmp` asks a running QEMU")
    elif "machine" in told:
        write_line(f"of a {told['machine']}")
