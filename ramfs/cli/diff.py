"""``ramfs diff``."""

import errno
import json
import os
import sys
from collections.abc import Iterator

import click

from ramfs.cli._generations import Change, compare, vanishing
from ramfs.cli._mounts import locate
from ramfs.cli._text import human, printable, write_line
from ramfs.errors import FileError, UsageError
from ramfs.units import PAGE


@click.command("diff")
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
@click.option("--pages", "with_pages", is_flag=True, help="List the pages, as runs of numbers.")
@click.option("--content", is_flag=True, help="Leave out pages that were written and hold the same bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def diff(old: str, new: str, with_pages: bool, content: bool, as_json: bool) -> None:
    """Tell which pages of the files in A are others in B.

    A and B are snapshots, directories as they are now, or files: two of one mount. They are related if one was cloned
    from, or is a snapshot of, the other, or both are snapshots of the same directory; else all pages differ.

    Known without reading a page: every page that was written since counts, also one that was written with the same
    bytes, unless --content compares the digests of those. (Of pages that have none yet it reads the page.)
    """
    for name, value in (("A", old), ("B", new)):
        if not value:
            raise UsageError(f"{name} is empty: give a path on a ramfs mount")
    (mount, _), (other, _) = locate(old), locate(new)
    if mount.device != other.device:
        raise UsageError(f"{old} and {new} lie in different mounts, so they share no pages: compare them with cmp")
    if os.path.isdir(old) != os.path.isdir(new):
        raise FileError(errno.ENOTDIR, f"one of {old} and {new} is a directory: give two directories, or two files")
    with vanishing(f"{old} or {new}"):
        found = list(compare(old, new, content=content, with_runs=with_pages, with_places=True))
    total = sum(change.pages for change in found)
    if as_json:
        files = [change.told() for change in found]
        click.echo(json.dumps({"a": old, "b": new, "page_bytes": PAGE, "files": files, "changed": total}, indent=2))
        return
    show = printable if sys.stdout.isatty() else str
    changed = [change for change in found if change.state != "same"]
    rows = [(_amount(change), _state(change), show(change.path)) for change in changed]
    same = len(found) - len(changed)
    rows.append((human(total * PAGE), f"{total} pages", f"changed in all; {_files(same)} as before"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for number, (amount, state, name) in enumerate(rows):
        write_line(f"{amount.rjust(widths[0])}  {state.ljust(widths[1])}  {name}")
        for line in _details(changed[number]) if number < len(changed) else ():
            write_line(f"{'':{widths[0]}}  {line}")


def _amount(change: Change) -> str:
    return human(change.pages * PAGE)


def _state(change: Change) -> str:
    before, after = change.sizes
    if change.state != "changed" or before == after:
        return change.state if change.state != "changed" else f"of {human(after)}"
    return f"of {human(after)}, was {human(before)}"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _details(change: Change) -> Iterator[str]:
    """Where in the guest's memory that is, of a file that lies at more than one place; then the pages."""
    if len(change.places) > 1:
        for place, count in change.places:
            yield f"{human(count * PAGE)} at guest-physical {_span(place.gpa, place.gpa + place.size)}"
    for run in change.runs or ():
        first, stop = run
        line = f"page {first}" if stop == first + 1 else f"pages {first}-{stop - 1}"
        spans = [place.of(run) for place, _ in change.places]
        where = ", ".join(_span(*span) for span in spans if span[0] < span[1])
        yield f"{line}, guest-physical {where}" if where else line


def _span(start: int, stop: int) -> str:
    return f"{start:#x}-{stop - 1:#x}"
