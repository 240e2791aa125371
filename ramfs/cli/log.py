"""``ramfs log``."""

import errno
import json
import os
import sys
import time
from typing import Any

import click

from ramfs.cli._generations import compare, vanishing
from ramfs.cli._mounts import MountEntry, locate
from ramfs.cli._text import human, printable, write_line
from ramfs.cli.du import collect
from ramfs.errors import FileError, UsageError
from ramfs.units import PAGE


@click.command("log")
@click.argument("directory", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def log(directory: str, as_json: bool) -> None:
    """Tell the generations of DIR: what it is now, then its snapshots, the newest first.

    Of each: when it was made, the generation before it, the pages that have changed since that, and the bytes that it
    alone has, which come back when it is removed. Before the first stands what DIR was cloned from, if that is there.
    """
    if not directory:
        raise UsageError("DIR is empty: give a directory on a ramfs mount")
    mount, _ = locate(directory)
    if not os.path.isdir(directory):
        raise FileError(errno.ENOTDIR, f"{directory} is not a directory: only directories have generations")
    snaps = os.path.join(directory, ".snap")
    if not os.path.isdir(snaps):
        raise FileError(errno.EINVAL, f"{directory} is frozen, and has no generations: name the directory itself")
    with vanishing(directory):
        paths = [os.path.join(snaps, name) for name in os.listdir(snaps)]  # in the order in which they were made
        found = [_generation(mount, path) for path in [directory, *reversed(paths)]]
    if as_json:
        click.echo(json.dumps({"path": directory, "page_bytes": PAGE, "generations": found}, indent=2))
        return
    show = printable if sys.stdout.isatty() else str
    rows: list[tuple[str, ...]] = [("made", "changed", "owned", "generation", "after")]
    for each in found:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["made"] / 1e9)) if each["name"] else "now"
        changed = "-" if each["changed"] is None else human(each["changed"] * PAGE)
        after = "-" if each["parent"] is None else show(_short(each["parent"], directory))
        rows.append((made, changed, human(each["owned_bytes"]), show(each["name"] or directory), after))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.rjust(width) if column in (1, 2) else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row[:4], widths, strict=True))]  # fmt: skip
        write_line("  ".join([*cells, row[4]]))


def _generation(mount: MountEntry, path: str) -> dict[str, Any]:
    """What there is to tell of one."""
    told = json.loads(os.getxattr(path, "user.ramfs.generation"))
    parent = None if told["parent"] is None else os.path.join(mount.mountpoint, told["parent"])
    counts = collect(path).values()
    snapshot = os.path.basename(os.path.dirname(path)) == ".snap"
    return {
        "name": os.path.basename(path) if snapshot else None,
        "path": path,
        "made": told["made"],
        "parent": parent,
        "changed": None if parent is None else sum(change.pages for change in compare(parent, path)),
        "pages": sum(each["total"] for each in counts),
        "owned_bytes": sum(each["owned"] for each in counts) * PAGE,
    }


def _short(parent: str, directory: str) -> str:
    """A snapshot of the same directory by its name alone."""
    above, name = os.path.split(parent)
    return name if above == os.path.join(os.path.realpath(directory), ".snap") else parent
