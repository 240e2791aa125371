"""``ramfs layout``."""

import asyncio
import errno
import json
import os
import sys
from typing import Any

import click

from ramfs import qmp
from ramfs.cli._layouts import ask, files_of, path_of, store
from ramfs.cli._mounts import locate
from ramfs.cli._text import human, printable, write_line
from ramfs.errors import FileError, UsageError
from ramfs.inspect.layout import MAX_TEXT, Layout, parse


async def _ask(socket: str, directory: str) -> Layout:
    async with qmp.connect(socket) as guest:
        told = await ask(guest)
    return told.layout(directory, socket)


def _read(source: str) -> bytes:
    with click.open_file(source, "rb") as file:
        text: bytes = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise FileError(errno.EFBIG, f"{source} is longer than any layout: at most {MAX_TEXT} bytes")
    return text


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
    path = path_of(directory)
    if socket is not None:
        store(directory, asyncio.run(_ask(socket, directory)))
    elif source is not None:
        try:
            made = parse(_read(source), files_of(directory))
        except FileError as exc:
            raise FileError(exc.errno, f"{source} is no layout for {directory}: {exc}") from None
        store(directory, made)
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
