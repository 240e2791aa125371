"""``ramfs top``."""

import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ramfs.cli._mounts import MountEntry, whole_mount
from ramfs.cli._pulls import facts
from ramfs.cli._text import duration, human, printable
from ramfs.cli.status import read_status
from ramfs.units import PAGE

#: What is told a second of, by their names in status.json and on the screen.
_RATES: Final = {
    "reads": "reads", "read_bytes": "read", "writes": "writes", "written_bytes": "written",
    "shared_bytes": "shared by copies", "errors": "errors",
}  # fmt: skip
_STATES: Final = ("owned", "shared", "zero", "absent")
#: Pages are counted again after so many seconds, and so many times what that took: large tables take long to read.
_COUNTING: Final = (3.0, 20.0)


class Sampler:
    """Looks at a mount again and again."""

    def __init__(self, mount: MountEntry) -> None:
        self._mount = mount
        self._before, self._at = read_status(mount), time.monotonic()
        self._counts: dict[str, dict[str, int]] = {}
        self._count_at = 0.0

    def look(self) -> dict[str, Any]:
        """What there is to show; rates are of the time since the last look. Raises MountError."""
        status, now = read_status(self._mount), time.monotonic()
        seconds = max(now - self._at, 1e-3)
        before, after = self._before["requests"], status["requests"]
        if status["pid"] != self._before["pid"]:  # another daemon, which counts from zero
            before = dict.fromkeys(after, 0)
        fetched = {pull["id"]: pull["fetched_bytes"] for pull in self._before["pulls"]}
        self._before, self._at = status, now
        if now >= self._count_at:
            self._count(status)
        return {
            "mountpoint": status["mountpoint"],
            "pid": status["pid"],
            "uptime_seconds": status["uptime_seconds"],
            "daemons_died": status["supervisor"]["crashes"],
            "store_bytes": status["store_bytes"],
            "seconds": round(seconds, 3),
            "per_second": {name: round((after[name] - before[name]) / seconds, 1) for name in _RATES},
            "fetched_per_second": round(
                sum(max(0, pull["fetched_bytes"] - fetched.get(pull["id"], 0)) for pull in status["pulls"]) / seconds, 1
            ),
            "directories": self._directories(status),
            "pulls": status["pulls"],
            "slowest_requests": status["slowest_requests"],
        }

    def _count(self, status: dict[str, Any]) -> None:
        """Ask for the pages of the open files; without a flush, which would cost more than all else."""
        begun = time.monotonic()
        self._counts = {}
        for path in {file["path"] for file in status["open_files"]}:
            with contextlib.suppress(OSError, ValueError):  # it has no name any more, or no pages
                self._counts[path] = json.loads(
                    os.getxattr(os.path.join(self._mount.mountpoint, path), "user.ramfs.pages", follow_symlinks=False)
                )
        took = time.monotonic() - begun
        self._count_at = time.monotonic() + max(_COUNTING[0], _COUNTING[1] * took)

    def _directories(self, status: dict[str, Any]) -> list[dict[str, Any]]:
        """The directories with open files, those with the most memory first."""
        found: dict[str, dict[str, Any]] = {}
        for file in status["open_files"]:
            name = os.path.dirname(file["path"]) or "."
            each = found.setdefault(name, {"path": name, "files": 0, "bytes": 0, "pids": [], "native": 0})
            each["files"] += 1
            each["bytes"] += file["bytes"]
            each["native"] += file["native"]
            each["pids"] = sorted({*each["pids"], *file["pids"]})
            for state in _STATES:
                pages = self._counts.get(file["path"], {}).get(state, 0)
                each[f"{state}_bytes"] = each.get(f"{state}_bytes", 0) + pages * PAGE
        for each in found.values():
            each["resident_bytes"] = each["owned_bytes"] + each["shared_bytes"]
        return sorted(found.values(), key=lambda each: (-each["resident_bytes"], each["path"]))


