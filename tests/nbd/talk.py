"""Conversations with a connection, without a socket: with an honest peer, or a deaf one that says anything."""

from __future__ import annotations

from collections.abc import Callable

from nbd.peer import Peer

from ramfs.errors import SourceError
from ramfs.source.nbd.connection import Command, Connection
from ramfs.source.nbd.states import Goal, State

MODES = ["simple", "structured", "extended"]
# Bytes, holes, and an end that is no multiple of anything.
CONTENTS = bytes(range(1, 256)) * 8 + bytes(3000) + b"\x07" * 777 + bytes(2048) + b"end"

DONE = {State.OPEN, State.IDLE, State.TLS, State.CLOSED}


class Talk:
    """A connection and its peer, with the wire between them: `step` bytes at a time."""

    def __init__(self, connection: Connection, peer: Peer, step: int = 1 << 30) -> None:
        self.connection, self.peer, self.step = connection, peer, step
        self.wire = bytearray(peer.greeting())
        self.settled: list[Command] = []

    def send(self) -> None:
        self.wire += self.peer.feed(self.connection.data_to_send())

    def receive(self) -> None:
        """One step of what lies on the wire."""
        buffer = self.connection.get_buffer()
        count = min(len(buffer), len(self.wire), self.step)
        buffer[:count] = self.wire[:count]
        del self.wire[:count]
        command = self.connection.buffer_updated(count)
        if command is not None:
            self.settled.append(command)

    def run(self, until: Callable[[], bool]) -> None:
        self.send()
        while not until():
            assert self.wire, f"nothing more to come in {self.connection.state}"
            self.receive()
            self.send()

    def handshake(self) -> Connection:
        self.run(lambda: self.connection.state in DONE)
        return self.connection

    def finish(self, *commands: Command) -> None:
        self.run(lambda: all(command.settled for command in commands))


def honest_stream(mode: str, goal: Goal) -> tuple[bytes, list[tuple[int, int]]]:
    """All that an honest server sends in a conversation, the reads of which are known."""
    peer = Peer(CONTENTS[:3000], mode=mode, exports=("x", "y"), block_size=(1, 512, 4096))
    talk = Talk(Connection(goal, "x"), peer)
    sent = bytearray(talk.wire)
    feed = peer.feed

    def record(data: bytes) -> bytes:
        answer = feed(data)
        sent.extend(answer)
        return answer

    peer.feed = record  # type: ignore[method-assign]
    talk.handshake()
    if goal is Goal.OPEN:
        play(talk)
    return bytes(sent), peer.asked


def play(talk: Talk) -> None:
    connection = talk.connection
    commands = [connection.read(at, memoryview(bytearray(1000))) for at in (0, 1000, 2000)]
    if connection.context is not None:
        commands.append(connection.block_status(0, 3000))
    talk.finish(*commands)


HONEST = {(mode, goal): honest_stream(mode, goal)[0] for mode in MODES for goal in Goal}


class Deaf(Peer):
    """Says what it was told to say, whatever it hears."""

    def __init__(self, says: bytes) -> None:
        super().__init__()
        self.says = says

    def greeting(self) -> bytes:
        return self.says

    def feed(self, data: bytes) -> bytes:
        return b""


def listen(says: bytes, goal: Goal, step: int) -> None:
    """Hear it all out. Whatever it is, only errors of sources come out of it, and no large buffer is ever offered."""
    connection = Connection(goal, "x")
    talk = Talk(connection, Deaf(says), step)
    memory = [bytearray(1000) for _ in range(3)]
    asked = False
    try:
        while talk.wire and connection.state not in (State.IDLE, State.TLS, State.CLOSED):
            assert len(connection.get_buffer()) <= 5 << 20
            talk.receive()
            if connection.state is State.OPEN and not asked and connection.size >= 3000:
                asked = True
                for at, part in enumerate(memory):
                    connection.read(1000 * at, memoryview(part))
                if connection.context is not None:
                    connection.block_status(0, 3000)
    except SourceError:
        assert connection.state is State.CLOSED
    else:
        connection.eof()
    for part in memory:
        part.append(1)  # let go of, in any case
