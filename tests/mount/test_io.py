"""Bytes of files by system calls: open flags, sizes, offsets, vectors, O_DIRECT, fsync."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import NOBODY, PAGE, errno_of, eventually, fails, in_child, opened, pattern, read, status

from ramfs.units import MAX_FILE_SIZE

SIZES = [0, 1, 511, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 17, 1 << 20, (1 << 20) + 1, (2 << 20) + 4097]


@contextlib.contextmanager
def aligned(length: int) -> Iterator[mmap.mmap]:
    """Memory that O_DIRECT takes."""
    with contextlib.closing(mmap.mmap(-1, length)) as memory:
        yield memory


# --- open ---


def test_creates_with_mode_and_umask(here: Path) -> None:
    old = os.umask(0o027)
    try:
        with opened(here / "f", os.O_RDWR | os.O_CREAT, 0o666):
            pass
    finally:
        os.umask(old)
    made = (here / "f").stat()
    assert (made.st_mode, made.st_size, made.st_nlink) == (0o100640, 0, 1)
    assert (made.st_uid, made.st_gid) == (os.getuid(), os.getgid())


def test_open_of_nothing_is_enoent(here: Path) -> None:
    with fails(errno.ENOENT):
        os.open(here / "f", os.O_RDWR)
    with fails(errno.ENOENT):
        os.open(here / "d" / "f", os.O_RDWR | os.O_CREAT)


def test_o_excl_refuses_what_exists(here: Path) -> None:
    (here / "f").write_bytes(b"old")
    (here / "link").symlink_to("nowhere")
    for name in ("f", "link"):
        with fails(errno.EEXIST):
            os.open(here / name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert (here / "f").read_bytes() == b"old"


def test_o_trunc_empties(here: Path) -> None:
    path = here / "f"
    path.write_bytes(pattern(3 * PAGE + 5))
    with opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.ftruncate(fd, 2 * PAGE)
        assert os.pread(fd, 3 * PAGE, 0) == bytes(2 * PAGE)


def test_open_of_a_directory_for_writing_is_eisdir(here: Path) -> None:
    with fails(errno.EISDIR):
        os.open(here, os.O_RDWR)


def test_o_directory_of_a_file_is_enotdir(here: Path) -> None:
    (here / "f").touch()
    with fails(errno.ENOTDIR):
        os.open(here / "f", os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.ENOTDIR):
        (here / "f" / "g").stat()


def test_o_nofollow_refuses_a_symlink(here: Path) -> None:
    (here / "link").symlink_to("f")
    with fails(errno.ELOOP):
        os.open(here / "link", os.O_RDONLY | os.O_NOFOLLOW)


def test_a_descriptor_is_for_what_it_was_opened_for(here: Path) -> None:
    (here / "f").write_bytes(b"abc")
    with opened(here / "f", os.O_RDONLY) as fd, fails(errno.EBADF):
        os.write(fd, b"x")
    with opened(here / "f", os.O_WRONLY) as fd, fails(errno.EBADF):
        os.read(fd, 1)
    with opened(here / "f", os.O_RDONLY) as fd, fails(errno.EINVAL):
        os.ftruncate(fd, 0)


def test_o_append_of_two_writers_loses_nothing(here: Path) -> None:
    path, lines = here / "log", 400
    path.touch()

    def write(who: int) -> int:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            for number in range(lines):
                os.write(fd, b"%d:%04d:%s\n" % (who, number, b"x" * 90))
        return 0

    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        child = os.fork()
        if child == 0:
            os._exit(write(1))
        for number in range(lines):
            os.write(fd, b"%d:%04d:%s\n" % (2, number, b"x" * 90))
        _, code = os.waitpid(child, 0)
    assert code == 0
    found = path.read_bytes().splitlines()
    assert len(found) == 2 * lines
    for who in (b"1", b"2"):
        mine = [line for line in found if line.startswith(who)]
        assert mine == [b"%s:%04d:%s" % (who, number, b"x" * 90) for number in range(lines)]


def test_o_append_goes_to_the_end_after_a_seek(here: Path) -> None:
    (here / "f").write_bytes(b"12345")
    with opened(here / "f", os.O_RDWR | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"6")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 6
    assert (here / "f").read_bytes() == b"123456"


# --- sizes and offsets ---


@pytest.mark.parametrize("size", SIZES)
def test_any_size_reads_back(here: Path, size: int) -> None:
    path, data = here / "f", pattern(size)
    path.write_bytes(data)
    assert path.stat().st_size == size
    assert path.read_bytes() == data
    with opened(path) as fd:
        assert os.pread(fd, PAGE, size) == b""
        assert os.pread(fd, PAGE, size + 12345) == b""
        assert os.pread(fd, 100, max(0, size - 10)) == data[max(0, size - 10) :]


@pytest.mark.parametrize("offset", [1, 100, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 3, 5 * PAGE + 7])
@pytest.mark.parametrize("length", [1, 3, 4 * PAGE, PAGE + 2, 2 * PAGE - 1])
def test_any_alignment_of_a_write(here: Path, offset: int, length: int) -> None:
    before, data = pattern(8 * PAGE + 100, 3), pattern(length, 9)
    model = bytearray(before)
    model[offset : offset + length] = data
    (here / "f").write_bytes(before)
    with opened(here / "f") as fd:
        assert os.pwrite(fd, data, offset) == length
        assert os.pread(fd, len(model) + 1, 0) == model
    assert read(here / "f") == model


def test_zeros_written_over_data_read_as_zeros(here: Path) -> None:
    (here / "f").write_bytes(pattern(8 * PAGE))
    with opened(here / "f") as fd:
        os.pwrite(fd, bytes(3 * PAGE), PAGE)
        os.pwrite(fd, bytes(10), 6 * PAGE - 5)
    model = bytearray(pattern(8 * PAGE))
    model[PAGE : 4 * PAGE] = bytes(3 * PAGE)
    model[6 * PAGE - 5 : 6 * PAGE + 5] = bytes(10)
    assert read(here / "f") == model


def test_a_sparse_file_reads_zeros_and_takes_no_space(here: Path) -> None:
    path, end = here / "f", 1 << 40
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", end)
        os.pwrite(fd, b"middle", end // 2)
        assert os.pread(fd, 3 * PAGE, 12345) == bytes(3 * PAGE)
        assert os.pread(fd, PAGE, end // 2 - 4) == bytes(4) + b"middle" + bytes(PAGE - 10)
        assert os.pread(fd, PAGE, end) == b"end"
    assert path.stat().st_size == end + 3


def test_st_blocks_tell_the_full_size(here: Path) -> None:
    """On purpose: cp takes its slow path for a file that looks sparse."""
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        for size in (0, 1, 512, 513, PAGE, (1 << 30) + 1):
            os.ftruncate(fd, size)
            assert os.fstat(fd).st_blocks == (size + 511) // 512


@pytest.mark.parametrize("new", [0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 99])
def test_truncate_down_and_up_again_shows_zeros(here: Path, new: int) -> None:
    path, data = here / "f", pattern(3 * PAGE + 100)
    path.write_bytes(data)
    os.truncate(path, new)
    assert path.read_bytes() == data[:new]
    os.truncate(path, len(data) + 2 * PAGE)
    assert path.read_bytes() == data[:new] + bytes(len(data) + 2 * PAGE - new)


def test_truncated_within_a_page_that_is_shared(here: Path) -> None:
    """The tail of a page that a snapshot has too must be cleared in a copy of it."""
    path, data = here / "f", pattern(2 * PAGE)
    path.write_bytes(data)
    (here / ".snap" / "s").mkdir()
    os.truncate(path, PAGE + 10)
    os.truncate(path, 2 * PAGE)
    assert read(path) == data[: PAGE + 10] + bytes(PAGE - 10)
    assert read(here / ".snap" / "s" / "f") == data


def test_a_write_beyond_the_end_fills_with_zeros(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"abc")
    with opened(path) as fd:
        os.pwrite(fd, b"x", 2 * PAGE + 5)
    assert path.read_bytes() == b"abc" + bytes(2 * PAGE + 2) + b"x"


def test_the_largest_file(mounted: Mount) -> None:
    path = mounted.path / "f"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, MAX_FILE_SIZE)
        assert os.fstat(fd).st_size == MAX_FILE_SIZE
        os.pwrite(fd, b"!", MAX_FILE_SIZE - 1)
        assert os.pread(fd, 10, MAX_FILE_SIZE - 2) == b"\0!"
    (mounted.path / ".snap" / "s").mkdir()
    with opened(path) as fd:
        os.ftruncate(fd, 1)
        assert os.pread(fd, 10, 0) == b"\0"
    assert read(mounted.path / ".snap" / "s" / "f", MAX_FILE_SIZE - 1) == b"!"
    # Looking for garbage in it takes no memory for its holes.
    (mounted.path / ".snap" / "s").rmdir()
    eventually(lambda: status(mounted.path)["requests"]["garbage_passes"] > 0, "a garbage pass")
    eventually(lambda: status(mounted.path)["store_bytes"]["layers"] == 0, "its page is free")
    assert status(mounted.path)["memory_bytes"] < 300 << 20
    mounted.restart()
    assert path.read_bytes() == b"\0"


@pytest.mark.parametrize("size", [MAX_FILE_SIZE + 1, 1 << 60, (1 << 63) - 1])
def test_beyond_the_largest_file_is_efbig(here: Path, size: int) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"kept")
        with fails(errno.EFBIG):
            os.ftruncate(fd, size)
        with fails(errno.EFBIG):
            os.truncate(here / "f", size)
        with fails(errno.EFBIG):
            os.pwrite(fd, b"x", size - 1)
        assert os.pread(fd, 10, min(size, (1 << 63) - 20)) == b""
        assert os.fstat(fd).st_size == 4
        assert os.pread(fd, 10, 0) == b"kept"


def test_a_write_across_the_largest_size_writes_nothing_or_what_fits(here: Path) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        code = errno_of(lambda: os.pwrite(fd, b"x" * 100, MAX_FILE_SIZE - 50))
        assert code in {0, errno.EFBIG}
        assert os.fstat(fd).st_size == (0 if code else MAX_FILE_SIZE)


def test_negative_sizes_and_offsets_are_einval(here: Path) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        with fails(errno.EINVAL):
            os.ftruncate(fd, -1)
        with fails(errno.EINVAL):
            os.pread(fd, 1, -1)
        with fails(errno.EINVAL):
            os.pwrite(fd, b"x", -1)
        with fails(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)


def test_vectors(here: Path) -> None:
    parts = [pattern(n, n) for n in (1, PAGE - 1, PAGE, 3 * PAGE + 5, 77)]
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        assert os.pwritev(fd, parts, 1000) == sum(map(len, parts))
        back = [bytearray(1000), *(bytearray(len(part)) for part in parts)]
        assert os.preadv(fd, back, 0) == 1000 + sum(map(len, parts))
        assert back == [bytes(1000), *parts]


def test_one_write_of_many_requests(here: Path) -> None:
    data = pattern(5 << 20)
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        assert os.pwrite(fd, data, 123) == len(data)
    assert read(here / "f") == bytes(123) + data


# --- O_DIRECT ---


def test_o_direct_aligned(here: Path) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd, aligned(4 * PAGE) as memory:
        memory[:] = pattern(4 * PAGE)
        assert os.pwritev(fd, [memory], PAGE) == 4 * PAGE
        memory[:] = bytes(4 * PAGE)
        assert os.preadv(fd, [memory], PAGE) == 4 * PAGE
        assert memory[:] == pattern(4 * PAGE)
    assert read(here / "f") == bytes(PAGE) + pattern(4 * PAGE)


def test_o_direct_unaligned_is_done_or_refused_never_wrong(here: Path) -> None:
    path, data = here / "f", pattern(3 * PAGE)
    path.write_bytes(data)
    model = bytearray(data)
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
        code = errno_of(lambda: os.pwrite(fd, b"x" * 100, PAGE - 50))
        assert code in {0, errno.EINVAL}
        if code == 0:
            model[PAGE - 50 : PAGE + 50] = b"x" * 100
        got: list[bytes] = []
        assert errno_of(lambda: got.append(os.pread(fd, 333, 77))) in {0, errno.EINVAL}
        assert all(data == model[77:410] for data in got)
    assert read(path) == model


def test_o_direct_and_cached_see_each_other(here: Path) -> None:
    path = here / "f"
    path.write_bytes(bytes(4 * PAGE))
    with opened(path) as cached, opened(path, os.O_RDWR | os.O_DIRECT) as direct, aligned(PAGE) as memory:
        for turn in range(1, 20):
            memory[:] = bytes([turn]) * PAGE
            assert os.pwritev(direct, [memory], (turn % 4) * PAGE) == PAGE
            assert os.pread(cached, PAGE, (turn % 4) * PAGE) == bytes([turn]) * PAGE
            os.pwrite(cached, bytes([turn + 100]) * PAGE, ((turn + 1) % 4) * PAGE)
            assert os.preadv(direct, [memory], ((turn + 1) % 4) * PAGE) == PAGE
            assert memory[:] == bytes([turn + 100]) * PAGE


def test_o_direct_across_the_end(here: Path) -> None:
    path, data = here / "f", pattern(PAGE + 100)
    path.write_bytes(data)
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, aligned(2 * PAGE) as memory:
        assert os.preadv(fd, [memory], 0) == PAGE + 100
        assert memory[: PAGE + 100] == data
        assert os.preadv(fd, [memory], 2 * PAGE) == 0


# --- sync, unlinked files ---


def test_fsync_of_files_and_directories(here: Path) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, pattern(100))
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(here, os.O_RDONLY) as fd:
        os.fsync(fd)
        os.fdatasync(fd)


def test_an_unlinked_file_lives_until_its_last_close(here: Path) -> None:
    path = here / "f"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"before")
        path.unlink()
        assert not path.exists()
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, pattern(3 * PAGE), PAGE)
        os.ftruncate(fd, 5 * PAGE)
        os.fsync(fd)
        os.fchmod(fd, 0o600)
        assert os.pread(fd, 10 * PAGE, 0) == b"before" + bytes(PAGE - 6) + pattern(3 * PAGE) + bytes(PAGE)
        with fails(errno.ENOENT):
            os.link(f"/proc/self/fd/{fd}", here / "again", src_dir_fd=fd)  # by linkat(2), which follows
        path.write_bytes(b"another")
        assert os.pread(fd, 6, 0) == b"before"
    assert path.read_bytes() == b"another"


def test_an_unlinked_file_gives_its_space_back(mounted: Mount) -> None:
    """On a mount of its own: what other tests have deleted goes meanwhile."""

    def used() -> int:
        return int(status(mounted.path)["store_bytes"]["layers"])

    with opened(mounted.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, pattern(8 << 20))
        (mounted.path / "f").unlink()
        assert used() >= 8 << 20
    eventually(lambda: used() == 0, "the space of an unlinked file is free")


def test_two_descriptors_see_one_file(here: Path) -> None:
    with opened(here / "f", os.O_RDWR | os.O_CREAT) as one, opened(here / "f") as two:
        for turn, fd in enumerate(itertools.islice(itertools.cycle((one, two)), 20)):
            os.pwrite(fd, b"%03d" % turn, turn * 1000)
            assert os.pread(two if fd == one else one, 3, turn * 1000) == b"%03d" % turn
        os.ftruncate(one, 1500)
        assert os.fstat(two).st_size == 1500


def test_another_process_sees_what_was_written(here: Path) -> None:
    (here / "f").write_bytes(pattern(PAGE + 1))
    assert in_child((here / "f").read_bytes) == pattern(PAGE + 1)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_without_allow_other_nobody_else_gets_in(here: Path, flags: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    (here / "f").write_bytes(b"secret")
    (here / "f").chmod(0o666)
    here.chmod(0o777)
    with fails(errno.EACCES):
        in_child(lambda: os.open("f", flags), user=NOBODY, cwd=here)
    with fails(errno.EACCES):
        in_child(lambda: os.listdir("."), user=NOBODY, cwd=here)
