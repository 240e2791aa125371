"""Extended attributes that nobody has set: what tables tell of a file, made for the asking (docs/format.md)."""

import errno
import json
import os
from typing import Final

from ramfs.errors import FileError
from ramfs.inspect import changes, states
from ramfs.inspect.generations import generation
from ramfs.inspect.report import Observer
from ramfs.namespace import CONTROL_XATTR, Caller, Namespace, may
from ramfs.pager import Pager
from ramfs.store.files import dirty_bytes
from ramfs.store.images import Image
from ramfs.units import InodeNumber

_PAGES: Final = CONTROL_XATTR + b"pages"
_DIRTY: Final = CONTROL_XATTR + b"dirty"
_GENERATION: Final = CONTROL_XATTR + b"generation"
#: access(2): may it be read?
_READ: Final = 4


class Questions:
    """Answers them."""

    def __init__(self, pager: Pager, namespace: Namespace, observer: Observer) -> None:
        self._pager = pager
        self._namespace = namespace
        self._looker = states.Looker(observer)

    async def answer(self, ino: InodeNumber, name: bytes, caller: Caller) -> bytes | None:
        """What an attribute reads as; None if it is none of these. Raises FileError: ENODATA if the file has none."""
        if name == _PAGES:
            return await self._looker.counts(self._image(ino))
        first = states.parse_question(name)
        if first is not None:
            return await self._looker.runs(self._image(ino), first)
        if name == _DIRTY:
            path = self._image(ino).direct
            dirty = None if path is None else dirty_bytes(path)
            if dirty is None:
                raise FileError(errno.ENODATA)
            return str(dirty).encode()
        question = changes.parse_question(name)
        if question is not None:
            return await self._changes(ino, question, caller)
        if name == _GENERATION:
            made, parent = generation(self._namespace, ino, caller)
            return json.dumps({"made": made, "parent": None if parent is None else os.fsdecode(parent)}).encode()
        return None

    def _image(self, ino: InodeNumber) -> Image:
        image = self._namespace.get(ino).image
        if image is None:
            raise FileError(errno.ENODATA)
        return image

    async def _changes(self, ino: InodeNumber, question: changes.Question, caller: Caller) -> bytes:
        """Which pages of a file are others than in another one, which the caller must be able to open."""
        space = self._namespace
        mine = space.get(ino).image
        with space.at(space.path_of(question.ino), caller) as other:
            if not may(other, caller, _READ):
                raise FileError(errno.EACCES)
            if other.image is None or mine is None:
                raise FileError(errno.ENODATA)
            theirs = space.images.acquire(other.image.id)
            space.images.acquire(mine.id)
        try:
            return await changes.answer(mine, theirs, self._pager.layers, question)
        finally:
            for image in (mine, theirs):
                space.images.release(image)
