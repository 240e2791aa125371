"""``ramfs pull``."""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from ramfs.cli._control import DaemonReplaced, outcome
from ramfs.cli._flush import regular_files
from ramfs.cli._mounts import MountEntry, locate, locate_new
from ramfs.cli._pulls import Rate, faults, source_of, trouble
from ramfs.cli._text import duration, human, printable, write_line
from ramfs.cli.status import read_status
from ramfs.errors import FileError, SourceLost, UsageError

#: Seconds between two looks of ``--wait``.
_PERIOD: Final = 0.2
#: ... and of ``--warm``, for which a guest waits.
_SOON: Final = 0.02
#: Seconds that a lost source is waited for with ``--on-error=eio``: a server that is restarted is no reason to fail.
DEADLINE: Final = 10.0
#: What the daemon tells of what it has found here, which the one after it does not know.
_FOUND: Final = ("like", "taken_bytes", "wanted_bytes", "lost_bytes", "first_bytes")
#: What a command ends with that Ctrl-C ended.
_INTERRUPTED: Final = 130


def make(mount: MountEntry, request: dict[str, Any], directory: str) -> dict[str, Any]:
    """Have the daemon make the directory: its ``files``, ``bytes``, and more of the pull."""
    while True:
        try:
            told = outcome(mount, {"pull": request})
            return {key: told[key] for key in ("id", "files", "bytes", "verified", *_FOUND)}
        except DaemonReplaced:  # it made all of it, or nothing
            if os.path.lexists(directory):
                return _made_before(mount, request, directory)
        except OSError as exc:
            why = os.strerror(exc.errno) if exc.errno else str(exc)
            raise FileError(exc.errno or errno.EIO, f"cannot pull to {directory}: {why}") from None


def _made_before(mount: MountEntry, request: dict[str, Any], directory: str) -> dict[str, Any]:
    """The same of a directory that is there, made by a daemon that is not."""
    way = os.path.normpath(os.path.join(request["parent"], request["name"]))
    found = read_status(mount)["pulls"]
    pull: dict[str, Any] = next((each for each in found if each["path"] == way), {})
    sizes = [os.lstat(path).st_size for path in regular_files(directory)]
    known = {"id": pull.get("id"), "files": len(sizes), "bytes": sum(sizes), "verified": pull.get("verified")}
    return known | dict.fromkeys(_FOUND)


