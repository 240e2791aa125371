"""``ramfs pause``."""

import click

from ramfs.cli._pulls import steer


@click.command("pause")
@click.argument("directory", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def pause(directory: str, as_json: bool) -> None:
    """Let nothing stream into DIR until `ramfs resume`; what is touched is fetched all the same.

    DIR is a directory that was pulled, a clone or snapshot of it, or a file in one of these.
    """
    steer(directory, {"paused": True}, as_json=as_json, done="paused; what is touched still comes")
