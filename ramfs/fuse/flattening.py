"""``ramfs flatten`` in the daemon: one frozen image after the other, told to whoever asked, until he goes.

What is flat when somebody ends it stays so; of the file under way nothing is left.
"""

import errno
import json
import os
import time
from typing import Any, Final

from ramfs.errors import FileError
from ramfs.fuse.jobs import Job
from ramfs.pager import Pager
from ramfs.store.flat import Flatten
from ramfs.store.images import Image
from ramfs.units import PAGE, ImageId

#: Why a file is left as it is.
_ZEROS: Final = "only zeros"
_RAGGED: Final = f"its size is no multiple of {PAGE}"


class Flattening(Job):
    """A list of frozen images on their way."""

    def __init__(self, pager: Pager, files: list[tuple[bytes, ImageId]]) -> None:
        super().__init__(files=len(files), results=[])
        self._pager = pager
        self._files = files
        self._work: Flatten | None = None
        self._done = 0

    async def work(self) -> None:
        """Flatten them all."""
        for path, number in self._files:
            self._told["results"].append({"path": os.fsdecode(path), **await self._flatten(number)})
            self._done += 1
            self._work = None

    def fail(self, number: int, text: str, exit_code: int = 1) -> None:
        """Tell an error, and of which file it is."""
        super().fail(number, text, exit_code)
        self._told["error"]["path"] = os.fsdecode(self._files[self._done][0])

    async def _flatten(self, number: ImageId) -> dict[str, Any]:
        if not self._pager.images.exists(number):
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
