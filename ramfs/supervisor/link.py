"""The daemon's end of the socket to its supervisor (process.py tells what goes over it)."""

import json
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from ramfs.supervisor.process import KEPT, MAX_MESSAGE, YIELDED

__all__ = ["YIELDED", "Go", "Link"]

_MOST_FDS: Final = len(KEPT)


@dataclass(frozen=True, slots=True)
class Go:
    """What a daemon is told when it is to serve."""

    supervisor: int
    """process id"""
    starts: int = 1
    """daemons so far, this one among them"""
    crashes: int = 0
    """of those, how many died"""
    why: str = ""
    """why there was another one before, in words; empty for the first"""
    yielded: bool = False
    """whether that one gave way to this one"""
    managed: bool = False
    """whether a service manager keeps the descriptors when the supervisor dies"""
    kept: dict[str, int] = field(default_factory=dict)
    """descriptors of the daemon before: ``fuse``, ``ledger``, ``lock``; none for the first"""


class Link:
    """A connected socket."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)

    def stand_by(self, version: str, ledger: int) -> Go | None:
        """Say that everything is imported, wait to be told to serve. None when there is no supervisor any more.

        ``ledger`` is the format in which this version keeps and reads the ledger.
        """
        self._tell({"warm": version, "ledger": ledger})
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, _MOST_FDS)
        except OSError:  # it died before it had read what was told to it
            return None
        if not data:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        facts = json.loads(data)["go"]
        kept = dict(zip(facts["kept"], fds, strict=True))
        return Go(
            facts["pid"], facts["starts"], facts["crashes"], facts["why"], facts["yielded"], facts["managed"], kept
        )

    def keep(self, name: str, fd: int) -> None:
        """Let the supervisor hold a descriptor for the daemons after this one."""
        self._tell({"keep": name}, fd)

    def ready(self, version: str) -> None:
        """The mount answers."""
        self._tell({"ready": version})

    def done(self) -> None:
        """The mount is gone; what is left to do is to close the store."""
        self._tell({"done": True})

    def _tell(self, message: dict[str, Any], *fds: int) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], fds)
        except OSError:
            return  # without a supervisor the daemon serves all the same

    async def orders(self) -> AsyncIterator[str]:
        """What the supervisor wants, ``"yield"`` or ``"stop"``, as long as there is one."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data = self._socket.recv(MAX_MESSAGE)
            except OSError:  # it died before it had read what was told to it
                return
            if not data:
                return
            (order,) = json.loads(data)
            yield order
