"""Local files: what only they do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio
from nbd.kit import on_trio, read
from source.cases import SIZE, sample

from ramfs.errors import SourceChanged, SourceLost, SourceRefused
from ramfs.source.file import FileDirectory, FileSource
from ramfs.units import PAGE

DATA = sample()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe", "missing", "a\0b"):
        with pytest.raises(SourceRefused):
            FileSource(str(tmp_path / name))
    with pytest.raises(SourceRefused):
        FileDirectory(str(tmp_path / "missing"))


def test_not_on_one_file_system(image: Path) -> None:
    with pytest.raises(SourceRefused, match="ramfs clone"):
        FileSource(str(image), not_on=image.stat().st_dev)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(SourceRefused):
            FileSource(str(image), not_on=image.stat().st_dev)
    assert len(os.listdir("/proc/self/fd")) == before


@on_trio
async def test_names(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    for name in ("a", "sub/b"):
        (tmp_path / "d" / name).write_bytes(name.encode())
    (tmp_path / "d" / "link").symlink_to("a")
    directory = FileDirectory(str(tmp_path / "d"))
    assert sorted(await directory.names()) == ["a", "sub/b"]
    source = await directory.open("sub/b")
    assert await read(source, 0, 5) == b"sub/b"
    await source.aclose()
    for name in ("", "/etc/passwd", "../secret", "sub/../../secret", "sub", "./a", "sub//b"):
        with pytest.raises(SourceRefused):
            await directory.open(name)


@on_trio
async def test_a_single_file(image: Path) -> None:
    directory = FileDirectory(str(image))
    assert await directory.names() == ["ram"]
    source = await directory.open("ram")
    assert source.size == SIZE
    await source.aclose()
    with pytest.raises(SourceRefused):
        await directory.open("empty")


@on_trio
async def test_one_that_becomes_shorter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    source = FileSource(str(path))
    os.truncate(path, 5 * PAGE)
    assert await read(source, 0, 5 * PAGE) == DATA[: 5 * PAGE]
    with pytest.raises(SourceChanged):
        await read(source, 4 * PAGE, 2 * PAGE)
    await source.aclose()


@on_trio
async def test_the_descriptor_stays_while_a_thread_reads(image: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FileSource):
        def _read(self, offset: int, buffer: memoryview) -> None:
            begun.set()
            go_on.wait()
            super()._read(offset, buffer)

    source = Slow(str(image))

    async def one() -> None:
        with pytest.raises(SourceLost):
            await read(source, 0, PAGE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.to_thread.run_sync(begun.wait)
        await source.aclose()
        try:
            assert os.fstat(source._fd).st_size == SIZE
        finally:
            go_on.set()
    assert source._fd == -1
