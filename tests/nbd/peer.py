"""The other end of an NBD connection, for what no server at hand does: extended headers, and every kind of lie.

`Peer` is an honest server without a socket: `feed` takes the client's bytes and returns the answer. A liar is a
subclass that overrides one of `greeting`, `option` and `request`. `serving` gives it a real socket.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

IHAVEOPT = 0x49484156454F5054
ACK, SERVER, INFO, META = 1, 2, 3, 4
UNSUP, POLICY, TLS_REQD, UNKNOWN, SHUTDOWN = ((1 << 31) + n for n in (1, 2, 5, 6, 7))
ABORT, LIST, STARTTLS, OPT_INFO, GO, STRUCTURED, SET_META, EXTENDED = 2, 3, 5, 6, 7, 8, 10, 11
READ, DISCONNECT, BLOCK_STATUS = 0, 2, 7
DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 1, 2, 5, 6, 0x8001, 0x8002
CONTEXT = 77
GRAIN = 512


def greeting(flags: int = 3, option: int = IHAVEOPT, magic: bytes = b"NBDMAGIC") -> bytes:
    return magic + struct.pack(">QH", option, flags)


def option_reply(number: int, kind: int, data: bytes = b"", magic: int = 0x3E889045565A9) -> bytes:
    return struct.pack(">QIII", magic, number, kind, len(data)) + data


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def export_info(size: int, flags: int = 3) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


class Peer:
    """Serves `contents` under every name of `exports`; runs of zeros of at least GRAIN bytes are its holes."""

    def __init__(
        self,
        contents: bytes = b"",
        *,
        mode: str = "structured",
        exports: tuple[str, ...] = ("",),
        block_size: tuple[int, int, int] | None = None,
        context: bool = True,
        flags: int = 3,
    ) -> None:
        self.contents = contents
        self.exports = exports
        self.mode = {"simple": 0, "structured": 1, "extended": 2}[mode]
        self.agreed = 0
        self.block_size = block_size
        self.context = context
        self.flags = flags
        self.open = False
        self.asked: list[tuple[int, int, int]] = []  # request, offset, length
        self.closed = False
        self._input = bytearray()
        self._stage = self._client_flags
        self._want = 4

    # --- what liars override ---

    def greeting(self) -> bytes:
        return greeting()

    def option(self, number: int, data: bytes) -> bytes:
        if number == STRUCTURED and self.mode >= 1:
            self.agreed = 1
            return option_reply(number, ACK)
        if number == EXTENDED and self.mode == 2:
            self.agreed = 2
            return option_reply(number, ACK)
        if number == LIST:
            listed = (option_reply(number, SERVER, string(name) + b"a description") for name in self.exports)
            return b"".join(listed) + option_reply(number, ACK)
        if number == ABORT:
            self.closed = True
            return option_reply(number, ACK)
        if number in (SET_META, GO, OPT_INFO):
            name = data[4 : 4 + int.from_bytes(data[:4])].decode()
            if name not in self.exports:
                return option_reply(number, UNKNOWN, b"no such export")
            if number == SET_META:
                chosen = option_reply(number, META, struct.pack(">I", CONTEXT) + b"base:allocation")
                return (chosen if self.context else b"") + option_reply(number, ACK)
            told = option_reply(number, INFO, export_info(len(self.contents), self.flags))
            told += option_reply(number, INFO, struct.pack(">H", 2) + b"described")
            if self.block_size:
                told += option_reply(number, INFO, struct.pack(">HIII", 3, *self.block_size))
            self.open = number == GO
            return told + option_reply(number, ACK)
        return option_reply(number, UNSUP, b"not here")

    def request(self, number: int, cookie: int, offset: int, length: int) -> bytes:
        if number == READ:
            data = self.contents[offset : offset + length]
            if self.agreed == 0:
                return self.simple(cookie) + data
            return self.pieces(cookie, offset, data)
        return self.status(cookie, offset, length)

    # --- honest answers ---

    def simple(self, cookie: int, error: int = 0) -> bytes:
        return struct.pack(">IIQ", 0x67446698, error, cookie)

    def chunk(self, cookie: int, kind: int, data: bytes = b"", *, done: bool = False, offset: int = 0) -> bytes:
        if self.agreed == 2:
            head = struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, cookie, offset, len(data))
        else:
            head = struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(data))
        return head + data

    def data(self, cookie: int, offset: int, data: bytes, *, of: int, done: bool = False) -> bytes:
        """Bytes of the read that began at `of`."""
        return self.chunk(cookie, DATA, struct.pack(">Q", offset) + data, done=done, offset=of)

    def hole(self, cookie: int, offset: int, length: int, *, of: int, done: bool = False) -> bytes:
        return self.chunk(cookie, HOLE, struct.pack(">QI", offset, length), done=done, offset=of)

    def error(self, cookie: int, code: int, message: bytes, *, of: int, done: bool = False) -> bytes:
        return self.chunk(cookie, ERROR, struct.pack(">IH", code, len(message)) + message, done=done, offset=of)

    def runs(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, zero), grain by grain, neighbours not joined."""
        found = []
        while length:
            size = min(GRAIN - offset % GRAIN, length)
            found.append((offset, size, not any(self.contents[offset : offset + size])))
            offset, length = offset + size, length - size
        return found

    def pieces(self, cookie: int, offset: int, data: bytes) -> bytes:
        """Chunks from the last one to the first one, and the end in a chunk of its own."""
        out = b""
        for start, length, zero in reversed(self.runs(offset, len(data))):
            if zero:
                out += self.hole(cookie, start, length, of=offset)
            else:
                out += self.data(cookie, start, data[start - offset : start - offset + length], of=offset)
        return out + self.chunk(cookie, 0, done=True, offset=offset)

    def status(self, cookie: int, offset: int, length: int) -> bytes:
        runs = [(size, 3 if zero else 0) for _, size, zero in self.runs(offset, length)]
        if self.agreed == 2:
            body = struct.pack(">II", CONTEXT, len(runs)) + b"".join(struct.pack(">QQ", *run) for run in runs)
        else:
            body = struct.pack(">I", CONTEXT) + b"".join(struct.pack(">II", *run) for run in runs)
        return self.chunk(cookie, STATUS_EXT if self.agreed == 2 else STATUS, body, done=True, offset=offset)

    # --- the machinery ---

    def feed(self, data: bytes) -> bytes:
        self._input += data
        out = b""
        while not self.closed and len(self._input) >= self._want:
            message = bytes(self._input[: self._want])
            del self._input[: self._want]
            out += self._stage(message)
        return out

    def _client_flags(self, data: bytes) -> bytes:
        assert int.from_bytes(data) & ~3 == 0
        self._await(16, self._option)
        return b""

    def _await(self, count: int, stage: Callable[[bytes], bytes]) -> None:
        self._want, self._stage = count, stage

    def _option(self, head: bytes) -> bytes:
        magic, number, length = struct.unpack(">QII", head)
        assert magic == IHAVEOPT
        self._await(length, lambda data: self._told(number, data))
        return b""

    def _told(self, number: int, data: bytes) -> bytes:
        self._await(16, self._option)
        answer = self.option(number, data)
        if self.open:
            self._await(32 if self.agreed == 2 else 28, self._request)
        return answer

    def _request(self, data: bytes) -> bytes:
        form, expected = (">IHHQQQ", 0x21E41C71) if self.agreed == 2 else (">IHHQQI", 0x25609513)
        magic, flags, number, cookie, offset, length = struct.unpack(form, data)
        assert (magic, flags) == (expected, 0)
        if number == DISCONNECT:
            self.closed = True
            return b""
        self.asked.append((number, offset, length))
        return self.request(number, cookie, offset, length)


@contextlib.contextmanager
def serving(make: Callable[[], Peer], path: Path) -> Iterator[list[Peer]]:
    """Serve at a Unix socket, with a peer of its own for each connection; yields the peers met so far."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(16)
    met: list[Peer] = []
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def talk(peer: Peer, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(peer.greeting())
            while not peer.closed and (data := sock.recv(1 << 16)):
                sock.sendall(peer.feed(data))
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                peer = make()
                met.append(peer)
                sockets.append(sock)
                threads.append(threading.Thread(target=talk, args=(peer, sock), daemon=True))
                threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield met
    finally:
        for sock in (listening, *sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        acceptor.join()
        for thread in threads:
            thread.join()
        for sock in (listening, *sockets):
            sock.close()
