"""``ramfs du``."""

import json
import os
from collections.abc import Iterator

import click
from rich.console import Console
from rich.table import Table

from ramfs.cli._mounts import mount_of
from ramfs.cli.status import human
from ramfs.units import PAGE

STATES = ("owned", "shared", "zero", "absent")


def page_counts(path: str) -> dict[str, int]:
    """The pages of a file by state, from the attribute ``user.ramfs.pages``."""
    counts: dict[str, int] = json.loads(os.getxattr(path, "user.ramfs.pages", follow_symlinks=False))
    return counts


def files(path: str) -> Iterator[str]:
    """A regular file itself, or those below a directory; symlinks are not followed."""
    if not os.path.isdir(path):
        yield path
        return
    for directory, names, entries in os.walk(path, onerror=_raise):
        names.sort()
        for name in sorted(entries):
            full = os.path.join(directory, name)
            if os.path.isfile(full) and not os.path.islink(full):
                yield full


def _raise(error: OSError) -> None:
    raise error


@click.command("du")
@click.argument("path", type=click.Path())
@click.option("--pages", "in_pages", is_flag=True, help="Print numbers of pages instead of sizes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in pages.")
def du(path: str, in_pages: bool, as_json: bool) -> None:
    """Tell for each file at or below PATH which pages it owns, shares, has zero or lacks.

    Owned pages are named by this file alone: their space comes back when it is removed. Shared ones are named
    by a clone or snapshot too, zero pages take no space, absent ones have not arrived yet.
    """
    mount_of(path)
    found = {name: page_counts(name) for name in files(path)}
    total = {state: sum(counts[state] for counts in found.values()) for state in (*STATES, "total")}
    if as_json:
        click.echo(json.dumps({"page_bytes": PAGE, "files": found, "total": total}, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for state in STATES:
        table.add_column(state, justify="right")
    table.add_column("file", overflow="fold")
    for name, counts in [*found.items(), ("total", total)] if len(found) != 1 else found.items():
        table.add_row(*(str(counts[state]) if in_pages else human(counts[state] * PAGE) for state in STATES), name)
    Console().print(table)
