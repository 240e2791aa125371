"""The client against servers that lie, hang and vanish, over real sockets; and its reads in each other's way."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from nbd.kit import on_trio, opened, read, read_all, sample
from nbd.peer import (
    ACK,
    BLOCK_STATUS,
    GO,
    INFO,
    LIST,
    READ,
    SERVER,
    STARTTLS,
    Peer,
    export_info,
    option_reply,
    serving,
    string,
)
from nbd.servers import free_port, nbdkit, room

from ramfs.errors import SourceBroken, SourceChanged, SourceError, SourceLost, SourceRefused, UsageError
from ramfs.source.base import Extent
from ramfs.source.nbd_client import Limits, NbdDirectory

CONTENTS = sample(64 << 10)


def uri_of(path: Path, scheme: str = "nbd+unix") -> str:
    return f"{scheme}:///?socket={path}"


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
@on_trio
async def test_every_kind_of_reply(mode: str) -> None:
    with room() as at, serving(lambda: Peer(CONTENTS, mode=mode, flags=3 | 256), at / "s") as met:
        async with opened(uri_of(at / "s")) as source:
            assert await read_all(source, 10_000) == CONTENTS
            told = await source.extents(0, len(CONTENTS))
            if mode == "simple":
                assert told == [Extent(0, len(CONTENTS), False)]
            else:
                quarter = len(CONTENTS) // 4
                assert told[1] == Extent(quarter, quarter, True)
        assert len(met) == 2


def test_a_uri_that_is_none() -> None:
    with pytest.raises(UsageError):
        NbdDirectory("http://example.com/")


@on_trio
async def test_nobody_there() -> None:
    with room() as at, pytest.raises(SourceLost, match="cannot be reached: No such file or directory"):
        await NbdDirectory(uri_of(at / "s")).names()
    with pytest.raises(SourceLost, match="cannot be reached: "):
        await NbdDirectory("nbd://does-not-exist.invalid/").open("")


# --- the handshake ---


class Endless(Peer):
    """A list without end: sent until the client goes."""

    def option(self, number: int, data: bytes) -> bytes:
        return option_reply(number, SERVER, string("x" * 4000)) * 3000


class Stripping(Peer):
    """Says no to STARTTLS, as a man in the middle does, and yes to all that may follow."""

    def option(self, number: int, data: bytes) -> bytes:
        self.asked.append((number, 0, 0))
        return super().option(number, data)


class FakeTls(Peer):
    """Agrees to TLS and goes on in plain text."""

    agreed_to_tls = False

    def feed(self, data: bytes) -> bytes:
        return b"" if self.agreed_to_tls else super().feed(data)

    def option(self, number: int, data: bytes) -> bytes:
        self.agreed_to_tls = True
        return option_reply(number, ACK) + option_reply(GO, INFO, export_info(5)) + option_reply(GO, ACK)


class Hanging(Peer):
    """Leaves one option without an answer."""

    def option(self, number: int, data: bytes) -> bytes:
        return b"" if number in (GO, LIST) else super().option(number, data)


class Leaving(Peer):
    """Closes the connection when it is asked for the export."""

    def option(self, number: int, data: bytes) -> bytes:
        self.closed = number in (GO, LIST)
        return b"" if self.closed else super().option(number, data)


class Silent(Peer):
    def greeting(self) -> bytes:
        return b""


class Web(Peer):
    def greeting(self) -> bytes:
        return b"HTTP/1.1 400 Bad Request\r\n\r\n"


HANDSHAKES = [
    (Endless, "names", SourceBroken, "without end"),
    (Hanging, "names", SourceLost, r"finish the handshake within 0\.3 s"),
    (Hanging, "open", SourceLost, r"finish the handshake within 0\.3 s"),
    (Silent, "open", SourceLost, r"finish the handshake within 0\.3 s"),
    (Leaving, "open", SourceLost, "in the handshake, at GO"),
    (Leaving, "names", SourceLost, "in the handshake, at LIST"),
    (Web, "open", SourceBroken, "does not greet as an NBD server does"),
]


@pytest.mark.parametrize(("peer", "call", "error", "words"), HANDSHAKES)
@on_trio
async def test_handshakes(peer: type[Peer], call: str, error: type[SourceError], words: str) -> None:
    with room() as at, serving(peer, at / "s"):
        directory = NbdDirectory(uri_of(at / "s"), limits=Limits(handshake=5 if peer is Endless else 0.3))
        began = time.monotonic()
        with pytest.raises(error, match=words):
            await (directory.names() if call == "names" else directory.open(""))
        assert time.monotonic() - began < 4


@on_trio
async def test_tls_that_is_stripped_or_faked() -> None:
    with room() as at:
        with serving(lambda: Stripping(CONTENTS), at / "s") as met:
            with pytest.raises(SourceRefused, match="does not offer TLS"):
                await NbdDirectory(uri_of(at / "s", "nbds+unix")).open("secret")
            assert [number for number, _, _ in met[0].asked] == [STARTTLS]
        with serving(lambda: FakeTls(CONTENTS), at / "t"), pytest.raises(SourceBroken, match="does not speak TLS"):
            await NbdDirectory(uri_of(at / "t", "nbds+unix")).open("")


@on_trio
async def test_an_export_of_two_sizes() -> None:
    sizes = iter([5000, 6000])
    with room() as at, serving(lambda: Peer(bytes(next(sizes)), flags=3 | 256), at / "s"):
        async with opened(uri_of(at / "s"), connections=1) as source:
            assert await read(source, 0, 100) == bytes(100)
        sizes = iter([5000, 6000])
        async with opened(uri_of(at / "s")) as source:
            for urgent in (False, True):
                with pytest.raises(SourceChanged, match="another size on each connection"):
                    await read(source, 0, 100, urgent=urgent)


@on_trio
async def test_the_second_connection_is_made_when_the_first_is_busy() -> None:
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Peer(CONTENTS, flags=3 | 256))
        return peers[-1]

    with room() as at, serving(make, at / "s"):
        source = await NbdDirectory(uri_of(at / "s")).open("")
        assert await read(source, 0, 100) == CONTENTS[:100]
        assert await read(source, 0, 100, urgent=True) == CONTENTS[:100]
        assert source.connections == len(peers) == 1
        assert await read_all(source, 4096) == CONTENTS
        while source.connections == 1:  # noqa: ASYNC110  (it happens aside)
            await trio.sleep(0.001)
        before = len(peers[0].asked)
        assert await read(source, 0, 100, urgent=True) == CONTENTS[:100]
        assert (len(peers), len(peers[0].asked), len(peers[1].asked)) == (2, before, 1)
        await source.aclose()


@on_trio
async def test_closed_before_the_second_connection_is_there() -> None:
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Silent() if peers else Peer(CONTENTS, flags=3 | 256))
        return peers[-1]

    with room() as at, serving(make, at / "s"):
        source = await NbdDirectory(uri_of(at / "s")).open("")
        assert await read_all(source, 4096) == CONTENTS
        while len(peers) == 1:  # noqa: ASYNC110  (it happens aside)
            await trio.sleep(0.001)
        await source.aclose()
        assert source.connections == 1


@on_trio
async def test_a_second_connection_that_is_not_to_be_had() -> None:
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Silent() if peers else Peer(CONTENTS, flags=3 | 256))
        return peers[-1]

    with room() as at, serving(make, at / "s"):
        async with opened(uri_of(at / "s"), handshake=0.2) as source:
            assert source.connections == 1
            assert await read(source, 0, 100, urgent=True) == CONTENTS[:100]


# --- transmission ---


def lying(lie: Callable[[Peer, int, int], bytes], number: int = READ) -> Callable[[], Peer]:
    class Liar(Peer):
        def request(self, asked: int, cookie: int, offset: int, length: int) -> bytes:
            return lie(self, cookie, offset) if asked == number else super().request(asked, cookie, offset, length)

    return lambda: Liar(CONTENTS)


def closing(peer: Peer, cookie: int, offset: int) -> bytes:
    peer.closed = True
    return peer.data(cookie, offset, CONTENTS[offset : offset + 100], of=offset)[:-50]


LIES = {
    "another cookie": (lambda peer, cookie, offset: peer.chunk(cookie + 100, 0, done=True), SourceBroken),
    "too many bytes": (lambda peer, cookie, offset: peer.data(cookie, offset, bytes(101), of=offset), SourceBroken),
    "bytes twice": (lambda peer, cookie, offset: peer.data(cookie, offset, b"12", of=offset) * 2, SourceBroken),
    "too few bytes": (lambda peer, cookie, offset: peer.chunk(cookie, 0, done=True), SourceBroken),
    "a huge error": (
        lambda peer, cookie, offset: struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, cookie, 1 << 31),
        SourceBroken,
    ),
    "a huge hole": (lambda peer, cookie, offset: peer.hole(cookie, 0, 0xFFFFFFFF, of=offset), SourceBroken),
    "noise": (lambda peer, cookie, offset: bytes(range(256)) * 4, SourceBroken),
    "the end": (closing, SourceLost),
    "nothing": (lambda peer, cookie, offset: b"", SourceLost),
}


@pytest.mark.parametrize("what", LIES)
@on_trio
async def test_one_lie_is_the_end_for_all_reads_under_way(what: str) -> None:
    lie, error = LIES[what]
    with room() as at, serving(lying(lie), at / "s"):
        async with opened(uri_of(at / "s"), silence=0.3) as source:
            ended = []

            async def one(offset: int) -> None:
                with pytest.raises(error) as caught:
                    await read(source, offset, 100)
                ended.append(str(caught.value))

            async with trio.open_nursery() as nursery:
                for number in range(100):  # more than are asked for at once
                    nursery.start_soon(one, number * 100)
            assert len(ended) == 100
            assert all(line.startswith("nbd+unix:///") for line in ended)
            with pytest.raises(error):
                await source.extents(0, 100)


@on_trio
async def test_lies_about_extents() -> None:
    def lie(peer: Peer, cookie: int, offset: int) -> bytes:
        return peer.chunk(cookie, 5, struct.pack(">III", 77, 0, 2), done=True)

    with room() as at, serving(lying(lie, BLOCK_STATUS), at / "s"):
        async with opened(uri_of(at / "s")) as source:
            with pytest.raises(SourceBroken, match="of no bytes"):
                await source.extents(0, 4096)


@on_trio
async def test_a_request_that_is_never_answered() -> None:
    """Though all others are, so that the server is anything but silent."""

    def lie(peer: Peer, cookie: int, offset: int) -> bytes:
        return b"" if offset == 0 else peer.pieces(cookie, offset, CONTENTS[offset : offset + 512])

    with room() as at, serving(lying(lie), at / "s"):
        async with opened(uri_of(at / "s"), silence=5, patience=0.4) as source:
            ended = []

            async def forgotten() -> None:
                with pytest.raises(SourceLost, match=r"unanswered for 0\.4 s"):
                    await read(source, 0, 512)
                ended.append(True)

            async def others() -> None:
                with contextlib.suppress(SourceLost):
                    while True:
                        await read(source, 512, 512)
                        await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(forgotten)
                nursery.start_soon(others)
            assert ended


@on_trio
async def test_a_dead_server_is_noticed_by_impatient_readers() -> None:
    """Readers who give up again and again do not begin the silence anew."""
    with room() as at, serving(lying(lambda *_: b""), at / "s"):
        async with opened(uri_of(at / "s"), silence=0.4, goodbye=0.05) as source:
            began = time.monotonic()

            async def impatient() -> None:
                while True:
                    with trio.move_on_after(0.02):
                        await read(source, 0, 512)

            with pytest.raises(SourceLost, match="has said nothing"):
                await impatient()
            assert time.monotonic() - began < 3


# --- many reads ---


class Holding(Peer):
    """Holds back the replies to reads below 4096, until one at RELEASE is asked for, or `most` are held."""

    RELEASE = 8192

    def __init__(self, most: int = 1 << 30) -> None:
        super().__init__(CONTENTS)
        self.held = b""
        self.count = 0
        self.most = most

    def request(self, number: int, cookie: int, offset: int, length: int) -> bytes:
        reply = super().request(number, cookie, offset, length)
        if offset < 4096:
            self.held += reply
            self.count += 1
            reply = b""
        if offset == self.RELEASE or self.count == self.most:
            reply, self.held = self.held + reply, b""
        return reply


@on_trio
async def test_who_receives_is_cancelled_together_with_who_would_be_next() -> None:
    with room() as at, serving(Holding, at / "s"):
        async with opened(uri_of(at / "s")) as source:
            for _ in range(20):  # the order in which the two learn of it is chance
                scopes = [trio.CancelScope(), trio.CancelScope()]

                async def cancelled(scope: trio.CancelScope) -> None:
                    with scope:
                        await read(source, 0, 512)

                async def kept() -> None:
                    assert await read(source, 512, 512) == CONTENTS[512:1024]

                async with trio.open_nursery() as nursery:
                    for reader in (*(functools.partial(cancelled, scope) for scope in scopes), kept):
                        nursery.start_soon(reader)
                        await trio.testing.wait_all_tasks_blocked()
                    for scope in scopes:
                        scope.cancel()
                    await trio.testing.wait_all_tasks_blocked()
                    # On the same connection: its reply is received only if somebody has taken the turn.
                    lane = source._lanes[0]
                    assert lane._driven
                    await read(source, Holding.RELEASE, 512)


@on_trio
async def test_a_cancelled_read_lets_go_of_its_memory() -> None:
    with room() as at, serving(Holding, at / "s"):
        async with opened(uri_of(at / "s")) as source:
            memory = bytearray(512)
            with trio.move_on_after(0.02):
                await source.read_into(0, memoryview(memory))
            # trio keeps the Cancelled, whose traceback has the frames of the read, until the task's next checkpoint.
            await trio.lowlevel.checkpoint()
            gc.collect()
            memory.append(1)  # BufferError if it were held
            assert await read(source, Holding.RELEASE, 512) == CONTENTS[8192:8704]
            assert memory == bytes(512) + b"\1"


@on_trio
async def test_who_waits_for_a_turn_gets_it_with_the_next_reply() -> None:
    """Also while the one who receives for all goes on waiting for its own."""
    with room() as at, serving(Holding, at / "s"):
        async with opened(uri_of(at / "s"), requests=2) as source, trio.open_nursery() as nursery:
            nursery.start_soon(read, source, 0, 512)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as others:
                for number in range(10):
                    others.start_soon(read, source, 16384 + 512 * number, 512)
            await read(source, Holding.RELEASE, 512)


@pytest.mark.parametrize("requests", [1, 3, 64])
@on_trio
async def test_a_storm_of_reads_and_cancellations(requests: int) -> None:
    """Whoever is cancelled, and at whatever moment: all others get their bytes, and nobody waits for ever."""
    rng = random.Random(requests)
    with room() as at, serving(lambda: Peer(CONTENTS, flags=3 | 256), at / "s"):
        async with opened(uri_of(at / "s"), requests=requests) as source:
            done = 0

            async def reader(number: int) -> None:
                nonlocal done
                for _ in range(25):
                    offset = rng.randrange(0, len(CONTENTS) - 3000)
                    if number % 2:
                        with trio.move_on_after(rng.choice([0, 0.0002, 0.002])):
                            await read(source, offset, 3000, urgent=number % 4 == 1)
                        continue
                    assert await read(source, offset, 3000) == CONTENTS[offset : offset + 3000]
                    done += 1

            async with trio.open_nursery() as nursery:
                for number in range(24):
                    nursery.start_soon(reader, number)
            assert done == 12 * 25


@on_trio
async def test_closing_ends_reads_at_once() -> None:
    with room() as at, serving(lying(lambda *_: b""), at / "s"):
        async with opened(uri_of(at / "s"), requests=4, goodbye=0.2) as source:
            ended = []

            async def one() -> None:
                with pytest.raises(SourceLost, match="is closed"):
                    await read(source, 0, 512)
                ended.append(trio.current_time())

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(one)
                await trio.testing.wait_all_tasks_blocked()
                began = trio.current_time()
                await source.aclose()
            assert max(ended) - began < 0.15
            with pytest.raises(SourceLost, match="is closed"):
                await read(source, 0, 512)
            await source.aclose()


@on_trio
async def test_requests_that_the_socket_does_not_take() -> None:
    """A server that does not read for a while, and does not reply before it has all: the rest is sent as it reads."""
    with room() as at:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(at / "s"))
        listening.listen()
        go = threading.Event()
        peer = Holding(most=1000)

        def serve() -> None:
            # The client may be gone before it has the answer to its goodbye.
            with contextlib.suppress(OSError), listening.accept()[0] as sock:
                sock.sendall(peer.greeting())
                while not peer.open:
                    sock.sendall(peer.feed(sock.recv(4096)))
                go.wait(10)
                while data := sock.recv(4096):
                    sock.sendall(peer.feed(data))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            async with opened(uri_of(at / "s"), requests=5000) as source:
                # Each message takes up almost a kilobyte of it.
                source._lanes[0]._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
                good = []

                async def one(offset: int) -> None:
                    good.append(await read(source, offset, 10) == CONTENTS[offset : offset + 10])

                async with trio.open_nursery() as nursery:
                    for number in range(1000):
                        nursery.start_soon(one, number * 4)
                    await trio.testing.wait_all_tasks_blocked()
                    assert source._lanes[0]._outgoing
                    go.set()
                assert good == [True] * 1000
        finally:
            go.set()
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            listening.close()


@on_trio
async def test_closing_by_one_who_is_cancelled() -> None:
    """Gives up what is due, and closes all the same."""
    with room() as at, serving(Holding, at / "s"):
        source = await NbdDirectory(uri_of(at / "s")).open("")
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                with pytest.raises(SourceLost, match="is closed"):
                    await read(source, 0, 512)

            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                scope.cancel()
                await source.aclose()
        assert source._lanes[0]._socket.fileno() == -1


@on_trio
async def test_options_of_the_socket() -> None:
    port = free_port()
    with nbdkit("memory", "1M", port=port) as uri:
        async with opened(uri) as source:
            for lane in source._lanes:
                sock = lane._socket
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
