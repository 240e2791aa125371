"""``ramfs capture``: make a clone of what a process has in private mappings of files.

What happens, and what is undone when a step fails, or Ctrl-C comes:

    step                                   when it fails
    for each file that becomes another     the copies are removed
      one, a copy that shares its pages
    stop                                   the guest goes on
    write the process's own pages          as above
      into the copies
    save the state of the devices          as above
    let the guest go on                    the copies are removed
    rename the copies to the files,        those that were renamed are put back
      the state to ``state``

The process keeps its mappings of the files before, which have no name in DIR any more.
"""

import array
import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Final

import click
import numpy as np

from ramfs import qmp
from ramfs.cli._devices import Devices
from ramfs.cli._flush import in_thread, regular_files
from ramfs.cli._mounts import locate
from ramfs.cli._private import Mapping, Process, Ranges, copy_pages
from ramfs.cli._stopping import (
    Signals,
    Stoppable,
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
from ramfs.cli._text import printable
from ramfs.errors import FileError, UsageError
from ramfs.image.scatter import MAX_RUNS, pack
from ramfs.store.files import write_all
from ramfs.units import PAGE

_TEMPORARY: Final = ".capture."

#: Bytes from which on a range has a request of its own, and the most that go with others.
_LONG: Final = 128 << 10
_MESSAGE: Final = 960 << 10

#: See ioctl_iflags(2): what the mount says of frozen files.
_FS_IOC_GETFLAGS: Final = 0x80086601
_IMMUTABLE: Final = 0x10


@dataclass
class Captured:
    """What was taken of one file."""

    path: str
    pages: int = 0
    """the process's own"""
    ranges: int = 0


@dataclass
class Report:
    """What a capture did and what it cost; printed as JSON under the same names."""

    directory: str
    pid: int
    files: list[Captured] = field(default_factory=list)
    #: Seconds; the first is None when the process was stopped before, the second without a guest.
    pause: float | None = None
    save: float | None = None
    copy: float | None = None
    state_bytes: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class File:
    """A file of the directory that becomes another one."""

    names: list[str]
    """its paths, more than one if it has hard links here"""
    status: os.stat_result
    mappings: list[Mapping]
    fd: int = -1
    """of the copy"""
    copies: list[str] = field(default_factory=list)
    """temporary paths of the copy, one for each name"""
    captured: Captured = field(init=False)

    def __post_init__(self) -> None:
        self.captured = Captured(self.names[0])

    def put(self, ranges: Ranges, data: memoryview, control: int, way: bytes) -> None:
        """Write ranges into the copy, which lies that way from the root of the mount.

        By the daemon's ``control``, if there is a descriptor of that, many short ones at a time.
        """
        size, at, room = self.status.st_size, 0, _MESSAGE
        runs: list[tuple[int, int]] = []
        pieces: list[memoryview] = []
        for start, stop in ranges.tolist():
            piece = data[at : at + stop - start]
            at += stop - start
            if control < 0 or len(piece) >= _LONG or stop > size:  # the last page may end before the page does
                write_all(self.fd, piece[: size - start], start)
                continue
            if len(runs) == MAX_RUNS or len(piece) > room:
                os.pwrite(control, pack(way, runs, pieces), 0)
                runs, pieces, room = [], [], _MESSAGE
            runs.append((start, len(piece)))
            pieces.append(piece)
            room -= len(piece)
        if runs:
            os.pwrite(control, pack(way, runs, pieces), 0)


class Capture:
    """One run of the command."""

    def __init__(self, directory: str, process: Process, *, quiet: bool) -> None:
        self.directory = directory
        self.process = process
        self.quiet = quiet
        self.report = Report(directory, process.pid)
        self.signals = Signals()
        self._files: list[File] = []
        self._state: tuple[int, str] | None = None
        mount, self._way = locate(directory)
        self._control = -1
        # Only the mount's owner may; others write range by range.
        with contextlib.suppress(OSError):
            self._control = os.open(os.path.join(mount.mountpoint, ".ramfs/control"), os.O_WRONLY | os.O_CLOEXEC)

    async def by_signal(self) -> Report:
        """Stop the process with SIGSTOP meanwhile; there is no state."""
        self.signals.watch()
        await self._work(self.process, await self.process.running(), None)
        return self.report

    async def by_qmp(self, socket: str) -> Report:
        """Stop the guest meanwhile, and save the state of its devices."""
        self.signals.watch()
        async with qmp.connect(socket) as guest:
            await require_fit(guest, socket)
            peer = guest.peer()
            if peer != self.process.pid and peer is not None and _is_qemu(peer):
                raise UsageError(f"the QMP socket {socket} is that of process {peer}, not of {self.process.pid}")
            devices = Devices(guest, self.process)
            await devices.prepare()
            await self._work(guest, await guest.running(), devices)
        return self.report

    async def _work(self, guest: Stoppable, was_running: bool, devices: Devices | None) -> None:
        try:
            await in_thread(lambda: self._prepare(with_state=devices is not None))
            pause = await pause_for(self._take(devices), guest, self.signals, "the capture", was_running=was_running)
            self.report.pause = pause.seconds
            if devices is not None:
                await in_thread(lambda: self._write_state(devices))
            with self.signals.held():
                await in_thread(self._publish)
        finally:
            await in_thread(self._clear_up)

    # -- before the guest is stopped

    def _prepare(self, *, with_state: bool) -> None:
        for directory, _, _ in os.walk(self.directory):
            sweep(directory, _TEMPORARY)
        self._files = self._find()
        for each in self._files:
            self._copy(each)
        if with_state:
            sweep(self.directory)
            self._state = temporary_file(self.directory)

    def _find(self) -> list[File]:
        """What of the directory becomes another file: what the process maps, and what is frozen."""
        device = os.stat(self.directory).st_dev
        mapped: dict[int, list[Mapping]] = {}
        for mapping in self.process.mappings():
            if mapping.device == device:
                mapped.setdefault(mapping.inode, []).append(mapping)
        found: dict[int, File] = {}
        shared = []
        for path in regular_files(self.directory):
            status = os.lstat(path)
            if status.st_ino in found:
                found[status.st_ino].names.append(path)
                continue
            all_of_it = mapped.get(status.st_ino, [])
            private = [mapping for mapping in all_of_it if mapping.private]
            if len(private) < len(all_of_it):
                shared.append(path)
            if private or _is_frozen(path):
                found[status.st_ino] = File([path], status, private)
        if not any(file.mappings for file in found.values()):
            if shared:
                text = f"process {self.process.pid} maps {shared[0]} shared, so that all it stores is in the file"
                raise FileError(errno.EINVAL, f"{text} already: use ramfs snapshot")
            raise FileError(errno.EINVAL, f"process {self.process.pid} maps no file of {self.directory}")
        return list(found.values())

    def _copy(self, file: File) -> None:
        """A copy of a file, which shares its pages."""
        name = file.names[0]
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(source)  # what others stored into a shared mapping of it
            file.fd, copy = temporary_file(os.path.dirname(name), _TEMPORARY)
            file.copies.append(copy)
            offset, size = 0, file.status.st_size
            while offset < size and (copied := os.copy_file_range(source, file.fd, size - offset, offset, offset)):
                offset += copied
            os.ftruncate(file.fd, size)
        finally:
            os.close(source)
        with contextlib.suppress(PermissionError):
            os.fchown(file.fd, file.status.st_uid, file.status.st_gid)
        shutil.copystat(name, copy)
        for other in file.names[1:]:
            spare = _spare(other)
            os.link(copy, spare)
            file.copies.append(spare)

    # -- while it stands still

    async def _take(self, devices: Devices | None) -> None:
        begin = time.monotonic()
        await in_thread(self._copy_pages)
        self.report.copy = time.monotonic() - begin
        if devices is not None:
            begin = time.monotonic()
            await devices.save()
            self.report.save = time.monotonic() - begin

    def _copy_pages(self) -> None:
        for file in self._files:
            if not file.mappings:
                continue
            parts = list(self._parts(file))
            _check_apart(file.names[0], parts)
            way = os.path.join(self._way, os.path.relpath(file.copies[0], self.directory))
            put = functools.partial(file.put, control=self._control, way=os.fsencode(way))
            copy_pages(self.process, parts, put)
            file.captured.ranges = sum(len(ranges) for _, ranges in parts)
            file.captured.pages = sum(int((ranges[:, 1] - ranges[:, 0]).sum()) for _, ranges in parts) // PAGE
        self.process.check_alive()

    def _parts(self, file: File) -> Iterator[tuple[int, Ranges]]:
        """What of each mapping is the process's own, and how far offsets in the file are from its addresses."""
        for mapping in file.mappings:
            yield mapping.offset - mapping.start, self.process.copied(mapping)

    # -- afterwards

    def _write_state(self, devices: Devices) -> None:
        assert self._state is not None
        fd, _ = self._state
        self.report.state_bytes = 0
        for part in devices.state():
            write_all(fd, part, self.report.state_bytes)
            self.report.state_bytes += len(part)
        os.fsync(fd)

    def _publish(self) -> None:
        """Let the copies take the places of the files; all of them, or none."""
        places: dict[str, str | None] = {}
        for file in self._files:
            if file.mappings:
                os.utime(file.fd)
                self.report.files.append(file.captured)
            os.fsync(file.fd)
            places.update(zip(file.names, file.copies, strict=True))
        state = os.path.join(self.directory, "state")
        if self._state is not None:
            places[state] = self._state[1]
        elif os.path.lexists(state):
            places[state] = None
            self._note(f"without --qmp no state of devices is saved, and {state}, which fits no more, was removed")
        before: dict[str, str] = {}
        try:
            for name in places:
                if os.path.lexists(name):
                    os.link(name, spare := _spare(name), follow_symlinks=False)
                    before[name] = spare
            for name, copy in places.items():
                if copy is None:
                    os.unlink(name)
                else:
                    os.rename(copy, name)
        except BaseException:
            for name in places:
                if name in before:
                    os.replace(before[name], name)
                elif name == state:
                    remove(name)
            raise
        finally:
            for spare in before.values():
                remove(spare)

    def _clear_up(self) -> None:
        if self._control >= 0:
            os.close(self._control)
        for file in self._files:
            if file.fd >= 0:
                os.close(file.fd)
            for copy in file.copies:
                remove(copy)
        if self._state is not None:
            discard(*self._state)

    def _note(self, text: str) -> None:
        self.report.notes.append(text)
        if not self.quiet:
            say(f"note: {text}", err=True)


def _spare(path: str) -> str:
    """A path beside another one, for a temporary link."""
    return os.path.join(os.path.dirname(path), f"{_TEMPORARY}{os.urandom(8).hex()}")


def _is_frozen(path: str) -> bool:
    flags = array.array("L", [0])
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    finally:
        os.close(fd)
    return bool(flags[0] & _IMMUTABLE)


def _is_qemu(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return "qemu" in file.read()
    except OSError:
        return False


def _check_apart(path: str, parts: list[tuple[int, Ranges]]) -> None:
    """Raises FileError when two mappings have each a copy of the same page: which one is meant?"""
    places = [ranges.astype(np.int64) + shift for shift, ranges in parts]
    found = np.concatenate(places)
    found = found[np.argsort(found[:, 0])]
    twice = np.flatnonzero(found[1:, 0] < found[:-1, 1])
    if len(twice):
        at = int(found[twice[0] + 1, 0])
        raise FileError(
            errno.EINVAL,
            f"the process has page {at // PAGE} of {path} twice, in two mappings: which one counts cannot be told",
        )


@click.command(short_help="Make a clone of a guest that maps its memory privately.")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--pid", type=click.IntRange(1), required=True, help="The process that maps files of DIR privately.")
@click.option("--qmp", "socket", metavar="SOCKET", type=click.Path(), help="QMP socket of the guest, if it is QEMU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def capture(directory: str, pid: int, socket: str | None, as_json: bool) -> None:
    """Make of DIR a clone that holds what a process stored into private mappings of its files.

    A guest with -mem-path DIR, or with share=off, keeps what it writes to itself. DIR is the directory of its files: a
    dense clone (cp -al of a snapshot), or that of -mem-path. Only the pages that the process has of its own are
    copied; all others stay shared. The files of DIR become ordinary ones, all at once; if something fails, nothing
    changes.

    With --qmp the guest is stopped meanwhile, and the state of its devices is saved to DIR/state; load that as the
    state of a snapshot. Without, the process is stopped by SIGSTOP.

    The process keeps what it has mapped, which DIR does not have any more. To capture it once more, capture links:
    cp -al DIR NEW before, and then NEW instead of DIR.
    """
    check_directory(directory)
    with Process(pid) as process, only_one(directory, "ramfs capture"):
        run = Capture(directory, process, quiet=as_json)
        work = run.by_signal() if socket is None else run.by_qmp(socket)
        report = run_to_end(work, run.signals, directory, "nothing was changed")
    if as_json:
        say(json.dumps(asdict(report)))
        return
    for each in report.files:
        text = f"{each.pages} pages ({mib(each.pages * PAGE)}) in {each.ranges} ranges"
        say(f"{printable(each.path)}: {text}")
    if report.copy is not None:
        say(f"copied in {milliseconds(report.copy)}")
    if report.state_bytes is not None and report.save is not None:
        say(f"state: {mib(report.state_bytes)} saved in {milliseconds(report.save)}")
    if report.pause is not None:
        say(f"the {'process' if socket is None else 'guest'} paused for {milliseconds(report.pause)}")
    else:
        say(f"the {'process' if socket is None else 'guest'} was stopped before and stays so")
