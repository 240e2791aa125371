"""A man in the middle of a QMP conversation, who makes something happen just before a command."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Called with the command; returns None to let it pass, or the answer to give in QEMU's place.
Hook = Callable[[dict[str, Any]], dict[str, Any] | None]


class Proxy:
    """Listens at `path` for one client and talks to the QEMU at `real` for it.

    `before` maps a command's name to what happens before QEMU sees it. `passed` lists the commands seen.
    A descriptor that is handed over is replaced by `substitute` when that is given.
    """

    def __init__(self, real: Path, path: Path, before: Mapping[str, Hook], *, substitute: str | None = None) -> None:
        self.path = path
        self.passed: list[str] = []
        self._before = before
        self._substitute = substitute
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._qemu = socket.socket(socket.AF_UNIX)
        self._qemu.connect(str(real))
        self._client: socket.socket | None = None
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listening, self._client, self._qemu):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._listening, self._client, self._qemu):
            if sock is not None:
                sock.close()

    def _serve(self) -> None:
        try:
            self._client, _ = self._listening.accept()
        except OSError:
            return
        back = threading.Thread(target=self._back, args=(self._client,), daemon=True)
        self._threads.append(back)
        back.start()
        with contextlib.suppress(OSError):
            self._forth(self._client)
        with contextlib.suppress(OSError):
            self._qemu.shutdown(socket.SHUT_RDWR)

    def _forth(self, client: socket.socket) -> None:
        text = ""
        while True:
            data, fds, _, _ = socket.recv_fds(client, 1 << 16, 4)
            if not data:
                return
            if fds:
                socket.send_fds(self._qemu, [b" "], [self._exchange(fd) for fd in fds])
                for fd in fds:
                    os.close(fd)
            text = (text + data.decode()).lstrip()
            while text:
                try:
                    message, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break  # the rest of it has not arrived
                text = text[end:].lstrip()
                self._command(client, message)

    def _command(self, client: socket.socket, message: dict[str, Any]) -> None:
        name = message.get("execute", "")
        self.passed.append(name)
        hook = self._before.get(name)
        answer = hook(message) if hook is not None else None
        if answer is None:
            self._qemu.sendall(json.dumps(message).encode())
        else:
            client.sendall(json.dumps({**answer, "id": message.get("id")}).encode() + b"\n")

    def _exchange(self, fd: int) -> int:
        if self._substitute is not None:
            other = os.open(self._substitute, os.O_WRONLY)
            os.dup2(other, fd)
            os.close(other)
        return fd

    def _back(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._qemu.recv(1 << 16):
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
