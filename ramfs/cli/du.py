"""``ramfs du``."""

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from typing import Final

import click

from ramfs.cli._mounts import locate
from ramfs.cli._text import human, printable, write_line
from ramfs.errors import FileError
from ramfs.fuse.flush_helper import write_back_range
from ramfs.units import PAGE

STATES: Final = ("owned", "shared", "zero", "absent")


def hand_over(path: str) -> None:
    """Have the kernel hand over what a guest stored into mapped pages, which it does when it is told to.

    Who may not open the file learns of it as it was up to half a minute ago; what is no regular file has nothing, nor
    has what is frozen, whose first open is not for nothing.
    """
    if f"{os.sep}.snap{os.sep}" in os.path.abspath(path):
        return
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            write_back_range(fd)
        finally:
            os.close(fd)


def page_counts(path: str) -> dict[str, int]:
    """The pages of a file by state, from the attribute ``user.ramfs.pages``."""
    hand_over(path)
    counts: dict[str, int] = json.loads(os.getxattr(path, "user.ramfs.pages", follow_symlinks=False))
    return counts


def files(path: str) -> Iterator[str]:
    """The regular files below a directory; symlinks are not followed."""
    for directory, names, entries in os.walk(path, onerror=_raise):
        names.sort()
        for name in sorted(entries):
            full = os.path.join(directory, name)
            try:
                if stat.S_ISREG(os.lstat(full).st_mode):
                    yield full
            except FileNotFoundError:
                continue  # removed meanwhile


def _raise(error: OSError) -> None:
    raise error


def collect(path: str) -> dict[str, dict[str, int]]:
    """Page counts of a file, or of the files below a directory, by their paths."""
    if os.path.isdir(path):
        found = {}
        for name in files(path):
            try:
                found[name] = page_counts(name)
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENODATA):  # removed meanwhile; a file of .ramfs
                    raise
        return found
    try:
        return {path: page_counts(os.path.realpath(path))}
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise
        raise FileError(errno.EINVAL, f"{path} is not a regular file, so it has no pages") from None


@click.command("du")
@click.argument("path")
@click.option("--pages", "in_pages", is_flag=True, help="Print numbers of pages instead of sizes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in pages.")
def du(path: str, in_pages: bool, as_json: bool) -> None:
    """Tell for each file at or below PATH which pages it owns, shares, has zero or lacks.

    Owned pages are named by this file alone: their space comes back when it is removed. Shared ones are named
    by a clone or snapshot too, zero pages take no space, absent ones have not arrived yet.
    """
    locate(path)
    found = collect(path)
    total = {state: sum(counts[state] for counts in found.values()) for state in (*STATES, "total")}
    if as_json:
        click.echo(json.dumps({"page_bytes": PAGE, "files": found, "total": total}, indent=2))
        return
    rows: list[tuple[str, ...]] = [(*STATES, "file")]
    show = printable if sys.stdout.isatty() else str
    for name, counts in [*found.items(), ("total", total)] if len(found) != 1 else found.items():
        rows.append(
            (*(str(counts[state]) if in_pages else human(counts[state] * PAGE) for state in STATES), show(name))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(STATES))]
    for row in rows:
        write_line("  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
