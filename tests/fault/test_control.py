"""Hostile commands written to `.ramfs/control`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from hypothesis import given, settings
from hypothesis import strategies as st
from mount.posix import errno_of, fails, opened


@pytest.fixture(scope="module")
def module_mount(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.mktemp("control")
    with Mount(base / "store", base / "mnt") as mount:
        (mount.path / "source").mkdir()
        (mount.path / "source" / "f").write_bytes(b"data")
        (mount.path / "file").write_bytes(b"data")
        (mount.path / "link").symlink_to("source")
        (mount.path / "source" / ".snap" / "s").mkdir()
        yield mount


def say(mount: Mount, command: bytes) -> int:
    """Write a command; its errno, 0 when it was done."""

    def write() -> None:
        with opened(mount.path / ".ramfs" / "control", os.O_WRONLY) as fd:
            assert os.write(fd, command) == len(command)

    return errno_of(write)


def clone(**values: Any) -> bytes:
    return json.dumps({"clone": {"source": "source", "parent": ".", "name": "copy", **values}}).encode()


def unchanged(mount: Mount) -> bool:
    return mount.running and sorted(os.listdir(mount.path)) == ["file", "link", "source"]


@pytest.mark.parametrize(
    "command",
    [
        b"",
        b"\0" * 100,
        b"{",
        b"null",
        b"[]",
        b"1e999",
        b'"clone"',
        b'{"clone": 1}',
        b'{"clone": []}',
        b'{"clone": {}}',
        b'{"clone": null}',
        b'{"rm": "/"}',
        b"\xff\xfe\xfd",
        b"[" * 60_000,
        b'{"clone":' * 6000,
        b"9" * 60_000,
        clone(name=1),
        clone(name=None),
        clone(name=""),
        clone(name="."),
        clone(name=".."),
        clone(name="a/b"),
        clone(name="a\0b"),
        clone(name="\ud800"),
        clone(source=1),
        clone(source=["source"]),
        clone(source="so\0urce"),
        clone(parent={"a": 1}),
    ],
    ids=range(28),
)
def test_garbage_is_einval(module_mount: Mount, command: bytes) -> None:
    assert say(module_mount, command) in ({0} if not command else {errno.EINVAL})
    assert unchanged(module_mount)


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({"source": "none"}, errno.ENOENT),
        ({"source": "file"}, errno.ENOTDIR),
        ({"source": "file/x"}, errno.ENOTDIR),
        ({"source": "source/f"}, errno.ENOTDIR),
        ({"source": "link"}, errno.ENOTDIR),
        ({"source": "source/.snap"}, errno.ENOTDIR),
        ({"source": "source/.snap/none"}, errno.ENOENT),
        ({"source": "../../../../etc"}, errno.ENOENT),
        ({"source": "/etc"}, errno.ENOENT),
        ({"source": ".ramfs"}, errno.ENOENT),
        ({"parent": "none"}, errno.ENOENT),
        ({"parent": "file"}, errno.ENOTDIR),
        ({"parent": "source/.snap"}, errno.EROFS),
        ({"parent": "source/.snap/s"}, errno.EROFS),
        ({"parent": ".ramfs"}, errno.ENOENT),
        ({"name": "file"}, errno.EEXIST),
        ({"name": "source"}, errno.EEXIST),
        ({"name": ".snap"}, errno.EEXIST),
        ({"name": ".ramfs"}, errno.EBUSY),
        ({"name": "n" * 256}, errno.ENAMETOOLONG),
        ({"source": "x" * 300}, errno.ENAMETOOLONG),
    ],
)
def test_a_clone_that_cannot_be(module_mount: Mount, values: dict[str, str], number: int) -> None:
    assert say(module_mount, clone(**values)) == number
    assert unchanged(module_mount)


def test_too_long_is_e2big(module_mount: Mount) -> None:
    assert say(module_mount, b" " * (65 << 10)) == errno.E2BIG
    with opened(module_mount.path / ".ramfs" / "control", os.O_WRONLY) as fd, fails(errno.E2BIG):
        os.write(fd, b"x" * (4 << 20))
    assert unchanged(module_mount)


def test_paths_that_go_around_end_where_they_should(module_mount: Mount) -> None:
    assert say(module_mount, clone(source="/../source/../../source//./", parent="source/..", name="round")) == 0
    copy: Path = module_mount.path / "round"
    assert (copy / "f").read_bytes() == b"data"
    (copy / "f").unlink()
    copy.rmdir()
    assert unchanged(module_mount)


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["source", ".", "..", "/"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["clone", "source", "parent", "name"]), inner, max_size=4),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
@settings(max_examples=150)
def test_anything_at_all(module_mount: Mount, command: bytes) -> None:
    say(module_mount, command)
    assert module_mount.running
    for name in set(os.listdir(module_mount.path)) - {"file", "link", "source"}:
        for entry in (module_mount.path / name).iterdir():
            entry.unlink()
        (module_mount.path / name).rmdir()


def test_reading_it_gives_nothing(module_mount: Mount) -> None:
    with opened(module_mount.path / ".ramfs" / "control", os.O_RDWR) as fd:
        assert os.pread(fd, 100, 0) == b""
        os.ftruncate(fd, 0)
    for name in ("status.json", "metrics"):
        with fails(errno.EACCES):
            os.open(module_mount.path / ".ramfs" / name, os.O_RDWR)
