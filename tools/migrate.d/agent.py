"""What tools/migrate runs on the other host: sent there as text, it takes orders and answers, JSON, one a line.

It ends with the connection, or when nothing was heard for a while. Unless the guest was told to go on before, its QEMU
is ended first and what was pulled is removed: so whoever never sent that order knows that the guest does not run here.

SOCKET.migrate tells who works here and how far he is, for the one who comes after a connection was lost ("settle").
"""

import asyncio
import base64
import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zlib
from typing import Any

from ramfs import qmp
from ramfs.cli._control import DaemonReplaced, ToldError, outcome
from ramfs.cli._mounts import locate, locate_new
from ramfs.cli.pull import make
from ramfs.errors import RamfsError, SourceBroken

#: Seconds in which a QEMU that needs none of the guest's memory for that is ready to load its devices.
_READY = 5.0
#: How often a source is tried, and the seconds in between.
_ATTEMPTS, _PAUSE = 10, 0.2
#: Bytes of the longest order.
_LONGEST = 4 << 20

#: Bytes of the journal.
_JOURNAL = 8192


class Failed(RamfsError):
    """One sentence for the other side."""


class Journal:
    """SOCKET.migrate: locked by the agent as long as it lives."""

    def __init__(self, socket: str) -> None:
        self.path = f"{socket}.migrate"

    def begin(self) -> None:
        """Be the one. Raises Failed."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"another migration to {self.path.removesuffix('.migrate')} is under way") from None
        self.told: dict[str, Any] = {"agent": os.getpid(), "qemu": None, "go": None, "made": []}
        self.write()

    def write(self, **change: Any) -> None:
        self.told |= change
        os.pwrite(self._fd, json.dumps(self.told).encode().ljust(_JOURNAL), 0)
        os.fsync(self._fd)

    def end(self) -> None:
        os.unlink(self.path)

    async def take_over(self) -> dict[str, Any] | None:
        """End the agent that may still be there, and tell how far it was; None: it left nothing."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        agent = json.loads(os.pread(fd, _JOURNAL, 0))["agent"]
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(agent, signal.SIGKILL)
                await asyncio.sleep(0.05)
            else:
                if not os.path.exists(self.path):
                    return None
                self._fd = fd
                self.told = json.loads(os.pread(fd, _JOURNAL, 0))
                return self.told


