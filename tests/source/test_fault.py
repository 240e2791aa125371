"""Faults on purpose: the words for them, and that they happen."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from nbd.kit import on_trio, read
from source.cases import MB, sample

from ramfs.errors import SourceError, SourceLost, SourceRefused, UsageError
from ramfs.source.fault import FaultDirectory, Faults
from ramfs.source.file import FileDirectory
from ramfs.units import PAGE

DATA = sample()


def directory(image: Path, words: str) -> FaultDirectory:
    faults, rest = Faults.parse(f"fault:{words}:{image.parent}")
    return FaultDirectory(FileDirectory(rest), faults)


def test_words() -> None:
    faults, rest = Faults.parse(
        "fault:error=0.5,lost=1,short=0,delay=5ms-0.1s,corrupt=0.25,corrupt=page17,corrupt=page3,"
        "down=2,vanish=3-4,resize=5-,seed=9:nbd://host:10809/a,b"
    )
    assert rest == "nbd://host:10809/a,b"
    assert (faults.error, faults.lost, faults.short, faults.corrupt) == (0.5, 1, 0, 0.25)
    assert faults.delay == (0.005, 0.1)
    assert faults.corrupt_pages == {17, 3}
    assert (faults.down, faults.vanish, faults.seed) == (range(2, 3), range(3, 5), 9)
    assert 4 not in faults.resize
    assert 10**9 in faults.resize
    assert Faults.parse("fault::/dir")[1] == "/dir"


@pytest.mark.parametrize(
    "text",
    ["fault:error=0.1", "fault:error=0.1:", "error=0.1:x", "fault:error:x", "fault:error=2:x", "fault:error=nan:x",
     "fault:delay=5:x", "fault:delay=5ms-x:y", "fault:bogus=1:x", "fault:corrupt=page:x", "fault:down=x:x",
     "fault:seed=:x", "fault:delay=-5ms:x"],
)  # fmt: skip
def test_wrong_words(text: str) -> None:
    with pytest.raises(UsageError):
        Faults.parse(text)


@on_trio
async def test_the_same_seed_is_the_same_drill(image: Path) -> None:
    async def outcomes(seed: int) -> list[bool]:
        source = await directory(image, f"error=0.3,corrupt=0.3,seed={seed}").open("ram")
        found = []
        for at in range(0, MB, 16 * PAGE):
            try:
                found.append(await read(source, at, PAGE) == DATA[at : at + PAGE])
            except SourceError:
                found.append(False)
        await source.aclose()
        return found

    assert await outcomes(1) == await outcomes(1) != await outcomes(2)
    assert {True, False} == set(await outcomes(1))


@on_trio
async def test_a_lost_connection_takes_all_reads_with_it(image: Path) -> None:
    words = directory(image, "delay=10ms-2s,seed=1")
    source = await words.open("ram")
    ended: list[type[BaseException]] = []

    async def one(offset: int) -> None:
        with pytest.raises(SourceLost) as caught:
            await read(source, offset, PAGE)
        ended.append(caught.type)

    with trio.fail_after(1.5):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number * PAGE)
            await trio.sleep(0.005)
            words._faults.lost = 1.0
    assert ended == [SourceLost] * 20
    with pytest.raises(SourceLost):
        await source.extents(0, PAGE)
    await source.aclose()


@on_trio
async def test_short_reads_errors_and_wrong_pages(image: Path) -> None:
    source = await directory(image, "short=1").open("ram")
    buffer = bytearray(b"x" * PAGE * 4)
    with pytest.raises(SourceLost):
        await source.read_into(2 * MB, memoryview(buffer))
    assert buffer == DATA[2 * MB : 2 * MB + 2 * PAGE] + b"x" * PAGE * 2
    await source.aclose()

    source = await directory(image, "error=1").open("ram")
    with pytest.raises(SourceError) as caught:
        await read(source, 0, PAGE)
    assert type(caught.value) is SourceError
    await source.aclose()

    source = await directory(image, "corrupt=page600").open("ram")
    got = await read(source, 590 * PAGE, 20 * PAGE)
    differ = [at for at, byte in enumerate(got) if byte != DATA[590 * PAGE + at]]
    assert differ == [10 * PAGE]
    await source.aclose()


@on_trio
async def test_servers_that_are_down_gone_or_changed(image: Path) -> None:
    words = directory(image, "down=1,vanish=2,resize=3")
    with pytest.raises(SourceLost):
        await words.open("ram")
    with pytest.raises(SourceRefused):
        await words.open("ram")
    assert (await words.open("ram")).size == len(DATA) - PAGE
    assert (await words.open("ram")).size == len(DATA)
    with pytest.raises(SourceLost):
        await words.open("empty")
