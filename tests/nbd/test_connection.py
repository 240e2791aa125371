"""The protocol without a socket: honest peers, a byte at a time, and every lie that a server can tell."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd.peer import (
    ACK,
    CONTEXT,
    ERROR,
    ERROR_OFFSET,
    EXTENDED,
    GO,
    HOLE,
    INFO,
    LIST,
    META,
    OPT_INFO,
    POLICY,
    SERVER,
    SET_META,
    SHUTDOWN,
    STARTTLS,
    STATUS,
    STATUS_EXT,
    STRUCTURED,
    TLS_REQD,
    Peer,
    export_info,
    greeting,
    option_reply,
    string,
)
from nbd.talk import CONTENTS, HONEST, MODES, Talk, listen, play

from ramfs.errors import SourceBroken, SourceError, SourceLost, SourceRefused
from ramfs.source.base import Extent
from ramfs.source.nbd.connection import Command, Connection
from ramfs.source.nbd.states import Goal, State


def opened(peer: Peer, step: int = 1 << 30, **more: Any) -> Talk:
    talk = Talk(Connection(Goal.OPEN, peer.exports[0], **more), peer, step)
    assert talk.handshake().state is State.OPEN
    return talk


# --- honest peers ---


@pytest.mark.parametrize("step", [1, 7, 1 << 30])
@pytest.mark.parametrize("mode", MODES)
def test_reads_and_extents(mode: str, step: int) -> None:
    peer = Peer(CONTENTS, mode=mode, exports=("disk ö",), block_size=(1, 4096, 1 << 20), flags=3 | 256)
    talk = opened(peer, step)
    connection = talk.connection
    assert (connection.size, connection.multi_conn) == (len(CONTENTS), True)
    assert connection.block_size == (1, 4096, 1 << 20)
    assert (connection.structured, connection.extended) == (mode != "simple", mode == "extended")
    memory = bytearray(b"\xff" * len(CONTENTS))
    ranges = [(0, 100), (100, 1900), (2000, 3), (2003, len(CONTENTS) - 2003)]
    commands = [connection.read(at, memoryview(memory)[at : at + length]) for at, length in ranges]
    talk.finish(*commands)
    assert bytes(memory) == CONTENTS
    assert talk.settled == commands
    assert all(command.error is None for command in commands)
    assert not connection.commands
    if mode == "simple":
        assert connection.context is None
        return
    command = connection.block_status(512, len(CONTENTS) - 512)
    talk.finish(command)
    # neighbours joined: data, a hole, data, a hole, data
    assert command.extents == [
        Extent(512, 2048 - 512, False),
        Extent(2048, 2560, True),
        Extent(4608, 1536, False),
        Extent(6144, 1536, True),
        Extent(7680, len(CONTENTS) - 7680, False),
    ]
    connection.leave()
    talk.send()
    assert peer.closed


@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_a_read_are_received_into_the_callers_memory(mode: str) -> None:
    talk = opened(Peer(b"x" * 4096, mode=mode))
    memory = bytearray(4096)
    talk.connection.read(0, memoryview(memory))
    talk.send()
    places = []
    while talk.wire:
        places.append((talk.connection.get_buffer().obj is memory, len(talk.connection.get_buffer())))
        talk.receive()
    assert sum(length for mine, length in places if mine) == 4096
    # All that is not the caller's is a header.
    assert max(length for mine, length in places if not mine) <= 32
    assert bytes(memory) == b"x" * 4096


def test_lists_and_looks() -> None:
    peer = Peer(b"1234", exports=("", "a", "ö/b c"))
    assert Talk(Connection(Goal.LIST), peer, 1).handshake().exports == ["", "a", "ö/b c"]
    peer = Peer(b"1234", exports=("a",))
    talk = Talk(Connection(Goal.LOOK, "a"), peer, 1)
    assert (talk.handshake().state, talk.connection.size) == (State.IDLE, 4)
    talk.connection.leave()
    talk.send()
    assert peer.closed
    with pytest.raises(SourceRefused, match="has no such export: no such export"):
        Talk(Connection(Goal.LOOK, "b"), Peer(exports=("a",))).handshake()
    with pytest.raises(SourceRefused, match="has no such export"):
        Talk(Connection(Goal.OPEN, "b"), Peer(exports=("a",))).handshake()


def test_nothing_is_asked_in_plain_text_when_tls_is_wanted() -> None:
    class Encrypting(Peer):
        def option(self, number: int, data: bytes) -> bytes:
            return option_reply(number, ACK) if number == STARTTLS else super().option(number, data)

    talk = Talk(Connection(Goal.OPEN, "x", tls=True), Encrypting(b"1", exports=("x",)))
    connection = talk.handshake()
    assert connection.state is State.TLS
    with pytest.raises(RuntimeError):
        connection.get_buffer()
    connection.tls_started()
    assert talk.handshake().state is State.OPEN


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (POLICY, SourceRefused, "does not offer TLS"),
        ((1 << 31) + 1, SourceRefused, "does not offer TLS"),
        (SHUTDOWN, SourceLost, "is shutting down"),
        (INFO, SourceBroken, "reply of type 3"),
    ],
)
def test_tls_that_is_stripped(reply: int, error: type[SourceError], words: str) -> None:
    class Stripping(Peer):
        def option(self, number: int, data: bytes) -> bytes:
            assert number == STARTTLS
            return option_reply(number, reply)

    talk = Talk(Connection(Goal.OPEN, "secret", tls=True), Stripping(b"1"))
    with pytest.raises(error, match=words):
        talk.handshake()
    assert talk.connection.data_to_send() == b""


def test_what_stands_behind_the_answer_to_starttls_is_not_taken_in() -> None:
    injected = option_reply(GO, INFO, export_info(666)) + option_reply(GO, ACK)

    class Injecting(Peer):
        def option(self, number: int, data: bytes) -> bytes:
            return option_reply(number, ACK) + injected

    talk = Talk(Connection(Goal.OPEN, tls=True), Injecting())
    assert talk.handshake().state is State.TLS
    assert bytes(talk.wire) == injected


def test_a_server_that_requires_tls() -> None:
    class Requiring(Peer):
        def option(self, number: int, data: bytes) -> bytes:
            return option_reply(number, TLS_REQD, b"go away")

    for goal in Goal:
        with pytest.raises(SourceRefused, match="requires TLS: go away; use nbds://"):
            Talk(Connection(goal), Requiring()).handshake()


def test_an_abandoned_read_leaves_the_connection_usable() -> None:
    """At every byte of the reply: its memory is let go at once, and the next read gets its own bytes."""
    for mode in MODES:
        for at in range(0, 700, 5):
            talk = opened(Peer(b"a" * 600 + b"b" * 600, mode=mode), 1)
            connection = talk.connection
            memory, other = bytearray(600), bytearray(600)
            first = connection.read(0, memoryview(memory))
            second = connection.read(600, memoryview(other))
            talk.send()
            for _ in range(at):
                talk.receive()
            connection.abandon(first)
            so_far = bytes(memory)
            memory.append(1)  # BufferError if anybody still held it
            talk.finish(second)
            assert bytes(other) == b"b" * 600
            assert bytes(memory[:600]) == so_far
            assert not connection.commands


def test_memory_that_cannot_be_written() -> None:
    def full(view: memoryview) -> None:
        raise OSError(28, "full")

    talk = opened(Peer(bytes(1024) + b"x" * 1024), clear=full)
    command = talk.connection.read(0, memoryview(bytearray(2048)))
    talk.finish(command)
    assert isinstance(command.error, OSError)
    # as when the kernel cannot receive into it
    command = talk.connection.read(1024, memoryview(bytearray(1024)))
    talk.send()
    while talk.connection.receiving is None:
        talk.receive()
    talk.connection.unwritable(OSError(14, "bad address"))
    talk.finish(command)
    assert "bad address" in str(command.error)
    other = bytearray(10)
    talk.finish(talk.connection.read(1030, memoryview(other)))
    assert other == b"x" * 10


@pytest.mark.parametrize("mode", MODES)
def test_errors_of_a_read(mode: str) -> None:
    class Failing(Peer):
        code = 5

        def request(self, number: int, cookie: int, offset: int, length: int) -> bytes:
            if mode == "simple":
                return self.simple(cookie, self.code)
            data = self.data(cookie, offset, b"xx", of=offset)
            return data + self.error(cookie, self.code, b"disk\nfire\x1b[2J", of=offset, done=True)

    peer = Failing(CONTENTS, mode=mode)
    talk = opened(peer)
    cases = [(5, SourceError), (1, SourceRefused), (22, SourceRefused), (108, SourceLost), (4711, SourceError)]
    for code, error in cases:
        peer.code = code
        command = talk.connection.read(0, memoryview(bytearray(100)))
        talk.finish(command)
        assert type(command.error) is error
        assert str(command.error).isprintable()
        if mode != "simple":
            assert "disk fire" in str(command.error)


# --- liars in the handshake ---

OPTIONS = [STRUCTURED, EXTENDED, SET_META, GO, LIST, OPT_INFO]


def lying(number: int, answer: bytes) -> Talk:
    """A conversation in which one option is answered with a lie."""

    class Liar(Peer):
        def option(self, asked: int, data: bytes) -> bytes:
            return answer if asked == number else super().option(asked, data)

    goal = {LIST: Goal.LIST, OPT_INFO: Goal.LOOK}.get(number, Goal.OPEN)
    mode = "extended" if number == EXTENDED else "structured"
    return Talk(Connection(goal, "x"), Liar(b"1234", mode=mode, exports=("x",)))


GREETINGS = [
    (greeting(magic=b"SSH-2.0-"), SourceBroken, "does not greet"),
    (greeting(option=0x420281861253), SourceRefused, "oldstyle"),
    (greeting(option=1), SourceBroken, "does not exist"),
    (greeting(flags=2), SourceRefused, "too old"),
]


@pytest.mark.parametrize(("answer", "error", "words"), GREETINGS)
def test_greetings(answer: bytes, error: type[SourceError], words: str) -> None:
    class Liar(Peer):
        def greeting(self) -> bytes:
            return answer

    with pytest.raises(error, match=words):
        Talk(Connection(Goal.OPEN), Liar()).handshake()


@pytest.mark.parametrize("number", OPTIONS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda number: option_reply(number, ACK, magic=1), "wrong magic"),
        (lambda number: option_reply(number + 1, ACK), "but .* was asked"),
        (lambda number: option_reply(number, 99), "reply of type 99"),
        (lambda number: option_reply(number, ACK, b"x"), "too many"),
        (lambda number: struct.pack(">QIII", 0x3E889045565A9, number, ACK, 0xFFFFFFFF), "are the most"),
        (lambda number: struct.pack(">QIII", 0x3E889045565A9, number, 0x80000001, 0x7FFFFFFF), "are the most"),
    ],
)
def test_answers_to_options(number: int, make: Callable[[int], bytes], words: str) -> None:
    with pytest.raises(SourceBroken, match=words):
        lying(number, make(number)).handshake()


def block_sizes(*sizes: int) -> bytes:
    return option_reply(GO, INFO, struct.pack(">HIII", 3, *sizes))


LIES = [
    (GO, option_reply(GO, ACK), "without telling the size"),
    (OPT_INFO, option_reply(OPT_INFO, ACK), "without telling the size"),
    (GO, option_reply(GO, INFO, b"\0"), "too short"),
    (GO, option_reply(GO, INFO, struct.pack(">HQ", 0, 1)), "wrong length"),
    (GO, option_reply(GO, INFO, export_info(1 << 63)), "more than any file"),
    (GO, option_reply(GO, INFO, struct.pack(">HII", 3, 1, 1)), "wrong length"),
    (GO, block_sizes(0, 512, 512), "no power of two"),
    (GO, block_sizes(3, 4096, 4096), "no power of two"),
    (GO, block_sizes(1 << 17, 1 << 17, 1 << 20), "no power of two"),
    (GO, block_sizes(512, 1000, 4096), "preferred"),
    (GO, block_sizes(4096, 512, 4096), "preferred"),
    (GO, block_sizes(4096, 4096, 512), "largest"),
    (GO, option_reply(GO, INFO, export_info(1)) * 100, "without end"),
    (SET_META, option_reply(SET_META, META, b"abc"), "too short"),
    (SET_META, option_reply(SET_META, META, struct.pack(">I", 1) + b"x:y") * 100, "without end"),
    (LIST, option_reply(LIST, SERVER, b"abc"), "longer than"),
    (LIST, option_reply(LIST, SERVER, struct.pack(">I", 10) + b"short"), "longer than"),
    (LIST, option_reply(LIST, SERVER, string("x" * 4097)), "longer than"),
    (LIST, option_reply(LIST, SERVER, string(b"\xff")), "not UTF-8"),
    (LIST, option_reply(LIST, SERVER, string("a\0b")), "NUL"),
]


@pytest.mark.parametrize(("number", "answer", "words"), LIES)
def test_lies_about_exports(number: int, answer: bytes, words: str) -> None:
    with pytest.raises(SourceBroken, match=words):
        lying(number, answer).handshake()


def test_the_largest_read_is_a_multiple_of_the_smallest() -> None:
    peer = Peer(b"1234", block_size=(4096, 8192, 9999))
    assert opened(peer).connection.block_size.maximum == 8192
    peer = Peer(b"1234", block_size=(1, 8192, 0xFFFFFFFF))
    assert opened(peer).connection.block_size.maximum == opened(Peer()).connection.block_size.maximum == 32 << 20


@pytest.mark.parametrize("number", [STRUCTURED, SET_META])
def test_what_a_server_need_not_know(number: int) -> None:
    """A no to these costs what it is for, and nothing else."""
    talk = lying(number, option_reply(number, POLICY, b"no"))
    assert talk.handshake().state is State.OPEN
    assert talk.connection.context is None
    memory = bytearray(4)
    talk.finish(talk.connection.read(0, memoryview(memory)))
    assert memory == b"1234"


@pytest.mark.parametrize("reply", [string("n" * 4000), string("")])
def test_a_list_without_end_takes_no_more_memory_than_is_believed(reply: bytes) -> None:
    talk = lying(LIST, b"")
    talk.send()
    message = option_reply(LIST, SERVER, reply)
    while talk.wire:
        talk.receive()
        talk.send()
    tracemalloc.start()
    with pytest.raises(SourceBroken, match="without end"):  # noqa: PT012
        while True:
            talk.wire += message
            while talk.wire:
                talk.receive()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_close_at_any_moment_is_a_loss() -> None:
    peer = Peer(b"1234")
    connection = Connection(Goal.OPEN)
    seen = set()
    talk = Talk(connection, peer)
    while connection.state is not State.OPEN:
        fresh = Connection(Goal.OPEN)
        other = Talk(fresh, Peer(b"1234"))
        other.run(lambda: fresh.state is connection.state)  # noqa: B023
        error = fresh.eof()
        assert fresh.state is State.CLOSED
        seen.add(str(error))
        talk.receive()
        talk.send()
    assert any("without a greeting" in line for line in seen)
    assert any("GO" in line for line in seen)
    assert "closed the connection" in str(connection.eof())


# --- liars in transmission ---

LENGTH = 4096
Lie = Callable[[Peer, int], bytes]


def misread(lie: Lie, mode: str, *, status: bool = False) -> Command:
    class Liar(Peer):
        def request(self, number: int, cookie: int, offset: int, length: int) -> bytes:
            return lie(self, cookie)

    talk = opened(Liar(b"x" * 2 * LENGTH, mode=mode))
    if status:
        command = talk.connection.block_status(0, LENGTH)
    else:
        command = talk.connection.read(0, memoryview(bytearray(LENGTH)))
    talk.finish(command)
    return command


def raw(peer: Peer, cookie: int, kind: int, length: int, done: int = 1) -> bytes:
    """A chunk's header alone, which promises `length` bytes."""
    if peer.agreed == 2:
        return struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, cookie, 0, length)
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, length)


