"""Moves a running guest to another host; started by tools/migrate.

What happens, and what is undone when a step fails or Ctrl-C comes:

    step                                  when it fails
    rounds: snapshot here, pull there     nothing runs there; what was made is removed
    there: a directory whose source is    that QEMU is ended, what was made is removed
      told later, and QEMU on it
    stop the guest, save its devices      it is continued
    if some of it is there: freeze it     it is continued
    tell the other host its source,       that QEMU is ended, the guest here is continued
      and have it load the devices
    order to go on there                  known not to be obeyed: as above; not known: the guest here stays stopped
    end QEMU here                         the guest runs there: nothing is undone from here on
    if it is not frozen yet: freeze it    its memory goes on arriving, unverified
    wait until all has arrived there      the server and the last snapshot stay

Where nothing of the guest is there much may be dirty here, and to flush that would take longer than all the rest. So
the stopped guest's files are served as they are until they are frozen, and only what is touched comes from there. Then
everything is compared with the digests of what was frozen, also what came before.

Only who was never told to go on can be known not to run: so the order is given once, and the guest here is continued
only before it, or when the other host has answered that its QEMU is no more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from ramfs import qmp
from ramfs.cli._flush import flush, in_thread, rounds
from ramfs.cli._states import read_zeros, zero_runs
from ramfs.cli._stopping import discard, only_one, sweep, temporary_file
from ramfs.cli._text import duration, human, parse_size
from ramfs.cli.snapshot import Snapshot
from ramfs.errors import RamfsError, UsageError

AGENT = Path(__file__).with_name("agent.py").read_text()

#: A round that brings more than this part of what the one before it brought is not worth another.
FALLS = 0.75
#: Seconds that clearing up on the other host may take, when it goes on telling that it is there.
_CLEARING = 60
#: Bytes of the devices' state in one order.
_PART = 1 << 20
#: Seconds in which it is looked for what only the kernel has of the stopped guest, about; runs of that which are read
#: before what was found is told; runs of zeros that are told at once, at most; and pages of each of them, at least.
_LOOK, _SOME, _RUNS, _SHORT = 0.3, 64, 2000, 4
#: Seconds that the guest waits for the first of that.
_SOON = 0.02
_STATE, _MANIFEST = "state", "ramfs.manifest"
_ENDED = "the server ended: "
#: Starts the server again when it ends, as nbdkit 1.32 does when a connection breaks at the wrong moment; also when we
#: are gone. As systemd activates by socket: the socket is number 3, and it is told which process that is meant for.
_KEEP = f"""
socket=$1 room=$2; shift 2
# By itself it would wait for clients, who may be cut off.
trap 'kill -9 $server; rm -r "$room"; exit' TERM
while :; do
  sh -c 'socket=$1; shift; export LISTEN_FDS=1 LISTEN_PID=$$; eval "exec 3<&$socket"; exec "$@"' sh "$socket" "$@" &
  server=$!
  wait $server
  echo "{_ENDED}status $?"
  sleep 0.1
