"""What the tests of the client, and of other sources, share."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ParamSpec

import trio

from ramfs.source.base import Extent, PageSource
from ramfs.source.nbd_client import Limits, NbdDirectory, NbdSource

P = ParamSpec("P")
MB = 1 << 20


def on_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """A test that is a coroutine, given half a minute."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                await test(*args, **kwargs)

        trio.run(main)

    return run


def sample(size: int, seed: int = 1) -> bytes:
    """Random bytes, of which the second quarter is a hole."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[size // 4 : size // 2] = bytes(size // 2 - size // 4)
    return bytes(data)


@contextlib.asynccontextmanager
async def opened(uri: str, name: str = "", **limits: Any) -> AsyncIterator[NbdSource]:
    connections = limits.pop("connections", 2)
    source = await NbdDirectory(uri, connections=connections, limits=Limits(**limits)).open(name)
    try:
        await source.widen()
        yield source
    finally:
        await source.aclose()


async def read(source: PageSource, offset: int, length: int, *, urgent: bool = False) -> bytes:
    buffer = bytearray(length)
    await source.read_into(offset, memoryview(buffer), urgent=urgent)
    return bytes(buffer)


async def read_all(source: NbdSource, step: int = 256 << 10) -> bytes:
    """All of it, in many reads at once."""
    whole = bytearray(source.size)
    async with trio.open_nursery() as nursery:
        for at in range(0, source.size, step):
            nursery.start_soon(source.read_into, at, memoryview(whole)[at : at + step])
    return bytes(whole)


async def all_extents(source: NbdSource) -> list[Extent]:
    """From the beginning to the end, neighbours of a kind joined."""
    found: list[Extent] = []
    at = 0
    while at < source.size:
        for extent in await source.extents(at, source.size - at):
            assert extent.offset == at
            assert extent.length > 0
            at += extent.length
            if found and found[-1].zero == extent.zero:
                found[-1] = Extent(found[-1].offset, found[-1].length + extent.length, extent.zero)
            else:
                found.append(extent)
    assert at == source.size
    return found
