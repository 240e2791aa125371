"""``ramfs status``."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import click

from ramfs.cli._mounts import FSTYPE, MountEntry, ask, locate, mounted_at, running
from ramfs.cli._pulls import facts
from ramfs.cli._text import human, printable
from ramfs.errors import MountError

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Seconds between two looks of ``--watch``.
_PERIOD: Final = 1.0


def read_status(entry: MountEntry) -> dict[str, Any]:
    """What the daemon of a mount says of itself. Raises MountError."""
    path = os.path.join(entry.mountpoint, ".ramfs/status.json")

    def read() -> dict[str, Any]:
        with open(path, "rb", buffering=0) as file:
            status: dict[str, Any] = json.loads(file.readall())
            return status

    try:
        return ask(entry.mountpoint, read)
    except PermissionError:
        raise MountError(f"you may not read {path}: ask as the owner of the mount, or as root") from None
    except OSError as exc:
        raise MountError(
            f"{entry.mountpoint} does not answer ({exc.strerror}): if its daemon died, unmount it and mount again"
        ) from exc


def _find(path: str) -> MountEntry:
    """The mount that a path lies in. A mountpoint itself is known without asking the mount."""
    entry = mounted_at(path)
    return entry if entry is not None and entry.fstype == FSTYPE and entry.root == "/" else locate(path)[0]


def _history(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows on what became of the daemons of a mount."""
    rows = [("supervisor", f"pid {facts['pid']}, {facts['starts']} daemons so far, of which {facts['crashes']} died")]
    if facts["why"]:
        rows.append(("last start", facts["why"]))
    return rows


def read_all() -> list[dict[str, Any]]:
    """The status of every ramfs mount; one that does not answer costs a line on standard error."""
    found = []
    entries = running()
    with ThreadPoolExecutor(max(1, len(entries))) as asking:  # who hangs, hangs beside the others
        for answer in [asking.submit(read_status, entry) for entry in entries]:
            try:
                found.append(answer.result())
            except MountError as exc:
                click.echo(f"ramfs: {exc}", err=True)
    return found


def picture(statuses: list[dict[str, Any]]) -> "RenderableType":
    """A table for each mount."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for status in statuses:
        table = Table(title=Text(printable(status["mountpoint"])), title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        images, layers, space, requests = (status[key] for key in ("images", "layers", "store_bytes", "requests"))
        rows = [
            ("store", printable(status["store"])),
            ("daemon", f"pid {status['pid']}, version {status['version']}, up {status['uptime_seconds']:.0f} s"),
            *_history(status["supervisor"]),
            ("images", f"{images['total']}, of which {images['frozen']} frozen, {images['in_use']} in use"),
            ("snapshots", str(status["snapshots"])),
            ("layers", f"{layers['live']} live, {layers['sealed']} sealed, {layers['undigested']} without digests yet"),
            ("space", f"{human(space['layers'])} in layers, {human(space['free'])} free"),
            ("read", f"{requests['reads']} requests, {human(requests['read_bytes'])}"),
            ("written", f"{requests['writes']} requests, {human(requests['written_bytes'])}"),
            ("shared", f"{human(requests['shared_bytes'])} by copy_file_range, {requests['clones']} clones"),
            ("errors", str(requests["errors"])),
        ]
        if ahead := requests.get("reads_ahead"):
            rows.append(("read ahead", f"{ahead} of these requests, {human(requests['read_ahead_bytes'])}"))
        native = status.get("native", {})
        if refused := native.get("refused"):
            rows.append(("native", f"no file: {refused}"))
        elif refused := native.get("live_refused"):
            rows.append(("native", f"frozen files only: {refused}"))
        for pull in status["pulls"]:
            where = "(removed)" if pull["path"] is None else printable(pull["path"])
            rows.append(("pull", f"{where} from {printable(pull['source'])}: {', '.join(facts(pull))}"))
        for file in status["open_files"]:
            pids = ", ".join(map(str, file["pids"]))
            how = ", native live" if file.get("live") else ", native" if file.get("native") else ""
            rows.append(("open", f"{printable(file['path'])} ({human(file['bytes'])}{how}) in process {pids}"))
        for name, value in rows:
            table.add_row(name, Text(value))
        parts.append(table)
    return Group(*parts) if parts else "no ramfs mount"


@click.command("status")
@click.argument("path", required=False)
@click.option("-w", "--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object, or with no PATH a list.")
def status(path: str | None, watch: bool, as_json: bool) -> None:
    """Show the mount that PATH lies in, or all ramfs mounts."""

    def look() -> list[dict[str, Any]]:
        return read_all() if path is None else [read_status(_find(path))]

    def text(statuses: list[dict[str, Any]]) -> str:
        return json.dumps(statuses if path is None else statuses[0], indent=None if watch else 2)

    if not watch:
        if as_json:
            click.echo(text(look()))
        else:
            from rich.console import Console  # takes as long as all else

            Console().print(picture(look()))
        return
    try:
        if as_json:
            while True:
                click.echo(text(look()))
                time.sleep(_PERIOD)
        from rich.live import Live

        with Live(picture(look()), auto_refresh=False) as live:
            while True:
                time.sleep(_PERIOD)
                live.update(picture(look()), refresh=True)
    except KeyboardInterrupt:  # the end that was asked for
        return