SIMPLE_LIES: dict[str, Lie] = {
    "wrong magic": lambda peer, cookie: struct.pack(">IIQ", 1, 0, cookie),
    "wrong magic number": lambda peer, cookie: struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, 8) + bytes(8),
    "not made": lambda peer, cookie: peer.simple(cookie + 1),
    "answered already": lambda peer, cookie: peer.simple(1 << 63),
}

CHUNK_LIES: dict[str, Lie] = {
    "wrong magic": lambda peer, cookie: bytes(32),
    "not made": lambda peer, cookie: peer.data(cookie + 1, 0, b"x", of=0),
    "that were not asked for": lambda peer, cookie: peer.data(cookie, LENGTH, b"x", of=0),
    "bytes that were not asked for": lambda peer, cookie: peer.data(cookie, LENGTH - 1, b"xx", of=0),
    "sends bytes that were not asked": lambda peer, cookie: peer.data(cookie, 0, b"", of=0),
    "sends bytes that were not": lambda peer, cookie: raw(peer, cookie, 1, 7) + bytes(8),
    "bytes that were not asked": lambda peer, cookie: raw(peer, cookie, 1, 0xFFFFFFFF) + bytes(8),
    "bytes that were not": lambda peer, cookie: peer.hole(cookie, 0, LENGTH + 1, of=0),
    "were not asked for": lambda peer, cookie: peer.hole(cookie, 0, 0, of=0),
    "were not asked": lambda peer, cookie: peer.hole(cookie, 1 << 62, 1, of=0),
    "same bytes of a read twice": lambda peer, cookie: peer.data(cookie, 0, b"xx", of=0) * 2,
    "bytes of a read twice": lambda peer, cookie: (
        peer.data(cookie, 10, b"x" * 10, of=0) + peer.hole(cookie, 19, 2, of=0)
    ),
    "of a read twice": lambda peer, cookie: peer.hole(cookie, 10, 10, of=0) + peer.data(cookie, 5, b"x" * 6, of=0),
    "twice": lambda peer, cookie: peer.data(cookie, 5, b"x", of=0) + peer.data(cookie, 0, b"x" * 10, of=0),
    "after 2 of 4096 bytes": lambda peer, cookie: peer.data(cookie, 0, b"xx", of=0, done=True),
    "after 0 of 4096 bytes": lambda peer, cookie: peer.chunk(cookie, 0, done=True),
    "not the last one": lambda peer, cookie: peer.chunk(cookie, 0) * 5,
    "type 0 with 1 bytes": lambda peer, cookie: peer.chunk(cookie, 0, b"x", done=True),
    "does not exist": lambda peer, cookie: peer.chunk(cookie, 99, done=True),
    "hole of wrong length": lambda peer, cookie: peer.chunk(cookie, HOLE, bytes(11)),
    "type 2 with 13 bytes": lambda peer, cookie: peer.chunk(cookie, HOLE, bytes(13)),
    "where a read was asked for": lambda peer, cookie: peer.status(cookie, 0, LENGTH),
    "error chunk that is too short": lambda peer, cookie: peer.chunk(cookie, ERROR, bytes(5)),
    "longer than the chunk": lambda peer, cookie: peer.chunk(cookie, ERROR, struct.pack(">IH", 5, 9) + b"x"),
    "more than a message": lambda peer, cookie: peer.chunk(cookie, ERROR, struct.pack(">IH", 5, 1) + b"xy"),
    "message and an offset": lambda peer, cookie: peer.chunk(cookie, ERROR_OFFSET, struct.pack(">IH", 5, 0)),
    "without an error": lambda peer, cookie: peer.error(cookie, 0, b"", of=0),
    "more than 16 errors": lambda peer, cookie: peer.error(cookie, 5, b"", of=0) * 17,
    "are the most": lambda peer, cookie: raw(peer, cookie, ERROR, 0xFFFFFFF0),
    "scattered pieces": lambda peer, cookie: b"".join(peer.data(cookie, at, b"x", of=0) for at in range(0, LENGTH, 2)),
}


