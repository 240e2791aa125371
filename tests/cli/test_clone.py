"""`ramfs clone`: its forms, and what it refuses."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from cli.conftest import Place, call, run


@pytest.fixture
def source(mounted_place: Place) -> Path:
    directory = mounted_place.path / "vm"
    (directory / "sub").mkdir(parents=True)
    (directory / "ram").write_bytes(os.urandom(50_000))
    (directory / "sub/link").symlink_to("../ram")
    os.link(directory / "ram", directory / "sub/hard")
    (directory / "run").write_text("#!/bin/sh\n")
    (directory / "run").chmod(0o755)
    (directory / ".snap/old").mkdir()
    return directory


def tree(directory: Path) -> dict[str, tuple[int, bytes | str]]:
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        what: bytes | str = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(directory))] = (mode, what)
    return found


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_new_name(source: Path, slash: str) -> None:
    run("clone", f"{source}{slash}", f"{source.parent}/clone{slash}").ok()
    clone = source.parent / "clone"
    assert tree(clone) == tree(source)
    assert (clone / "ram").stat().st_ino == (clone / "sub/hard").stat().st_ino != (source / "ram").stat().st_ino
    assert os.listdir(clone / ".snap") == []
    (clone / "ram").write_bytes(b"other")
    assert (source / "ram").stat().st_size == 50_000


def test_a_directory_as_target_gets_it_inside(source: Path) -> None:
    into = source.parent / "into"
    into.mkdir()
    run("clone", source, into).ok()
    assert tree(into / "vm") == tree(source)
    run("clone", f"{source}/.", f"{into}/").failed(1, into / "vm", "exists")


def test_relative_paths(source: Path) -> None:
    run("clone", "vm", "clone", cwd=source.parent).ok()
    run("clone", ".", "../again", cwd=source).ok()
    assert tree(source.parent / "clone") == tree(source.parent / "again") == tree(source)


def test_of_a_snapshot_it_is_writable(source: Path) -> None:
    run("clone", source / ".snap/old", source.parent / "clone").ok()
    assert tree(source.parent / "clone") == tree(source)
    (source.parent / "clone/ram").write_bytes(b"mine")


def test_into_itself_is_a_copy_as_of_before(source: Path) -> None:
    before = tree(source)
    run("clone", source, source / "inner").ok()
    assert tree(source / "inner") == before


def test_mapped_pages_are_flushed_first(source: Path) -> None:
    with open(source / "ram", "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        memory[:5] = b"dirty"
        run("clone", source, source.parent / "clone").ok()
    assert (source.parent / "clone/ram").read_bytes()[:5] == b"dirty"


def test_odd_names(source: Path) -> None:
    for name in ("with space", "grün", os.fsdecode(b"\xff"), "a\nb", "-x"):
        run("clone", "--", source, source.parent / name).ok()
        run("clone", "--", source.parent / name, source.parent / f"{name}2").ok()
        assert (source.parent / f"{name}2" / "ram").is_file()


def test_refused(source: Path, tmp_path: Path) -> None:
    top = source.parent
    run("clone", source, top / "no/clone").failed(1, top / "no", "not a directory")
    run("clone", source, top / "vm/ram").failed(1, top / "vm/ram", "exists")
    run("clone", source, top / "vm/ram/x").failed(1, top / "vm/ram", "not a directory")
    run("clone", source / "ram", top / "file").failed(1, source / "ram", "not a directory", "cp")
    run("clone", source / "sub/link", top / "file").failed(1, "link", "not a directory")
    run("clone", source, tmp_path / "clone").failed(8, tmp_path)
    run("clone", tmp_path, top / "clone").failed(8, tmp_path)
    run("clone", source, source / ".snap/new").failed(1, ".snap/new", "Read-only")
    run("clone", source, source / ".snap/old/new").failed(1, "Read-only")
    run("clone", source, top / ".ramfs/new").failed(1, ".ramfs/new")
    run("clone", source, top / ("n" * 256)).failed(1, "too long")
    assert sorted(os.listdir(top)) == ["vm"]


def test_across_mounts(source: Path, shm: Path) -> None:
    other = Place(shm, shm / "other.store", shm / "other")
    other.path.mkdir()
    other.mount()
    run("clone", source, other.path / "clone").failed(2, "different mounts", "cp")
    assert os.listdir(other.path) == []
    call("cp", "-r", source, other.path / "clone").ok()
    assert (other.path / "clone/ram").read_bytes() == (source / "ram").read_bytes()
    other.umount()
