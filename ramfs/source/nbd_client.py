"""Sources of pages on an NBD server: what `ramfs.source.nbd` says, over sockets and TLS, on trio.

There is no task behind a connection. Of those who wait for replies on it one receives for all (`_Lane._drive`), and
hands that on to another one when it has what it waits for, or is cancelled. So the reply to a single urgent read
costs no switch of tasks, and a connection that nobody waits for costs nothing.

Where the server allows several connections for an export, one of them is kept for urgent reads: what streams on the
others does not stand in their way. They are made when the first one is busy, by a task that ends with that: for each
connection some servers look through the whole file before they say a word.
"""

import errno
import logging
import mmap
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

import trio

from ramfs.errors import SourceBroken, SourceChanged, SourceError, SourceLost, SourceRefused
from ramfs.source.base import Extent, Rest
from ramfs.source.nbd.connection import MAX_EXTENTS, Command, Connection
from ramfs.source.nbd.states import Goal, State
from ramfs.source.nbd.uri import NbdUri, parse

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a server is waited for, in seconds, and how much is asked of it at once."""

    handshake: float = 10.0
    """From the first packet until the export is open."""
    silence: float = 30.0
    """Without a byte, while replies are due."""
    patience: float = 120.0
    """For the reply to one request, whatever else comes meanwhile."""
    goodbye: float = 1.0
    """For the replies that are still due when a connection is closed."""
    requests: int = 64
    """Under way on one connection; more wait for their turn."""


_LIMITS: Final = Limits()
#: Bytes received at one go before other tasks have their turn.
_BURST: Final = 2 << 20
#: Bytes of the largest TLS record.
_RECORD: Final = 1 << 14


class NbdDirectory:
    """The exports of an NBD server. The one that the URI names is a matter of the caller."""

    def __init__(self, uri: NbdUri | str, *, connections: int = 2, limits: Limits = _LIMITS) -> None:
        """Connects with the first call.

        ``connections`` is how many are made for an export, where the server allows more than one.

        :raises UsageError: the URI is none.
        """
        self._uri = parse(uri) if isinstance(uri, str) else uri
        self._connections = connections
        self._limits = limits

    @property
    def description(self) -> str:
        """The URI."""
        return str(self._uri)

    async def names(self) -> list[str]:
        """All that the server lists. A name that it does not list may still be there to open."""
        lane = await _Lane.connect(self._uri, Goal.LIST, self._limits)
        lane.close()
        return lane.connection.exports

    async def size(self, name: str) -> int:
        """Bytes of an export, without opening it."""
        lane = await _Lane.connect(self._uri.with_export(name), Goal.LOOK, self._limits)
        lane.close()
        return lane.connection.size

    async def open(self, name: str) -> "NbdSource":
        """Open an export, on one connection; it makes the others when they are of use."""
        uri = self._uri.with_export(name)
        first = await _Lane.connect(uri, Goal.OPEN, self._limits)
        return NbdSource(uri, first, self._connections, self._limits)

    async def aclose(self) -> None:
        """Nothing is open between two calls."""
        await trio.lowlevel.checkpoint()


class NbdSource:
    """One export, on one or more connections."""

    def __init__(self, uri: NbdUri, first: "_Lane", connections: int, limits: Limits) -> None:
        connection = first.connection
        self.description = str(uri)
        self.size = connection.size
        self._block = connection.block_size.minimum
        self.maximum = connection.block_size.maximum
        self._uri = uri
        self._limits = limits
        self._lanes = [first]
        self._urgent = first
        self._calm = [first]
        self._lacking = connections - 1 if connection.multi_conn else 0
        self._widening = trio.CancelScope()
        self._known = Extent(0, 0, False)
        """the last one that the server told of: often it goes on far behind what was asked for"""

    @property
    def connections(self) -> int:
        """How many there are by now."""
        return len(self._lanes)

    async def widen(self) -> None:
        """Make the connections that are lacking, once, as many as are to be had. Reads go on meanwhile."""
        lacking, self._lacking = self._lacking, 0
        if not lacking:
            return
        with self._widening:
            async with trio.open_nursery() as nursery:
                for _ in range(lacking):
                    nursery.start_soon(self._add)

    async def _add(self) -> None:
        try:
            lane = await _Lane.connect(self._uri, Goal.OPEN, self._limits)
        except SourceError as error:
            _log.info("%s; going on with fewer connections", error)
            return
        if self._widening.cancel_called:
            lane.close()
            return
        self._lanes.append(lane)
        if lane.connection.size != self.size:
            for each in self._lanes:
                each.distrust(SourceChanged("has another size on each connection"))
        # The second one is for urgent reads alone.
        self._urgent = self._lanes[1]
        self._calm = [each for each in self._lanes if each is not self._urgent]

    async def _widen_aside(self) -> None:
        try:
            await self.widen()
        except Exception:  # noqa: BLE001  (what a system task raises would end the daemon)
            _log.exception("%s: no more connections", self._uri)

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill ``buffer``: the kernel copies what it received into it, and nobody else (TLS into a bytearray does).

        What is no whole blocks of the server's is read with what lies around it.

        :raises ValueError: the range is not one that this export has, or too long.
        """
        self._check_range(offset, len(buffer))
        if not len(buffer):
            await trio.lowlevel.checkpoint()
            return
        lane = self._urgent if urgent else self._calmest()
        if self._lacking and lane.busy:
            trio.lowlevel.spawn_system_task(self._widen_aside)
        if self._is_whole(offset, len(buffer)):
            await lane.perform(lambda connection: connection.read(offset, buffer))
            return
        low, high = self._around(offset, len(buffer))
        blocks = memoryview(bytearray(high - low))
        for at in range(low, high, self.maximum):
            part = blocks[at - low : at - low + self.maximum]
            await lane.perform(partial(_read, offset=at, buffer=part))
        buffer[:] = blocks[offset - low : offset - low + len(buffer)]

    def _check_range(self, offset: int, length: int) -> None:
        end = offset + length
        if not 0 <= offset <= end <= self.size or length > self.maximum:
            raise ValueError(f"bytes {offset} to {end} of {self.description} cannot be read at once")

    def _is_whole(self, offset: int, length: int) -> bool:
        """Are these whole blocks of the server's? The last one ends where the export does."""
        end = offset + length
        return not offset % self._block and (not end % self._block or end == self.size)

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """First byte and end of the blocks that have these bytes."""
        end = -(-(offset + length) // self._block) * self._block
        return offset - offset % self._block, min(end, self.size)

    def read_soon(self, offset: int, buffer: memoryview, patience: float, meanwhile: Callable[[], None]) -> Rest | None:
        """See ramfs.source.base.read_soon."""
        self._check_range(offset, len(buffer))
        lane = self._urgent
        if not len(buffer) or lane.busy or not self._is_whole(offset, len(buffer)):
            return partial(self.read_into, offset, buffer, urgent=True)
        command = lane.begin(lambda connection: connection.read(offset, buffer), patience, meanwhile)
        return None if command.settled and command.error is None else partial(lane.finish, command)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """What the server's ``base:allocation`` says; nothing where it has none. It is asked of at most 64 MiB.

        What it has told behind the end of an earlier range is not asked for again: some servers look for the end of an
        extent each time, however far away that is.
        """
        lane, end = self._calmest(), offset + length
        if lane.connection.context is None:
            await lane.alive()
            return [Extent(offset, length, False)]
        if self._known.offset <= offset < self._known.offset + self._known.length:
            await lane.alive()
            told = [self._known]
        else:
            start, end_of_block = self._around(offset, length)
            ask = min(end_of_block - start, MAX_EXTENTS)
            command = await lane.perform(lambda connection: connection.block_status(start, ask))
            told = command.extents or []
            self._known = told[-1] if told else self._known
        cut = ((max(each.offset, offset), min(each.offset + each.length, end), each.zero) for each in told)
        found = [Extent(low, high - low, zero) for low, high, zero in cut if low < high]
        return found or [Extent(offset, min(length, self._block), False)]

    def _calmest(self) -> "_Lane":
        if len(self._calm) == 1:
            return self._calm[0]
        return min(self._calm, key=lambda lane: len(lane.connection.commands))

    async def aclose(self) -> None:
        """Say goodbye and close. Reads that are under way raise SourceLost."""
        self._lacking = 0
        self._widening.cancel()
        async with trio.open_nursery() as nursery:
            for lane in self._lanes:
                nursery.start_soon(lane.leave)


class _Lane:
    """One connection: a socket, what it said, and who waits for it."""

    def __init__(self, uri: NbdUri, goal: Goal, limits: Limits, sock: socket.socket) -> None:
        self.connection = Connection(goal, uri.export, tls=uri.tls, clear=self._clear)
        self._uri = uri
        self._limits = limits
        self._socket = sock
        self._secure: ssl.SSLSocket | None = None
        self._outgoing = bytearray()
        self._blocked = False  # what is outgoing has to wait until the socket takes it
        self._heard = trio.current_time()
        self._driven = False
        self._waiting: dict[object, trio.Event] = {}
        self._queueing: dict[object, trio.Event] = {}
        self._failure: SourceError | None = None
        self._leaving = False
        self._pause = trio.CancelScope()  # while the one who drives waits for the socket
        self._memory = _KernelMemory()

    @classmethod
    async def connect(cls, uri: NbdUri, goal: Goal, limits: Limits) -> "_Lane":
        """Connect and shake hands.

        :raises SourceError: there is nobody, or nobody who should be spoken to, or it takes too long.
        """
        lane = None
        try:
            with trio.fail_after(limits.handshake):
                sock = await _connected(uri)
                lane = cls(uri, goal, limits, sock)
                await lane._negotiate()
            return lane
        except BaseException as error:
            if lane is not None:
                lane.close()
            if isinstance(error, trio.TooSlowError):
                what = "connect" if lane is None else "finish the handshake"
                raise SourceLost(f"{uri} does not {what} within {limits.handshake:g} s") from error
            raise

    # --- the handshake ---

    async def _negotiate(self) -> None:
        connection = self.connection
        while connection.state not in (State.OPEN, State.IDLE):
            if connection.state is State.TLS:
                await self._start_tls()
            self._send()
            count = self._receive()
            if count is None:
                await self._ready()
            else:
                self._take_in(count)

    async def _start_tls(self) -> None:
        # Loading the system's authorities takes some ten milliseconds, and so does a disk.
        context = await trio.to_thread.run_sync(_context, self._uri, abandon_on_cancel=True)
        try:
            self._secure = self._socket = context.wrap_socket(
                self._socket, server_hostname=self._uri.server_name, do_handshake_on_connect=False
            )
            while True:
                try:
                    self._secure.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await trio.lowlevel.wait_readable(self._socket)
                except ssl.SSLWantWriteError:
                    await trio.lowlevel.wait_writable(self._socket)
        except (OSError, ValueError) as error:
            raise self._fail(_why(error, "in the TLS handshake")) from error
        self.connection.tls_started()

    # --- requests ---

    async def alive(self) -> None:
        """Raise if the connection is known to be lost."""
        await trio.lowlevel.checkpoint()
        self._check()

    async def perform(self, ask: Callable[[Connection], Command]) -> Command:
        """Make a request and wait for its reply.

        :raises SourceError: the server cannot do it, or the connection is lost.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        if len(self.connection.commands) >= self._limits.requests:
            await self._turn()
            self._check()
        command = ask(self.connection)
        command.since = trio.current_time()
        return await self.finish(command)

    @property
    def busy(self) -> bool:
        """Does anybody wait for a reply here, or is it of no use any more?"""
        return bool(self._driven or self.connection.commands or self._failure is not None or self._leaving)

    def begin(self, ask: Callable[[Connection], Command], patience: float, meanwhile: Callable[[], None]) -> Command:
        """Make a request while the connection is not busy, and receive for so many seconds. Then :meth:`finish` it."""
        command = ask(self.connection)
        command.since = trio.current_time()
        with suppress(SourceError):  # which those who finish it are told
            self._send()
            meanwhile()
            until = time.perf_counter() + patience
            while not command.settled and time.perf_counter() < until:
                count = self._receive()
                if count is not None:
                    self._take_in(count)
        return command

    async def finish(self, command: Command) -> Command:
        """Wait for the reply to a request that was made. Raises as :meth:`perform`."""
        try:
            self._send()
            while not command.settled:
                self._check()
                if self._driven:
                    await self._wait(self._waiting, command)
                else:
                    await self._drive(lambda: command.settled)
        except BaseException:
            if self._failure is None:
                self.connection.abandon(command)
            raise
        if isinstance(command.error, SourceError):
            raise self._named(command.error)
        if command.error is not None:
            raise SourceError(f"what {self._uri} sends cannot be stored: {_reason(command.error)}") from command.error
        return command

    async def _turn(self) -> None:
        """Wait until fewer requests are under way; among those may be some that nobody else waits for any more."""

        def free() -> bool:
            return self._leaving or len(self.connection.commands) < self._limits.requests

        while not free():
            if self._driven:
                await self._wait(self._queueing, object())
            else:
                await self._drive(free)

    async def _wait(self, where: dict[object, trio.Event], key: object) -> None:
        event = where[key] = trio.Event()
        try:
            await event.wait()
        except trio.Cancelled:
            del where[key]
            # It may have been woken all the same, when it was cancelled already: then that is another one's turn.
            if event.is_set():
                self._hand_on()
            raise
        del where[key]

    async def _drive(self, done: Callable[[], bool]) -> None:
        """Receive, for everybody, until ``done``; then have another one who waits go on with it."""
        self._driven = True
        taken, rested = 0, False
        try:
            while not done():
                if self._failure is not None:
                    raise self._named(self._failure)
                count = self._receive()
                if count is None:
                    await self._patiently()
                    taken, rested = 0, True
                    continue
                command = self._take_in(count)
                if command is not None:
                    if (event := self._waiting.get(command)) is not None:
                        event.set()
                    _wake(self._queueing.values())
                taken += count
                if taken >= _BURST:
                    self._heard = trio.current_time()
                    await trio.lowlevel.checkpoint()
                    taken, rested = 0, True
            if not rested:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._driven = False
            self._hand_on()

    def _hand_on(self) -> None:
        """Have one of those who wait look whether it is its turn to receive, and one whether it can ask."""
        if not self._driven:
            _wake(self._waiting.values())
        _wake(self._queueing.values())

    async def _patiently(self) -> None:
        """Wait until there may be something to receive, but not for ever."""
        if self._outgoing:
            self._send()
        oldest = next(iter(self.connection.commands.values())).since
        silence = max(self._heard, oldest) + self._limits.silence
        patience = oldest + self._limits.patience
        with trio.CancelScope(deadline=min(silence, patience)) as self._pause:
            await self._ready()
        if self._pause.cancelled_caught:
            if trio.current_time() < self._pause.deadline:  # something else to look at
                return
            if silence <= patience:
                raise self._fail(SourceLost(f"has said nothing for {self._limits.silence:g} s"))
            raise self._fail(SourceLost(f"has left a request unanswered for {self._limits.patience:g} s"))
        self._heard = trio.current_time()

    # --- the socket ---

    async def _ready(self) -> None:
        """Wait until the socket can be read, or can be written if something waits for that."""
        closed = False
        try:
            if self._blocked:
                await _either(self._socket)
            else:
                await trio.lowlevel.wait_readable(self._socket)
        except* trio.ClosedResourceError:
            closed = True
        self._blocked = False
        if closed:
            self._check()

    def _send(self) -> None:
        """Send what there is to send, as far as the socket takes it; whoever drives sends the rest."""
        self._outgoing += self.connection.data_to_send()
        known, self._blocked = self._blocked, False
        while self._outgoing:
            try:
                del self._outgoing[: self._socket.send(self._outgoing)]
            except ssl.SSLWantReadError:
                return
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._blocked = True
                if not known:
                    self._pause.cancel()
                return
            except OSError as error:
                raise self._fail(_why(error)) from error

    def _receive(self) -> int | None:
        """Receive into the buffer that the connection offers; None if there is nothing yet."""
        connection = self.connection
        try:
            if self._secure is not None:
                count = self._receive_tls(self._secure, connection.get_buffer())
            else:
                count = self._socket.recv_into(connection.get_buffer())
            if count:
                return count
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except ssl.SSLWantWriteError:
            self._blocked = True
            return None
        except OSError as error:
            if error.errno == errno.EFAULT and connection.receiving is not None:
                connection.unwritable(error)
                return self._receive()
            raise self._fail(_why(error)) from error
        raise self._fail(connection.eof())

    def _receive_tls(self, secure: ssl.SSLSocket, buffer: memoryview) -> int:
        """OpenSSL stores what it deciphered; into memory that may be mapped, the kernel must."""
        if isinstance(buffer.obj, bytearray):
            return secure.recv_into(buffer)
        part = self._memory.view[: len(buffer)]
        count = secure.recv_into(part)
        try:
            self._memory.copy(buffer[:count])
        except OSError as error:
            self.connection.unwritable(error)
        return count

    def _take_in(self, count: int) -> Command | None:
        try:
            return self.connection.buffer_updated(count)
        except SourceError as error:
            raise self._fail(error) from error

    def _clear(self, view: memoryview) -> None:
        self._memory.clear(view)

    # --- the end ---

    def _named(self, error: SourceError) -> SourceError:
        return type(error)(f"{self._uri} {error}")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._named(self._failure)
        if self._leaving:
            raise SourceLost(f"{self._uri} is closed")

    def _fail(self, error: SourceError) -> SourceError:
        """The connection is of no use any more: close it, and have all who wait look at why. Returns what to raise."""
        if self._failure is None:
            self._failure = error
            self.connection.close()
            if self._socket.fileno() >= 0:
                trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self._memory.close()
            for event in chain(self._waiting.values(), self._queueing.values()):
                event.set()
        return self._named(error)

    def distrust(self, error: SourceError) -> None:
        """Close: what comes would be of something else. All who wait are told why."""
        self._fail(error)

    async def leave(self) -> None:
        """Give up all requests, receive what the server has to say to them, and close.

        There are servers that crash when a client goes while they reply (nbdkit 1.32), and other clients with them.
        """
        if self._failure is None and not self._leaving:
            self._leaving = True
            commands = self.connection.commands
            for command in commands.values():
                command.error = SourceLost("is closed")
                self.connection.abandon(command)
            for event in chain(self._waiting.values(), self._queueing.values()):
                event.set()
            self._pause.cancel()
            try:
                with trio.move_on_after(self._limits.goodbye):
                    while self._driven:  # who did so until now has yet to notice
                        await trio.lowlevel.checkpoint()
                    await self._drive(lambda: not commands)
            except SourceError:
                pass
            finally:
                self.close()
        else:
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Say goodbye, if that can be said at once, and close."""
        if self._failure is not None:
            return
        self.connection.leave()
        with suppress(SourceError):
            self._send()
        self._fail(SourceLost("is closed"))


class _KernelMemory:
    """Has the kernel copy into memory that may be mapped: where a disk is full that is an error, and no SIGBUS."""

    def __init__(self) -> None:
        self._zeros = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
        self._fd = -1
        self._view: memoryview | None = None

    @property
    def view(self) -> memoryview:
        """Memory of one TLS record, that `copy` copies from."""
        if self._view is None:
            self._fd = os.memfd_create("ramfs-record")
            os.truncate(self._fd, _RECORD)
            self._view = memoryview(mmap.mmap(self._fd, _RECORD))
        return self._view

    def copy(self, target: memoryview) -> None:
        """Copy the beginning of `view`."""
        done = 0
        while done < len(target):
            done += os.preadv(self._fd, [target[done:]], done)

    def clear(self, target: memoryview) -> None:
        """Fill with zeros."""
        done = 0
        while done < len(target):
            done += os.readv(self._zeros, [target[done:]])

    def close(self) -> None:
        """Let go of the descriptors."""
        os.close(self._zeros)
        if self._fd >= 0:
            os.close(self._fd)
        self._view = None


async def _either(sock: socket.socket) -> None:
    """Wait until a socket can be read or written."""
    async with trio.open_nursery() as nursery:

        async def first(wait: Callable[[socket.socket], Awaitable[None]]) -> None:
            await wait(sock)
            nursery.cancel_scope.cancel()

        nursery.start_soon(first, trio.lowlevel.wait_readable)
        nursery.start_soon(first, trio.lowlevel.wait_writable)


async def _connected(uri: NbdUri) -> socket.socket:
    """A socket that is connected to the server."""
    try:
        if uri.socket:
            local = trio.socket.socket(socket.AF_UNIX)
            try:
                await local.connect(uri.socket.encode())
            except BaseException:
                local.close()
                raise
            sock = socket.socket(fileno=local.detach())
        else:
            stream = await trio.open_tcp_stream(uri.host, uri.port)
            sock = socket.socket(fileno=stream.socket.detach())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A peer that went away without a word is found out within half a minute, also while nothing is asked.
            for number, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                sock.setsockopt(socket.IPPROTO_TCP, number, value)
    except OSError as error:
        raise SourceLost(f"{uri} cannot be reached: {_reason(error)}") from error
    sock.setblocking(False)
    return sock


def _read(connection: Connection, offset: int, buffer: memoryview) -> Command:
    return connection.read(offset, buffer)


def _context(uri: NbdUri) -> ssl.SSLContext:
    """What is needed to verify the server; read anew for each connection, as certificates are renewed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    path = uri.certificates
    try:
        if not path:
            context.load_default_certs()
        elif os.path.isdir(path):
            context.load_verify_locations(os.path.join(path, "ca-cert.pem"))
            certificate = os.path.join(path, "client-cert.pem")
            if os.path.exists(certificate):
                # Nobody is there to be asked for a password.
                context.load_cert_chain(certificate, os.path.join(path, "client-key.pem"), password="")
        else:
            context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise SourceRefused(f"the certificates in {path or 'the system'} cannot be used: {_reason(error)}") from error
    return context


def _why(error: Exception, where: str = "") -> SourceError:
    """What an error of the socket means; the sentence goes on from the server's name."""
    at = f" {where}" if where else ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceRefused(f"cannot be trusted: {error.verify_message or _reason(error)}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        if "ALERT" in (error.reason or ""):
            return SourceRefused(f"refuses the connection{at}: {_reason(error)}")
        return SourceBroken(f"does not speak TLS as it should{at}: {_reason(error)}")
    return SourceLost(f"lost the connection{at}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The cause that a person can act on."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError):
        return _reason(cause)
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror | ssl.SSLError):
        return os.strerror(error.errno)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _wake(events: Iterable[trio.Event]) -> None:
    """Wake the first one that was not woken yet."""
    for event in events:
        if not event.is_set():
            event.set()
            return
