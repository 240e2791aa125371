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

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import click

from ramfs import qmp
from ramfs.cli._flush import Round, flush, in_thread, regular_files, rounds
from ramfs.cli.flatten import Results, flatten_below, print_results
from ramfs.errors import BadName, FileError, MountError, NameTooLong, QmpError, RamfsError, UsageError
from ramfs.units import MAX_NAME

T = TypeVar("T")

_TEMPORARY: Final = ".state."

#: Run states in which a guest cannot be saved, and what to do about it.
_UNFIT: Final = {
    "inmigrate": "it still waits for its own incoming state",
    "postmigrate": "it was saved and has not run since; QEMU saves it again once it has (cont)",
    "finish-migrate": "it is being saved or migrated already",
    "save-vm": "it is being saved already",
    "restore-vm": "it is being restored",
    "suspended": "it sleeps; wake it first (system_wakeup)",
}


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


class Interrupted(RamfsError):
    """A signal ended the command."""

    def __init__(self, number: int, outcome: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; {outcome}")
        self.errno = errno.EINTR
        self.exit_code = 128 + number


class Signals:
    """Ctrl-C and its relatives as cancellation, held back while a snapshot becomes real.

    A second signal in that time cancels after all: the file system may hang for good.
    """

    NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.seen: int | None = None
        #: Whether a second one has broken into what a first one may not.
        self.forced = False
        self._task: asyncio.Task[Any] | None = None
        self._held = False
        self._undoing = False

    def watch(self) -> None:
        """Cancel the current task on a signal, from now on."""
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in self.NUMBERS:
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        first = self.seen is None
        self.seen = number
        if self._undoing or (self._held and first) or self._task is None:
            return
        self.forced = self._held
        self._task.cancel()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Do not cancel at the first signal in this block."""
        if self.seen is not None:
            raise asyncio.CancelledError
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def undoing(self) -> None:
        """From here on everything is clearing up, which no signal may cut short."""
        self._undoing = True


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
            status = await guest.status()
            if status in _UNFIT:
                raise QmpError(f"the guest at {socket} cannot be saved now ({status}): {_UNFIT[status]}")
            await guest.require_ignore_shared()
            pid = guest.peer()
            await in_thread(lambda: self._look_at_memory(pid))
            was_running = await guest.running()
            if was_running:
                await self._flush_in_rounds()
            with self.signals.held():
                fd, temporary = await in_thread(self._temporary)
            try:
                await self._pause_for(self._save_and_freeze(guest, fd, temporary), guest, was_running)
            finally:
                # The guest runs again; only now touch the file system, which may hang.
                await in_thread(lambda: _discard(fd, temporary))
        return self.report

    async def _pause_for(self, work: Coroutine[Any, Any, None], guest: qmp.Qmp, was_running: bool) -> None:
        """Do the work while the guest is stopped, and let it go on whatever came of that."""
        begin, stopped_at = time.monotonic(), time.time()
        try:
            if was_running:
                await guest.stop()
            await work
        except BaseException as error:
            self.signals.undoing()
            work.close()
            if was_running:
                try:
                    await guest.cont()
                except qmp.QmpGone:
                    pass  # No guest is left to continue, and the first error is the one to tell.
                except QmpError as refusal:
                    raise QmpError(f"{str(error) or 'interrupted'}; the guest stays stopped: {refusal}") from error
            raise
        self.signals.undoing()
        if was_running and self.stop:
            self.report.stopped_at = stopped_at
        elif was_running:
            try:
                await guest.cont()
            except QmpError as error:
                raise QmpError(f"{self.target} is complete, but the guest does not go on: {error}") from error
            self.report.pause = time.monotonic() - begin

    async def _save_and_freeze(self, guest: qmp.Qmp, fd: int, temporary: str) -> None:
        self._done(await flush(self.directory, running=False))
        begin = time.monotonic()
        await guest.save_state(fd)
        self.report.state_bytes = await in_thread(lambda: _settle(fd))
        self.report.save = time.monotonic() - begin
        with self.signals.held():
            begin = time.monotonic()
            await in_thread(lambda: self._publish(temporary))
            self.report.freeze = time.monotonic() - begin

    def _temporary(self) -> tuple[int, str]:
        try:
            with os.scandir(self.directory) as entries:
                stale = [entry.path for entry in entries if entry.name.startswith(_TEMPORARY)]
            for path in stale:
                _remove(path)
            return tempfile.mkstemp(prefix=_TEMPORARY, dir=self.directory)
        except OSError as error:
            raise FileError(
                error.errno or errno.EIO, f"cannot write the state into {self.directory}: {error.strerror}"
            ) from error

    def _publish(self, temporary: str) -> None:
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
                    _remove(state)
                else:
                    self._put_back(older, state)
                raise
        finally:
            if older >= 0:
                os.close(older)

    def _put_back(self, older: int, state: str) -> None:
        was = os.fstat(older)
        fd, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=self.directory)
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
            _remove(temporary)

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
            amount = "" if each.bytes is None else f"{_mib(each.bytes)} "
            _say(f"round {number}: {amount}flushed in {_milliseconds(each.seconds)}{guest}")

    def _note(self, text: str) -> None:
        self.report.notes.append(text)
        if not self.quiet:
            _say(f"note: {text}", err=True)

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
    _check_directory(directory)
    run = Snapshot(directory, name, limit, quiet=as_json, stop=stop)
    with _only_one(directory):
        if os.path.lexists(run.target):
            raise run._exists()
        report = _run(run, run.alone() if socket is None else run.with_guest(socket))
    if as_json:
        results = {"flat": _flatten(run)} if flat else {}
        _say(json.dumps({**asdict(report), "flushed": report.flushed(), **results}))
        return
    if report.state_bytes is not None and report.save is not None:
        _say(f"state: {_mib(report.state_bytes)} saved in {_milliseconds(report.save)}")
    if report.freeze is not None:
        _say(f"frozen in {_milliseconds(report.freeze)}: {report.snapshot}")
    if report.pause is not None:
        _say(f"the guest paused for {_milliseconds(report.pause)}")
    elif report.stopped_at is not None:
        _say(f"the guest was stopped {_milliseconds(time.time() - report.stopped_at)} ago and stays so")
    elif report.state_bytes is not None:
        _say("the guest was stopped before and stays so")
    if flat:
        print_results(_flatten(run))


def _flatten(run: Snapshot) -> Results:
    """Flatten what was frozen. The snapshot stays, whatever comes of that."""
    try:
        return flatten_below(run.target, quiet=run.quiet)
    except RamfsError as error:
        raise FileError(error.errno, f"{run.target} is made and not flat: {error}") from error


def _run(run: Snapshot, work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except asyncio.CancelledError:
        outcome = "no snapshot was made"
        if run.signals.forced:
            outcome = f"whether {run.target} was made is not known"
        raise Interrupted(run.signals.seen or signal.SIGINT, outcome) from None
    except OSError as error:
        raise FileError(error.errno or errno.EIO, f"cannot make {run.target}: {error}") from error


def _check_name(name: str) -> None:
    if len(os.fsencode(name)) > MAX_NAME:
        raise NameTooLong(f"the snapshot's name has more than {MAX_NAME} bytes")
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise BadName(f"{name!r} cannot be a snapshot's name; it is the name of one directory")


def _check_directory(directory: str) -> None:
    try:
        mode = os.stat(directory).st_mode
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        raise FileError(number, f"cannot reach {directory}: {os.strerror(number)}") from error
    if not stat.S_ISDIR(mode):
        raise FileError(errno.ENOTDIR, f"{directory} is not a directory")
    if not os.path.isdir(os.path.join(directory, ".snap")):
        raise MountError(f"{directory} is not on a ramfs mount (it has no .snap), so it cannot be frozen")


@contextlib.contextmanager
def _only_one(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(errno.EBUSY, f"another ramfs snapshot of {directory} is running") from error
        yield
    finally:
        os.close(fd)


def _settle(fd: int) -> int:
    os.fsync(fd)
    size = os.fstat(fd).st_size
    if not size:
        raise QmpError("QEMU says that it saved the guest, but wrote nothing")
    return size


def _discard(fd: int, path: str) -> None:
    os.close(fd)
    _remove(path)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _say(text: str, *, err: bool = False) -> None:
    try:
        click.echo(text, err=err)
    except OSError:
        # A reader who has gone away is no reason to give up, the less so while a guest is stopped.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2 if err else 1)
        os.close(nowhere)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
