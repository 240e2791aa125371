"""What ssh is between real hosts, without its keys: runs commands on another host over a real connection.

    python rsh.py serve PORT            there
    python rsh.py ADDRESS PORT WORDS    here: standard input goes there, standard output comes back

RSH_BREAKS=before or after: the connection breaks when the guest is told to go on, before or after that has got there.
RSH_STOPS=JOURNAL: the agent that has that journal, on this very machine, is stopped before, and does not see it break.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path


def serve(port: int) -> None:
    with socket.create_server(("", port)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb", buffering=0) as file:
                words = json.loads(file.readline())
                # A process of its own, which has the connection as its standard input and output.
                subprocess.Popen(words, stdin=connection, stdout=connection, stderr=connection, start_new_session=True)


def call(address: str, port: int, words: list[str]) -> None:
    connection = socket.create_connection((address, port), timeout=5)
    connection.settimeout(None)
    breaks = os.environ.get("RSH_BREAKS")
    broken = threading.Event()
    connection.sendall(json.dumps(words).encode() + b"\n")

    def forward() -> None:
        while data := os.read(0, 1 << 16):
            told = b'"do": "go"' in data
            if told and (journal := os.environ.get("RSH_STOPS")):
                os.kill(json.loads(Path(journal).read_text())["agent"], signal.SIGSTOP)
            if told and breaks == "before":
                os._exit(1)
            if told and breaks == "after":
                broken.set()  # before it can be answered
            connection.sendall(data)
            if broken.is_set():
                os._exit(1)
        connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=forward, daemon=True).start()
    while (data := connection.recv(1 << 16)) and not broken.is_set():
        os.write(1, data)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        call(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
