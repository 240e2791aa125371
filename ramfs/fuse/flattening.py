"""``ramfs flatten`` in the daemon: one frozen image after the other, told to whoever asked, until he goes.

The work belongs to the open file ``.ramfs/control`` that asked for it: reading there tells how far it is, and
closing it, in whatever way, ends it. What is flat by then stays so; of the file under way nothing is left.
"""

import errno
import json
import logging
import os
import time
from typing import Any, Final

import trio

from ramfs.errors import FileError, RamfsError
from ramfs.pager import Pager
from ramfs.store.flat import Flatten
from ramfs.store.images import Image
from ramfs.units import PAGE, ImageId

log = logging.getLogger(__name__)

#: Why a file is left as it is.
_ZEROS: Final = "only zeros"
_RAGGED: Final = f"its size is no multiple of {PAGE}"


class Flattening:
    """A list of frozen images on their way. ``text`` tells how far it is; docs/format.md names the fields."""

    def __init__(self, pager: Pager, files: list[tuple[bytes, ImageId]]) -> None:
        self._pager = pager
        self._files = files
        self._work: Flatten | None = None
        self._scope = trio.CancelScope()
        self._told: dict[str, Any] = {"files": len(files), "results": [], "finished": False, "error": None}
        self._done = 0

    async def run(self) -> None:
        """Flatten them all; errors are told, not raised."""
        with self._scope:
            try:
                for path, number in self._files:
                    self._told["results"].append({"path": os.fsdecode(path), **await self._flatten(number)})
                    self._done += 1
                    self._work = None
            except FileError as exc:
                self._fail(exc.errno, str(exc))
            except RamfsError as exc:
                self._fail(errno.EIO, str(exc))
            except OSError as exc:
                self._fail(exc.errno or errno.EIO, exc.strerror or str(exc))
            except Exception:
                log.exception("flattening failed")
                self._fail(errno.EIO, os.strerror(errno.EIO))
            self._told["finished"] = True

    def _fail(self, number: int, text: str) -> None:
        self._told["error"] = {"errno": number, "message": text, "path": os.fsdecode(self._files[self._done][0])}

    async def _flatten(self, number: ImageId) -> dict[str, Any]:
        row = self._pager.store.catalog.row("SELECT id FROM images WHERE id = ?", number)
        if row is None:
            raise FileError(errno.ENOENT, "it was deleted meanwhile")
        image = self._pager.images.acquire(number)
        try:
            why = self._needless(image) or ("flat already" if await self._pager.is_flat(image) else "")
            if why:
                return {"flattened": False, "why": why, "bytes": 0, "seconds": 0.0}
            begin = time.monotonic()
            await self._pager.flatten(image, self._watch)
            assert self._work is not None
            return {"flattened": True, "why": "", "bytes": self._work.total, "seconds": time.monotonic() - begin}
        finally:
            self._pager.images.release(image)

    @staticmethod
    def _needless(image: Image) -> str:
        if image.size % PAGE:
            return _RAGGED
        return "" if image.table.resident() else _ZEROS

    def _watch(self, work: Flatten) -> None:
        self._work = work

    @property
    def text(self) -> bytes:
        """How far it is, as JSON. The results are told at the end only, when the text changes no more."""
        told = dict(self._told, done_files=self._done, path=None, done=0, total=0)
        if not told["finished"]:
            told["results"] = []
            told["path"] = os.fsdecode(self._files[self._done][0]) if self._done < len(self._files) else None
            if self._work is not None:
                told["done"], told["total"] = self._work.done, self._work.total
        return json.dumps(told).encode() + b"\n"

    def cancel(self) -> None:
        """End it; nothing is left of what is not complete."""
        self._scope.cancel()
