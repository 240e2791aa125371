"""One connection to an NBD server, as arithmetic: bytes come in where `get_buffer` says, bytes to send are queued.

    connection = Connection(Goal.OPEN, "disk0")
    send(connection.data_to_send())
    while connection.state is not State.OPEN:
        connection.buffer_updated(socket.recv_into(connection.get_buffer()))
        send(connection.data_to_send())
    command = connection.read(0, memory)
    ...

What `get_buffer` gives is never longer than the message that is being received, so nothing behind it is ever taken
in: not what a man in the middle puts behind the answer to STARTTLS, and no payload of a read, which is received right
into the caller's memory. Of what a server sends, only as much is kept as is named here, whatever it says.

Errors speak of the server without naming it ("requires TLS"); whoever knows its name puts it in front.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Final

from ramfs.errors import SourceBroken, SourceError, SourceLost
from ramfs.source.base import Extent
from ramfs.source.nbd import codec
from ramfs.source.nbd.codec import BlockSize, Chunk, Flag, HandshakeFlag, Reply, Request
from ramfs.source.nbd.states import MAX_EXPORTS, STEPS, Goal, State

#: Bytes of a range of which extents are asked for at once. What is known of it comes in one message and is taken
#: apart at one go; behind a connection with 32-bit headers, more than 4 GiB could not be named either.
MAX_EXTENTS: Final = 64 << 20

#: Bytes of names in a list of exports that are believed.
_MAX_NAMES: Final = 8 << 20
#: Pieces, each apart from all others, in which a read may arrive at any moment.
_MAX_PIECES: Final = 1024
#: Error chunks in one reply.
_MAX_ERRORS: Final = 16
#: What nobody wants any more is received into a buffer of so many bytes.
_SCRATCH: Final = 1 << 16


class Command:
    """A request under way. `settled`: its reply has ended, or was given up; `error` tells how, if not well."""

    __slots__ = (
        "cookie",
        "error",
        "errors",
        "extents",
        "length",
        "number",
        "offset",
        "pieces",
        "settled",
        "since",
        "view",
    )

    def __init__(self, number: Request, cookie: int, offset: int, length: int, view: memoryview | None) -> None:
        self.number = number
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.view = view
        """Where the bytes of a read go; None when nobody wants them any more."""
        self.pieces = _Pieces()
        self.extents: list[Extent] | None = None
        self.error: Exception | None = None
        self.errors = 0
        self.settled = False
        self.since = 0.0
        """For whoever has a clock."""


class _Pieces:
    """Which bytes of a read have arrived: spans that neither touch nor overlap, in order."""

    __slots__ = ("_starts", "_stops", "count")

    def __init__(self) -> None:
        self.count = 0
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        starts, stops = self._starts, self._stops
        at = bisect_right(starts, start)
        if (at and stops[at - 1] > start) or (at < len(starts) and starts[at] < stop):
            raise SourceBroken("sends the same bytes of a read twice")
        before = at > 0 and stops[at - 1] == start
        behind = at < len(starts) and starts[at] == stop
        if before and behind:
            stops[at - 1] = stops[at]
            del starts[at], stops[at]
        elif before:
            stops[at - 1] = stop
        elif behind:
            starts[at] = start
        elif len(starts) < _MAX_PIECES:
            starts.insert(at, start)
            stops.insert(at, stop)
        else:
            raise SourceBroken(f"sends a read in more than {_MAX_PIECES} scattered pieces")
        self.count += stop - start


def _zero(view: memoryview) -> None:
    view[:] = bytes(len(view))


class Connection:
    """The client's end. `state` is where it stands; the attributes below it are known from then on.

    `clear` makes a part of a caller's memory zero where the server says that it is.
    """

    def __init__(
        self, goal: Goal, export: str = "", *, tls: bool = False, clear: Callable[[memoryview], None] = _zero
    ) -> None:
        self.state = State.GREETING
        #: OPEN, or IDLE after Goal.LOOK: what the server says of the export.
        self.size = 0
        self.multi_conn = False
        self.block_size = BlockSize()
        #: OPEN: whether it tells extents; whether headers are the extended ones.
        self.context: int | None = None
        self.extended = False
        self.structured = False
        #: IDLE, after Goal.LIST.
        self.exports: list[str] = []
        #: OPEN: what has no reply yet, by cookie, the oldest first.
        self.commands: dict[int, Command] = {}
        #: OPEN: the read whose bytes are being received right now.
        self.receiving: Command | None = None

        self._goal = goal
        self._export = export.encode()
        self._tls = tls
        self._clear = clear
        self._outgoing = bytearray()
        self._cookies = 0
        self._known = False  # the size
        self._gathered = 0
        self._names = 0
        self._kind = 0
        self._length = 0
        self._chunk: tuple[int, int, Command] = (0, 0, Command(Request.READ, 0, 0, 0, None))
        self._surplus = 0  # bytes to throw away behind what the buffer holds
        self._scratch: memoryview | None = None
        self._control = memoryview(bytearray(codec.MAX_OPTION_REPLY))
        self._message = self._control[:0]
        self._target = self._message
        self._then: Callable[[], Command | None] = self._greeted
        self._expect(codec.GREETING.size, self._greeted)

    # --- bytes ---

    def data_to_send(self) -> bytes:
        """Bytes for the server, in order; each is given once."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def get_buffer(self) -> memoryview:
        """Where the next bytes from the server belong: at least one. Good until the next call of anything here."""
        if not len(self._target):
            raise RuntimeError(f"there is nothing to receive in state {self.state.name}")
        return self._target

    def buffer_updated(self, count: int) -> Command | None:
        """Take in what was received into the buffer; returns the command whose reply that ended, if any.

        :raises SourceError: the server is broken, or declines; the connection is of no use any more.
        """
        if count < len(self._target):
            self._target = self._target[count:]
            return None
        try:
            return self._then()
        except SourceError:
            self.close()
            raise

    def eof(self) -> SourceLost:
        """The error for a server that closes the connection now."""
        state = self.state
        self.close()
        if state is State.OPEN:
            return SourceLost("closed the connection")
        if state is State.GREETING:
            return SourceLost("closed the connection without a greeting")
        return SourceLost(f"closed the connection in the handshake, at {state.name}")

    def close(self) -> None:
        """Let go of all memory: what has not settled never will."""
        self.state = State.CLOSED
        self._target = self._control[:0]
        self.receiving = None
        for command in self.commands.values():
            command.view = None

    def leave(self) -> None:
        """Say goodbye, where the protocol has words for it, and close."""
        if self.state is State.OPEN:
            self._outgoing += codec.request(Request.DISCONNECT, 0, 0, 0, extended=self.extended)
        elif self.state not in (State.GREETING, State.TLS, State.CLOSED):
            self._outgoing += codec.option(codec.Option.ABORT)
        self.close()

    # --- the handshake ---

    def tls_started(self) -> None:
        """The socket is wrapped, and the peer is who it should be."""
        if self.state is not State.TLS:
            raise RuntimeError(f"TLS cannot start in state {self.state.name}")
        self._enter(self._goal.value)

    def _greeted(self) -> None:
        flags = codec.greeting(self._message)
        self._outgoing += codec.client_flags(flags | HandshakeFlag.FIXED_NEWSTYLE)
        self._enter(State.STARTTLS if self._tls else self._goal.value)

    def _enter(self, state: State) -> None:
        self.state = state
        self._gathered = 0
        if state is State.OPEN:
            self._next_reply()
            return
        step = STEPS.get(state)
        if step is None:  # the adapter's turn
            self._target = self._control[:0]
            return
        data = b""
        if state in (State.GO, State.INFO):
            data = codec.go(self._export)
        elif state is State.META:
            data = codec.meta_context(self._export)
        self._outgoing += codec.option(step.option, data)
        self._expect(codec.OPTION_REPLY.size, self._option_replied)

    def _option_replied(self) -> None:
        self._kind, self._length = codec.option_reply(self._message, STEPS[self.state].option)
        self._expect(self._length, self._option_told)
        if self._length == 0:
            self._option_told()

    def _option_told(self) -> None:
        step = STEPS[self.state]
        kind, data = self._kind, self._message
        if codec.declined(kind):
            refused = codec.refusal(step.option, kind, data)
            if step.no is None or kind in (codec.Refusal.TLS_REQD, codec.Refusal.SHUTDOWN):
                raise refused
            self.context = None
            self._enter(step.no)
        elif kind == Reply.ACK:
            if len(data):
                raise SourceBroken(f"agrees to {step.option.name} with {len(data)} bytes too many")
            if self.state in (State.GO, State.INFO) and not self._known:
                raise SourceBroken(f"agrees to {step.option.name} without telling the size of the export")
            if self.state is State.EXTENDED_HEADERS:
                self.extended = self.structured = True
            elif self.state is State.STRUCTURED_REPLY:
                self.structured = True
            self._enter(step.yes)
        elif kind == step.gathers:
            self._gathered += 1
            if self._gathered > step.most:
                raise SourceBroken(f"answers {step.option.name} without end: {step.most} replies and more")
            self._gather(data)
            self._expect(codec.OPTION_REPLY.size, self._option_replied)
        else:
            raise SourceBroken(f"answers {step.option.name} with a reply of type {kind}")

    def _gather(self, data: memoryview) -> None:
        if self.state is State.LIST:
            name = codec.export_name(data)
            self._names += len(data)
            if self._names > _MAX_NAMES:
                raise SourceBroken(f"lists exports without end: {len(self.exports)} of at most {MAX_EXPORTS} so far")
            self.exports.append(name)
        elif self.state is State.META:
            context = codec.context(data)
            self.context = self.context if context is None else context
        else:
            told = codec.info(data)
            if isinstance(told, BlockSize):
                self.block_size = told
            elif told is not None:
                self.size, flags = told
                self.multi_conn = bool(flags & Flag.MULTI_CONN)
                self._known = True

    # --- requests ---

    def read(self, offset: int, view: memoryview) -> Command:
        """Ask for the bytes of the export that fill `view`, which is kept until the command has settled."""
        return self._ask(Request.READ, offset, len(view), view)

    def block_status(self, offset: int, length: int) -> Command:
        """Ask for the extents of a range of at most `MAX_EXTENTS` bytes. Only where there is a `context`."""
        return self._ask(Request.BLOCK_STATUS, offset, length, None)

    def _ask(self, number: Request, offset: int, length: int, view: memoryview | None) -> Command:
        if self.state is not State.OPEN:
            raise RuntimeError(f"there is nothing to ask for in state {self.state.name}")
        if length < 1 or offset < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} are not a range of an export of {self.size}")
        self._cookies += 1
        command = Command(number, self._cookies, offset, length, view)
        self.commands[command.cookie] = command
        self._outgoing += codec.request(number, command.cookie, offset, length, extended=self.extended)
        return command

    def abandon(self, command: Command) -> None:
        """Settle a command now: nobody wants what still comes for it, which is received and thrown away."""
        command.settled = True
        self._spill(command)

    def unwritable(self, error: OSError) -> None:
        """The buffer cannot be written: the read that it belongs to fails with this error, when its reply has ended."""
        command = self.receiving
        if command is None:
            raise error
        command.error = command.error or error.with_traceback(None)  # whose frames hold the memory
        self._spill(command)

    def _spill(self, command: Command) -> None:
        if self.receiving is command:
            self._surplus = len(self._target)
            self._throw_away()
        command.view = None

    # --- replies ---

    def _expect(self, count: int, then: Callable[[], Command | None]) -> None:
        """Receive `count` bytes into memory of our own, `_message`, and go on there."""
        fits = count <= len(self._control)
        self._message = self._target = self._control[:count] if fits else memoryview(bytearray(count))
        self._then = then

    def _next_reply(self) -> None:
        if self.extended:
            self._expect(codec.CHUNK_EXTENDED.size, self._extended_reply)
        else:
            self._expect(codec.SIMPLE.size, self._reply)

    def _command(self, cookie: int) -> Command:
        command = self.commands.get(cookie)
        if command is None:
            raise SourceBroken(f"replies to a request that was not made, or was answered already ({cookie:#x})")
        return command

    def _reply(self) -> Command | None:
        """The first 16 bytes of a reply tell which kind it is. A chunk's header has four more."""
        magic, error, cookie = codec.SIMPLE.unpack(self._message)
        if magic == codec.SIMPLE_MAGIC:
            return self._simple_reply(self._command(cookie), error)
        if magic != codec.CHUNK_MAGIC or not self.structured:
            raise SourceBroken(f"sends a reply with a wrong magic number ({magic:#x})")
        flags, kind = error >> 16, error & 0xFFFF
        self._chunk = flags, kind, self._command(cookie)
        # The length; and the offset that the bytes of a read begin with.
        self._expect(4 + (codec.OFFSET.size if kind == Chunk.OFFSET_DATA else 0), self._chunk_length)
        return None

    def _simple_reply(self, command: Command, error: int) -> Command | None:
        if error:
            command.error = command.error or codec.failure(error)
            return self._settle(command)
        if self.structured:
            raise SourceBroken("sends a simple reply where structured ones were agreed upon")
        self._chunk = codec.DONE, Chunk.OFFSET_DATA, command
        command.pieces.add(0, command.length)
        return self._data(command, 0, command.length)

    def _chunk_length(self) -> Command | None:
        length = int.from_bytes(self._message[:4])
        if self._chunk[1] != Chunk.OFFSET_DATA:
            return self._payload(length)
        return self._offset_data(length, int.from_bytes(self._message[4:]))

    def _extended_reply(self) -> Command | None:
        magic, flags, kind, cookie, offset, length = codec.CHUNK_EXTENDED.unpack(self._message)
        if magic != codec.CHUNK_EXTENDED_MAGIC:
            raise SourceBroken(f"sends a reply with a wrong magic number ({magic:#x})")
        command = self._command(cookie)
        if offset != command.offset:
            raise SourceBroken("replies with the offset of another request")
        self._chunk = flags, kind, command
        if kind != Chunk.OFFSET_DATA:
            return self._payload(length)
        self._length = length
        self._expect(codec.OFFSET.size, self._extended_data)
        return None

    def _extended_data(self) -> Command | None:
        return self._offset_data(self._length, int.from_bytes(self._message))

    def _offset_data(self, length: int, offset: int) -> Command | None:
        """A chunk with bytes of a read: right into the reader's memory."""
        command = self._chunk[2]
        start, stop = self._part(command, offset, length - codec.OFFSET.size)
        return self._data(command, start, stop)

    def _part(self, command: Command, offset: int, length: int) -> tuple[int, int]:
        """The part of the caller's memory that a chunk fills, which is within it and was not filled yet."""
        if command.number != Request.READ:
            raise SourceBroken("sends data where extents were asked for")
        start = offset - command.offset
        if length <= 0 or start < 0 or start + length > command.length:
            raise SourceBroken("sends bytes that were not asked for")
        command.pieces.add(start, start + length)
        return start, start + length

    def _data(self, command: Command, start: int, stop: int) -> Command | None:
        if command.view is None:
            self._surplus = stop - start
            self._throw_away()
        else:
            self.receiving = command
            self._target = command.view[start:stop]
            self._then = self._received
        return None

    def _received(self) -> Command | None:
        self.receiving = None
        return self._chunk_done()

    def _throw_away(self) -> Command | None:
        """Receive what nobody wants, a buffer at a time."""
        self.receiving = None
        if self._surplus == 0:
            return self._chunk_done()
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH))
        part = self._scratch[: self._surplus]
        self._surplus -= len(part)
        self._target = part
        self._then = self._throw_away
        return None

    def _payload(self, length: int) -> Command | None:
        """Any other chunk is small, or of a known most."""
        _, kind, command = self._chunk
        if kind & codec.CHUNK_FAILED:
            most = codec.MAX_OPTION_REPLY
        elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
            if command.number != Request.BLOCK_STATUS:
                raise SourceBroken("tells of extents where a read was asked for")
            if (kind == Chunk.BLOCK_STATUS_EXT) != self.extended:
                raise SourceBroken("tells of extents in a form that was not agreed upon")
            most = 16 * codec.MAX_RANGES
        elif kind == Chunk.OFFSET_HOLE:
            most = 12
        elif kind == Chunk.NONE:
            most = 0
        else:
            raise SourceBroken(f"sends a chunk of a type that does not exist ({kind})")
        if length > most:
            raise SourceBroken(f"sends a chunk of type {kind} with {length} bytes, where {most} are the most")
        if length == 0:
            self._message = self._control[:0]
            return self._chunk_told()
        self._expect(length, self._chunk_told)
        return None

    def _chunk_told(self) -> Command | None:
        flags, kind, command = self._chunk
        data = self._message
        if kind & codec.CHUNK_FAILED:
            command.errors += 1
            if command.errors > _MAX_ERRORS:
                raise SourceBroken(f"sends more than {_MAX_ERRORS} errors for one request")
            told = codec.error_chunk(kind, data)
            command.error = command.error or told
        elif kind == Chunk.OFFSET_HOLE:
            start, stop = self._part(command, *codec.hole(data))
            if command.view is not None:
                try:
                    self._clear(command.view[start:stop])
                except OSError as error:
                    command.error = command.error or error.with_traceback(None)
                    command.view = None
        elif kind == Chunk.NONE:
            if not flags & codec.DONE:
                raise SourceBroken("sends an empty chunk that is not the last one")
        else:
            if self.context is None or command.extents is not None:
                raise SourceBroken("tells of extents twice, or unasked")
            command.extents = codec.extents(
                data, self.context, command.offset, command.length, self.size, extended=self.extended
            )
        return self._chunk_done()

    def _chunk_done(self) -> Command | None:
        flags, _, command = self._chunk
        if not flags & codec.DONE:
            self._next_reply()
            return None
        if command.error is None and not command.settled:
            if command.number == Request.READ and command.pieces.count != command.length:
                raise SourceBroken(f"ends its reply after {command.pieces.count} of {command.length} bytes")
            if command.number == Request.BLOCK_STATUS and command.extents is None:
                raise SourceBroken("ends its reply without telling any extents")
        return self._settle(command)

    def _settle(self, command: Command) -> Command:
        del self.commands[command.cookie]
        command.view = None
        command.settled = True
        self._next_reply()
        return command