done
"""


class Failed(RamfsError):
    """The migration failed."""


class Lost(Failed):
    """The connection to the other host is lost."""


class Interrupted(RamfsError):
    """A signal ended it."""

    def __init__(self, number: int | None, outcome: str) -> None:
        number = number or signal.SIGINT
        super().__init__(f"interrupted by {signal.Signals(number).name}; {outcome}")
        self.exit_code = 128 + number


@dataclass
class Round:
    """What was pulled of one snapshot: bytes that the server was asked for."""

    bytes: int
    seconds: float


@dataclass
class Report:
    """What it took; printed as JSON under the same names."""

    target: str
    rounds: list[Round] = field(default_factory=list)
    prepare: float | None = None
    """seconds after the rounds in which all was made ready there; the guest ran on meanwhile"""
    downtime: float | None = None
    """seconds in which the guest ran nowhere; None if it was stopped before"""
    behind: Round | None = None
    """what came after the last snapshot"""
    server_restarts: int = 0


# --- the other host ---


class Other:
    """The agent on the other host. Its orders are those of agent.py."""

    def __init__(self, prefix: list[str], python: str, socket: str, patience: float) -> None:
        self._prefix = prefix
        self._patience = patience
        self._words = [python, "-c", AGENT, socket, str(patience)]
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._lost: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def command(self, *more: str) -> list[str]:
        words = [*self._words, *more]
        # ssh hands its words to a shell.
        remote = any(os.path.basename(word) == "ssh" for word in self._prefix)
        return [*self._prefix, *([shlex.join(words)] if remote else words)]

    async def begin(self) -> None:
        """Start it, or another one after a loss. Raises Failed."""
        await self._drop()
        self._lost = None
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(), stdin=-1, stdout=-1, stderr=-1, start_new_session=True, limit=1 << 20
            )
        except OSError as error:
            raise Failed(f"{self._prefix[0]}: {error.strerror}") from None
        self._waiting.clear()
        self._next = 0
        answer = self._expect()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._tell())]
        await answer

    @property
    def there(self) -> bool:
        """Is it connected?"""
        return self._lost is None

    def _expect(self) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self._waiting[self._next] = future
        self._next += 1
        return future

    async def do(self, order: str, **how: Any) -> Any:
        """Have an order obeyed; returns the answer. Raises Failed, and Lost when it is not known whether it was."""
        if self._lost is not None:
            raise Lost(self._lost)
        number, answer = self._next, self._expect()
        self._send({"id": number, "do": order, "with": how})
        return await answer

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._send({"do": "alive"})

    async def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        why = ""
        try:
            while line := await asyncio.wait_for(self._process.stdout.readline(), self._patience):
                told = json.loads(line)
                answer = self._waiting.pop(told["id"], None)
                if answer is None or answer.done():
                    continue
                if "error" in told:
                    answer.set_exception(Failed(told["error"]))
                else:
                    answer.set_result(told["answer"])
            with contextlib.suppress(TimeoutError):
                why = (await asyncio.wait_for(self._process.stderr.read(), 1)).decode(errors="replace").strip()
            why = why.splitlines()[-1] if why else "it ended"
        except TimeoutError:
            why = f"nothing was heard for {self._patience:g} s"
        except ValueError:
            why = "it does not speak as tools/migrate does there"
        self._lost = f"the connection to the other host is lost: {why}"
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Lost(self._lost))
        self._waiting.clear()

    async def end(self) -> None:
        """Have it clear up and end; after a loss it does so by itself."""
        if self._process is not None:
            with contextlib.suppress(Failed, TimeoutError):
                async with asyncio.timeout(_CLEARING):
                    await self.do("end")
        await self._drop()

    async def _drop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(OSError):  # it may not have read all
                await self._process.stdin.wait_closed()
        self._process = None

    async def settle(self) -> str:
        """After a loss: "runs", "ended" or "unknown", as far as the other host can tell. Raises Failed."""
        process = await asyncio.create_subprocess_exec(
            *self.command("settle"), stdin=-3, stdout=-1, stderr=-1, start_new_session=True
        )
        try:
            async with asyncio.timeout(self._patience):
                out, _ = await process.communicate()
            return str(json.loads(out)["answer"])
        except (TimeoutError, ValueError, KeyError):
            raise Lost("the other host does not answer") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


# --- this host ---


class Server:
    """nbdkit, for one directory after the other on one socket, which stays when a server dies."""

    def __init__(self, listen: str, report: Report) -> None:
        host, _, port = listen.rpartition(":") if re.search(r"\]:\d+$|^[^:]*:\d+$", listen) else (listen, "", "0")
        host = host.strip("[]")
        try:
            family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(address[:2], family=family, backlog=64)
        except OSError as error:
            raise Failed(f"cannot listen at {listen}: {error.strerror or error}") from None
        self.uri = f"nbd://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}/"
        self._report = report
        self._log = Path(tempfile.mkdtemp(prefix="ramfs-migrate-")) / "log"
        self._errors = self._log.with_name("errors")
        self.stage = str(self._log.with_name("stage"))
        """a directory of links, of which each new connection gets what they lead to then"""
        os.mkdir(self.stage)
        self.leave = False
        """is it to go on without us?"""

    @contextlib.asynccontextmanager
    async def serving(self, directory: str) -> AsyncIterator[None]:
        """Serve a directory within the block, and after it with ``leave``."""
        self._log.write_bytes(b"")
        self._errors.write_bytes(b"")
        fd = self._socket.fileno()
        # A live file that is asked for its first hole, as servers ask what they open, has all before that flushed.
        # Where zeros are the manifest tells.
        words = ["nbdkit", "-f", "-r", "--filter=log", "--filter=noextents", "file", f"dir={directory}"]
        words.append(f"logfile={self._log}")
        with self._errors.open("ab") as file:
            process = self._keeper = subprocess.Popen(  # noqa: ASYNC220 - it may outlive the loop
                ["sh", "-c", _KEEP, "sh", str(fd), self._log.parent, *words, "logappend=true"],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[fd], start_new_session=True,
            )  # fmt: skip
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            if not self.leave:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    async def _watch(self) -> None:
        """Tell of each time that it ended."""
        told = 0
        while True:
            await asyncio.sleep(0.1)
            lines = self._errors.read_text(errors="replace").splitlines()
            ends = [number for number, line in enumerate(lines) if line.startswith(_ENDED)]
            for number in ends[told:]:
                self._report.server_restarts += 1
                why = lines[number - 1] if number and number - 1 not in ends else lines[number].removeprefix(_ENDED)
                say(f"the server ended ({why}), and is started again")
            told = len(ends)

    def show(self, directory: str, names: list[str]) -> None:
        """Let the stage lead to these files of a directory."""
        for name in names:
            new = os.path.join(self._log.parent, "link")
            os.symlink(os.path.join(directory, name), new)
            os.rename(new, os.path.join(self.stage, name))

    @property
    def group(self) -> int:
        """The process group of the server and its keeper, which clear up after SIGTERM."""
        return self._keeper.pid

    def asked(self) -> int:
        """Bytes that were asked for in this block."""
        text = self._log.read_text(errors="replace")
        return sum(int(found, 16) for found in re.findall(r"\bRead .*?\bcount=0x([0-9a-f]+)", text))

    def close(self) -> None:
        self._socket.close()
        if not self.leave:
            shutil.rmtree(self._log.parent)


class Signals:
    """Ctrl-C and its relatives as cancellation of what can still be undone."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.seen: int | None = None
        self.held = False
        self._again = asyncio.Event()

    def watch(self) -> None:
        self._task = asyncio.current_task()
        for number in self.NUMBERS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self.seen = number
        if self.held or self._task is None:
            self._again.set()
        else:
            self._task.cancel()

    async def another(self) -> None:
        """Wait for one that comes while they are held."""
        await self._again.wait()
        self._again.clear()


