"""``ramfs snapshot``: freeze a directory, and with ``--qmp`` the guest whose RAM it holds, at one moment.

What happens with a guest, and what is undone when a step fails:

    step                        when it fails, or Ctrl-C comes
    rounds of flushing          nothing to undo
    stop                        the guest is continued
    last round                  the guest is continued
    save the state to a         the temporary file is removed, the guest is continued
      temporary file
    rename it to ``state``      as above
    mkdir ``.snap/NAME``        the older ``state`` is put back, the guest is continued
    cont                        the snapshot is whole and stays; the guest's owner is told

A guest that was not running before is not continued afterwards, nor is any with ``--stop`` when all went well. Two
snapshots of one directory at a time are refused, so a temporary file that is found is one that a killed command left,
and is removed.
"""

import contextlib
import errno
import json
import os
import stat
import tempfile
import time
from dataclasses import asdict, dataclass, field

import click

from ramfs import qmp
from ramfs.cli._flush import Round, flush, in_thread, regular_files, rounds
from ramfs.cli._layouts import ask, is_derived, store
from ramfs.cli._stopping import (
    TEMPORARY,
    Signals,
    check_directory,
    discard,
    mib,
    milliseconds,
    only_one,
    pause_for,
    remove,
    require_fit,
    run_to_end,
    say,
    sweep,
    temporary_file,
)
from ramfs.cli.flatten import Results, flatten_below, print_results
from ramfs.errors import BadName, FileError, NameTooLong, QmpError, RamfsError, UsageError
from ramfs.units import MAX_NAME


@dataclass
class Report:
    """What a snapshot did and what it cost; printed as JSON under the same names."""

    snapshot: str
    rounds: list[Round] = field(default_factory=list)
    #: Seconds; the four below are None without a guest, and the first also when it was stopped before.
    pause: float | None = None
    save: float | None = None
    freeze: float | None = None
    state_bytes: int | None = None
    #: Seconds since the epoch: when it was stopped, if it stays so.
    stopped_at: float | None = None
    notes: list[str] = field(default_factory=list)

    def flushed(self) -> int | None:
        """Bytes flushed in all rounds, or None when the kernel does not tell."""
        found = [each.bytes for each in self.rounds]
        return None if None in found else sum(each or 0 for each in found)