class Agent:
    """The orders, one method each."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.journal = Journal(socket)
        self.made: list[str] = []
        self.paused = ""
        """a directory of which only what is touched comes"""
        self.qemu: asyncio.subprocess.Process | None = None
        self.guest: qmp.Qmp | None = None
        self._talking = contextlib.AsyncExitStack()
        self.gone = False
        """was the guest told to go on?"""

    async def check(self, directory: str) -> None:
        """Can it be made?"""
        if await asyncio.to_thread(os.path.lexists, directory):
            raise Failed(f"{directory} exists on the other host")

    async def pull(self, uri: str, directory: str, wait: bool) -> dict[str, Any]:
        """Pull a directory, which goes again unless the guest went on in it."""
        await self.check(directory)
        self._made(directory)
        words = [sys.executable, "-m", "ramfs", "pull", "--json", *(["--wait"] if wait else []), uri, directory]
        process = await asyncio.create_subprocess_exec(*words, stdin=-3, stdout=-1, stderr=-1)
        try:
            out, err = await process.communicate()
        except asyncio.CancelledError:
            process.send_signal(signal.SIGINT)  # it leaves nothing half
            await process.wait()
            raise
        if process.returncode:
            await self.remove(directory)
            raise Failed(_last(err) or f"ramfs pull ended with {process.returncode}")
        return dict(json.loads(out))

    async def remove(self, directory: str) -> None:
        """Remove what was pulled, if it is there."""
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        if directory in self.made:
            self.made.remove(directory)

    def _made(self, directory: str) -> None:
        self.made.append(directory)
        self.journal.write(made=self.made)

    async def prepare(self, directory: str, sizes: dict[str, int], command: list[str]) -> dict[str, Any]:
        """Make a directory of files whose source is told later, and start QEMU on it.

        Answers the number of the pull, and another generation that is here, if any. QEMU is started later if it wants
        some of that memory for its start.
        """
        await self.check(directory)
        self._made(directory)
        mount, parent, name = await asyncio.to_thread(locate_new, directory)
        request = {"sizes": sizes, "parent": parent, "name": name, "paused": True}
        told = await asyncio.to_thread(make, mount, request, directory)
        try:
            async with asyncio.timeout(_READY):
                await self._start(command)
        except TimeoutError:
            await self._end_qemu()
            self.qemu = None
        return {"pull": told["id"], "like": told["like"]}

    async def take(self, directory: str, uri: str | None, resume: bool) -> dict[str, Any]:
        """Tell where the memory comes from, and whether it streams.

        Answers whether all of it is compared with digests, or why its source is none for what came before.
        """
        change: dict[str, Any] = {} if uri is None else {"uri": uri}
        if resume:
            change["paused"] = False
        mount, way = await asyncio.to_thread(locate, directory)
        attempts = _ATTEMPTS
        while True:
            try:
                told = await asyncio.to_thread(outcome, mount, {"arrival": {"path": way, **change}})
            except DaemonReplaced:
                continue
            except ToldError as error:
                if error.exit_code == SourceBroken.exit_code:
                    return {"verified": False, "wrong": str(error)}
                attempts -= 1
                if not attempts:
                    raise
                await asyncio.sleep(_PAUSE)  # a server that dies is started again
                continue
            self.paused = "" if resume else directory
            return {"verified": told["verified"], "wrong": ""}

    async def part(self, directory: str, data: str) -> None:
        """A part of the devices' state."""
        part = zlib.decompress(base64.b64decode(data))
        await asyncio.to_thread(_append, os.path.join(directory, "state"), part)

    async def zeros(self, directory: str, zeros: dict[str, list[tuple[int, int]]]) -> None:
        """Runs of pages of its files that are zeros at the source. Raises RamfsError, OSError."""
        mount, way = await asyncio.to_thread(locate, directory)
        await asyncio.to_thread(outcome, mount, {"arrival": {"path": way, "zeros": zeros}})

    async def load(self, directory: str, uri: str, resume: bool, command: list[str]) -> dict[str, Any]:
        """Take the memory from a source, and let QEMU load the state; as :meth:`take`."""
        if self.qemu is None:
            await self.take(directory, uri, resume)
            await self._start(command)
        taking = asyncio.create_task(self.take(directory, uri, resume))
        loading = asyncio.create_task(self._load(os.path.join(directory, "state")))
        try:
            await asyncio.wait({taking, loading}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (taking, loading):  # QEMU waits for ever where nothing can be taken
                if task.done():
                    await task
            return await taking
        finally:
            for task in (taking, loading):
                task.cancel()
            await asyncio.gather(taking, loading, return_exceptions=True)

    async def _load(self, state: str) -> None:
        assert self.guest is not None
        async with self._explained():
            await self.guest.load_state(state)

    async def _start(self, command: list[str]) -> None:
        if _listens(self.socket):
            raise Failed(f"{self.socket} is in use on the other host: name another with --target-qmp")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)
        words = [*command, "-S", "-incoming", "defer", "-qmp", f"unix:{self.socket},server=on,wait=off"]
        async with self._explained():
            with open(f"{self.socket}.log", "wb") as file:
                self.qemu = await asyncio.create_subprocess_exec(
                    *words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            self.journal.write(qemu=self.qemu.pid)
            while not _listens(self.socket):
                if self.qemu.returncode is not None:
                    raise Failed("it ended")
                await asyncio.sleep(0.005)
            # It greets when it has all that it wants before, which may be the whole memory of the guest.
            self.guest = await self._talking.enter_async_context(qmp.connect(self.socket, math.inf))

    @contextlib.asynccontextmanager
    async def _explained(self):  # type: ignore[no-untyped-def]
        """Tell what QEMU said when it fails within the block."""
        try:
            yield
        except (RamfsError, OSError) as error:
            why = str(error)
            if self.qemu is not None and await self._has_ended():
                with open(f"{self.socket}.log", "rb") as file:
                    why = f"QEMU ended: {_last(file.read()) or self.qemu.returncode}"
            raise Failed(f"the guest cannot be started on the other host: {why}") from None

    async def _has_ended(self) -> bool:
        """Has QEMU ended, or is it just about to?"""
        assert self.qemu is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.qemu.wait(), 1)
        return self.qemu.returncode is not None

    async def go(self, run: bool) -> None:
        """From here on the guest is this host's."""
        assert self.guest is not None
        self.journal.write(go="run" if run else "stay")
        self.gone = True
        try:
            if run:
                await self.guest.cont()
        except RamfsError as error:
            await self._end_qemu()
            self.gone = False
            self.journal.write(qemu=None, go=None)
            raise Failed(f"the guest does not go on on the other host: {error}") from None

    async def lacks(self, directory: str, pull: int) -> int:
        """Bytes that a pull still lacks."""

        def look() -> int:
            mount = directory
            while not os.path.ismount(mount):
                mount = os.path.dirname(mount)
            with open(os.path.join(mount, ".ramfs", "status.json"), "rb") as file:
                pulls = json.load(file)["pulls"]
            return next((each["total_bytes"] - each["here_bytes"] for each in pulls if each["id"] == pull), 0)

        return await asyncio.to_thread(look)

    async def settle(self) -> str:
        """After a connection was lost: does the guest run here? If it does not, it never will."""
        told = await self.journal.take_over()
        if told is None:
            return "ended"
        if told["go"] is not None:
            try:
                async with qmp.connect(self.socket) as guest:
                    if told["go"] == "run":
                        await guest.cont()  # as it was ordered, and perhaps not done yet
            except RamfsError:
                return "unknown"
            self.journal.end()
            return "runs"
        if told["qemu"] is not None:
            with contextlib.suppress(OSError):
                with open(f"/proc/{told['qemu']}/cmdline", "rb") as file:
                    ours = self.socket.encode() in file.read()
                if ours:
                    os.kill(told["qemu"], signal.SIGKILL)
            self._forget_qemu()
        for directory in told["made"]:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        self.journal.end()
        return "ended"

    def _forget_qemu(self) -> None:
        """Remove what a QEMU leaves that is killed."""
        for path in (self.socket, f"{self.socket}.log"):
            with contextlib.suppress(OSError):
                os.unlink(path)

    async def _end_qemu(self) -> None:
        await self._talking.aclose()
        assert self.qemu is not None
        if self.qemu.returncode is None:
            self.qemu.kill()
        await self.qemu.wait()

    async def end(self, *, orderly: bool) -> None:
        """Leave nothing that is not the guest's."""
        if not self.gone:
            if self.qemu is not None:
                await self._end_qemu()
                self._forget_qemu()
            for directory in self.made:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        if self.paused and (self.gone or self.paused not in self.made):  # nobody is there to tell more
            with contextlib.suppress(RamfsError, OSError):
                await self.take(self.paused, None, resume=True)
        await self._talking.aclose()
        if orderly or not self.gone:
            self.journal.end()


