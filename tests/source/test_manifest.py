"""Manifests: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import trio
import xxhash
from hypothesis import given
from nbd.kit import on_trio
from source.cases import MemorySource, file_of, manifest_of

from ramfs.errors import SourceBroken, SourceLost
from ramfs.source import manifest
from ramfs.source.fault import FaultDirectory, Faults
from ramfs.source.file import FileDirectory
from ramfs.source.manifest import MAX_SIZE, Manifest, fetch_manifest, lay_out, read_manifest
from ramfs.units import MAX_FILE_SIZE, PAGE

HEADER = 48


def load(data: bytes, **more: int) -> Manifest | None:
    return trio.run(read_manifest, MemorySource(data, **more))


def checked(data: bytearray) -> bytes:
    """The same with the right checksum."""
    data[32:48] = bytes(16)
    data[32:48] = xxhash.xxh3_128_digest(data)
    return bytes(data)


PARTS = st.binary(min_size=1, max_size=12).filter(lambda part: part not in (b".", b"..") and not {0, 47} & set(part))
PATHS = st.lists(PARTS, min_size=1, max_size=3).map(b"/".join)
CONTENTS = st.integers(0, 4 * PAGE).map(lambda length: bytes(i % 251 for i in range(length)))


def compatible(paths: list[bytes]) -> bool:
    return not any(other.startswith(path + b"/") for path in paths for other in paths)


@given(
    st.dictionaries(PATHS, CONTENTS, max_size=6).filter(lambda files: compatible(list(files))),
    st.sampled_from([1 << 20, 4096, 512, 60]),
)
def test_what_is_written_is_read(files: dict[bytes, bytes], limit: int) -> None:
    named = {path.decode("utf-8", "surrogateescape"): data for path, data in files.items()}
    found = load(bytes(manifest_of(named)), maximum=limit)
    assert found is not None
    assert set(found.files) == set(named)
    for name, data in named.items():
        expected = file_of(data)
        assert found.files[name].size == len(data)
        assert (found.files[name].digests == expected.digests).all()
        assert not found.files[name].digests.flags.writeable


@pytest.mark.parametrize("path", ["ram", "name"])  # the digests begin at different places of a page
@pytest.mark.parametrize("wrong", [False, True])
def test_digests_of_known_zeros_are_not_fetched(path: str, wrong: bool) -> None:
    """... as long as they are zeros: else all are."""
    zeros = np.ones(5000, np.bool_)
    data = bytearray(5000 * PAGE)
    for page in (0, 2000, 4500, 4999):
        data[page * PAGE] = 1
        zeros[page] = wrong and page == 4500
    source = MemorySource(bytes(manifest_of({path: bytes(data), "small": b"x"})))
    found = trio.run(read_manifest, source, {path: zeros, "other": zeros})
    assert found is not None
    assert (found.files[path].digests == file_of(bytes(data)).digests).all()
    assert (source.asked < 80000) == (not wrong)


@given(st.data())
def test_no_bit_can_be_wrong(data: st.DataObject) -> None:
    whole = manifest_of({"ram": b"x" * 9000, "dir/other": b"", "dir/third": b"z" * PAGE})
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    if bit < 64:
        assert load(bytes(whole)) is None  # a file of another kind
    else:
        with pytest.raises(SourceBroken):
            load(bytes(whole))


@given(st.data())
def test_hostile_numbers_under_a_right_checksum(data: st.DataObject) -> None:
    """Whatever stands there: an error of this kind, or a manifest whose parts agree."""
    whole = manifest_of({"ram": b"x" * 9000, "dir/other": b"", "dir/third": b"z" * PAGE})
    first = struct.unpack_from("<Q", whole, 24)[0]
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        at = data.draw(st.integers(8, first - width))
        limit = (1 << 8 * width) - 1
        value = data.draw(
            st.one_of(st.integers(0, limit), st.sampled_from([0, 1, limit, limit >> 1, len(whole) & limit]))
        )
        whole[at : at + width] = value.to_bytes(width, "little")
    try:
        found = load(checked(whole))
    except SourceBroken:
        return
    assert found is not None
    for name, file in found.files.items():
        assert len(file.digests) == -(-file.size // PAGE)
        assert not name.startswith("/")
        assert not {"", ".", ".."} & set(name.split("/"))


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for whole in (data, b"RAMFSMAN" + data, b"RAMFSMAN\1\0\0\0" + data):
        try:
            load(whole)
        except SourceBroken:
            assert whole.startswith(b"RAMFSMAN")


@pytest.mark.parametrize(
    "paths",
    [[b"/a"], [b"a/"], [b""], [b"a//b"], [b"."], [b"a/.."], [b"a/./b"], [b"a\0"], [b"n" * 256], [b"a", b"a"],
     [b"a", b"a/b"], [b"a", b"a-", b"a/b"], [b"d/" * 2048 + b"f"]],
)  # fmt: skip
def test_impossible_names(paths: list[bytes]) -> None:
    layout = lay_out([(path, 0, number) for number, path in enumerate(paths)])
    with pytest.raises(SourceBroken, match=r"name|file"):
        load(checked(layout.head))


def test_names_out_of_order() -> None:
    whole = manifest_of({"a": b"", "b": b""})
    whole[HEADER + 24], whole[HEADER + 24 + 32] = whole[HEADER + 24 + 32], whole[HEADER + 24]
    with pytest.raises(SourceBroken, match="name"):
        load(checked(whole))


def test_memory_grows_only_with_what_comes() -> None:
    """A server that claims much and gives nothing."""
    claims = [
        (1, MAX_SIZE, MAX_SIZE - 16),  # a table of gigabytes
        (1 << 32 - 1, MAX_SIZE, 1 << 20),
        (1, MAX_SIZE + 16, 80),
        (0, MAX_SIZE, 48),
        (1, MAX_SIZE, 80),
    ]
    for count, size, first in claims:
        head = struct.pack("<8sIIQQ16s", b"RAMFSMAN", 1, count & 0xFFFFFFFF, size, first, bytes(16))
        source = MemorySource(head + struct.pack("<QQII", MAX_FILE_SIZE, first, 1, 0) + b"a", size=size)
        with pytest.raises(SourceBroken):
            trio.run(read_manifest, source)
        assert source.asked <= 8 << 20


def test_servers_that_round_sizes_up() -> None:
    whole = bytes(manifest_of({"ram": b"x" * 9000}))
    for more in (0, 1, 511):
        found = load(whole + bytes(more))
        assert found is not None
        assert found.files["ram"].size == 9000
    for size in (len(whole) - 1, len(whole) + 4096):
        with pytest.raises(SourceBroken):
            load(whole.ljust(size, b"\0")[:size])


def test_what_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bytes(manifest_of({"ram": b"x" * PAGE * 1000}))
    assert load(whole) is not None
    monkeypatch.setattr(manifest, "MAX_SIZE", len(whole) - 1)
    with pytest.raises(SourceBroken):
        load(whole)


def test_records_that_are_not_there_and_bytes_that_should_not_be() -> None:
    whole = manifest_of({"a": b"", "b": b""})
    whole[12] = 3
    with pytest.raises(SourceBroken, match="too short"):
        load(checked(whole))
    whole[12] = 1
    with pytest.raises(SourceBroken, match="between"):
        load(checked(whole))
    whole[12] = 2
    assert load(checked(whole)) is not None
    whole[HEADER + 24 + 5] = 1  # behind the name "a"
    with pytest.raises(SourceBroken):
        load(checked(whole))


def test_another_version_is_told() -> None:
    whole = manifest_of({})
    whole[8] = 2
    with pytest.raises(SourceBroken, match="version 2"):
        load(checked(whole))


@on_trio
async def test_fetching_from_a_directory(tmp_path: Path) -> None:
    directory = FileDirectory(str(tmp_path))
    assert await fetch_manifest(directory) is None
    path = tmp_path / "ramfs.manifest"
    path.write_bytes(b"my own notes, longer than the header of a manifest is")
    assert await fetch_manifest(directory) is None
    path.write_bytes(manifest_of({"ram": b"x" * PAGE}))
    faults, _ = Faults.parse("fault:error=1,vanish=1-,corrupt=1:x")
    for each in (directory, FaultDirectory(directory, faults)):
        found = await fetch_manifest(each)
        assert found is not None
        assert list(found.files) == ["ram"]
    os.truncate(path, 70)
    with pytest.raises(SourceBroken):
        await fetch_manifest(directory)


@on_trio
async def test_a_loss_is_not_taken_for_a_missing_manifest() -> None:
    class Down(FileDirectory):
        async def open(self, name: str) -> None:
            raise SourceLost("down")

    with pytest.raises(SourceLost):
        await fetch_manifest(Down("/"))
