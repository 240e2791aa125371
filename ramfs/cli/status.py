"""``ramfs status``."""

import json
import os
import time
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from ramfs.cli._mounts import MountEntry, running
from ramfs.errors import MountError


def read_status(entry: MountEntry) -> dict[str, Any]:
    """What the daemon of a mount says of itself. Raises MountError."""
    path = os.path.join(entry.mountpoint, ".ramfs/status.json")
    try:
        with open(path, "rb", buffering=0) as file:
            status: dict[str, Any] = json.loads(file.readall())
    except OSError as exc:
        raise MountError(
            f"{entry.mountpoint} does not answer ({exc.strerror}): if its daemon died, unmount it and mount again"
        ) from exc
    return status


def human(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def picture(statuses: list[dict[str, Any]]) -> RenderableType:
    """A table for each mount."""
    parts: list[RenderableType] = []
    for status in statuses:
        table = Table(title=status["mountpoint"], title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        images, layers, space, requests = (status[key] for key in ("images", "layers", "store_bytes", "requests"))
        rows = (
            ("store", status["store"]),
            ("daemon", f"pid {status['pid']}, version {status['version']}, up {status['uptime_seconds']:.0f} s"),
            ("images", f"{images['total']}, of which {images['frozen']} frozen, {images['in_use']} in use"),
            ("snapshots", str(status["snapshots"])),
            ("layers", f"{layers['live']} live, {layers['sealed']} sealed, {layers['undigested']} without digests yet"),
            ("space", f"{human(space['layers'])} in layers, {human(space['free'])} free"),
            ("read", f"{requests['reads']} requests, {human(requests['read_bytes'])}"),
            ("written", f"{requests['writes']} requests, {human(requests['written_bytes'])}"),
            ("shared", f"{human(requests['shared_bytes'])} by copy_file_range, {requests['clones']} clones"),
            ("errors", str(requests["errors"])),
        )
        for name, value in rows:
            table.add_row(name, value)
        for file in status["open_files"]:
            pids = ", ".join(map(str, file["pids"]))
            table.add_row("open", f"{file['path']} ({human(file['bytes'])}) in process {pids}")
        parts.append(table)
    return Group(*parts) if parts else "no ramfs mount"


@click.command("status")
@click.argument("path", type=click.Path(), required=False)
@click.option("-w", "--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object, or with no PATH a list.")
def status(path: str | None, watch: bool, as_json: bool) -> None:
    """Show the mount that PATH lies in, or all ramfs mounts."""

    def look() -> list[dict[str, Any]]:
        return [read_status(entry) for entry in running(path)]

    def text(statuses: list[dict[str, Any]]) -> str:
        return json.dumps(statuses if path is None else statuses[0], indent=None if watch else 2)

    if as_json:
        click.echo(text(look()))
        while watch:
            time.sleep(1)
            click.echo(text(look()))
        return
    console = Console()
    if not watch:
        console.print(picture(look()))
        return
    with Live(picture(look()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(1)
            live.update(picture(look()), refresh=True)
