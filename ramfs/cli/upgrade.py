"""``ramfs upgrade``."""

import json
import sys

import click

from ramfs.cli._mounts import whole_mount
from ramfs.supervisor import process
from ramfs.supervisor.client import ask


@click.command("upgrade")
@click.argument("mountpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def upgrade(mountpoint: str, as_json: bool) -> None:
    """Let the installed version of ramfs serve MOUNTPOINT, while its guests run.

    The new daemon starts beside the old one and takes over from it: for guests a stall of a fraction of a second.
    When it does not start, the old one goes on. The supervisor becomes that of the installed version too. Where
    too many daemons have died, this starts one again.
    """
    entry = whole_mount(mountpoint)
    # In isolation, as the mount was made: the modules beside this interpreter are the installed version.
    done = ask(entry.source, "upgrade", python=sys.executable, script=process.SCRIPT)
    if as_json:
        click.echo(json.dumps({"mountpoint": entry.mountpoint, **done}))
    else:
        click.echo(f"{mountpoint} is served by ramfs {done['version']} now, process {done['pid']}")