def picture(sample: dict[str, Any]) -> RenderableType:
    """What a terminal shows of a sample."""
    space = sample["store_bytes"]
    died = f", {sample['daemons_died']} died before" if sample["daemons_died"] else ""
    head = Text.assemble(
        (printable(sample["mountpoint"]), "bold"),
        f"  daemon {sample['pid']}, up {duration(sample['uptime_seconds'])}{died}; "
        f"store {human(space['layers'])}, {human(space['free'])} free",
    )
    rates = Text()
    for name, label in _RATES.items():
        amount = sample["per_second"][name]
        rates.append(f"{human(amount) if name.endswith('bytes') else f'{amount:.0f}'}/s ", "bold")
        rates.append(f"{label}   ")
    parts: list[RenderableType] = [head, rates]
    if sample["directories"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for label in ("resident", "own", "shared", "zero", "absent"):
            table.add_column(label, justify="right")
        for label in ("directory", "files", "processes"):
            table.add_column(label, overflow="fold")
        for each in sample["directories"]:
            amounts = [human(each[f"{key}_bytes"]) for key in ("resident", *_STATES)]
            files = f"{each['files']}, {each['native']} native" if each["native"] else str(each["files"])
            table.add_row(*amounts, printable(each["path"]), files, ", ".join(_process(pid) for pid in each["pids"]))
        parts += ["", table]
    else:
        parts += ["", "no file is open"]
    for pull in sample["pulls"]:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            printable(pull["path"] or "(removed)"),
            ProgressBar(total=max(1, pull["total_bytes"]), completed=pull["here_bytes"], width=30),
            Text(", ".join(facts(pull))),
        )
        parts += ["", bar]
    if sample["slowest_requests"]:
        slow = Table(box=None, pad_edge=False, header_style="bold")
        for label in ("slowest", "request", "ago"):
            slow.add_column(label, justify="left" if label == "request" else "right")
        for each in sample["slowest_requests"]:
            slow.add_row(duration(each["seconds"]), each["request"], duration(each["ago"]))
        parts += ["", slow]
    return Group(*parts)


def _process(pid: int) -> str:
    """A process by its name, if it is still there."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return f"{printable(comm.read().strip())} {pid}"
    except OSError:
        return str(pid)


@contextlib.contextmanager
def _keys() -> Iterator[bool]:
    """Let keys be read one by one; whether there are any."""
    if not sys.stdin.isatty():
        yield False
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _is_enough(seconds: float, keys: bool) -> bool:
    """Wait; whether q was pressed meanwhile."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if not keys:
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b""):
            return True
    return False


@click.command("top")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option(
    "-d",
    "--delay",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Time between two looks.",
)
@click.option("-n", "--samples", metavar="N", type=click.IntRange(1), help="End after N looks.")
@click.option("--once", is_flag=True, help="Show one look and end.")
@click.option("--json", "as_json", is_flag=True, help="Print each look as a JSON object in a line; one, but with -n.")
def top(mountpoint: str, delay: float, samples: int | None, once: bool, as_json: bool) -> None:  # fmt: skip
    """Show what a mount does, again and again: q or Ctrl-C ends.

    Requests and bytes a second; the directories with open files, and what they have resident, own, share, and lack;
    pulls and how far they are; and what took longest in the last minute. Sizes are as of the last write-back.
    """
    sampler = Sampler(whole_mount(mountpoint))
    left = 1 if once or (as_json and samples is None) else samples
    console = Console()
    live = contextlib.nullcontext() if as_json or left == 1 else Live(
        console=console, auto_refresh=False, screen=console.is_terminal
    )  # fmt: skip
    try:
        with _keys() as keys, live as shown:
            if shown is not None:
                shown.update(picture(sampler.look()), refresh=True)
            while left is None or left > 0:
                if _is_enough(delay, keys):
                    return
                sample = sampler.look()
                if as_json:
                    click.echo(json.dumps(sample))
                elif shown is None:
                    console.print(picture(sample))
                else:
                    shown.update(picture(sample), refresh=True)
                left = None if left is None else left - 1
    except KeyboardInterrupt:  # the end that was asked for
        return
