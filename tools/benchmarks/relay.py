"""A TCP port that leads to another one over a line with a delay, for kernels without netem.

    python -m tools.benchmarks.relay PORT TARGET MS

Each byte comes out MS milliseconds after it went in, either way, at whatever rate they come; and a connection is there
for its two ends when the packets of TCP's handshake would have made it.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from queue import SimpleQueue

HOST = "127.0.0.1"
#: Bytes taken at once, and how many of these are on the line at most: a GiB/s for 0.2 s.
PIECE, MOST = 1 << 18, 800

Line = SimpleQueue[tuple[float, bytes]]


def take(source: socket.socket, line: Line, room: threading.Semaphore, delay: float, since: float) -> None:
    """Put what a socket has on the line, until it ends; nothing is sent before the moment ``since``."""
    data = b"?"
    while data:
        room.acquire()
        try:
            data = source.recv(PIECE)
        except OSError:
            data = b""
        line.put((max(time.monotonic(), since) + delay, data))


def give(line: Line, room: threading.Semaphore, sink: socket.socket) -> None:
    """Give what comes over the line to a socket, each piece when its time has come."""
    with contextlib.suppress(OSError):
        while True:
            due, data = line.get()
            room.release()
            time.sleep(max(0.0, due - time.monotonic()))
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)


def join(near: socket.socket, target: int, delay: float) -> None:
    """Serve a connection that was just accepted."""
    accepted = time.monotonic()
    there, back, room, other = Line(), Line(), threading.Semaphore(MOST), threading.Semaphore(MOST)
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # SYN, and its answer: two ways. Then it is open here; over there when the answer to that is there, one more.
    threading.Thread(target=take, args=(near, there, room, delay, accepted + 2 * delay), daemon=True).start()
    time.sleep(3 * delay)
    with near, socket.create_connection((HOST, target)) as far:
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        rest = [
            threading.Thread(target=take, args=(far, back, other, delay, 0.0), daemon=True),
            threading.Thread(target=give, args=(back, other, near), daemon=True),
        ]
        for each in rest:
            each.start()
        give(there, room, far)
        for each in rest:
            each.join()


def main() -> None:
    port, target, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1e3
    with socket.create_server((HOST, port)) as server:
        while True:
            near, _ = server.accept()
            threading.Thread(target=join, args=(near, target, delay), daemon=True).start()


if __name__ == "__main__":
    main()
