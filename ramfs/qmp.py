"""Drive a running QEMU through its QMP socket: stop, save, load and continue a guest.

What is saved here is the state of the devices alone. The guest's RAM is a file on the mount, and QEMU
leaves it out of the stream with the capability ``x-ignore-shared``, so a state is about half a megabyte.

QEMU writes the state to a descriptor that we open and hand over (``getfd``, ``fd:``): no shell stands
between, QEMU's sandbox need not allow it to open files, and the file has our owner and mode from the start.

Only `qemu.qmp <https://qemu.readthedocs.io/projects/python-qemu-qmp/>`_'s errors and operating system
errors can come out of a conversation with QEMU; every one leaves this module as a `QmpError` of one sentence.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, cast

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from ramfs.errors import QmpError

#: Seconds that QEMU has to answer a command. Its main loop may be busy with a device, or starved by an
#: emulated guest; longer than this and it hangs.
ANSWER = 60.0

#: Seconds that QEMU has to greet. A QMP socket serves one client; others wait in its queue unheard.
GREETING = 5.0

#: How often a connection that QEMU resets is tried, and the seconds in between.
_ATTEMPTS, _PAUSE = 5, 0.05

#: The name under which QEMU keeps the descriptor of the state.
FD_NAME = "ramfs-state"

#: The shortest and longest pause between two looks at a migration, in seconds.
_LOOK = (0.001, 0.02)

# The library logs what it also raises, and we tell each failure once.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Qmp:
    """A conversation with one QEMU; made by `connect`."""

    def __init__(self, client: QMPClient, path: str) -> None:
        self._client = client
        self._path = path

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Send a command and return its answer.

        :raises QmpError: QEMU refused it, does not answer, or is gone.
        """
        try:
            async with asyncio.timeout(ANSWER):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpRefused(command, error.error.error.desc) from error
        except TimeoutError as error:
            raise QmpError(f"QEMU at {self._path} has not answered {command} for {ANSWER:.0f} s") from error
        except (ExecInterruptedError, StateError) as error:
            raise QmpGone(f"QEMU at {self._path} ended or closed its QMP socket during {command}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpError(f"QEMU at {self._path} failed at {command}: {_sentence(error)}") from error

    async def status(self) -> str:
        """The run state, such as ``running``, ``paused`` or ``postmigrate``."""
        answer = await self.execute("query-status")
        return str(answer["status"])

    async def running(self) -> bool:
        """Whether the guest's processors run."""
        answer = await self.execute("query-status")
        return bool(answer["running"])

    async def stop(self) -> None:
        """Stop the guest's processors; when this returns, none of them writes any more."""
        await self.execute("stop")

    async def cont(self) -> None:
        """Let the guest go on."""
        await self.execute("cont")

    async def capability(self, name: str) -> bool | None:
        """Whether a migration capability is set; None when this QEMU does not know it."""
        answer = cast("list[dict[str, Any]]", await self.execute("query-migrate-capabilities"))
        return next((bool(each["state"]) for each in answer if each["capability"] == name), None)

    async def set_capability(self, name: str, on: bool) -> None:
        """Set or clear a migration capability."""
        await self.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": on}]})

    async def require_ignore_shared(self) -> bool:
        """Return whether ``x-ignore-shared`` is set already.

        :raises QmpError: this QEMU cannot leave shared RAM out of a state.
        """
        value = await self.capability("x-ignore-shared")
        if value is None:
            raise QmpError(f"QEMU at {self._path} has no capability x-ignore-shared; QEMU 4.0 has it")
        return value

    @contextlib.asynccontextmanager
    async def saving(self) -> AsyncIterator[None]:
        """Settings for `save_state`, as long as this lasts; a running guest need not be stopped for them.

        :raises QmpError: this QEMU cannot save a state without the RAM, or is gone.
        """
        was_set = await self.require_ignore_shared()
        parameters = cast("dict[str, Any]", await self.execute("query-migrate-parameters"))
        bandwidth = parameters.get("max-bandwidth")
        try:
            if not was_set:
                await self.set_capability("x-ignore-shared", True)
            if bandwidth is not None:
                # QEMU holds migrations to 128 MiB/s, for the sake of a network that is not used here.
                await self.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            yield
        finally:
            with contextlib.suppress(QmpError):
                if bandwidth is not None:
                    await self.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
                if not was_set:
                    await self.set_capability("x-ignore-shared", False)

    async def save_state(self, fd: int) -> None:
        """Write the device state of a stopped guest to the descriptor, which stays the caller's; while `saving`.

        Afterwards the guest is stopped, whatever happens.

        :raises QmpError: QEMU refused to save, failed at it, or is gone. What it wrote is then of no use.
        """
        try:
            await self.hand_over(fd)
            try:
                await self.execute("migrate", {"uri": f"fd:{FD_NAME}"})
            except QmpRefused as error:
                with contextlib.suppress(QmpError):
                    await self.execute("closefd", {"fdname": FD_NAME})
                raise QmpError(f"QEMU refuses to save the guest: {error.reason}") from error
            await self._finished()
        except asyncio.CancelledError:
            with contextlib.suppress(QmpError):
                await self.execute("migrate_cancel")
                await self._settled()
            raise

    async def require_movable(self) -> None:
        """:raises QmpError: some device of the guest cannot be saved."""
        answer = cast("dict[str, Any]", await self.execute("query-migrate"))
        if reasons := answer.get("blocked-reasons"):
            raise QmpError(f"QEMU refuses to save the guest: {str(reasons[0]).rstrip('.')}")

    async def save_devices(self, fd: int) -> None:
        """Write the state of a stopped guest's devices, without any RAM, to the file; it stays the caller's.

        That is no stream which -incoming takes yet. What cannot be saved is not told: `require_movable` before.

        :raises QmpError: QEMU refused, or is gone.
        """
        # QEMU takes a descriptor only if it may do what it was opened for, and no more.
        writing = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._send(writing)
        finally:
            os.close(writing)
        number = cast("dict[str, Any]", await self.execute("add-fd"))["fdset-id"]
        try:
            await self.execute("xen-save-devices-state", {"filename": f"/dev/fdset/{number}", "live": False})
        finally:
            with contextlib.suppress(QmpError):
                await self.execute("remove-fd", {"fdset-id": number})

    async def monitor(self, command: str) -> str:
        """What QEMU's monitor for people says to a command."""
        return str(await self.execute("human-monitor-command", {"command-line": command})).replace("\r", "")

    async def load_state(self, path: str | os.PathLike[str]) -> None:
        """Load a saved device state into a QEMU started with ``-incoming defer``; the guest is then stopped.

        :raises QmpError: QEMU refused the state. QEMU 7.2 ends itself when a state does not fit its machine.
        """
        await self.require_ignore_shared()
        await self.set_capability("x-ignore-shared", True)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise QmpError(f"cannot read the state {os.fspath(path)}: {error.strerror}") from error
        try:
            await self.hand_over(fd)
        finally:
            os.close(fd)
        try:
            await self.execute("migrate-incoming", {"uri": f"fd:{FD_NAME}"})
        except QmpRefused as error:
            raise QmpError(f"QEMU refuses the state {os.fspath(path)}: {error.reason}") from error
        # The state of an incoming migration is told on some versions only; the run state is on all.
        for pause in _pauses():
            if await self.status() != "inmigrate":
                return
            await asyncio.sleep(pause)

    def _send(self, fd: int) -> None:
        """Give QEMU a descriptor, which the next command takes."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise QmpGone(f"cannot hand QEMU at {self._path} a file: {_sentence(error)}") from error

    async def hand_over(self, fd: int) -> None:
        """Give QEMU a descriptor, which it then has under the name `FD_NAME`; ours stays the caller's."""
        self._send(fd)
        await self.execute("getfd", {"fdname": FD_NAME})

    async def _finished(self) -> None:
        """Wait until the outgoing migration has ended, and raise unless it has ended well."""
        end = await self._settled()
        if end.get("status") != "completed":
            reason = end.get("error-desc") or f"its migration ended as {end.get('status', 'none')}"
            raise QmpError(f"QEMU failed to save the guest: {str(reason).rstrip('.')}")

    async def _settled(self) -> dict[str, Any]:
        for pause in _pauses():
            answer = cast("dict[str, Any]", await self.execute("query-migrate"))
            # What it still has to do then takes a moment more, in which it refuses cont.
            ended = answer.get("status", "none") in ("none", "completed", "failed", "cancelled")
            if ended and await self.status() != "finish-migrate":
                return answer
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the pauses have no end")

    def peer(self) -> int | None:
        """The process that made the socket: QEMU itself, or whoever started it with the socket ready-made."""
        # No interface of asyncio or of qemu.qmp gives the socket without the writer.
        writer: asyncio.StreamWriter | None = getattr(self._client, "_writer", None)
        sock = writer.get_extra_info("socket") if writer is not None else None
        if sock is None:
            return None
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return None
        pid = int(struct.unpack("3i", credentials)[0])
        return pid or None


class QmpRefused(QmpError):
    """QEMU understood a command and said no."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"QEMU refuses {command}: {reason}")
        self.reason = reason


class QmpGone(QmpError):
    """The conversation ended in the middle: QEMU is dead, or has closed the socket."""


class _Client(QMPClient):
    """Passes over events that QEMU sends before its answer to the first command: the library trips over them."""

    async def _do_recv(self) -> Message:
        message = await super()._do_recv()
        while self.runstate is Runstate.CONNECTING and "event" in message:
            message = await super()._do_recv()
        return message


async def _connected(name: str) -> QMPClient:
    """A client that QEMU has greeted. What QEMU resets, since the connection before is just ending, is tried again."""
    attempts = _ATTEMPTS
    while True:
        client = _Client("ramfs")
        try:
            await client.connect(name)
        except (ConnectError, OSError, EOFError) as error:
            attempts -= 1
            if attempts == 0 or ConnectionResetError not in (type(error), type(error.__cause__)):
                raise
        else:
            return client
        await asyncio.sleep(_PAUSE)


@contextlib.asynccontextmanager
async def connect(path: str | os.PathLike[str], greeting: float = GREETING) -> AsyncIterator[Qmp]:
    """Talk to the QEMU that listens at a QMP socket.

    :raises QmpError: there is no such socket, nobody listens at it, or it is not QEMU's.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISSOCK(os.stat(name).st_mode):
            raise QmpError(f"{name} is not a socket; start QEMU with -qmp unix:{name},server=on,wait=off")
    except OSError as error:
        raise QmpError(f"cannot reach QEMU at {name}: {error.strerror}") from error
    try:
        async with asyncio.timeout(greeting):
            client = await _connected(name)
    except TimeoutError as error:
        raise QmpError(
            f"{name} does not greet as QEMU does within {greeting:g} s; "
            "another client may hold it (a QMP socket serves one at a time)"
        ) from error
    except (ConnectError, QMPError, OSError, EOFError) as error:
        raise QmpError(f"cannot reach QEMU at {name}: {_sentence(error)}") from error
    try:
        yield Qmp(client, name)
    finally:
        # A connection that broke is told by the command that met it, not once more here.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(GREETING):
                await client.disconnect()


def _pauses() -> Iterator[float]:
    pause, longest = _LOOK
    while True:
        yield pause
        pause = min(pause * 1.25, longest)


def _sentence(error: BaseException) -> str:
    """The cause that a person can act on: the innermost one, without its number."""
    while True:
        inner = getattr(error, "exc", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError):
        return "it closed the connection"
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
