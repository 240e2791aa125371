"""``ramfs receive``."""

import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ramfs.cli._generations import compare
from ramfs.cli._mounts import locate
from ramfs.cli._text import duration, human, printable, write_line
from ramfs.cli._transfer import progress, widen, zstd
from ramfs.errors import FileError, RamfsError, SourceBroken, SourceLost, UsageError
from ramfs.units import PAGE

if TYPE_CHECKING:
    from ramfs.transfer.receiving import Partial
    from ramfs.transfer.stream import Begin


@click.command("receive")
@click.argument("directory", metavar="DIR")
@click.option("-F", "--force", is_flag=True, help="Give up what has changed in DIR since its newest snapshot.")
@click.option("--token", "only_token", is_flag=True, help="Print where an interrupted receive of DIR goes on.")
@click.option("--abort", is_flag=True, help="Remove what an interrupted receive of DIR has left.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def receive(directory: str, force: bool, only_token: bool, abort: bool, as_json: bool) -> None:
    """Make DIR, and the snapshot DIR/.snap/NAME, of what `ramfs send` writes, from standard input.

    A complete stream makes a new DIR. One that was made with -i needs DIR with the snapshot that it builds on as its
    newest one, and nothing changed since: DIR becomes what was sent, and keeps its snapshots.

    DIR changes in one step at the end, or not at all. What an interrupted stream has brought stays hidden beside DIR,
    and a token is told with which `ramfs send -t` sends the rest.
    """
    from ramfs.transfer.receiving import Partial

    if not directory:
        raise UsageError("DIR is empty: give a path on a ramfs mount")
    if only_token and abort:
        raise UsageError("--token and --abort: give one of them")
    target = _target(directory)
    partial = Partial(target)
    try:
        if only_token or abort:
            _look(partial, directory, remove=abort, as_json=as_json)
            return
        if sys.stdin.isatty():
            raise UsageError("no stream comes from a terminal: pipe what `ramfs send` writes to it")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        told = _receive(partial, directory, force=force, quiet=as_json)
    finally:
        partial.close()
    if as_json:
        click.echo(json.dumps(told))
        return
    files = "1 file" if told["files"] == 1 else f"{told['files']} files"
    write_line(
        f"{directory}: {files} as of snapshot {told['name']}; {human(told['page_bytes'])} of pages came in "
        f"{duration(told['seconds'])}"
    )


def _target(directory: str) -> str:
    """The absolute path of the directory, whose parent is there and in a mount. Raises FileError, MountError."""
    above, name = os.path.split(os.path.abspath(directory))
    if not os.path.isdir(above):
        raise FileError(errno.ENOENT, f"{above} is not a directory: make it first")
    target = os.path.join(os.path.realpath(above), name)
    locate(above)
    if os.path.ismount(target):
        raise UsageError(f"{directory} is a mountpoint: name a directory in it")
    return target


def _look(partial: "Partial", directory: str, *, remove: bool, as_json: bool) -> None:
    token = partial.token() if partial.lock(make=False) else None
    if token is None and not (remove and os.path.lexists(partial.path)):
        raise FileError(errno.ENOENT, f"there is no interrupted receive of {directory}")
    if remove:
        partial.remove()
    elif token is not None:
        click.echo(json.dumps({"token": token.text(), **token._asdict()}) if as_json else token.text())


def _reader() -> Callable[[memoryview], int]:
    """Reads the stream behind its prelude, which is taken. Raises SourceLost, SourceBroken."""
    from ramfs.transfer.stream import PRELUDE, read_prelude

    widen(0)
    raw = io.FileIO(0, closefd=False)
    prelude = b""
    while len(prelude) < PRELUDE.size:
        part = raw.read(PRELUDE.size - len(prelude))
        if not part:
            why = "is empty" if not prelude else "ends in its first bytes"
            raise SourceLost(f"the stream {why}: see what `ramfs send` says")
        prelude += part
    if not read_prelude(prelude):
        return raw.readinto
    module = zstd()
    file = module.ZstdFile(raw)

    def read_into(buffer: memoryview) -> int:
        try:
            return int(file.readinto(buffer))
        except module.ZstdError as exc:
            raise SourceBroken(f"the stream is damaged: {exc}") from None

    return read_into


def _receive(partial: "Partial", directory: str, *, force: bool, quiet: bool) -> dict[str, Any]:
    from ramfs.transfer.receiving import Receiving, read_begin
    from ramfs.transfer.sending import identity
    from ramfs.transfer.stream import Decoder

    began = time.monotonic()
    decoder = Decoder()
    try:
        read_into = _reader()
        begin = read_begin(decoder, read_into)
    except EOFError:
        raise SourceLost("the stream ends in its first bytes: see what `ramfs send` says") from None
    base = _check(partial.directory, directory, begin, force=force)
    partial.lock(make=True)
    try:
        _check_partial(partial, directory, begin)
        work = Receiving(partial, base, decoder)
        with progress(f"receive {printable(begin.name)}", begin.pages * PAGE, quiet=quiet) as show:
            _take(work, read_into, show, partial, directory)
        work.settle()
        work.freeze(identity)
        _check(partial.directory, directory, begin, force=force)  # it may have changed meanwhile
        try:
            work.publish(onto=base is not None)
        except OSError as exc:
            raise FileError(exc.errno or errno.EIO, f"{directory} cannot become what was sent: {_why(exc)}") from None
    except BaseException:
        if partial.load() is None or not partial.worthwhile():
            partial.remove()
        raise
    partial.remove()
    return {
        "path": directory, "name": begin.name, "id": begin.id, "base": begin.base, "resumed": work.resumed,
        "files": sum(entry.kind == "file" for entry in decoder.entries), "page_bytes": work.bytes,
        "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip


def _why(exc: OSError) -> str:
    if exc.errno == errno.EBUSY:
        return "something has files of it open for writing; end that, and send again"
    return exc.strerror or str(exc)


def _take(
    work: Any, read_into: Callable[[memoryview], int], show: Callable[[int], None], partial: "Partial", directory: str
) -> None:
    """Take the stream; when it ends too early, tell how to go on."""
    try:
        work.take(read_into, show)
        if read_into(memoryview(bytearray(1))):
            raise SourceBroken("the stream has something behind its end")
    except EOFError:
        raise SourceLost(f"the stream ended before its end{_go_on(partial, directory)}") from None
    except RamfsError as exc:
        raise type(exc)(f"{exc}{_go_on(partial, directory)}") if not isinstance(exc, FileError) else exc from None
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise FileError(exc.errno or errno.EIO, f"cannot write what comes: {why}{_go_on(partial, directory)}") from None
    except KeyboardInterrupt:
        click.echo(f"ramfs: interrupted{_go_on(partial, directory)}", err=True)
        raise SystemExit(130) from None


def _go_on(partial: "Partial", directory: str) -> str:
    token = partial.token()
    if token is None or not partial.worthwhile():
        return f"; {directory} is as it was"
    return f"; {directory} is as it was, and what came is kept: go on with `ramfs send -t {token.text()}`"


def _check_partial(partial: "Partial", directory: str, begin: "Begin") -> None:
    token = partial.token()
    if token is not None and (token.id, token.base) != (begin.id, begin.base) and partial.worthwhile():
        raise FileError(
            errno.EEXIST, f"an interrupted receive of {directory} is of another snapshot: go on with its token "
            "(ramfs receive --token), or remove it (ramfs receive --abort)",
        )  # fmt: skip


def _check(target: str, directory: str, begin: "Begin", *, force: bool) -> str | None:
    """The snapshot that the stream builds on, if it does. Raises FileError unless it fits what is there."""
    there = os.path.lexists(target)
    if begin.base is None:
        if there:
            raise FileError(
                errno.EEXIST, f"{directory} exists, and the stream is complete in itself: receive it under another name"
            )
        return None
    if not os.path.isdir(target):
        raise FileError(
            errno.ENOENT, f"{directory} is not there, and the stream builds on a snapshot of it: receive that one first"
        )
    snaps = os.path.join(target, ".snap")
    names = os.listdir(snaps) if os.path.isdir(snaps) else []  # in the order in which they were made
    if begin.name in names:
        raise FileError(errno.EEXIST, f"{directory} has a snapshot {begin.name} already")
    from ramfs.transfer.sending import identity

    newest = os.path.join(snaps, names[-1]) if names else None
    if newest is None or identity(newest) != begin.base:
        found = f"its newest snapshot is another one, {names[-1]}" if names else "it has no snapshot"
        wanted = os.path.basename(begin.base_snapshot or "")
        raise FileError(
            errno.ENOENT,
            f"the stream builds on a snapshot ({printable(wanted)}) that {directory} does not end with: {found}",
        )
    _check_unchanged(newest, target, directory, force=force)
    return newest


def _check_unchanged(newest: str, target: str, directory: str, *, force: bool) -> None:
    if not force and any(change.state != "same" for change in compare(newest, target)):
        raise FileError(
            errno.EEXIST, f"{directory} has changed since its newest snapshot, {os.path.basename(newest)}: "
            "freeze or move it, or give up what has changed with --force",
        )  # fmt: skip
