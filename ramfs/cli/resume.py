"""``ramfs resume``."""

from typing import Any

import click

from ramfs.cli._pulls import Rate, steer
from ramfs.cli._text import human


@click.command("resume")
@click.argument("directory", metavar="DIR")
@click.option("--rate", type=Rate(), metavar="RATE", help="From now on so fast at most, such as 100M/s; 0: no limit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def resume(directory: str, rate: int | None, as_json: bool) -> None:
    """Let what is still elsewhere stream into DIR again, after `ramfs pause` or `ramfs pull --paused`.

    DIR is a directory that was pulled, a clone or snapshot of it, or a file in one of these. Without --rate the limit
    stays as it was.
    """
    change: dict[str, Any] = {"paused": False}
    how = ""
    if rate is not None:
        change["rate"] = rate
        how = f", with {human(rate)}/s at most" if rate else ", without a limit"
    steer(directory, change, as_json=as_json, done=f"goes on{how}")
