"""What ``pull``, ``recover``, ``pause``, ``resume`` and ``status`` share: pulls as people see and steer them."""

import json
import time
from typing import Any

import click

from ramfs.cli._control import outcome
from ramfs.cli._mounts import locate
from ramfs.cli._text import duration, human, parse_size
from ramfs.errors import FileError, UsageError


class Rate(click.ParamType[int]):
    """Bytes a second, 0 for no limit: ``100M``, ``12.5MB/s``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """From the command line."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value).removesuffix("/s"))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def source_of(uri: str) -> str:
    """A URI from the command line as the daemon needs it. Raises UsageError."""
    from ramfs.source.opening import absolute  # with trio

    return absolute(uri)


def facts(pull: dict[str, Any]) -> list[str]:
    """What there is to say of a pull, from status.json."""
    total, here, rate = pull["total_bytes"], pull["here_bytes"], pull["bytes_per_second"]
    found = [f"{pull['state']}, {here / total if total else 1:.0%} of {human(total)}"]
    if rate:
        found += [f"{human(rate)}/s", f"{duration((total - here) / rate)} left"]
    if pull["rate"]:
        found.append(f"limited to {human(pull['rate'])}/s")
    if pull["demand_faults"]:
        found.append(faults(pull))
    if not pull["verified"]:
        found.append("unverified")
    if pull["wait"] is not None:
        found.append(f"fails {duration(pull['wait'])} after its source was lost")
    if pull["error"]:
        found.append(trouble(pull))
    return found


def faults(pull: dict[str, Any]) -> str:
    """How often somebody waited for a page, and how long."""
    count = pull["demand_faults"]
    if not count:
        return "0 demand faults"
    mean = duration(pull["demand_seconds"] / count)
    return f"{count} demand faults, {mean} each, slowest {duration(pull['demand_slowest_seconds'])}"


def trouble(pull: dict[str, Any]) -> str:
    """Why it does not go on."""
    since = f", for {duration(max(0.0, time.time() - pull['since']))} now" if pull["since"] else ""
    return f"{pull['error']}{since}"


def steer(directory: str, change: dict[str, Any], *, as_json: bool, done: str) -> None:
    """Change what arrives at or below a path, and say so. Raises RamfsError, OSError."""
    if not directory:
        raise UsageError("DIR is empty: give a path in a ramfs mount")
    mount, way = locate(directory)
    try:
        told = outcome(mount, {"arrival": {"path": way, **change}})
    except OSError as exc:
        raise FileError(exc.errno or 0, f"cannot change what arrives at {directory}: {exc.strerror}") from None
    if as_json:
        click.echo(json.dumps({"path": directory, "pulls": told["pulls"], **change}))
    elif told["pulls"]:
        click.echo(f"{directory}: {done}")
    else:
        click.echo(f"{directory}: nothing arrives there, all of it is here")
