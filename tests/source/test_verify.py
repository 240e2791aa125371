"""Digests: no page that is wrong is given out as right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from nbd.kit import on_trio, read
from source.cases import MB, SIZE, file_at, file_of, sample

from ramfs.errors import SourceChanged, SourceCorrupt
from ramfs.image.digest import KNOWN_LOST
from ramfs.source.base import Extent
from ramfs.source.fault import Faults, FaultSource
from ramfs.source.file import FileSource
from ramfs.source.manifest import File
from ramfs.source.verify import AGAIN, VerifiedSource
from ramfs.units import PAGE, pages

DATA = sample()


class Counted(FileSource):
    """A file that tells what was read, in reads of few bytes; the first reads of some pages are wrong."""

    maximum = 2048

    def __init__(self, path: Path, wrong: dict[int, int] | None = None) -> None:
        super().__init__(str(path))
        self.reads: list[tuple[int, int]] = []
        self.wrong = wrong or {}

    async def read_into(self, offset: int, buffer: memoryview, *, urgent: bool = False) -> None:
        await super().read_into(offset, buffer, urgent=urgent)
        self.reads.append((offset, len(buffer)))
        page = offset // PAGE
        if self.wrong.get(page, 0) and offset % PAGE == 0:
            self.wrong[page] -= 1
            buffer[5] ^= 0x80


@pytest.mark.parametrize("page", [0, 255, 256, 300, 513, pages(SIZE) - 1])
@on_trio
async def test_any_wrong_page_is_told_apart(image: Path, page: int) -> None:
    faults = Faults(corrupt_pages={page})
    source = VerifiedSource(FaultSource(FileSource(str(image)), faults), file_at(image), "vm/ram")
    with pytest.raises(SourceCorrupt, match=rf"page {page} of vm/ram is not what"):
        await read(source, 0, SIZE)
    assert faults.happened["corrupt"] == 1 + AGAIN
    assert source.verified == 0
    for other in (page - 1, page + 1):
        if 0 <= other < pages(SIZE):
            at = other * PAGE
            assert await read(source, at, min(PAGE, SIZE - at)) == DATA[at : at + PAGE]
    await source.aclose()


@on_trio
async def test_a_page_is_read_again(image: Path) -> None:
    plain = Counted(image, {3: 2, 5: 1, 6: 1, pages(SIZE) - 1: 1})
    source = VerifiedSource(plain, file_at(image), "ram")
    assert await read(source, 0, SIZE) == DATA
    again = sorted((at, length) for at, length in plain.reads if plain.reads.count((at, length)) > 1)
    assert {at // PAGE for at, _ in again} == {3, 5, 6, pages(SIZE) - 1}
    assert source.verified == SIZE
    await source.aclose()


@on_trio
async def test_random_bits(image: Path) -> None:
    faults = Faults(corrupt=0.3)
    source = VerifiedSource(FaultSource(FileSource(str(image)), faults), file_at(image), "ram", again=30)
    rng = random.Random(2)
    for _ in range(100):
        at = rng.randrange(pages(SIZE)) * PAGE
        length = min(rng.randint(1, 40) * PAGE, SIZE - at)
        assert await read(source, at, length) == DATA[at : at + length]
    assert faults.happened["corrupt"] > 20
    await source.aclose()


@on_trio
async def test_zeros_in_place_of_data_and_data_in_place_of_zeros(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for page, contents in ((2 * MB // PAGE, bytes(PAGE)), (0, DATA[2 * MB : 2 * MB + PAGE])):
        other.write_bytes(DATA[: page * PAGE] + contents + DATA[page * PAGE + PAGE :])
        source = VerifiedSource(FileSource(str(other)), file_at(image), "ram")
        with pytest.raises(SourceCorrupt, match=f"page {page} "):
            await read(source, page * PAGE, PAGE)
        await source.aclose()


@on_trio
async def test_a_lost_page_is_never_right(image: Path) -> None:
    file = file_at(image)
    file.digests[7] = bytearray(KNOWN_LOST)
    source = VerifiedSource(FileSource(str(image)), file, "ram")
    with pytest.raises(SourceCorrupt, match="page 7 of ram is lost"):
        await read(source, 0, 16 * PAGE)
    await source.aclose()


@on_trio
async def test_another_size_is_another_file(image: Path) -> None:
    plain = FileSource(str(image))
    with pytest.raises(SourceChanged, match=str(SIZE)):
        VerifiedSource(plain, File(SIZE + 1, file_at(image).digests), "ram")
    await plain.aclose()


@on_trio
async def test_the_source_is_not_asked_for_zeros(tmp_path: Path) -> None:
    """It could claim some where the manifest knows of data, and nobody would ever read that."""
    path = tmp_path / "liar"
    with path.open("wb") as file:
        file.truncate(8 * PAGE)
    data = bytes(PAGE) + b"x" * PAGE + bytes(5 * PAGE) + b"y" * PAGE
    source = VerifiedSource(FileSource(str(path)), file_of(data), "ram")
    assert await source.extents(0, 8 * PAGE) == [
        Extent(0, PAGE, True),
        Extent(PAGE, PAGE, False),
        Extent(2 * PAGE, 5 * PAGE, True),
        Extent(7 * PAGE, PAGE, False),
    ]
    assert await source.extents(3 * PAGE, 2 * PAGE) == [Extent(3 * PAGE, 2 * PAGE, True)]
    await source.aclose()


@on_trio
async def test_many_extents_are_told_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "comb"
    data = (b"x" * PAGE + bytes(PAGE)) * 1500
    path.write_bytes(data)
    for source in (FileSource(str(path)), VerifiedSource(FileSource(str(path)), file_of(data), "comb")):
        at, rounds = 0, 0
        while at < len(data):
            told = await source.extents(at, len(data) - at)
            assert 0 < len(told) <= 1024
            at, rounds = told[-1].offset + told[-1].length, rounds + 1
        assert (at, rounds < 10) == (len(data), True)
        await source.aclose()
