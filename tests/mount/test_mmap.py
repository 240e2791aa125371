"""Mapped files: what one view stores, every other sees."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import PAGE, Process, fails, in_child, opened, pattern, read

SHARED = mmap.MAP_SHARED
PRIVATE = mmap.MAP_PRIVATE


def writes(mount: Mount) -> int:
    """WRITE requests that the daemon has answered."""
    status = json.loads((mount.path / ".ramfs" / "status.json").read_text())
    return int(status["requests"]["writes"])


def file_of(here: Path, data: bytes) -> Path:
    (here / "f").write_bytes(data)
    return here / "f"


def test_stores_are_seen_by_read_at_once(here: Path) -> None:
    path = file_of(here, pattern(4 * PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[PAGE : PAGE + 5] = b"store"
        assert os.pread(fd, 5, PAGE) == b"store"
        assert in_child(lambda: read(path, PAGE, 5)) == b"store"


def test_writes_are_seen_by_loads_at_once(here: Path) -> None:
    path = file_of(here, pattern(4 * PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        assert memory[:] == pattern(4 * PAGE)
        os.pwrite(fd, b"write", 2 * PAGE - 2)
        assert memory[2 * PAGE - 2 : 2 * PAGE + 3] == b"write"

        def write() -> None:
            with opened(path) as other:
                os.pwrite(other, b"child", 3 * PAGE)

        in_child(write)
        assert memory[3 * PAGE : 3 * PAGE + 5] == b"child"


def test_two_mappings_are_one_memory(here: Path) -> None:
    path = file_of(here, bytes(2 * PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0) as one, mmap.mmap(fd, 0) as two:
        one[10:13] = b"abc"
        assert two[10:13] == b"abc"


def test_a_private_mapping_keeps_its_stores(here: Path) -> None:
    path = file_of(here, pattern(2 * PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0, flags=PRIVATE) as memory:
        memory[0:3] = b"own"
        assert os.pread(fd, 3, 0) == pattern(2 * PAGE)[:3]
    assert read(path) == pattern(2 * PAGE)


def test_msync_and_close_keep_the_stores(here: Path) -> None:
    path = file_of(here, bytes(64 * PAGE))
    model = bytearray(64 * PAGE)
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        for number in range(0, 64, 3):
            memory[number * PAGE + 7 : number * PAGE + 12] = model[number * PAGE + 7 : number * PAGE + 12] = b"dirty"
        memory.flush()
        memory[5 * PAGE] = model[5 * PAGE] = 1  # after the msync: goes with munmap and close
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 64 * PAGE) as memory:
        assert os.preadv(fd, [memory], 0) == 64 * PAGE
        assert memory[:] == model


def test_a_reader_flushes_nothing_and_a_snapshot_everything(shared: Mount, here: Path) -> None:
    model = pattern(64 * PAGE)
    path = file_of(here, bytes(64 * PAGE))

    def store() -> tuple[mmap.mmap, int]:
        fd = os.open(path, os.O_RDWR)
        memory = mmap.mmap(fd, 0)
        memory[:] = model
        return memory, fd

    with Process(store):
        before = writes(shared)
        assert subprocess.run(["cat", path], capture_output=True, check=True).stdout == model
        assert read(path) == model
        assert writes(shared) == before
        (here / ".snap" / "s").mkdir()
        assert writes(shared) > before
    assert read(here / ".snap" / "s" / "f") == model


def test_closing_what_could_be_written_to_flushes(shared: Mount, here: Path) -> None:
    path = file_of(here, bytes(PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[0] = 1
        before = writes(shared)
        with opened(path):
            pass
        assert writes(shared) > before


def test_the_last_munmap_flushes_after_the_last_close(shared: Mount, here: Path) -> None:
    path = file_of(here, bytes(PAGE))

    def store() -> None:
        with opened(path) as fd:
            memory = mmap.mmap(fd, 0)  # with a descriptor of its own, which is closed here too ...
        memory[0] = 1
        memory.close()

    before = writes(shared)
    in_child(store)
    assert writes(shared) > before
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, PAGE) as memory:
        assert os.preadv(fd, [memory], 0) == PAGE
        assert memory[0] == 1


def test_mtime_tells_of_stores_after_msync(here: Path) -> None:
    path = file_of(here, bytes(PAGE))
    os.utime(path, ns=(1, 1))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[0] = 1
        memory.flush()
    assert path.stat().st_mtime_ns > 10**18


def test_a_load_beyond_the_end_is_sigbus(here: Path) -> None:
    path = file_of(here, pattern(PAGE))

    def touch() -> None:
        with opened(path) as fd:
            os.ftruncate(fd, 4 * PAGE)
            memory = mmap.mmap(fd, 0)
            os.ftruncate(fd, PAGE)
            memory[3 * PAGE]

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        touch()
        os._exit(0)
    _, code = os.waitpid(child, 0)
    assert os.WIFSIGNALED(code)
    assert os.WTERMSIG(code) == signal.SIGBUS


def test_memory_mapped_beyond_the_old_end_appears_with_truncate(here: Path) -> None:
    path = file_of(here, pattern(PAGE + 100))
    with opened(path) as fd:
        os.ftruncate(fd, 3 * PAGE)
        memory = mmap.mmap(fd, 0)
        os.ftruncate(fd, PAGE + 50)
        os.ftruncate(fd, 3 * PAGE)
        assert memory[PAGE:] == pattern(PAGE + 100)[PAGE : PAGE + 50] + bytes(2 * PAGE - 50)
        memory[2 * PAGE] = 9
        memory.flush()
        assert os.pread(fd, 1, 2 * PAGE) == b"\x09"
        memory.close()


def test_stores_behind_the_end_of_the_last_page_are_not_in_the_file(here: Path) -> None:
    path = file_of(here, pattern(100))
    with opened(path) as fd:
        with mmap.mmap(fd, 100) as memory:
            view = memoryview(memory)
            assert len(view) == 100
            view.release()
            memory[99] = 7
        os.ftruncate(fd, PAGE)
        assert os.pread(fd, PAGE, 0) == pattern(100)[:99] + b"\x07" + bytes(PAGE - 100)


def test_stores_after_the_unlink(here: Path) -> None:
    path = file_of(here, pattern(8 * PAGE))
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, 0)
    path.unlink()
    os.close(fd)  # mmap has a descriptor of its own
    memory[3 * PAGE : 3 * PAGE + 4] = b"gone"
    memory.flush()
    assert memory[:] == pattern(8 * PAGE)[: 3 * PAGE] + b"gone" + pattern(8 * PAGE)[3 * PAGE + 4 :]
    memory.close()
    assert os.listdir(here) == []


def test_a_mapping_outlives_a_rename_and_a_new_file_of_the_name(here: Path) -> None:
    path = file_of(here, pattern(PAGE))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        path.rename(here / "g")
        path.write_bytes(b"other")
        memory[0:3] = b"abc"
        memory.flush()
    assert read(here / "g", 0, 3) == b"abc"
    assert path.read_bytes() == b"other"


def test_a_mapping_of_another_process_is_the_same_memory(here: Path) -> None:
    path = file_of(here, bytes(PAGE))

    def work() -> mmap.mmap:
        with opened(path) as fd:
            memory = mmap.mmap(fd, 0)
        memory[0:5] = b"child"
        return memory

    with Process(work), opened(path) as fd, mmap.mmap(fd, 0) as memory:
        assert memory[0:5] == b"child"
    assert read(path, 0, 5) == b"child"


def test_dirty_pages_of_a_killed_process_are_kept(here: Path) -> None:
    path = file_of(here, bytes(16 * PAGE))

    def work() -> mmap.mmap:
        with opened(path) as fd:
            memory = mmap.mmap(fd, 0)
        memory[:] = pattern(16 * PAGE)
        return memory

    Process(work).kill()
    assert read(path) == pattern(16 * PAGE)


def test_a_mapping_keeps_its_readers_off_what_it_may_not(here: Path) -> None:
    path = file_of(here, bytes(PAGE))
    with opened(path, os.O_RDONLY) as fd, fails(errno.EACCES):
        mmap.mmap(fd, PAGE, SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, PAGE, PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        memory[0] = 1


@pytest.mark.parametrize("advice", [mmap.MADV_DONTNEED, mmap.MADV_WILLNEED, mmap.MADV_HUGEPAGE])
def test_advice_changes_no_byte(here: Path, advice: int) -> None:
    path = file_of(here, pattern(1 << 20))
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory[PAGE] = 0
        memory.madvise(advice)
        assert memory[:] == pattern(1 << 20)[:PAGE] + b"\0" + pattern(1 << 20)[PAGE + 1 :]


def test_populated_at_once(here: Path) -> None:
    """As QEMU does with prealloc=on."""
    path = file_of(here, pattern(1 << 20))
    populate_write = 23
    with opened(path) as fd, mmap.mmap(fd, 0) as memory:
        memory.madvise(populate_write)
        memory.flush()
        assert memory[:] == pattern(1 << 20)
    assert read(path) == pattern(1 << 20)
