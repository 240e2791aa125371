"""Stopping a guest for a moment: signals that come meanwhile, and that it goes on whatever happens."""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import stat
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import click

from ramfs import qmp
from ramfs.errors import FileError, MountError, QmpError, RamfsError

T = TypeVar("T")

#: How the name of a state begins that is being written.
TEMPORARY: Final = ".state."

#: Run states in which a guest cannot be saved, and what to do about it.
UNFIT: Final = {
    "inmigrate": "it still waits for its own incoming state",
    "postmigrate": "it was saved and has not run since; QEMU saves it again once it has (cont)",
    "finish-migrate": "it is being saved or migrated already",
    "save-vm": "it is being saved already",
    "restore-vm": "it is being restored",
    "suspended": "it sleeps; wake it first (system_wakeup)",
}


class Stoppable(Protocol):
    """What can be stopped for a while: a guest by QMP, or a process."""

    async def stop(self) -> None:
        """Let nothing of it write to its memory any more."""

    async def cont(self) -> None:
        """Let it go on."""


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


@dataclass
class Pause:
    """How long something stood still; both are None when it was stopped before."""

    #: Seconds, if it goes on.
    seconds: float | None = None
    #: Seconds since the epoch: when it was stopped, if it stays so.
    stopped_at: float | None = None


async def pause_for(
    work: Coroutine[Any, Any, None],
    guest: Stoppable,
    signals: Signals,
    made: str,
    *,
    was_running: bool,
    stay: bool = False,
) -> Pause:
    """Do the work while the guest is stopped, and let it go on whatever came of that.

    One that was not running does not go on afterwards, nor with ``stay`` when all went well. ``made`` says what then
    is complete.
    """
    begin, stopped_at = time.monotonic(), time.time()
    try:
        if was_running:
            await guest.stop()
        await work
    except BaseException as error:
        signals.undoing()
        work.close()
        if was_running:
            try:
                await guest.cont()
            except qmp.QmpGone:
                pass  # No guest is left to continue, and the first error is the one to tell.
            except QmpError as refusal:
                raise QmpError(f"{str(error) or 'interrupted'}; the guest stays stopped: {refusal}") from error
        raise
    signals.undoing()
    if not was_running:
        return Pause()
    if stay:
        return Pause(stopped_at=stopped_at)
    try:
        await guest.cont()
    except QmpError as error:
        raise QmpError(f"{made} is complete, but the guest does not go on: {error}") from error
    return Pause(seconds=time.monotonic() - begin)


async def require_fit(guest: qmp.Qmp, socket: str) -> None:
    """Raises QmpError when the guest is in a state in which it cannot be saved."""
    status = await guest.status()
    if status in UNFIT:
        raise QmpError(f"the guest at {socket} cannot be saved now ({status}): {UNFIT[status]}")


def run_to_end(work: Coroutine[Any, Any, T], signals: Signals, target: str, undone: str) -> T:
    """Do it all; ``target`` is what it makes, and ``undone`` says that nothing came of it. Raises RamfsError."""
    try:
        return asyncio.run(work)
    except asyncio.CancelledError:
        outcome = undone
        if signals.forced:
            outcome = f"whether {target} was made is not known"
        raise Interrupted(signals.seen or signal.SIGINT, outcome) from None
    except OSError as error:
        raise FileError(error.errno or errno.EIO, f"cannot make {target}: {error}") from error


def check_directory(directory: str) -> None:
    """Raises FileError, MountError unless it is a directory that can be frozen."""
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
def only_one(directory: str, command: str) -> Iterator[None]:
    """Hold the directory against other commands of this kind. Raises FileError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(errno.EBUSY, f"another {command} of {directory} is running") from error
        yield
    finally:
        os.close(fd)


def sweep(directory: str, prefix: str = TEMPORARY) -> None:
    """Remove the temporary files that a killed command left. Raises FileError."""
    try:
        with os.scandir(directory) as entries:
            stale = [entry.path for entry in entries if entry.name.startswith(prefix)]
        for path in stale:
            remove(path)
    except OSError as error:
        raise FileError(error.errno or errno.EIO, f"cannot clear up {directory}: {error.strerror}") from error


def temporary_file(directory: str, prefix: str = TEMPORARY) -> tuple[int, str]:
    """A new file, open for reading and writing, and its path. Raises FileError."""
    try:
        return tempfile.mkstemp(prefix=prefix, dir=directory)
    except OSError as error:
        raise FileError(error.errno or errno.EIO, f"cannot write into {directory}: {error.strerror}") from error


def discard(fd: int, path: str) -> None:
    """Close and remove a temporary file."""
    os.close(fd)
    remove(path)


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def say(text: str, *, err: bool = False) -> None:
    """Print a line; to nobody, if nobody reads it."""
    try:
        click.echo(text, err=err)
    except OSError:
        # A reader who has gone away is no reason to give up, the less so while a guest is stopped.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2 if err else 1)
        os.close(nowhere)


def mib(count: int) -> str:
    """Bytes as people read them, always in MiB."""
    return f"{count / (1 << 20):.1f} MiB"


def milliseconds(seconds: float) -> str:
    """A short time as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
