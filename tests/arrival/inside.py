"""A store without a mount that pulls, from a source that gives out as many reads as a test allows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import numpy as np
import trio
import trio.testing
from storekit import ME, Kit

from ramfs.arrival.fetch import Arrivals
from ramfs.arrival.known import Known, look, new_path
from ramfs.arrival.pulls import Incoming, Options, Pulls
from ramfs.errors import SourceLost, SourceRefused
from ramfs.image.digest import digest_pages
from ramfs.image.pages import is_zero
from ramfs.namespace import Namespace
from ramfs.pager import Absent, Pager
from ramfs.source.base import Extent, PageSource
from ramfs.source.manifest import Digests
from ramfs.store.layers import Layer
from ramfs.store.store import Store
from ramfs.units import PAGE, ROOT, LayerId


class Shelf:
    """A directory of files in memory. ``allowed`` reads are answered, the others wait (None: all are)."""

    description = "a shelf"

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.allowed: int | None = None
        self.zeros_known = True
        self.fetched: Counter[tuple[str, int]] = Counter()
        """how often each page was read"""

    async def __call__(self, uri: str) -> Shelf:
        return self

    async def names(self) -> list[str]:
        return list(self.files)

    async def open(self, name: str) -> PageSource:
        if name not in self.files:
            raise SourceRefused(f"no {name}")
        return Item(self, name)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Item:
    """A file of a shelf."""

    maximum = 8 * PAGE

    def __init__(self, shelf: Shelf, name: str) -> None:
        self.description = name
        self.shelf = shelf
        self.data = shelf.files[name]
        self.size = len(self.data)
        self.closed = False

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        shelf = self.shelf
        await trio.lowlevel.checkpoint()
        while shelf.allowed is not None and shelf.allowed <= 0:
            if self.closed:
                raise SourceLost("closed")
            await trio.sleep(0.01)
        if shelf.allowed is not None:
            shelf.allowed -= 1
        for page in range(offset // PAGE, -(-(offset + len(buffer)) // PAGE)):
            shelf.fetched[self.description, page] += 1
        buffer[:] = self.data[offset : offset + len(buffer)]
        await trio.lowlevel.checkpoint()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        await trio.lowlevel.checkpoint()
        found = []
        for at in range(offset, offset + length, PAGE):
            part = min(PAGE, offset + length - at)
            found.append(Extent(at, part, self.shelf.zeros_known and is_zero(self.data[at : at + part])))
        return found

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


class ArrivingKit(Kit):
    """An open store with its pulls."""

    def __init__(self, directory: Path | str, shelf: Shelf) -> None:
        super().__init__(directory)
        self.shelf = shelf
        self._restore()

    def _restore(self) -> None:
        self.pulls = Pulls(self.pager, Arrivals(self.pager), self.shelf)
        self.pulls.restore()

    def take_over(self) -> None:
        super().take_over()
        self._restore()

    def reopen(self) -> None:
        """What the next mount does, whatever the end was."""
        self.store = Store(str(self.directory), create=True)
        self.pager = Pager(self.store)
        self.space = Namespace(self.pager)
        self._restore()

    def pull(self, name: str, *, verified: bool = False, **options: object) -> None:
        """All files of the shelf, into a new directory at the root."""
        files = self.shelf.files
        with self.store.catalog.transaction():
            top, images = self.space.plant(ROOT, os.fsencode(name), ME, map(os.fsencode, files))
            incoming = [
                Incoming(images[os.fsencode(each)], each, len(data), self._known(data) if verified else None)
                for each, data in files.items()
            ]
            pull = self.pulls.begin(top, "shelf:", Options(**options), incoming)  # type: ignore[arg-type]
        for image in images.values():
            self.store.images.release(image)
        self.pulls.start(pull)

    def _known(self, data: bytes) -> Known:
        return look(digests_of(data), len(data), new_path(self.store.layers.directory))

    def run(
        self, work: Callable[[], Awaitable[object]] | None = None, *, streaming: bool = True, patient: bool = True
    ) -> None:
        """Let what is pulled arrive until it stands still, and meanwhile do some work, which must come to an end.

        Without ``patient`` that is the end of it.
        """

        async def main() -> None:
            done = trio.Event()

            async def do() -> None:
                if work is not None:
                    await work()
                done.set()

            async with trio.open_nursery() as nursery:
                if streaming:
                    nursery.start_soon(self.pulls.run)
                nursery.start_soon(do)
                await done.wait()
                for _ in range(0 if not streaming or not patient else 2000 if self.shelf.allowed is None else 2):
                    if not self.pulls.running:
                        break
                    await trio.sleep(1)
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(rate=100))  # a second takes 10 ms

    async def having(self, work: Callable[[], object]) -> None:
        """Do something for which absent pages may have to be brought."""
        while True:
            try:
                work()
            except Absent as absent:
                await self.pulls.arrivals.bring(absent)
            else:
                return

    def arrive(self) -> None:
        """Let all arrive."""
        self.shelf.allowed = None
        self.run()
        assert not self.pulls.running

    def fetch(self, layer: Layer, first: int, stop: int) -> None:
        """Bring some pages of a layer, and no others."""

        async def work() -> None:
            await self.pulls.arrivals.bring(Absent(layer.id, first, stop))

        self.run(work, streaming=False)

    def arriving(self, path: str, page: int = 0) -> Layer:
        """The arriving layer that a page of a file is in."""
        return self.store.layers[LayerId(self.store.layers[self.layer_of(path, page)].base)]


def digests_of(data: bytes) -> Digests:
    """As a manifest has them."""
    whole = data.ljust(-(-len(data) // PAGE) * PAGE, b"\0")
    found = np.frombuffer(digest_pages(whole), np.uint8).reshape(-1, 16).copy()
    for page in range(len(found)):
        if is_zero(whole[page * PAGE : (page + 1) * PAGE]):
            found[page] = 0
    return found