class Snapshot:
    """One run of the command."""

    def __init__(self, directory: str, name: str, limit: int, *, quiet: bool, stop: bool = False) -> None:
        self.directory = directory
        self.target = os.path.join(directory, ".snap", name)
        self.name = name
        self.limit = limit
        self.quiet = quiet
        self.stop = stop
        self.report = Report(self.target)
        self.signals = Signals()

    async def alone(self) -> Report:
        """Freeze the directory, without regard to a guest."""
        self.signals.watch()
        await self._flush_in_rounds()
        with self.signals.held():
            begin = time.monotonic()
            await in_thread(self._freeze)
            self.report.freeze = time.monotonic() - begin
        return self.report

    async def with_guest(self, socket: str) -> Report:
        """Stop the guest, save its state into the directory, freeze, continue the guest."""
        self.signals.watch()
        async with qmp.connect(socket) as guest:
            await self.check(guest, socket)
            was_running = await guest.running()
            await self._learn_layout(guest, socket)
            with self.signals.held():
                await in_thread(lambda: sweep(self.directory))
                fd, temporary = await in_thread(lambda: temporary_file(self.directory))
            try:
                # All is ready when the rounds end: what the guest stores from then on it has to wait for.
                async with guest.saving():
                    if was_running:
                        await self._flush_in_rounds()
                    work = self._save_and_freeze(guest, fd, temporary)
                    pause = await pause_for(
                        work, guest, self.signals, self.target, was_running=was_running, stay=self.stop
                    )
                self.report.pause, self.report.stopped_at = pause.seconds, pause.stopped_at
            finally:
                # The guest runs again; only now touch the file system, which may hang.
                await in_thread(lambda: discard(fd, temporary))
        return self.report

    async def check(self, guest: qmp.Qmp, socket: str) -> None:
        """Can it be saved, and does its memory lie in the directory? Raises QmpError."""
        await require_fit(guest, socket)
        await guest.require_ignore_shared()
        pid = guest.peer()
        await in_thread(lambda: self._look_at_memory(pid))

    async def _learn_layout(self, guest: qmp.Qmp, socket: str) -> None:
        """Where the guest's memory lies, for those who look into it, unless the directory knows that."""
        with contextlib.suppress(QmpError, FileError, OSError):  # it is no part of the snapshot
            if await in_thread(lambda: is_derived(self.directory)):
                told = await ask(guest)
                await in_thread(lambda: store(self.directory, told.layout(self.directory, socket)))

    async def _save_and_freeze(self, guest: qmp.Qmp, fd: int, temporary: str) -> None:
        # Before QEMU writes to the mount: while that hangs nothing else could be cancelled.
        self._done(await flush(self.directory, running=False))
        begin = time.monotonic()
        await guest.save_state(fd)
        self.report.state_bytes = await in_thread(lambda: _settle(fd))
        self.report.save = time.monotonic() - begin
        with self.signals.held():
            begin = time.monotonic()
            await in_thread(lambda: self.publish(temporary))
            self.report.freeze = time.monotonic() - begin

    def publish(self, temporary: str) -> None:
        """Make the state and the frozen directory appear; when the second fails, the first is undone."""
        state = os.path.join(self.directory, "state")
        # The older state loses its name, and its contents live on behind this descriptor until we know.
        try:
            older = os.open(state, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            older = -1
        except OSError as error:
            raise FileError(error.errno or errno.EIO, f"cannot replace {state}: {error.strerror}") from error
        try:
            try:
                os.rename(temporary, state)
            except OSError as error:
                raise FileError(error.errno or errno.EIO, f"cannot replace {state}: {error.strerror}") from error
            try:
                self._freeze()
            except BaseException:
                if older < 0:
                    remove(state)
                else:
                    self._put_back(older, state)
                raise
        finally:
            if older >= 0:
                os.close(older)

    def _put_back(self, older: int, state: str) -> None:
        was = os.fstat(older)
        fd, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=self.directory)
        try:
            offset = 0
            # On the mount this shares the pages; it needs no room even where there is none.
            while copied := os.copy_file_range(older, fd, was.st_size - offset, offset, offset):
                offset += copied
            os.fchown(fd, was.st_uid, was.st_gid)
            os.fchmod(fd, stat.S_IMODE(was.st_mode))
            os.utime(fd, ns=(was.st_atime_ns, was.st_mtime_ns))
            os.rename(temporary, state)
        finally:
            os.close(fd)
            remove(temporary)

    def _freeze(self) -> None:
        try:
            os.mkdir(self.target)
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise FileError(error.errno or errno.EIO, f"cannot make {self.target}: {error.strerror}") from error

    def _exists(self) -> FileError:
        return FileError(
            errno.EEXIST, f"{self.target} exists; choose another name, or remove it with rmdir {self.target}"
        )

    async def _flush_in_rounds(self) -> None:
        async for each in rounds(self.directory, self.limit):
            self._done(each)

    def _done(self, each: Round) -> None:
        self.report.rounds.append(each)
        if not self.quiet:
            number = len(self.report.rounds)
            guest = "" if each.running else ", guest stopped"
            amount = "" if each.bytes is None else f"{mib(each.bytes)} "
            say(f"round {number}: {amount}flushed in {milliseconds(each.seconds)}{guest}")

    def _note(self, text: str) -> None:
        self.report.notes.append(text)
        if not self.quiet:
            say(f"note: {text}", err=True)

    def _look_at_memory(self, pid: int | None) -> None:
        """Say so when the guest's stores do not reach the directory, as far as that can be told."""
        if pid is None:
            return
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                if "qemu" not in file.read():
                    return  # libvirt makes the socket and hands it to QEMU
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
                maps = [line.split(maxsplit=5) for line in file]
        except OSError:
            return
        device = os.stat(self.directory).st_dev
        name = f"{os.major(device):02x}:{os.minor(device):02x}"
        inodes: dict[str, str] = {}
        for path in regular_files(self.directory):
            with contextlib.suppress(FileNotFoundError):
                inodes[str(os.stat(path).st_ino)] = os.path.relpath(path, self.directory)
        ours = [(line[1], inodes[line[4]]) for line in maps if line[3] == name and line[4] in inodes]
        if not ours:
            self._note(f"QEMU (process {pid}) maps no file of {self.directory}: all of its RAM goes into the state")
        for path in sorted({path for mode, path in ours if "w" in mode and mode.endswith("p")}):
            self._note(
                f"the guest maps {path} privately, so its RAM goes into the state and not into the file; "
                "memory-backend-file with share=on puts it into the file"
            )


