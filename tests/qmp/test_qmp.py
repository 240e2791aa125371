"""ramfs.qmp against QEMU, and against servers that are not QEMU or not well."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm.guest import Guest

from ramfs import qmp
from ramfs.errors import QmpError

VERSION = b'{"qemu": {"major": 3, "minor": 1, "micro": 0}, "package": ""}'
GREETING = b'{"QMP": {"version": %s, "capabilities": []}}\n' % VERSION


@contextmanager
def server(path: Path, *says: bytes) -> Iterator[None]:
    """Accepts one client, says one thing after each line or message that it hears, then hangs up."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(1)

    def serve() -> None:
        client, _ = listening.accept()
        with client:
            client.sendall(says[0])
            for text in says[1:]:
                client.recv(1 << 16)
                client.sendall(text)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        listening.close()


def talk(path: Path, what: Callable[[qmp.Qmp], object] | None = None, greeting: float = 5) -> None:
    async def run() -> None:
        async with qmp.connect(path, greeting) as guest:
            if what is not None:
                await what(guest)

    asyncio.run(run())


def test_another_client_holds_the_socket(tmp_path_short: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path_short / "qmp"))
    listening.listen(1)
    with listening, pytest.raises(QmpError, match="another client may hold it"):
        talk(tmp_path_short / "qmp", greeting=0.1)


@pytest.mark.parametrize("says", [b"SSH-2.0-OpenSSH\r\n", b"{}\n", b"[]\n", b'{"QMP": 1}\n', b"", b"\xff\xfe\n", b"{"])
def test_not_qemu(tmp_path_short: Path, says: bytes) -> None:
    with server(tmp_path_short / "qmp", says), pytest.raises(QmpError, match="cannot reach QEMU at") as error:
        talk(tmp_path_short / "qmp")
    assert "\n" not in str(error.value)


def test_an_old_qemu_without_the_capability(tmp_path_short: Path) -> None:
    answers = [
        b'{"return": {}}\n',
        b'{"return": [{"capability": "xbzrle", "state": false}], "id": "__qmp#00000"}\n',
    ]
    with server(tmp_path_short / "qmp", GREETING, *answers), pytest.raises(QmpError, match="x-ignore-shared"):
        talk(tmp_path_short / "qmp", lambda guest: guest.require_ignore_shared())


def test_an_event_before_the_first_answer(tmp_path_short: Path) -> None:
    """QEMU takes the first command, then something happens in the guest, then it answers."""
    event = b'{"event": "RTC_CHANGE", "data": {"offset": 0}, "timestamp": {"seconds": 1, "microseconds": 2}}\n'
    answer = b'{"return": {"status": "running", "singlestep": false, "running": true}, "id": "__qmp#00000"}\n'
    with server(tmp_path_short / "qmp", GREETING, event + b'{"return": {}}\n', event + answer):
        talk(tmp_path_short / "qmp", lambda guest: guest.status())


def test_hangs_up_in_the_middle(tmp_path_short: Path) -> None:
    with (
        server(tmp_path_short / "qmp", GREETING, b'{"return": {}}\n', b'{"return'),
        pytest.raises(qmp.QmpGone, match="query-status"),
    ):
        talk(tmp_path_short / "qmp", lambda guest: guest.status())


def test_qemu_hangs(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "ANSWER", 0.2)
    monkeypatch.setattr(qmp, "GREETING", 0.2)
    with Guest(shm / "ram", mib=16, kernel=False) as guest:

        async def run() -> None:
            async with qmp.connect(guest.socket, 5) as talk:
                os.kill(guest.pid, signal.SIGSTOP)
                await talk.status()

        with pytest.raises(QmpError, match="has not answered query-status"):
            asyncio.run(run())


def test_the_peer_is_qemu(shm: Path) -> None:
    with Guest(shm / "ram", mib=16, kernel=False) as guest:

        async def run() -> int | None:
            async with qmp.connect(guest.socket) as talk:
                return talk.peer()

        assert asyncio.run(run()) == guest.pid


def test_a_state_goes_there_and_back(shm: Path) -> None:
    state = shm / "state"
    fd = os.open(state, os.O_WRONLY | os.O_CREAT)

    async def save(path: Path) -> None:
        async with qmp.connect(path) as talk:
            async with talk.saving():
                await talk.stop()
                await talk.save_state(fd)
            shutil.copy(shm / "ram", shm / "then")  # it goes on, and changes its memory
            await talk.cont()

    with Guest(shm / "ram", mib=16, kernel=False) as guest:
        asyncio.run(save(guest.socket))
        os.close(fd)
        assert guest.status() == "running"
    with Guest(shm / "then", mib=16, kernel=False, incoming=True) as guest:
        guest.load(state)
        assert guest.status() == "running"


def test_loading_what_is_no_state(shm: Path) -> None:
    (shm / "state").write_bytes(b"nonsense" * 100)
    with Guest(shm / "ram", mib=16, kernel=False, incoming=True) as guest:
        with pytest.raises(QmpError, match="cannot read the state"):
            talk(guest.socket, lambda each: each.load_state(shm / "missing"))
        with pytest.raises(QmpError, match="ended or closed"):
            talk(guest.socket, lambda each: each.load_state(shm / "state"))


def test_loading_into_a_guest_that_runs(shm: Path) -> None:
    (shm / "state").write_bytes(b"")
    with (
        Guest(shm / "ram", mib=16, kernel=False) as guest,
        pytest.raises(QmpError, match="refuses the state"),
    ):
        talk(guest.socket, lambda each: each.load_state(shm / "state"))