@pytest.mark.parametrize("words", SIMPLE_LIES)
def test_lies_in_simple_replies(words: str) -> None:
    with pytest.raises(SourceBroken, match=words):
        misread(SIMPLE_LIES[words], "simple")


@pytest.mark.parametrize("mode", ["structured", "extended"])
@pytest.mark.parametrize("words", CHUNK_LIES)
def test_lies_in_chunks(words: str, mode: str) -> None:
    with pytest.raises(SourceBroken, match=words):
        misread(CHUNK_LIES[words], mode)


def test_replies_of_another_kind_than_agreed() -> None:
    with pytest.raises(SourceBroken, match="simple reply where structured"):
        misread(lambda peer, cookie: peer.simple(cookie) + bytes(LENGTH), "structured")
    with pytest.raises(SourceBroken, match="wrong magic"):
        misread(lambda peer, cookie: peer.simple(cookie) + bytes(LENGTH), "extended")
    with pytest.raises(SourceBroken, match="offset of another"):
        misread(lambda peer, cookie: peer.chunk(cookie, 0, done=True, offset=8), "extended")


def pairs(*of: int, count: int | None = None, context: int = CONTEXT) -> Lie:
    def lie(peer: Peer, cookie: int) -> bytes:
        if peer.agreed == 2:
            said = len(of) // 2 if count is None else count
            return peer.chunk(cookie, STATUS_EXT, struct.pack(f">II{len(of)}Q", context, said, *of), done=True)
        return peer.chunk(cookie, STATUS, struct.pack(f">I{len(of)}I", context, *of), done=True)

    return lie


