"""QEMU's temporary names: what `-mem-path DIR` does, call by call."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import time
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import NOBODY, PAGE, Process, eventually, fails, in_child, opened, pattern, read

FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL


def begin(directory: Path, name: str = "pc.ram", letters: str = "aB3xYz", size: int = 16 * PAGE) -> int:
    """What QEMU does to make its RAM: mkstemp, unlink, fstatfs, ftruncate. Returns the descriptor."""
    path = directory / f"qemu_back_mem.{name}.{letters}"
    fd = os.open(path, FLAGS, 0o600)
    path.unlink()
    os.fstatvfs(fd)
    os.ftruncate(fd, size)
    return fd


def test_a_block_file_appears_and_stays(here: Path) -> None:
    path = here / "qemu_back_mem.pc.ram.aB3xYz"
    fd = os.open(path, FLAGS, 0o600)
    assert "pc.ram@0x0" in os.listdir(here)
    assert os.path.samestat(path.stat(), (here / "pc.ram@0x0").stat())
    path.unlink()
    assert os.listdir(here) == ["pc.ram@0x0"]
    with fails(errno.ENOENT):
        path.stat()
    os.ftruncate(fd, 4 * PAGE)
    with mmap.mmap(fd, 4 * PAGE) as memory:
        os.close(fd)
        memory[PAGE : PAGE + 3] = b"ram"
    told = (here / "pc.ram@0x0").stat()
    assert (told.st_mode, told.st_size, told.st_nlink) == (0o100600, 4 * PAGE, 1)
    assert read(here / "pc.ram@0x0", PAGE, 3) == b"ram"


def test_the_next_create_finds_the_contents(here: Path) -> None:
    fd = begin(here)
    os.pwrite(fd, b"first life", 5 * PAGE)
    os.close(fd)
    fd = begin(here, letters="000000")
    assert os.pread(fd, 10, 5 * PAGE) == b"first life"
    os.close(fd)
    assert os.listdir(here) == ["pc.ram@0x0"]


def test_two_blocks_are_two_files(here: Path) -> None:
    one, two = begin(here), begin(here, "dimm@1:x")
    os.pwrite(one, b"one", 0)
    os.pwrite(two, b"two", 0)
    os.close(one)
    os.close(two)
    assert sorted(os.listdir(here)) == ["dimm@1:x@0x0", "pc.ram@0x0"]
    assert read(here / "pc.ram@0x0", 0, 3) == b"one"


def test_a_block_at_another_address_is_found(here: Path) -> None:
    (here / "pc.ram@0x100000000").write_bytes(pattern(PAGE))
    fd = begin(here)
    assert os.pread(fd, PAGE, 0) == pattern(PAGE)
    os.close(fd)
    assert os.listdir(here) == ["pc.ram@0x100000000"]


def test_a_slash_in_a_block_name(here: Path) -> None:
    """QEMU writes `_` for it; the block's own file tells what it was."""
    (here / "0000:00:02.0%2Fvga.vram@0xfd000000").write_bytes(b"vram")
    fd = begin(here, "0000:00:02.0_vga.vram")
    assert os.pread(fd, 4, 0) == b"vram"
    os.close(fd)


def test_while_another_process_has_it_open_it_is_busy(make_mount: type[Mount]) -> None:
    mount = make_mount()
    with Process(lambda: begin(mount.path)) as holder:
        started = time.monotonic()
        with fails(errno.EBUSY):
            begin(mount.path, letters="bbbbbb")
        assert time.monotonic() - started < 1
        assert os.listdir(mount.path) == ["pc.ram@0x0"]
        eventually(lambda: f"open in process {holder.pid}" in mount.log, "the log names the process")
        os.close(begin(mount.path, "another"))  # other blocks are free


def test_a_killed_holder_is_no_hindrance(here: Path) -> None:
    holder = Process(lambda: begin(here))
    os.kill(holder.pid, 9)
    fd = begin(here, letters="cccccc")
    os.close(fd)
    holder.end()


def test_a_holder_that_has_it_mapped_only(here: Path) -> None:
    def work() -> mmap.mmap:
        fd = begin(here)
        memory = mmap.mmap(fd, 16 * PAGE)
        os.close(fd)
        memory[0:3] = b"map"
        return memory

    with Process(work), fails(errno.EBUSY):
        begin(here, letters="dddddd")
    fd = begin(here, letters="eeeeee")
    assert os.pread(fd, 3, 0) == b"map"
    os.close(fd)


def test_a_clone_comes_up_on_its_parents_contents(here: Path) -> None:
    parent, clone = here / "parent", here / "clone"
    parent.mkdir()
    fd = begin(parent)
    os.pwrite(fd, pattern(16 * PAGE), 0)
    subprocess.run(["cp", "-r", parent, clone], check=True)
    other = begin(clone)  # while the parent has its own open
    assert os.pread(other, 16 * PAGE, 0) == pattern(16 * PAGE)
    os.pwrite(other, b"clone", 0)
    os.pwrite(fd, b"parent", PAGE)
    assert os.pread(fd, 5, 0) == pattern(5)
    assert os.pread(other, 6, PAGE) == pattern(16 * PAGE)[PAGE : PAGE + 6]
    os.close(fd)
    os.close(other)


def test_another_user_must_be_let_in_by_the_block_file(public: Mount) -> None:
    directory = public.path / "vm"
    directory.mkdir()
    directory.chmod(0o777)
    os.close(begin(directory))
    with fails(errno.EACCES):
        in_child(lambda: begin(directory, letters="ffffff"), user=NOBODY)
    (directory / "pc.ram@0x0").chmod(0o666)
    in_child(lambda: os.close(begin(directory, letters="ffffff")), user=NOBODY)


@pytest.mark.parametrize("name", ["qemu_back_mem.pc.ram.short", "qemu_back_mem..abcdef", "ram0", "pc.ram@0x10", "@"])
def test_other_names_are_ordinary_files(here: Path, name: str) -> None:
    with opened(here / name, FLAGS, 0o600) as fd:
        os.write(fd, b"ordinary")
    assert os.listdir(here) == [name]
    (here / name).unlink()
    assert os.listdir(here) == []


def test_hostile_block_names(here: Path) -> None:
    for name in ("..", "a" * 228, "new\nline", "@@@", "100%", "x@0x0"):
        os.close(begin(here, name))
    listed = sorted(os.listdir(here))
    assert listed == sorted(["..@0x0", "a" * 228 + "@0x0", "new\nline@0x0", "@@@@0x0", "100%25@0x0", "x@0x0@0x0"])
    for name in ("a" * 235, "b" * 240):
        with fails(errno.ENAMETOOLONG):
            begin(here, name)


def test_a_temporary_name_is_not_renamed_or_linked(here: Path) -> None:
    path = here / "qemu_back_mem.pc.ram.aB3xYz"
    with opened(path, FLAGS, 0o600):
        with fails(errno.EBUSY):
            path.rename(here / "x")
        with fails(errno.EEXIST):
            path.mkdir()
        path.unlink()
    assert os.listdir(here) == ["pc.ram@0x0"]


def test_mem_path_of_a_file_is_that_file(here: Path) -> None:
    """`mem-path=DIR/FILE`: opened O_RDWR; if ENOENT, created O_EXCL 0644."""
    with fails(errno.ENOENT):
        os.open(here / "ram0", os.O_RDWR)
    with opened(here / "ram0", FLAGS, 0o644) as fd:
        os.ftruncate(fd, PAGE)
        os.pwrite(fd, b"x", 0)
    with opened(here / "ram0", os.O_RDWR) as fd:
        assert os.pread(fd, 1, 0) == b"x"