def _listens(socket: str) -> bool:
    """Does somebody? A socket's name is there a moment earlier."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        return any(line.rstrip("\n").endswith(f" {socket}") and line.split()[3] == "00010000" for line in file)


def _append(path: str, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)


def _last(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("ramfs: ") if lines else ""


async def main(socket: str, patience: float, *, settling: bool) -> None:
    loop = asyncio.get_running_loop()
    agent = Agent(socket)
    reader = asyncio.StreamReader(limit=_LONGEST)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(told: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(told).encode() + b"\n")

    async def obey(order: dict[str, Any]) -> None:
        try:
            answer = await getattr(agent, order["do"])(**order["with"])
        except (RamfsError, OSError) as error:
            say({"id": order["id"], "error": str(error)})
        else:
            say({"id": order["id"], "answer": answer})

    if settling:
        say({"id": 0, "answer": await agent.settle()})
        return
    try:
        agent.journal.begin()
    except (RamfsError, OSError) as error:
        say({"id": 0, "error": str(error)})
        return
    say({"id": 0, "answer": None})
    goodbye: int | None = None
    tasks: set[asyncio.Task[None]] = set()
    with contextlib.suppress(TimeoutError):
        while line := await asyncio.wait_for(reader.readline(), patience):
            order = json.loads(line)
            if order["do"] == "end":
                goodbye = order["id"]
                break
            if order["do"] == "alive":
                say({"id": None})
                continue
            if order["do"] == "go":  # to its end, whatever becomes of the connection
                await obey(order)
                continue
            tasks.add(task := asyncio.create_task(obey(order)))
            task.add_done_callback(tasks.discard)

    async def live() -> None:
        while True:
            say({"id": None})
            await asyncio.sleep(1)

    living = asyncio.create_task(live())  # clearing up may take longer than the other side is patient
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await agent.end(orderly=goodbye is not None)
    living.cancel()
    if goodbye is not None:
        say({"id": goodbye, "answer": None})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), settling=sys.argv[3:] == ["settle"]))