EXTENT_LIES: dict[str, Lie] = {
    "not agreed upon": pairs(LENGTH, 0, context=1),
    "wrong length": pairs(),
    "in a message of wrong length": pairs(LENGTH, 0, 1),
    "of no bytes": pairs(0, 0, LENGTH, 0),
    "behind the range": pairs(LENGTH, 0, 1, 0),
    "behind the range that": pairs(LENGTH - 1, 0, 100, 0, 1, 0),
    "without telling any": lambda peer, cookie: peer.chunk(cookie, 0, done=True),
    "twice": lambda peer, cookie: (pairs(LENGTH, 0)(peer, cookie).replace(b"\0\1\0", b"\0\0\0", 1)) * 2,
    "data where extents": lambda peer, cookie: peer.data(cookie, 0, b"x", of=0),
    "are the most": lambda peer, cookie: raw(peer, cookie, STATUS_EXT if peer.agreed == 2 else STATUS, 0x7FFFFFFF),
    "form": lambda peer, cookie: raw(peer, cookie, STATUS if peer.agreed == 2 else STATUS_EXT, 100),
}


@pytest.mark.parametrize("mode", ["structured", "extended"])
@pytest.mark.parametrize("words", EXTENT_LIES)
def test_lies_about_extents(words: str, mode: str) -> None:
    with pytest.raises(SourceBroken, match=words):
        misread(EXTENT_LIES[words], mode, status=True)