class Migration:
    """One run of the tool."""

    def __init__(
        self, directory: str, target: str, command: list[str], socket: str, other: Other, server: Server,
        report: Report, limit: int, small: int, hold: bool,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.target = target
        self.command = command
        self.socket = socket
        self.other = other
        self.server = server
        self.report = report
        self.limit = limit
        self.small = small
        self.hold = hold
        self.signals = Signals()
        self.mark = f"migrate-{os.getpid()}"
        self.snapshots: list[str] = []
        self.frozen: Snapshot | None = None
        """the last snapshot, when it is to be made"""
        self.state = -1
        """a descriptor of the devices' state"""
        self.sent = 0
        """bytes of it that were sent"""
        self.telling: asyncio.Task[None] | None = None
        """looks for zeros, and tells of them"""
        self.told = asyncio.Event()
        """the other host has heard of the holes, which are looked for first"""
        self.was_running = False
        self.stopped_at: float | None = None
        self.fate = ""
        """where the guest is, for who reads of an error"""
        self.state_kept = False
        """is the last snapshot perhaps all that is left of the guest?"""

    async def run(self) -> None:
        self.signals.watch()
        try:
            async with qmp.connect(self.socket) as guest:
                await Snapshot(self.directory, self.mark, 0, quiet=quiet).check(guest, self.socket)
                self.was_running = await guest.running()
            self.fate = "the guest runs on here" if self.was_running else "the guest is here, stopped as before"
            await self.other.begin()
            await self.other.do("check", directory=self.target)
            last = await self._rounds() if self.was_running else None
            await self._move(last)
        except BaseException as error:
            self.signals.held = True
            await self._go_on_here()
            await self._clear_up()
            if isinstance(error, asyncio.CancelledError):
                raise Interrupted(self.signals.seen, self.fate) from None
            if isinstance(error, RamfsError) and self.fate:
                raise Failed(f"{error}; {self.fate}") from None
            raise
        await self._clear_up()

    async def _clear_up(self) -> None:
        """Leave nothing that nobody needs."""
        self.signals.held = True
        await self.other.end()
        for name in list(self.snapshots):
            if not self.server.leave and not (self.state_kept and name == self.snapshots[-1]):
                await self._thaw(name)

    # -- rounds

    async def _rounds(self) -> str | None:
        """Pull snapshots of the running guest until that brings little; where the last one is on the other host.

        Each is pulled beside the one before, named as another generation of the same guest: so what it has not changed
        is taken from there.
        """
        there = None
        for number in range(1, self.limit + 1):
            name, directory = f"{self.mark}-{number}", f"{self.target}.{self.mark}-{number}"
            say(f"round {number}: snapshot")
            await self._freeze(name)
            begin = time.monotonic()
            async with self.server.serving(self._path(name)):
                say(f"round {number}: pull")
                await self._pull(directory, wait=True)
                this = Round(self.server.asked(), time.monotonic() - begin)
            say(f"round {number}: {human(this.bytes)} in {duration(this.seconds)}")
            if there is not None:
                await self.other.do("remove", directory=there)
            there = directory
            await self._thaw(name)
            before = self.report.rounds[-1] if self.report.rounds else None
            self.report.rounds.append(this)
            if this.bytes <= self.small or (before is not None and this.bytes > before.bytes * FALLS):
                break
        return there

    async def _pull(self, directory: str, **how: Any) -> dict[str, Any]:
        """Have what is served pulled; again if the server died at the very beginning: from then on it is waited for."""
        while True:
            restarts = self.report.server_restarts
            try:
                return dict(await self.other.do("pull", uri=self.server.uri, directory=directory, **how))
            except Lost:
                raise
            except Failed:
                await asyncio.sleep(0.2)  # until it has been seen
                if self.report.server_restarts == restarts:
                    raise

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, ".snap", name)

    async def _freeze(self, name: str, *more: str) -> dict[str, Any]:
        self.snapshots.append(name)
        words = [sys.executable, "-m", "ramfs", "snapshot", "--json", *more, self.directory, name]
        # Out of reach of the terminal's Ctrl-C: a snapshot is short, and ends whole.
        process = await asyncio.create_subprocess_exec(*words, stdin=-3, stdout=-1, stderr=-1, start_new_session=True)
        try:
            out, err = await process.communicate()
        except asyncio.CancelledError:
            process.send_signal(signal.SIGINT)
            await process.wait()
            raise
        if process.returncode:
            raise Failed(err.decode(errors="replace").strip().removeprefix("ramfs: "))
        return dict(json.loads(out))

    async def _thaw(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await in_thread(lambda: os.rmdir(self._path(name)))
        self.snapshots.remove(name)

    # -- the move

    async def _move(self, before: str | None) -> None:
        """Stop here, go on there, and wait until all has arrived."""
        begin = time.monotonic()
        sizes = await in_thread(self._sizes)
        await in_thread(lambda: self.server.show(self.directory, list(sizes)))
        async with self.server.serving(self.server.stage):
            with only_one(self.directory, "tools/migrate"):
                say("prepare there")
                made = await self.other.do("prepare", directory=self.target, sizes=sizes, command=self.command)
                later = made["like"] is None
                async with qmp.connect(self.socket) as guest:
                    self.report.prepare = time.monotonic() - begin
                    if self.hold:
                        await self._held()
                    begin = time.monotonic()
                    verified = await self._stop_and_load(guest, sizes, later=later)
                await self._commit()
                if self.stopped_at is not None:
                    self.report.downtime = time.time() - self.stopped_at
                self.stopped_at, self.fate = None, ""
                now = "" if self.report.downtime is None else f", after {duration(self.report.downtime)}"
                say(f"the guest is there{now}")
                await self._end_here()
                if self.telling is not None:
                    if not self.told.is_set():  # where the files have holes is of no use any more
                        self.telling.cancel()
                    await self._freeze_behind(list(sizes))
                    self.telling.cancel()
            wrong = await self._arrive(made["pull"], verified=verified)
            if before is not None:
                await self.other.do("remove", directory=before)
            amount = self.server.asked() + self.sent
            self.report.behind = Round(amount, time.monotonic() - begin)
        if wrong:
            self._disbelieve(wrong)
        say(f"all of it is there: {human(self.report.behind.bytes)} since it was stopped")

    async def _held(self) -> None:
        say("ready; a line on standard input lets it go")
        if not await in_thread(sys.stdin.readline):
            raise Failed("standard input ended without a line")

    def _sizes(self) -> dict[str, int]:
        """The files to move, and their bytes."""
        with os.scandir(self.directory) as entries:
            found = {each.name: each.stat().st_size for each in entries if each.is_file(follow_symlinks=False)}
        found = {name: size for name, size in found.items() if name != _STATE and not name.startswith(f".{_STATE}.")}
        if not any(found.values()):
            raise Failed(f"{self.directory} has no guest's memory in it")
        return found

    async def _stop_and_load(self, guest: qmp.Qmp, sizes: dict[str, int], *, later: bool) -> bool:
        """Stop the guest, and bring it to where it needs only go on there; whether its memory is verified by now.

        It is frozen at once, or ``later``.
        """
        self.frozen = Snapshot(self.directory, f"{self.mark}-last", 0, quiet=quiet, stop=True)
        if self.was_running:
            if not later:
                async for _ in rounds(self.directory, self.limit or 1):
                    pass
            say("stop")
            self.stopped_at = time.time()
            await guest.stop()
        if later:
            self.telling = asyncio.create_task(self._tell_zeros(list(sizes)))
        else:
            await flush(self.directory, running=False)
        self.state = os.memfd_create("state")
        async with guest.saving():
            await guest.save_state(self.state)
        if await in_thread(self._sizes) != sizes:
            raise Failed(f"files in {self.directory} were made, removed or changed their size")
        if not later:
            await self._freeze_state()
            await in_thread(lambda: self._show_frozen(list(sizes)))
            say("pull of what is left")
        at = 0
        while part := os.pread(self.state, _PART, at):
            packed = zlib.compress(part, 1)
            await self.other.do("part", directory=self.target, data=base64.b64encode(packed).decode())
            at, self.sent = at + len(part), self.sent + len(packed)
        say("start there")
        how = {"directory": self.target, "uri": self.server.uri, "resume": not later, "command": self.command}
        told = await self.other.do("load", **how)
        if told["wrong"]:
            raise Failed(told["wrong"])
        if later:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.told.wait(), _SOON)
        return bool(told["verified"])

    async def _tell_zeros(self, names: list[str]) -> None:
        """Tell the other host where the stopped guest has zeros, which are not fetched then beside what is touched.

        First what is a hole, and soon what the guest has made so and only the kernel knows of. Whatever of that fails,
        or comes too late, has more fetched and nothing else.
        """
        with contextlib.suppress(RamfsError, OSError):
            paths = {name: os.path.join(self.directory, name) for name in names}
            found = {name: await in_thread(partial(zero_runs, path, _LOOK)) for name, path in paths.items()}
            await self._tell_longest({name: zeros.known for name, zeros in found.items()})
            self.told.set()
            for name, zeros in found.items():
                # What is large is a program's data, and neither the first that is touched nor zeros.
                possible = sorted(zeros.possible, key=lambda run: run[1] - run[0])
                for low in range(0, len(possible), _SOME):
                    part = possible[low : low + _SOME]
                    await self._tell_longest({name: await in_thread(partial(read_zeros, paths[name], part))})

    async def _tell_longest(self, zeros: dict[str, list[tuple[int, int]]]) -> None:
        """Tell of runs of zeros, but for short ones, around which it takes more requests than they save."""
        told: dict[str, list[tuple[int, int]]] = {}
        runs = ((stop - first, first, stop, name) for name in zeros for first, stop in zeros[name])
        for _, first, stop, name in sorted((run for run in runs if run[0] >= _SHORT), reverse=True)[:_RUNS]:
            told.setdefault(name, []).append((first, stop))
        if told:
            await self.other.do("zeros", directory=self.target, zeros=told)

    async def _freeze_state(self) -> None:
        """Make the last snapshot, with the state in it."""
        assert self.frozen is not None
        snapshot = self.frozen

        def work() -> None:
            sweep(self.directory)
            fd, temporary = temporary_file(self.directory)
            try:
                at = 0
                while part := os.pread(self.state, _PART, at):
                    at += os.write(fd, part)
                os.fsync(fd)
                snapshot.publish(temporary)
            finally:
                discard(fd, temporary)

        self.snapshots.append(snapshot.name)
        await in_thread(work)
        self.frozen = None

    def _show_frozen(self, names: list[str]) -> None:
        self.server.show(self._path(self.snapshots[-1]), [*names, _MANIFEST])

    async def _freeze_behind(self, names: list[str]) -> None:
        """Freeze the guest that runs there already, so that what is left of it can be verified."""
        try:
            await self._freeze_state()
            await in_thread(lambda: self._show_frozen(names))
        except (RamfsError, OSError) as error:
            say(f"{self.directory} cannot be frozen, so what arrives is not verified: {error}")

    def _disbelieve(self, wrong: str) -> NoReturn:
        self.state_kept = True
        raise Failed(
            f"{wrong}: the guest that runs there may have read something else; as it was when it stopped here, it is "
            f"in {self._path(self.snapshots[-1])}"
        )

    async def _commit(self) -> None:
        """Have the guest go on there. Raises Failed when it is known that it does not."""
        self.signals.held = True
        say("go on there")
        try:
            await self.other.do("go", run=self.was_running)
            return
        except Lost as error:
            say(f"{error}; asking whether the guest runs there, until then it stays stopped here")
        interrupted = asyncio.create_task(self.signals.another())
        try:
            while True:
                with contextlib.suppress(Lost):
                    answer = await self.other.settle()
                    if answer == "ended":
                        raise Failed("the connection to the other host was lost before the guest went on there")
                    if answer == "runs":
                        return  # _arrive begins another agent
                    await self._give_up("the other host has lost its QEMU after it was to go on")
                await asyncio.wait([interrupted], timeout=1)
                if interrupted.done():
                    await self._give_up("interrupted, and whether the guest runs there is not known")
        finally:
            interrupted.cancel()

    async def _give_up(self, why: str) -> NoReturn:
        """Neither continue here nor clear away what may be the guest's only state."""
        self.stopped_at = None
        await self._keep_state()
        self.fate = (
            f"the guest stays stopped here, with its state in {self._path(self.snapshots[-1])}; continue it (cont at "
            f"{self.socket}) only if it does not run there"
        )
        raise Failed(why)

    async def _go_on_here(self) -> None:
        """Continue what was stopped here, after a failure."""
        if not self.was_running or self.stopped_at is None:
            return
        try:
            async with qmp.connect(self.socket) as guest:
                await guest.cont()
            self.fate = f"the guest goes on here, after {duration(time.time() - self.stopped_at)}"
        except RamfsError as error:
            self.fate = f"the guest does not go on here: {error}"
            if await self._keep_state():
                self.fate += f"; its state is in {self._path(self.snapshots[-1])}"

    async def _keep_state(self) -> bool:
        """Have the last snapshot, with the state in it, and let it stay; is there one?"""
        if self.frozen is not None and self.state >= 0 and os.fstat(self.state).st_size:
            with contextlib.suppress(RamfsError, OSError):
                await self._freeze_state()
        self.state_kept = bool(self.snapshots) and os.path.isfile(os.path.join(self._path(self.snapshots[-1]), _STATE))
        return self.state_kept

    async def _end_here(self) -> None:
        try:
            async with qmp.connect(self.socket) as guest:
                await guest.execute("quit")
        except qmp.QmpGone:
            pass  # as it was to
        except RamfsError as error:
            say(f"QEMU here was not ended ({error}): if it is there, end it, and do not continue it")

    async def _arrive(self, pull: int | None, *, verified: bool) -> str:
        """Wait until nothing is lacking there, however often the connection is lost; what is wrong with what came."""
        interrupted = asyncio.create_task(self.signals.another())
        left: int | None = None
        asked, streams, wrong = False, verified, ""
        try:
            while pull is not None:
                try:
                    if not streams:
                        uri = self.server.uri if self.frozen is None and not wrong else None
                        told = await self.other.do("take", directory=self.target, uri=uri, resume=True)
                        wrong, streams = wrong or told["wrong"], not told["wrong"]
                        if not streams:
                            continue
                    left = await self.other.do("lacks", directory=self.target, pull=pull)
                    if not left:
                        break
                except Failed as error:
                    say(f"{error}; trying again")
                    if isinstance(error, Lost):
                        with contextlib.suppress(Failed):
                            await self.other.begin()
                await asyncio.wait([interrupted], timeout=0.1 if self.other.there else 1)
                if interrupted.done():
                    if asked:
                        self._leave("interrupted")
                    asked = True
                    amount = "what is lacking there is" if left is None else f"{human(left)} are"
                    say(f"the guest runs there, and {amount} only here; interrupt again to leave it so")
                    interrupted = asyncio.create_task(self.signals.another())
        finally:
            interrupted.cancel()
        return wrong

    def _leave(self, why: str) -> NoReturn:
        self.server.leave = True
        raise Failed(
            f"{why}: the guest runs there, and may still need this host, whose server goes on. When `ramfs status` "
            f"there shows no pull: kill -- -{self.server.group}; rmdir {self._path(self.snapshots[-1])}"
        )