def _wait(
    mount: MountEntry, number: int, deadline: float | None, show: Callable[[dict[str, Any]], None], *, warm: bool
) -> bool:
    """Until nothing is lacking, or nothing of what guests ask for first (``warm``).

    Returns whether the directory was still there before. Raises SourceLost, MountError.
    """
    there = True
    while True:
        pull = next((each for each in read_status(mount)["pulls"] if each["id"] == number), None)
        if pull is None:
            return there
        there = pull["path"] is not None
        if warm and not pull["first_bytes"]:
            return there
        show(pull)
        if deadline is not None and pull["since"] and time.time() - pull["since"] > deadline + _PERIOD:
            raise SourceLost(f"{trouble(pull)}; what is touched fails until it is back, see `ramfs recover`")
        time.sleep(_SOON if warm else _PERIOD)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows on standard error how far a pull is: a bar on a terminal, and everywhere what goes wrong."""
    state = ""

    def tell(pull: dict[str, Any]) -> None:
        """Say once that it does not go on, and once that it does."""
        nonlocal state
        if pull["error"] and state != "waiting":
            say(f"ramfs: {pull['error']}; waiting, and going on when it is back")
        elif state == "waiting" and pull["state"] != "waiting":
            say("ramfs: going on")
        state = "waiting" if pull["error"] else pull["state"]

    say: Callable[[str], None] = _say
    if not sys.stderr.isatty():
        yield tell
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    say = console.out
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=True))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(pull: dict[str, Any]) -> None:
            tell(pull)
            left, rate = pull["total_bytes"] - pull["here_bytes"], pull["bytes_per_second"]
            soon = f" in {duration(left / rate)}" if rate else ""
            words = [f"{human(left)} left{soon}", f"{human(rate)}/s", faults(pull)]
            if pull["state"] != "arriving":
                words = [f"{pull['state']} {trouble(pull)}", *words] if pull["error"] else [pull["state"], *words]
            bar.update(
                task, description=escape(printable(", ".join(words))), total=pull["total_bytes"],
                completed=pull["here_bytes"],
            )  # fmt: skip

        yield show


def _say(line: str) -> None:
    click.echo(line, err=True)


def _like(like: str | None, mount: MountEntry) -> str | bool | None:
    """What is to be asked for: a path from the root of the mount, False for none, None for the newest."""
    if like in (None, "none"):
        return None if like is None else False
    found, way = locate(like)
    if found.device != mount.device:
        raise UsageError(f"{like} is not in the mount {mount.mountpoint}, so nothing can be shared with it")
    return way


def _describe(directory: str, uri: str, told: dict[str, Any]) -> str:
    """A line on what is there now."""
    files = "1 file" if told["files"] == 1 else f"{told['files']} files"
    checked = "each page is verified" if told["verified"] else "unverified: the source has no manifest of it"
    if told["taken_bytes"]:
        checked += f"; {human(told['taken_bytes'])} of it were here, {human(told['wanted_bytes'])} have to come"
    if told["lost_bytes"]:
        checked += f"; {human(told['lost_bytes'])} are lost there, and reading them is an error"
    if told["id"] is None:
        checked = "all of it is here"
    return f"{directory}: {files}, {human(told['bytes'])}, from {uri}; {checked}"


@click.command("pull")
@click.argument("uri")
@click.argument("directory", metavar="DIR")
@click.option("--wait", is_flag=True, help="Return when all is here, and show how it comes.")
@click.option("--warm", is_flag=True, help="Return when what guests ask for first is here, if the source tells.")
@click.option("--rate", type=Rate(), default=0, metavar="RATE", help="Stream so fast at most, such as 100M/s.")
@click.option("--paused", is_flag=True, help="Fetch what is touched only, until `ramfs resume`.")
@click.option(
    "--on-error", type=click.Choice(("wait", "eio")),
    help="When the source is lost, let whoever needs a page wait (the default), or fail after a while.",
)  # fmt: skip
@click.option(
    "--deadline", type=click.FloatRange(0, 1e9, max_open=True), metavar="SECONDS",
    help=f"Fail when the source was lost for so long; with --on-error=eio {DEADLINE:g}.",
)  # fmt: skip
@click.option(
    "--like", metavar="DIR|none",
    help="Take what is the same from this directory, or a snapshot, instead of fetching it; or from none.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def pull(
    uri: str, directory: str, wait: bool, warm: bool, rate: int, paused: bool, on_error: str | None,
    deadline: float | None, like: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Make DIR from what an NBD server exports, and use it at once; its pages come when they are touched.

    All others stream in behind. DIR lies in a ramfs mount and does not exist yet; it has a file for each export, or
    the one that the URI names. Returns when DIR can be used, long before all of it is here.

    \b
    URI is one of:
      nbd://HOST[:PORT]/[EXPORT]             nbds:// with TLS
      nbd+unix:///[EXPORT]?socket=PATH       nbds+unix:// with TLS
      file:PATH                              a local file or directory
    With TLS, ?tls-certificates=DIR names ca-cert.pem, client-cert.pem and
    client-key.pem; without it the authorities of the system are believed.

    Pages that this mount has already are not fetched: those of the same file, at the same offset, of another generation
    of DIR. Without --like that is the newest snapshot or directory among those beside DIR whose names are the same up
    to the first dot.

    Ctrl-C before DIR is there leaves nothing; after that the pull goes on. Both end with exit code 130.
    """  # noqa: D301 - click takes the backspace for "do not wrap"
    for name, value in (("URI", uri), ("DIR", directory)):
        if not value:
            raise UsageError(f"{name} is empty: see `ramfs pull --help`")
    if (wait or warm) and paused:
        raise UsageError(f"--{'wait' if wait else 'warm'} would never end with --paused: give one of them")
    if deadline is not None and (on_error == "wait" or math.isnan(deadline)):
        raise UsageError("--deadline is how long to wait before failing: give it without --on-error=wait, as a number")
    if on_error == "eio" and deadline is None:
        deadline = DEADLINE
    uri = source_of(uri)
    mount, parent, name = locate_new(directory)
    request = {"uri": uri, "parent": parent, "name": name, "wait": deadline, "rate": rate, "paused": paused}
    request["like"] = _like(like, mount)
    began = time.monotonic()
    try:
        told = make(mount, request, directory)
        if not as_json:
            write_line(_describe(directory, uri, told))
        if (wait or warm) and told["id"] is not None:
            with _progress() as show:
                there = _wait(mount, told["id"], deadline, show, warm=not wait)
            if not there or not os.path.lexists(directory):
                raise FileError(errno.ENOENT, f"{directory} was removed or renamed before all of it was here")
    except KeyboardInterrupt:
        if not os.path.lexists(directory):
            raise
        _say(f"ramfs: interrupted; {directory} goes on arriving, until `ramfs pause` or until it is removed")
        return _INTERRUPTED
    seconds = round(time.monotonic() - began, 3)
    if as_json:
        took = {"seconds": seconds} if wait or warm else {}
        click.echo(json.dumps({"path": directory, "source": uri, **told, **took}))
    elif wait:
        click.echo(f"all of it is here, after {duration(seconds)}")
    elif warm and told["first_bytes"] == 0:
        click.echo("nothing is known of what guests ask for first, or it was here already")
    elif warm:
        click.echo(f"what guests ask for first is here, after {duration(seconds)}")
    return 0
