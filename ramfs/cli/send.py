"""``ramfs send``."""

import errno
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ramfs.cli._generations import vanishing
from ramfs.cli._mounts import locate
from ramfs.cli._text import duration, human, printable
from ramfs.cli._transfer import Output, progress
from ramfs.errors import FileError, UsageError
from ramfs.units import PAGE

if TYPE_CHECKING:
    from ramfs.transfer.stream import Token


@click.command("send")
@click.argument("snapshot", metavar="[SNAPSHOT]", required=False)
@click.option("-i", "--from", "base", metavar="FROM", help="Send what has changed since this snapshot.")
@click.option("-t", "--token", "token_text", metavar="TOKEN", help="Go on where `ramfs receive` was interrupted.")
@click.option("--zstd", is_flag=True, help="Compress the stream.")
@click.option("--json", "as_json", is_flag=True, help="Tell on standard error in one JSON object what was sent.")
def send(snapshot: str | None, base: str | None, token_text: str | None, zstd: bool, as_json: bool) -> None:
    """Write SNAPSHOT to standard output, for `ramfs receive` on another mount.

    SNAPSHOT is DIR/.snap/NAME. Pages that hold only zeros are not sent, and with -i only those that are others than in
    FROM: a path, or the name of another snapshot of the same DIR. The other side must have that one. Each page goes
    with its digest.

    With the token of a receive that was interrupted the rest is sent; SNAPSHOT and FROM are those of before, and need
    be named only where they have another path now.
    """
    from ramfs.transfer.stream import Token

    token = None if token_text is None else Token.parse(token_text)
    if token is not None:
        snapshot, base = snapshot or token.snapshot, base or token.base_snapshot
    if not snapshot:
        raise UsageError("name the SNAPSHOT to send, as DIR/.snap/NAME; see `ramfs send --help`")
    if os.isatty(sys.stdout.fileno()):
        raise UsageError("the stream is not for a terminal: redirect it, as in `ramfs send SNAPSHOT | ssh HOST ...`")
    if base is not None and "/" not in base:
        base = os.path.join(os.path.dirname(snapshot.rstrip("/")), base)
    for path in (snapshot, base):
        if path is not None:
            _check_snapshot(path)
    began = time.monotonic()
    with vanishing(snapshot):
        told = _send(snapshot, base, token, compressed=zstd, quiet=as_json)
    told["seconds"] = round(time.monotonic() - began, 3)
    if as_json:
        click.echo(json.dumps(told), err=True)
    elif sys.stderr.isatty():
        rate = told["page_bytes"] / max(told["seconds"], 1e-3)
        click.echo(
            f"sent {printable(snapshot)}: {human(told['page_bytes'])} of pages in {duration(told['seconds'])}, "
            f"{human(rate)}/s", err=True,
        )  # fmt: skip


def _send(snapshot: str, base: str | None, token: "Token | None", *, compressed: bool, quiet: bool) -> dict[str, Any]:
    from ramfs.transfer.sending import Sending, Span

    work = Sending(snapshot.rstrip("/"), base, os.path.abspath)
    begin = work.begin
    if token is not None and (begin.id, begin.base) != (token.id, token.base):
        raise FileError(
            errno.ESTALE, f"{snapshot} is not what the token is of: name the same snapshots, or begin anew without it"
        )
    start, done = token.record if token is not None else 0, 0
    out = Output(sys.stdout.fileno())
    with progress(f"send {printable(begin.name)}", work.pages * PAGE, quiet=quiet) as show:
        try:
            for number, piece in enumerate(work.pieces(start, zstd=compressed)):
                if isinstance(piece, Span):
                    out.copy(piece.path, piece.offset, piece.length)
                    if piece.padding:
                        out.write(bytes(piece.padding))
                    done += piece.length + piece.padding
                    show(done)
                else:
                    out.write(piece)
                    if number == 0 and compressed:  # the prelude alone is not
                        out.compress()
            out.finish()
        finally:
            out.close_source()
    return {"snapshot": snapshot, "id": begin.id, "from": base, "base": begin.base, "page_bytes": done}


def _check_snapshot(path: str) -> None:
    """Raises FileError unless it is the top of a snapshot; MountError, OSError."""
    locate(path)
    real = os.path.realpath(path)
    if not os.path.isdir(real) or os.path.basename(os.path.dirname(real)) != ".snap":
        raise FileError(
            errno.EINVAL, f"{path} is no snapshot: make one (`ramfs snapshot DIR NAME`), name DIR/.snap/NAME"
        )
