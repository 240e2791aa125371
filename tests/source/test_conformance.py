"""What every source promises (ramfs/source/base.py), tried on all of them: CASES in cases.py."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import pytest
import trio
from nbd.kit import on_trio, read
from source.cases import CASES, MB, SIZE, Case, sample

from ramfs.errors import SourceLost, SourceRefused
from ramfs.units import PAGE

DATA = sample()


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@on_trio
async def test_it_tells_what_it_is(case: Case, image: Path) -> None:
    async with case.open(image) as source:
        assert source.size == SIZE
        assert source.description
        assert source.maximum >= PAGE


@on_trio
async def test_all_bytes_in_the_largest_reads(case: Case, image: Path) -> None:
    async with case.open(image) as source:
        parts = [
            await read(source, at, min(source.maximum, SIZE - at)) for at in range(0, SIZE, source.maximum)
        ]  # fmt: skip
    assert b"".join(parts) == DATA


@on_trio
async def test_any_pages(case: Case, image: Path) -> None:
    rng = random.Random(7)
    async with case.open(image) as source:
        for urgent in (False, True) * 20:
            offset = rng.randrange(0, SIZE, PAGE)
            length = min(rng.randint(1, 64) * PAGE, source.maximum, SIZE - offset)
            assert await read(source, offset, length, urgent=urgent) == DATA[offset : offset + length]


@on_trio
async def test_the_last_bytes(case: Case, image: Path) -> None:
    async with case.open(image) as source:
        start = SIZE // PAGE * PAGE
        assert await read(source, start, SIZE - start) == DATA[start:]


@on_trio
async def test_it_fills_the_buffer_and_nothing_else(case: Case, image: Path) -> None:
    memory = mmap.mmap(-1, 4 * PAGE)
    async with case.open(image) as source:
        memory[:] = b"x" * len(memory)
        await source.read_into(2 * MB, memoryview(memory)[PAGE : 2 * PAGE])
    assert memory[PAGE : 2 * PAGE] == DATA[2 * MB : 2 * MB + PAGE]
    assert set(memory[:PAGE]) == set(memory[2 * PAGE :]) == {ord("x")}


@on_trio
async def test_many_reads_at_once(case: Case, image: Path) -> None:
    got: dict[int, bytes] = {}
    async with case.open(image) as source:
        step = 4 * PAGE

        async def one(offset: int) -> None:
            got[offset] = await read(source, offset, min(step, SIZE - offset), urgent=offset % (8 * step) == 0)

        async with trio.open_nursery() as nursery:
            for offset in range(0, SIZE, step):
                nursery.start_soon(one, offset)
    assert b"".join(got[offset] for offset in sorted(got)) == DATA


@pytest.mark.parametrize("urgent", [False, True])
@on_trio
async def test_a_cancelled_read_harms_no_other(case: Case, image: Path, urgent: bool) -> None:
    rng = random.Random(3)
    async with case.open(image) as source:
        length = min(64 * PAGE, source.maximum)

        async def cancelled(delay: float) -> None:
            with trio.move_on_after(delay):
                await read(source, 0, length, urgent=urgent)

        async def kept(offset: int) -> None:
            assert await read(source, offset, length, urgent=urgent) == DATA[offset : offset + length]

        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(cancelled, rng.choice([0, 0, 0.0001, 0.001]))
                    nursery.start_soon(kept, rng.randrange(0, SIZE - length, PAGE))
        assert await read(source, 2 * MB, length) == DATA[2 * MB : 2 * MB + length]


@on_trio
async def test_extents_tell_the_truth(case: Case, image: Path) -> None:
    async with case.open(image) as source:
        at, zeros = 0, 0
        while at < SIZE:
            told = await source.extents(at, SIZE - at)
            assert told
            for extent in told:
                assert extent.offset == at
                assert extent.length > 0
                at += extent.length
                if extent.zero:
                    zeros += extent.length
                    assert not any(DATA[extent.offset : at])
        assert at == SIZE
    # One that knows of no zeros is within its rights; these all know of the large hole.
    assert zeros >= MB


@on_trio
async def test_extents_end_where_the_range_does(case: Case, image: Path) -> None:
    async with case.open(image) as source:
        for offset, length in ((0, PAGE), (MB, PAGE), (MB - PAGE, 2 * PAGE), (2 * MB, SIZE - 2 * MB)):
            told = await source.extents(offset, length)
            assert told[0].offset == offset
            assert offset < told[-1].offset + told[-1].length <= offset + length


@on_trio
async def test_an_empty_file(case: Case, image: Path) -> None:
    async with case.open(image.parent / "empty") as source:
        assert source.size == 0


@on_trio
async def test_after_closing_there_is_nothing(case: Case, image: Path) -> None:
    async with case.open(image) as source:
        await source.aclose()
        with pytest.raises(SourceLost):
            await read(source, 0, PAGE)
        await source.aclose()


@on_trio
async def test_closing_ends_the_reads_under_way(case: Case, image: Path) -> None:
    ended: list[bool] = []
    async with case.open(image) as source:

        async def one(offset: int) -> None:
            try:
                length = min(source.maximum, MB)
                ended.append(await read(source, offset, length) == DATA[offset : offset + length])
            except SourceLost:
                ended.append(True)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number % 3 * MB)
            await trio.sleep(0.0005)
            await source.aclose()
    assert ended == [True] * 20


@on_trio
async def test_the_directory(case: Case, image: Path) -> None:
    async with case.serve(image.parent) as directory:
        assert directory.description
        assert sorted(await directory.names()) == ["empty", "ram"]
        with pytest.raises(SourceRefused):
            await directory.open("no such file")
        one, other = await directory.open("ram"), await directory.open("empty")
        await directory.aclose()
        assert (one.size, other.size) == (SIZE, 0)
        assert await read(one, 2 * MB, PAGE) == DATA[2 * MB : 2 * MB + PAGE]
        await one.aclose()
        await other.aclose()
