"""What somebody asks for by writing to ``.ramfs/control`` and that takes time; reading there tells how it goes.

A job belongs to the open file that asked for it: closing that, in whatever way, ends it.
"""

import errno
import json
import logging
import os
from typing import Any

import trio

from ramfs.errors import RamfsError

log = logging.getLogger(__name__)


class Job:
    """One of them: what it does is in :meth:`work`. ``text`` tells how far it is; docs/format.md names the fields."""

    def __init__(self, **told: Any) -> None:
        self._scope = trio.CancelScope()
        self._told: dict[str, Any] = {"finished": False, "error": None, **told}

    async def run(self) -> None:
        """Do it; errors are told, not raised."""
        with self._scope:
            try:
                await self.work()
            except RamfsError as exc:
                self.fail(exc.errno, str(exc), exc.exit_code)
            except OSError as exc:
                self.fail(exc.errno or errno.EIO, exc.strerror or str(exc))
            except Exception:
                log.exception("%s failed", type(self).__name__)
                self.fail(errno.EIO, os.strerror(errno.EIO))
            self._told["finished"] = True

    async def work(self) -> None:
        """Do it. What it raises is told."""
        raise NotImplementedError

    def fail(self, number: int, text: str, exit_code: int = 1) -> None:
        """Tell an error, by its errno, its sentence and what a command exits with."""
        self._told["error"] = {"errno": number, "message": text, "exit": exit_code}

    @property
    def text(self) -> bytes:
        """How far it is, as JSON."""
        return json.dumps(self._told).encode() + b"\n"

    def cancel(self) -> None:
        """Nobody is there any more to hear of it: end it."""
        self._scope.cancel()
