"""The disk under the store cannot read: EIO to whoever needs a page that is not in memory, never zeros."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable

from fault.conftest import Disk, fsck, needs_root
from harness import Mount
from mount.posix import PAGE, errno_of, fails, opened, pattern, read

pytestmark = needs_root
MB = 1 << 20


def test_an_unreadable_layer_is_eio_until_it_is_readable(disk: Disk, make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(store=disk.path / "store")
    mount.expect("ERROR|Traceback")
    files = {f"f{number}": pattern(2 * MB, number + 1) for number in range(4)}
    for name, data in files.items():
        (mount.path / name).write_bytes(data)
    (mount.path / ".snap" / "s").mkdir()
    mount.restart()
    # What is needed to get at the pages is in memory; the pages are not.
    fds = {name: os.open(mount.path / name, os.O_RDWR) for name in files}
    try:
        for fd in fds.values():
            assert os.pread(fd, 1, 2 * MB) == b""
        assert os.listxattr(mount.path / "f0") == []
        disk.break_reads()
        for _turn in range(3):
            for offset in (0, MB + 5, 2 * MB - PAGE):
                with fails(errno.EIO):
                    os.pread(fds["f0"], PAGE, offset)
            with fails(errno.EIO):  # part of a page: the rest of it cannot be read
                os.pwrite(fds["f1"], b"x" * 10, PAGE + 5)
        assert faults(fds["f2"]) == signal.SIGBUS
        with fails(errno.EIO):  # offsets that differ by less than a page: bytes are copied
            os.copy_file_range(fds["f2"], fds["f3"], MB, 5, 0)
        assert mount.running
        disk.mend()
        for name, data in files.items():
            assert os.pread(fds[name], 2 * MB, 0) == data, name
        assert faults(fds["f2"]) == 0
        os.pwrite(fds["f1"], b"x" * 10, PAGE + 5)
    finally:
        for fd in fds.values():
            os.close(fd)
    mount.restart()
    for name, data in files.items():
        expected = data[: PAGE + 5] + b"x" * 10 + data[PAGE + 15 :] if name == "f1" else data
        assert read(mount.path / name) == expected
        assert read(mount.path / ".snap" / "s" / name) == data
    mount.umount()
    fsck(mount.store)


def faults(fd: int) -> int:
    """Touch a page of a file through a mapping in a process of its own; the signal that ended it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        with mmap.mmap(fd, 2 * MB, prot=mmap.PROT_READ) as memory:
            memory[MB]
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_whole_pages_and_clones_need_no_read(disk: Disk, make_mount: Callable[..., Mount]) -> None:
    """What touches no old byte goes on: writes of whole pages, and sharing."""
    mount = make_mount(store=disk.path / "store")
    mount.expect("ERROR|Traceback")
    (mount.path / "f").write_bytes(pattern(2 * MB))
    (mount.path / "g").touch()
    mount.restart()
    with opened(mount.path / "f") as one, opened(mount.path / "g") as two:
        assert os.pread(one, 1, 2 * MB) == b""
        os.pwrite(two, pattern(PAGE), 0)
        disk.break_reads()
        codes = [
            errno_of(lambda: os.pwrite(one, pattern(4 * PAGE, 7), 8 * PAGE)),
            errno_of(lambda: os.copy_file_range(one, two, MB, 0, 0)),
        ]
        assert set(codes) <= {0, errno.EIO}
        assert mount.running
        disk.mend()
        if codes[0] == 0:
            assert os.pread(one, 4 * PAGE, 8 * PAGE) == pattern(4 * PAGE, 7)
        assert os.pread(one, PAGE, 100 * PAGE) == pattern(2 * MB)[100 * PAGE : 101 * PAGE]
        if codes[1] == 0:
            assert os.pread(two, PAGE, 100 * PAGE) == pattern(2 * MB)[100 * PAGE : 101 * PAGE]
    mount.umount(check=False)
