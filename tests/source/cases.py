"""What the tests of sources read, and the kinds of sources that the suite runs over."""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio
import xxhash
from nbd.servers import nbdkit

from ramfs.image.digest import DIGEST, ZERO_DIGEST, digest_padded
from ramfs.source.base import Extent, PageSource, SourceDirectory
from ramfs.source.fault import FaultDirectory, Faults
from ramfs.source.file import FileDirectory
from ramfs.source.manifest import File, lay_out
from ramfs.source.nbd_client import NbdDirectory
from ramfs.source.retry import RetrySource
from ramfs.source.verify import VerifiedSource
from ramfs.units import PAGE

MB = 1 << 20
#: Bytes of the image: no multiple of a page.
SIZE = 3 * MB + 5000


@functools.cache
def sample() -> bytes:
    """Random data with holes at the start, in the middle and inside of pages."""
    data = bytearray(random.Random(4).randbytes(SIZE))
    data[: 64 << 10] = bytes(64 << 10)
    data[MB : 2 * MB] = bytes(MB)
    data[2 * MB + 100 : 2 * MB + 5000] = bytes(4900)
    return bytes(data)


def write_sparse(path: Path, data: bytes) -> None:
    """A file that has holes where whole pages are zero."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), PAGE):
            if any(data[at : at + PAGE]):
                os.pwrite(file.fileno(), data[at : at + PAGE], at)


def file_of(data: bytes) -> File:
    """What a manifest has of some contents."""
    digests = np.frombuffer(digest_padded(data), np.uint8).reshape(-1, DIGEST).copy()
    digests[(digests == np.frombuffer(ZERO_DIGEST, np.uint8)).all(axis=1)] = 0
    return File(len(data), digests)


def file_at(path: Path) -> File:
    """What a manifest has of a file."""
    return file_of(path.read_bytes())


def manifest_of(files: dict[str, bytes]) -> bytearray:
    """A manifest, made the slow way."""
    layout = lay_out([(os.fsencode(name), len(data), number) for number, (name, data) in enumerate(files.items())])
    whole = layout.head + bytes(layout.size - len(layout.head))
    for number, data in enumerate(files.values()):
        digests = file_of(data).digests.tobytes()
        offset = layout.places[number].offset
        whole[offset : offset + len(digests)] = digests
    whole[: len(layout.head)] = layout.sealed_head(xxhash.xxh3_128_digest(whole))
    return whole


class MemorySource:
    """A source that has its bytes in memory, and tells how many of them were asked for."""

    description = "memory"

    def __init__(self, data: bytes, *, size: int | None = None, maximum: int = 1 << 20) -> None:
        self.data = data
        self.size = len(data) if size is None else size
        self.maximum = maximum
        self.asked = 0

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        assert len(buffer) <= self.maximum
        self.asked += len(buffer)
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        buffer[len(part) :] = bytes(len(buffer) - len(part))
        await trio.lowlevel.checkpoint()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        await trio.lowlevel.checkpoint()
        return [Extent(offset, length, False)]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class MemoryDirectory:
    """The sample in memory, under any name: without threads, so that a test can have a clock of its own."""

    description = "memory"

    async def names(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return ["ram"]

    async def open(self, name: str) -> PageSource:
        await trio.lowlevel.checkpoint()
        return MemorySource(sample())

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class Case:
    """A kind of source: how to open one file, or the directory it is in, given a local directory."""

    name: str
    serve: Callable[[Path], AbstractAsyncContextManager[SourceDirectory]]
    wrap: Callable[[SourceDirectory, Path], AbstractAsyncContextManager[PageSource]] | None = None

    @contextlib.asynccontextmanager
    async def open(self, path: Path) -> AsyncIterator[PageSource]:
        """A source of what a file holds."""
        async with self.serve(path.parent) as directory:
            if self.wrap is not None:
                async with self.wrap(directory, path) as source:
                    yield source
            else:
                source = await directory.open(path.name)
                yield source
                await source.aclose()


@contextlib.asynccontextmanager
async def files(path: Path) -> AsyncIterator[SourceDirectory]:
    directory = FileDirectory(str(path))
    yield directory
    await directory.aclose()


@contextlib.asynccontextmanager
async def harmless_faults(path: Path) -> AsyncIterator[SourceDirectory]:
    faults, rest = Faults.parse(f"fault:delay=1us-50us,corrupt=page100000:{path}")
    directory = FaultDirectory(FileDirectory(rest), faults)
    yield directory
    await directory.aclose()


def served(*filters: str) -> Callable[[Path], AbstractAsyncContextManager[SourceDirectory]]:
    """By nbdkit, with these filters and their parameters."""

    @contextlib.asynccontextmanager
    async def serve(path: Path) -> AsyncIterator[SourceDirectory]:
        options = [f"--filter={each}" for each in filters if "=" not in each]
        with nbdkit(*options, "file", f"dir={path}", *(each for each in filters if "=" in each)) as uri:
            directory = NbdDirectory(uri)
            yield directory
            await directory.aclose()

    return serve


@contextlib.asynccontextmanager
async def retried(directory: SourceDirectory, path: Path) -> AsyncIterator[PageSource]:
    source = await RetrySource.open(lambda: directory.open(path.name))
    yield source
    await source.aclose()


@contextlib.asynccontextmanager
async def verified(directory: SourceDirectory, path: Path) -> AsyncIterator[PageSource]:
    source = VerifiedSource(await directory.open(path.name), file_at(path), path.name)
    yield source
    await source.aclose()


@contextlib.asynccontextmanager
async def retried_verified(directory: SourceDirectory, path: Path) -> AsyncIterator[PageSource]:
    async def factory() -> PageSource:
        return VerifiedSource(await directory.open(path.name), file_at(path), path.name)

    source = await RetrySource.open(factory)
    yield source
    await source.aclose()


#: All implementations. What serves over a network is added here: one line, a function as ``files``.
CASES = [
    Case("file", files),
    Case("fault", harmless_faults),
    Case("retry", files, retried),
    Case("verify", files, verified),
    Case("retry-verify-fault", harmless_faults, retried_verified),
    Case("nbd", served()),
    Case("nbd-one-connection", served("multi-conn", "multi-conn-mode=disable")),
    Case("nbd-retry-verify", served(), retried_verified),
]