@click.command(short_help="Freeze a directory, and with --qmp its running guest.")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.argument("name", metavar="NAME")
@click.option(
    "--qmp",
    "socket",
    metavar="SOCKET",
    type=click.Path(),
    help="QMP socket of the guest whose RAM DIR holds.",
)
@click.option(
    "--rounds",
    "limit",
    metavar="N",
    type=click.IntRange(0, 1000),
    default=8,
    show_default=True,
    help="Flush at most N times while the guest runs.",
)
@click.option("--stop", is_flag=True, help="Leave the guest stopped, for another QEMU to go on with it.")
@click.option("--flat", is_flag=True, help="Flatten what was frozen (see flatten), when the guest runs on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def snapshot(
    directory: str, name: str, socket: str | None, limit: int, stop: bool, flat: bool, as_json: bool
) -> None:  # fmt: skip
    """Freeze all of DIR as DIR/.snap/NAME.

    What the guest has written to its RAM is flushed first, in rounds, so that the freeze itself is short.

    With --qmp the guest is stopped for the last round, the state of its devices is saved to DIR/state,
    and after the freeze it runs on, but not with --stop. A copy of DIR/.snap/NAME is a clone of the guest:
    start QEMU on it with -incoming defer, set the migration capability x-ignore-shared, load the state, cont.
    """
    if stop and socket is None:
        raise UsageError("--stop is for the guest of --qmp: give its socket too")
    _check_name(name)
    check_directory(directory)
    run = Snapshot(directory, name, limit, quiet=as_json, stop=stop)
    with only_one(directory, "ramfs snapshot"):
        if os.path.lexists(run.target):
            raise run._exists()
        work = run.alone() if socket is None else run.with_guest(socket)
        report = run_to_end(work, run.signals, run.target, "no snapshot was made")
    if as_json:
        results = {"flat": _flatten(run)} if flat else {}
        say(json.dumps({**asdict(report), "flushed": report.flushed(), **results}))
        return
    if report.state_bytes is not None and report.save is not None:
        say(f"state: {mib(report.state_bytes)} saved in {milliseconds(report.save)}")
    if report.freeze is not None:
        say(f"frozen in {milliseconds(report.freeze)}: {report.snapshot}")
    if report.pause is not None:
        say(f"the guest paused for {milliseconds(report.pause)}")
    elif report.stopped_at is not None:
        say(f"the guest was stopped {milliseconds(time.time() - report.stopped_at)} ago and stays so")
    elif report.state_bytes is not None:
        say("the guest was stopped before and stays so")
    if flat:
        print_results(_flatten(run))


def _flatten(run: Snapshot) -> Results:
    """Flatten what was frozen. The snapshot stays, whatever comes of that."""
    try:
        return flatten_below(run.target, quiet=run.quiet)
    except RamfsError as error:
        raise FileError(error.errno, f"{run.target} is made and not flat: {error}") from error


def _check_name(name: str) -> None:
    if len(os.fsencode(name)) > MAX_NAME:
        raise NameTooLong(f"the snapshot's name has more than {MAX_NAME} bytes")
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise BadName(f"{name!r} cannot be a snapshot's name; it is the name of one directory")


def _settle(fd: int) -> int:
    os.fsync(fd)
    size = os.fstat(fd).st_size
    if not size:
        raise QmpError("QEMU says that it saved the guest, but wrote nothing")
    return size