@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_the_last_extent_may_go_on_behind_the_range_but_not_behind_the_export(mode: str) -> None:
    for said, told in ((LENGTH - 100, LENGTH - 100), (LENGTH, LENGTH), (0xFFFFFFFF, 2 * LENGTH - 100)):
        command = misread(pairs(100, 2, said, 1), mode, status=True)
        assert command.extents == [Extent(0, 100, True), Extent(100, told, False)]
    most = (1 << 64) - 1 if mode == "extended" else (1 << 32) - 1
    assert misread(pairs(most, 0), mode, status=True).extents == [Extent(0, 2 * LENGTH, False)]
    assert misread(pairs(7, 3), mode, status=True).extents == [Extent(0, 7, True)]
    many = misread(pairs(*[1, 0, 1, 2] * (LENGTH // 2)), mode, status=True).extents
    assert many is not None
    assert len(many) == LENGTH
    with pytest.raises(SourceBroken, match="more or fewer"):
        misread(pairs(LENGTH, 0, count=2), "extended", status=True)


def test_ranges_that_cannot_be_asked_for() -> None:
    connection = opened(Peer(b"1234")).connection
    for offset, length in ((0, 0), (0, 5), (4, 1), (-1, 1)):
        with pytest.raises(ValueError, match="not a range"):
            connection.read(offset, memoryview(bytearray(length)))
    connection.close()
    with pytest.raises(RuntimeError):
        connection.read(0, memoryview(bytearray(1)))


# --- fuzz ---

STREAM = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 4000), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.integers(0, 4000), st.integers(1, 64)),
        st.tuples(st.just("put"), st.integers(0, 4000), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("copy"), st.integers(0, 4000), st.integers(1, 200)),
    ),
    max_size=6,
)