quiet = False


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(text, err=quiet)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False})
@click.option("--qmp", "socket", required=True, metavar="SOCKET", help="QMP socket of the guest here.")
@click.option("--on", "prefix", default="", metavar="COMMAND", help="Runs commands there, such as 'ssh hostB'.")
@click.option("--listen", required=True, metavar="ADDRESS", help="Where the other host reaches this one, [:PORT].")
@click.option("--target-qmp", metavar="SOCKET", help="QMP socket there [default: as here].")
@click.option(
    "--target-python", default=sys.executable, metavar="PATH", help="Python there that has ramfs [default: as here]."
)
@click.option("--rounds", "limit", type=click.IntRange(0, 100), default=8, show_default=True, help="At most so many.")
@click.option("--small", default="16M", show_default=True, metavar="SIZE", help="A round that brings less is the last.")
@click.option("--hold", is_flag=True, help="Make all ready, and go when a line comes on standard input.")
@click.option("--patience", default=15.0, show_default=True, help="Seconds until a silent host is lost.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; progress goes to standard error.")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("target", metavar="TARGET")
@click.argument("command", metavar="-- QEMU ...", nargs=-1, required=True, type=click.UNPROCESSED)
def main(
    socket: str, prefix: str, listen: str, target_qmp: str | None, target_python: str, limit: int, small: str,
    hold: bool, patience: float, as_json: bool, directory: str, target: str, command: tuple[str, ...],
) -> None:  # fmt: skip
    """Move the running guest whose RAM is in DIR to another host, as TARGET there.

    QEMU ... is its command line there, with its RAM in TARGET, without -incoming and -qmp, which are added. Memory is
    pulled in rounds while the guest runs; then it stops here and goes on there, and what is lacking comes when it is
    touched. When anything fails before, it goes on here. Both hosts have ramfs, this one nbdkit too.
    """
    global quiet  # noqa: PLW0603
    quiet = as_json
    report = Report(target)
    if not os.path.isabs(target):
        raise UsageError(f"{target} is a path on the other host: give the whole of it")
    try:
        least = parse_size(small)
    except ValueError as error:
        raise UsageError(f"--small: {error}") from None
    server = Server(listen, report)
    other = Other(shlex.split(prefix), target_python, target_qmp or os.path.abspath(socket), patience)
    migration = Migration(
        os.path.abspath(directory), target.rstrip("/"), [word for word in command if word != "--"], socket, other,
        server, report, limit, least, hold,
    )  # fmt: skip
    try:
        asyncio.run(migration.run())
    finally:
        server.close()
    if as_json:
        total = sum(each.bytes for each in report.rounds) + (report.behind.bytes if report.behind else 0)
        click.echo(json.dumps({**asdict(report), "bytes": total}))


def run() -> int:
    try:
        main.main(prog_name="tools/migrate", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"migrate: {error.format_message().rstrip('.')}; see tools/migrate --help", err=True)
        return 2
    except RamfsError as error:
        click.echo(f"migrate: {error}", err=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run())
