"""``ramfs flatten``."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from ramfs.cli._control import asked, follow
from ramfs.cli._mounts import locate
from ramfs.cli._text import human, printable, write_line
from ramfs.errors import FileError

Results = list[dict[str, Any]]


def flatten_below(path: str, *, quiet: bool = False) -> Results:
    """Flatten the frozen files at or below a path; what became of each. Raises FileError, MountError.

    An exception in between, such as KeyboardInterrupt, leaves the file under way as it was.
    """
    mount, way = locate(path)
    with _progress(quiet=quiet) as show:
        try:
            with asked(mount, {"flatten": way}, told=True) as fd:
                told = follow(fd, show)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                text = f"{path} has nothing frozen in it: only what never changes can be flat; take a snapshot first"
                raise FileError(errno.EINVAL, text) from None
            raise
    results: Results = [{**result, "path": _join(path, result["path"])} for result in told["results"]]
    if told["error"] is not None:
        error = told["error"]
        raise FileError(error["errno"], f"cannot flatten {_join(path, error['path'])}: {error['message']}")
    return results


def _join(path: str, below: str) -> str:
    return os.path.join(path, below) if below else path


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows how far it is, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(told: dict[str, Any]) -> None:
            name = printable(told["path"] or "")
            bar.update(
                task, description=f"{told['done_files']} of {told['files']} {name}",
                completed=told["done"], total=told["total"] or None,
            )  # fmt: skip

        yield show


def print_results(results: Results) -> None:
    """A line for each file."""
    for result in results:
        path = result["path"]
        if result["flattened"]:
            write_line(f"flattened {path}: {human(result['bytes'])} in {result['seconds']:.2f} s")
        else:
            write_line(f"left {path}: {result['why']}")


@click.command("flatten")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def flatten(path: str, as_json: bool) -> None:
    """Let the frozen files at or below PATH be held by one layer of the store each.

    Such a file the kernel can serve by itself, without the daemon, from its next first open on. It reads the same
    before, meanwhile and after. Where the store's file system shares blocks (XFS, btrfs) nothing is copied; else the
    file has pages of its own afterwards. Ctrl-C ends it; files that are done stay so, of the one under way nothing is
    left.
    """
    results = flatten_below(path, quiet=as_json)
    if as_json:
        click.echo(json.dumps({"files": results}))
    else:
        print_results(results)