def mutate(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    out = bytearray(data)
    for what, at, how in changes:
        place = at % (len(out) + 1)
        if what == "flip" and place < len(out):
            out[place] ^= how
        elif what == "cut":
            del out[place : place + how]
        elif what == "put":
            out[place:place] = how
        elif what == "copy":
            out[place:place] = out[place : place + how]
    return bytes(out)


@pytest.mark.parametrize("goal", Goal)
@pytest.mark.parametrize("mode", MODES)
def test_honest_streams_are_heard_out(mode: str, goal: Goal) -> None:
    """Or the fuzzer would look at the first bytes alone."""
    says = HONEST[mode, goal]
    listen(says, goal, 1)
    talk = Talk(Connection(goal, "x"), Peer(CONTENTS[:3000], mode=mode, exports=("x", "y"), block_size=(1, 512, 4096)))
    talk.handshake()
    if goal is Goal.OPEN:
        play(talk)
        assert len(talk.settled) == (3 if mode == "simple" else 4)
    assert not talk.wire


@settings(max_examples=400)
@given(st.sampled_from(sorted(HONEST, key=str)), STREAM, st.sampled_from([1, 5, 1 << 30]))
def test_fuzzed_streams(which: tuple[str, Goal], changes: list[tuple[str, int, Any]], step: int) -> None:
    listen(mutate(HONEST[which], changes), which[1], step)


@given(st.binary(max_size=300), st.sampled_from(list(Goal)), st.booleans())
def test_any_bytes(data: bytes, goal: Goal, greets: bool) -> None:
    listen((greeting() if greets else b"") + data, goal, 1 << 30)


RUN = st.tuples(st.integers(1, 40), st.booleans())


@given(st.lists(RUN, min_size=1, max_size=30), st.randoms(), st.sampled_from(["structured", "extended"]))
def test_chunks_in_any_order_fill_a_read(runs: list[tuple[int, bool]], random: Any, mode: str) -> None:
    length = sum(size for size, _ in runs)
    contents = bytes(random.randrange(1, 256) for _ in range(length))
    expected = bytearray(contents)
    chunks: list[Callable[[Peer, int], bytes]] = []
    at = 0
    for size, zero in runs:
        if zero:
            expected[at : at + size] = bytes(size)
            chunks.append(lambda peer, cookie, at=at, size=size: peer.hole(cookie, at, size, of=0))
        else:
            part = contents[at : at + size]
            chunks.append(lambda peer, cookie, at=at, part=part: peer.data(cookie, at, part, of=0))
        at += size
    random.shuffle(chunks)

    class Shuffling(Peer):
        def request(self, number: int, cookie: int, offset: int, size: int) -> bytes:
            return b"".join(make(self, cookie) for make in chunks) + self.chunk(cookie, 0, done=True)

    talk = opened(Shuffling(contents, mode=mode))
    memory = bytearray(b"\xee" * length)
    command = talk.connection.read(0, memoryview(memory))
    talk.finish(command)
    assert command.error is None
    assert memory == expected
