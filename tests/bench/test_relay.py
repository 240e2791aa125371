"""The line with a delay that benchmarks put before a server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from mount.posix import eventually

from tools.benchmarks.lazy import is_listening

TREE = Path(__file__).parents[2]
DELAY = 0.05


def test_bytes_come_later_and_all_at_once() -> None:
    data = os.urandom(8 << 20)

    def answer(server: socket.socket) -> None:
        client, _ = server.accept()
        with client:
            while client.recv(1):  # nothing comes before the other end has closed its half
                pass
            client.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        words = ["-m", "tools.benchmarks.relay", port, server.getsockname()[1], DELAY * 1e3]
        relay = subprocess.Popen([sys.executable, *map(str, words)], cwd=TREE)
        try:
            eventually(lambda: is_listening(port), "the relay listens")
            begun = time.monotonic()
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"ask")
                client.shutdown(socket.SHUT_WR)
                first = client.recv(1)
                took = time.monotonic() - begun
                got = first + b"".join(iter(lambda: client.recv(1 << 20), b""))
        finally:
            relay.kill()
            relay.wait()
    assert got == data
    assert took >= 3.9 * DELAY  # three ways until the other end is there, and one back
