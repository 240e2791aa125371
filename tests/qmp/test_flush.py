from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ramfs.cli import _flush
from ramfs.cli._flush import LITTLE, Round, dirty_bytes, flush, regular_files, rounds
from ramfs.errors import FileError


def test_what_is_dirty_is_told_and_flushed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "link").symlink_to("sub/file")
    os.mkfifo(tmp_path / "fifo")
    first = asyncio.run(flush(str(tmp_path), running=True))
    assert first.bytes in {None, 102_400}  # 25 pages; None before Linux 6.5
    second = asyncio.run(flush(str(tmp_path), running=True))
    assert second.bytes in {None, 0}


def test_files_are_found_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    (tmp_path / "c").symlink_to("a")
    assert list(regular_files(str(tmp_path))) == [str(tmp_path / "a" / "b")]


def test_without_cachestat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr("ramfs.store.cachestat._CACHESTAT", 100_000)
    assert asyncio.run(flush(str(tmp_path), running=True)).bytes is None
    with open(tmp_path / "file") as file:
        assert dirty_bytes(file.fileno()) is None


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    assert asyncio.run(flush(str(tmp_path / "gone"), running=True)).bytes == 0


def test_a_file_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FileError, match=r"cannot flush .*file: Input/output error") as error:
        asyncio.run(flush(str(tmp_path), running=True))
    assert error.value.errno == 5


@pytest.mark.parametrize(
    ("found", "limit", "done"),
    [
        ([10 * LITTLE, 5 * LITTLE, LITTLE // 2, 0], 8, 3),  # until little is left
        ([LITTLE], 8, 1),
        ([10 * LITTLE, 9 * LITTLE, 0], 8, 2),  # the guest writes as fast as we flush
        ([100 * LITTLE, 60 * LITTLE, 40 * LITTLE, 0], 2, 2),  # as often as was asked for
        ([100 * LITTLE], 0, 0),
    ],
)
def test_when_rounds_end(monkeypatch: pytest.MonkeyPatch, found: list[int], limit: int, done: int) -> None:
    left = iter(found)

    async def fake(_: str, *, running: bool) -> Round:
        return Round(next(left), 0.1, running)

    async def run() -> list[int | None]:
        return [each.bytes async for each in rounds("dir", limit)]

    monkeypatch.setattr(_flush, "flush", fake)
    assert asyncio.run(run()) == found[:done]


def test_when_rounds_end_by_time() -> None:
    assert Round(None, 0.001, running=True).little()
    assert not Round(None, 0.1, running=True).little()
    assert Round(None, 0.1, running=True).falls_from(Round(None, 0.2, running=True))
    assert not Round(None, 0.19, running=True).falls_from(Round(None, 0.2, running=True))
