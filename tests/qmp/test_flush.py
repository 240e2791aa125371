from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ramfs.cli import _flush
from ramfs.cli._flush import LITTLE, Round, flush, regular_files, rounds
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


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    assert asyncio.run(flush(str(tmp_path / "gone"), running=True)).bytes == 0


def test_a_file_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FileError, match=r"cannot flush .*file: Input/output error") as error:
        asyncio.run(flush(str(tmp_path), running=False))
    assert error.value.errno == 5


@pytest.mark.parametrize(
    ("found", "limit", "took", "done", "synced"),
    [
        ([10 * LITTLE, 5 * LITTLE, LITTLE // 2, 0], 8, 0.1, 3, 1),  # until little is left
        ([LITTLE], 8, 0.1, 1, 1),
        ([10 * LITTLE, 9 * LITTLE, 0], 8, 0.1, 2, 1),  # the guest writes as fast as we flush
        ([100 * LITTLE, 60 * LITTLE, 40 * LITTLE, 0], 2, 0.1, 2, 1),  # as often as was asked for
        ([9 * LITTLE, LITTLE, 20 * LITTLE, 9 * LITTLE, LITTLE, 0], 8, 5.0, 5, 2),  # once more after a slow disk
        ([100 * LITTLE], 0, 0.1, 0, 0),
    ],
)
def test_when_rounds_end(
    monkeypatch: pytest.MonkeyPatch, found: list[int], limit: int, took: float, done: int, synced: int
) -> None:
    left = iter(found)
    syncs: list[str] = []

    async def fake(directory: str, *, running: bool, sync: bool = False) -> Round:
        assert running
        if not sync:
            return Round(next(left), 0.1, running)
        syncs.append(directory)
        return Round(1, took, running)

    async def run() -> list[int | None]:
        return [each.bytes async for each in rounds("dir", limit)]

    monkeypatch.setattr(_flush, "flush", fake)
    told = asyncio.run(run())
    assert [(each or 0) // LITTLE * LITTLE for each in told] == [each // LITTLE * LITTLE for each in found[:done]]
    assert sum(each or 0 for each in told) == sum(found[:done]) + synced
    assert len(syncs) == synced


def test_when_rounds_end_by_time() -> None:
    assert Round(None, 0.001, running=True).little()
    assert not Round(None, 0.1, running=True).little()
    assert Round(None, 0.1, running=True).falls_from(Round(None, 0.2, running=True))
    assert not Round(None, 0.19, running=True).falls_from(Round(None, 0.2, running=True))
