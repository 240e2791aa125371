"""``.guest``: the layout of a directory and the views of its guest's memory."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arrival.conftest import nbdkit
from cli.conftest import NOBODY, call, needs_root, run
from harness import Mount
from mount.posix import errno_of, eventually, fails, pattern, status

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
RAM = pattern(MIB)
TEXT = b"OSRELEASE=6.1.0-test\nPAGESIZE=4096\nNUMBER(x)=1\n\n"
NOTE = struct.pack("<III", 11, len(TEXT), 0) + b"VMCOREINFO\0\0" + TEXT


def cp(*args: object) -> None:
    subprocess.run(["cp", *map(str, args)], stdin=subprocess.DEVNULL, timeout=60, check=True)


def layout_of(directory: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((directory / ".guest/layout.json").read_text())
    assert json.loads(run("layout", "--json", directory).ok()) == told
    return told


def places(directory: Path) -> list[tuple[int, int, str, int]]:
    return [
        (int(each["gpa"], 16), int(each["size"], 16), each["file"], int(each["offset"], 16))
        for each in layout_of(directory)["ranges"]
    ]


def write_layout(directory: Path, *ranges: tuple[int, int, str, int], **more: object) -> None:
    told = [dict(zip(("gpa", "size", "file", "offset"), each, strict=True)) for each in ranges]
    (directory / ".guest/layout.json").write_text(json.dumps({"ranges": told, **more}))


def read_at(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def edges(path: Path) -> list[tuple[int, int]]:
    """Where a file has data, by SEEK_DATA and SEEK_HOLE."""
    fd = os.open(path, os.O_RDONLY)
    found, at, end = [], 0, os.fstat(fd).st_size
    try:
        while at < end:
            if errno_of(lambda at=at: os.lseek(fd, at, os.SEEK_DATA)) == errno.ENXIO:  # type: ignore[misc]
                break
            low = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, low, os.SEEK_HOLE)
            found.append((low, at))
    finally:
        os.close(fd)
    return found


@pytest.fixture
def vm(here: Path) -> Path:
    """RAM that is cut in two, the second part in another file's middle, above 4 GiB."""
    vm = here / "vm"
    vm.mkdir()
    (vm / "ram0").write_bytes(RAM)
    (vm / "ram1").write_bytes(bytes(16 * PAGE) + RAM[: 16 * PAGE])
    write_layout(vm, (0, MIB, "ram0", 0), (4 * GIB, 24 * PAGE, "ram1", 8 * PAGE), machine="pc")
    return vm


# --- names and attributes ---


def test_it_is_not_listed_and_cannot_be_changed(vm: Path) -> None:
    guest = vm / ".guest"
    assert sorted(os.listdir(vm)) == ["ram0", "ram1"]
    assert sorted(os.listdir(guest)) == ["layout.json", "physmem", "ranges", "vmcore"]
    assert sorted(os.listdir(guest / "ranges")) == ["ram0@0x0", "ram1@0x100000000"]
    assert {each.name for each in os.scandir(guest) if each.is_dir()} == {"ranges"}
    for code, work in (
        (errno.EEXIST, guest.mkdir),
        (errno.EBUSY, guest.rmdir),
        (errno.EBUSY, lambda: guest.rename(vm / "other")),
        (errno.EROFS, (guest / "new").touch),
        (errno.EROFS, (guest / "physmem").unlink),
        (errno.EROFS, lambda: (guest / "ranges/ram0@0x0").rename(vm / "other")),
        (errno.EROFS, lambda: (vm / "ram0").rename(guest / "other")),
        (errno.EPERM, lambda: (guest / "vmcore").chmod(0o777)),
        (errno.EPERM, lambda: os.setxattr(guest / "vmcore", "user.x", b"")),
        (errno.EPERM, lambda: os.setxattr(vm / "ram0", "user.ramfs.layout", b"{}")),
        (errno.EACCES, lambda: os.close(os.open(guest / "physmem", os.O_RDWR))),
        (errno.ENOENT, (guest / "none").stat),
        (errno.ENOENT, (guest / "ranges/ram0@0x1").stat),
        (errno.ENOTDIR, (vm / "ram0/.guest").stat),
        (errno.ENOENT, (vm / ".snap/.guest").stat),
    ):
        with fails(code):
            work()
    assert os.listxattr(vm / "ram0") == []
    cp("-r", vm, vm.parent / "copy")
    shutil.rmtree(vm)
    assert not vm.exists()


def test_who_may_read_all_files_may_read_a_view_of_them(vm: Path) -> None:
    (vm / "ram0").chmod(0o640)
    (vm / "ram1").chmod(0o600)
    os.utime(vm / "ram1")
    mode = {name: stat.S_IMODE((vm / ".guest" / name).stat().st_mode) for name in ("physmem", "vmcore", "layout.json")}
    assert mode == {"physmem": 0o400, "vmcore": 0o400, "layout.json": stat.S_IMODE(vm.stat().st_mode) & 0o666}
    assert stat.S_IMODE((vm / ".guest/ranges/ram0@0x0").stat().st_mode) == 0o440
    told = (vm / ".guest/physmem").stat()
    assert told.st_size == 4 * GIB + 24 * PAGE
    assert told.st_blocks == (MIB + 24 * PAGE) // 512
    assert told.st_mtime_ns == (vm / "ram1").stat().st_mtime_ns


@needs_root
def test_another_user_may_not_read_memory(public: Mount) -> None:
    vm = public.path / "vm"
    vm.mkdir(mode=0o755)
    (vm / "pc.ram@0x0").write_bytes(RAM)
    (vm / "theirs@0x200000").write_bytes(RAM)
    os.chown(vm / "theirs@0x200000", 65534, 65534)
    for path in vm.iterdir():
        path.chmod(0o600)
    physmem = (vm / ".guest/physmem").stat()
    assert (physmem.st_uid, physmem.st_gid, stat.S_IMODE(physmem.st_mode)) == (0, 0, 0o400)
    for name, works in (
        ("physmem", False), ("vmcore", False), ("ranges/pc.ram@0x0", False), ("ranges/theirs@0x200000", True),
        ("layout.json", True),
    ):  # fmt: skip
        done = call(*NOBODY, "cat", vm / ".guest" / name)
        assert (done.code == 0) == works, (name, done.err)
    assert "Permission denied" in call(*NOBODY, "sh", "-c", f": > {vm}/.guest/layout.json").err


# --- what they read as ---


def test_they_show_the_memory(vm: Path) -> None:
    guest, second = vm / ".guest", (vm / "ram1").read_bytes()[8 * PAGE :]
    assert (guest / "ranges/ram0@0x0").read_bytes() == RAM
    assert (guest / "ranges/ram1@0x100000000").read_bytes() == second
    physmem = guest / "physmem"
    assert edges(physmem) == [(0, MIB), (4 * GIB + 8 * PAGE, 4 * GIB + 24 * PAGE)]
    assert read_at(physmem, 0, MIB) == RAM
    assert read_at(physmem, MIB - 10, 20) == RAM[-10:] + bytes(10)
    assert read_at(physmem, 4 * GIB - 5, 10 * PAGE) == (bytes(5) + second)[: 10 * PAGE]
    assert read_at(physmem, 4 * GIB + 23 * PAGE, 2 * PAGE) == second[-PAGE:]
    assert read_at(physmem, 2 * GIB, 100) == bytes(100)
    assert read_at(physmem, 1 << 60, 100) == b""
    core = (guest / "vmcore").read_bytes()
    assert core.endswith(RAM + second)
    assert core.startswith(b"\x7fELF")
    for segments in ([(0, MIB), (4 * GIB, len(second))],):
        told = subprocess.run(["readelf", "-lW", guest / "vmcore"], capture_output=True, text=True, check=True)
        assert told.stderr == ""
        loads = [line.split() for line in told.stdout.splitlines() if line.startswith("  LOAD")]
        # Without a note there is an empty one before.
        assert [(int(line[3], 16), int(line[4], 16)) for line in loads[1:]] == segments


def test_other_programs_copy_and_map_them(vm: Path, tmp_path: Path) -> None:
    write_layout(vm, (0, MIB, "ram0", 0), (64 * MIB, 24 * PAGE, "ram1", 8 * PAGE))
    physmem = vm / ".guest/physmem"
    cp(physmem, tmp_path / "dump")
    assert (tmp_path / "dump").stat().st_size == physmem.stat().st_size
    assert (tmp_path / "dump").stat().st_blocks * 512 < 4 * MIB
    assert edges(tmp_path / "dump") == edges(physmem)
    cp(vm / ".guest/ranges/ram0@0x0", vm / "copied")
    assert (vm / "copied").read_bytes() == RAM
    with open(physmem, "rb") as file:
        for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
            with mmap.mmap(file.fileno(), MIB, flags, mmap.PROT_READ) as memory:
                assert memory[:] == RAM
    out = call("grep", "-c", "-a", "-F", "nowhere", physmem)
    assert (out.code, out.out) == (1, "0\n")


def test_what_a_file_lacks_by_now_reads_as_zeros(vm: Path) -> None:
    os.truncate(vm / "ram0", 100)
    assert read_at(vm / ".guest/physmem", 0, MIB) == RAM[:100] + bytes(MIB - 100)
    assert edges(vm / ".guest/ranges/ram0@0x0") == [(0, 100)]


# --- live ---


def test_what_is_stored_into_a_mapping_is_seen_at_once(vm: Path) -> None:
    """By reads of any size, in whatever order, in views that were open before; and where there was a hole."""
    names = "physmem", "vmcore", "ranges/ram0@0x0"
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(vm / "ram0", "r+b"))
        memory = stack.enter_context(mmap.mmap(file.fileno(), MIB))
        views = [stack.enter_context(open(vm / ".guest" / name, "rb", buffering=0)).fileno() for name in names]
        start = [0, os.stat(views[1]).st_size - MIB - 24 * PAGE, 0]
        for i in range(40):
            at = (i * 37 % 256) * PAGE + i
            memory[at : at + 8] = struct.pack("<Q", i)
            for view, low in zip(views, start, strict=True):
                assert os.pread(view, 8, low + at) == struct.pack("<Q", i)
        assert os.pread(views[0], 2 * MIB, 0) == memory[:] + bytes(MIB)
    with open(vm / "ram1", "r+b") as file, mmap.mmap(file.fileno(), 32 * PAGE) as memory:
        memory[10 * PAGE] = 1
        assert edges(vm / ".guest/physmem")[1] == (4 * GIB + 2 * PAGE, 4 * GIB + 3 * PAGE)
        (vm / "ram1").rename(vm / "renamed")
        memory[11 * PAGE] = 2
        assert read_at(vm / ".guest/ranges/ram1@0x100000000", 3 * PAGE, 1) == b"\2"
        assert places(vm)[1][2] == "renamed"


def test_a_removed_file_is_read_until_the_view_is_closed(vm: Path) -> None:
    with open(vm / ".guest/physmem", "rb", buffering=0) as view:
        (vm / "ram0").unlink()
        assert os.pread(view.fileno(), MIB, 0) == RAM
        assert (vm / ".guest/ranges").is_dir()
        assert os.listdir(vm / ".guest/ranges") == ["ram1@0x100000000"]
    assert [each[2] for each in places(vm)] == ["ram1"]


@pytest.mark.parametrize("much", [False, True])
def test_another_daemon_goes_on(mounted: Mount, much: bool) -> None:
    """Also when so much has been noted for it that the daemon before has noted all anew."""
    vm = mounted.path / "vm"
    vm.mkdir()
    (vm / "ram0").write_bytes(RAM)
    (vm / "gone").write_bytes(RAM)
    write_layout(vm, (MIB, MIB, "ram0", 0), (4 * MIB, MIB, "gone", 0))
    with open(vm / ".guest/physmem", "rb", buffering=0) as view, open(vm / ".guest/vmcore", "rb", buffering=0) as core:
        head = os.pread(core.fileno(), PAGE, 0)
        (vm / "gone").unlink()
        write_layout(vm, (0, MIB, "ram0", 0))
        if much:
            for _ in range(5000):
                os.close(os.open(vm / "ram0", os.O_RDONLY))
            time.sleep(1.5)  # a second between two looks
        mounted.kill_daemon()
        assert os.pread(view.fileno(), MIB, MIB) == RAM
        assert os.pread(core.fileno(), PAGE, 0) == head
        assert os.lseek(view.fileno(), 0, os.SEEK_DATA) == MIB
    assert read_at(vm / ".guest/physmem", 0, MIB) == RAM
    mounted.restart()
    assert places(vm) == [(0, MIB, "ram0", 0)]


# --- the layout ---


def test_a_layout_goes_where_the_files_go(vm: Path, here: Path) -> None:
    own = places(vm)
    assert own == [(0, MIB, "ram0", 0), (4 * GIB, 24 * PAGE, "ram1", 8 * PAGE)]
    (vm / ".snap/s").mkdir()
    for number, copy in enumerate(
        (["cp", "-r", vm], ["cp", "-a", vm], ["cp", "-r", vm / ".snap/s"], ["cp", "-al", vm / ".snap/s"])
    ):
        target = here / f"copy{number}"
        subprocess.run([*map(str, copy), str(target)], check=True, stdin=subprocess.DEVNULL)
        assert places(target) == own
        assert layout_of(target)["machine"] == "pc"
    run("clone", vm / ".snap/s", here / "cloned").ok()
    assert places(here / "cloned") == own
    (vm / ".guest/layout.json").unlink()  # each has its own
    assert layout_of(vm)["derived"] is True
    assert places(here / "copy0") == places(vm / ".snap/s") == own
    assert read_at(vm / ".snap/s/.guest/physmem", 4 * GIB + 8 * PAGE, PAGE) == RAM[:PAGE]
    for frozen in (vm / ".snap/s", here / "copy3"):
        with fails(errno.EROFS):
            write_layout(frozen, (0, PAGE, "ram0", 0))
        run("layout", frozen, "--derive").failed(1, "Read-only")
    (here / "copy0/other").write_bytes(b"")
    cp(here / "copy0/ram0", here / "copy0/other")  # has the same place, where there is room for one only
    assert [each["file"] for each in layout_of(here / "copy0")["ignored"]] == ["ram0"]


@pytest.mark.parametrize("size", [1, 17, 4096])
def test_a_layout_is_written_in_parts_and_counts_when_it_is_whole(vm: Path, size: int) -> None:
    text = json.dumps({"ranges": [{"gpa": 0, "size": PAGE, "file": "ram0"}], "machine": "m" * 50}).encode()
    path = vm / ".guest/layout.json"
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(text), size):
            assert b"ram1" in path.read_bytes()
            file.write(text[at : at + size])
        assert len(places(vm)) == 1


def test_what_cannot_be_is_refused_and_changes_nothing(vm: Path) -> None:
    path, before = vm / ".guest/layout.json", places(vm)
    with fails(errno.EINVAL):
        path.write_text('{"ranges": [{"gpa": 0, "size": 4096, "file": "none"}]}')
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b'{"ranges": [')
    with fails(errno.EINVAL):
        os.pwrite(fd, b"x", 100)
    with fails(errno.EINVAL):
        os.close(fd)
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    with fails(errno.EFBIG):
        for _ in range(20):
            os.write(fd, b" " * 100_000)
    with fails(errno.EINVAL):
        os.close(fd)
    assert places(vm) == before


def test_the_command(vm: Path, tmp_path: Path) -> None:
    out = run("layout", vm).ok().splitlines()
    assert [line.split() for line in out] == [
        ["from", "to", "size", "file"],
        ["0x0", "0x100000", "1.0", "MiB", "ram0", "at", "0x0"],
        ["0x100000", "0x100000000", "4.0", "GiB", "(no", "file)"],
        ["0x100000000", "0x100018000", "96.0", "KiB", "ram1", "at", "0x8000"],
        ["of", "a", "pc"],
    ]
    source = tmp_path / "layout.json"
    source.write_bytes((vm / ".guest/layout.json").read_bytes())
    assert "derived" in run("layout", vm, "--derive").ok()
    assert run("layout", vm, "--from", source).ok().splitlines() == out
    source.write_text('{"ranges": [{"gpa": 0, "size": "2M", "file": "ram0"}]}')
    run("layout", vm, "--from", source).failed(1, str(source), '"size"')
    run("layout", vm, "--from", tmp_path / "none").failed(1, "none")
    run("layout", vm, "--from", source, "--derive").failed(2, "one of them")
    run("layout", vm / "ram0").failed(1, "not a directory")
    run("layout", vm, "--qmp", tmp_path / "none").failed(9, "none")
    assert run("layout", vm).ok().splitlines() == out


# --- the note of a kernel ---


def notes(vmcore: Path) -> list[bytes]:
    """The notes of a core, as readelf tells them."""
    done = subprocess.run(["readelf", "-nW", vmcore], capture_output=True, text=True, check=True)
    return [line.split()[0].encode() for line in done.stdout.splitlines() if line.startswith("  VMCOREINFO")]


def test_the_note_is_found_where_it_is_now(vm: Path) -> None:
    core = vm / ".guest/vmcore"
    assert notes(core) == []
    size = core.stat().st_size
    with open(vm / "ram0", "r+b") as file, mmap.mmap(file.fileno(), MIB) as memory:
        memory[77 * PAGE : 77 * PAGE + len(NOTE)] = NOTE  # dirty, and nobody has told us
        assert notes(core) == [b"VMCOREINFO"]
        assert NOTE in read_at(core, 0, 2 * PAGE)
        (vm / ".snap/s").mkdir()
        memory[77 * PAGE] = 0
        memory[12 * PAGE : 12 * PAGE + len(NOTE)] = NOTE  # another kernel was booted
        assert notes(core) == [b"VMCOREINFO"]
        memory[12 * PAGE] = 0
        assert notes(core) == []
    assert notes(vm / ".snap/s/.guest/vmcore") == [b"VMCOREINFO"]
    assert core.stat().st_size == size
    with fails(errno.ENODATA):
        os.getxattr(vm / ".snap/s/ram1", "user.ramfs.vmcoreinfo")
    assert os.getxattr(vm / ".snap/s/ram0", "user.ramfs.vmcoreinfo") == b"77"


# --- arriving ---


@pytest.fixture
def tmp_path_short() -> Iterator[Path]:
    """For sockets."""
    with tempfile.TemporaryDirectory(prefix="views-", dir="/tmp") as path:
        yield Path(path)


def test_of_what_arrives_only_what_is_read_comes(
    shared: Mount, here: Path, tmp_path: Path, tmp_path_short: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "pc.ram@0x0").write_bytes(RAM * 16)
    with nbdkit(tmp_path_short / "s", "file", f"dir={served}") as uri:
        run("pull", "--paused", uri, here / "vm").ok()
        guest = here / "vm/.guest"

        def fetched() -> int:
            return int(next(pull for pull in status(shared.path)["pulls"])["fetched_bytes"])

        assert notes(guest / "vmcore") == []
        assert edges(guest / "physmem") == [(0, 16 * MIB)]
        assert fetched() == 0
        assert read_at(guest / "physmem", 5 * MIB + 100, 8) == RAM[100:108]
        assert read_at(guest / "physmem", 16 * MIB - 4, 8) == RAM[-4:]
        assert 0 < fetched() < MIB
        core = guest / "vmcore"
        assert read_at(core, core.stat().st_size - 2 * MIB - 50, MIB) == (RAM * 2)[MIB - 50 : 2 * MIB - 50]
        assert MIB < fetched() < 3 * MIB
        run("resume", here / "vm").ok()
        eventually(lambda: not status(shared.path)["pulls"], "all is here")
        assert read_at(guest / "physmem", 0, 20 * MIB) == RAM * 16


def test_what_is_pulled_from_a_snapshot_has_its_layout(shared: Mount, vm: Path, tmp_path_short: Path) -> None:
    """And the note of its kernel is found without a look at what has not come."""
    with open(vm / "ram0", "r+b") as file:
        os.pwrite(file.fileno(), NOTE, 77 * PAGE)
    (vm / ".snap/s").mkdir()
    exported = (vm / ".snap/s/ramfs.layout").read_bytes()
    assert json.loads(exported) == layout_of(vm / ".snap/s")
    assert json.loads(exported)["vmcoreinfo"] == {"file": "ram0", "offset": hex(77 * PAGE)}
    assert len(exported) == (vm / ".snap/s/ramfs.layout").stat().st_size
    assert "ramfs.layout" not in os.listdir(vm / ".snap/s")
    with fails(errno.ENOENT):
        (vm / "ramfs.layout").stat()
    with nbdkit(tmp_path_short / "s", "file", f"dir={vm}/.snap/s") as uri:
        pulled = vm.parent / "pulled"
        run("pull", "--paused", "--like", "none", uri, pulled).ok()
        assert os.listdir(pulled) == ["ram0", "ram1"]
        assert layout_of(pulled) == layout_of(vm / ".snap/s")
        assert notes(pulled / ".guest/vmcore") == [b"VMCOREINFO"]
        (pull,) = status(shared.path)["pulls"]
        assert pull["fetched_bytes"] <= 64 * PAGE
        run("resume", pulled).ok()
        eventually(lambda: not status(shared.path)["pulls"], "all is here")
    assert read_at(pulled / ".guest/physmem", 4 * GIB + 8 * PAGE, PAGE) == RAM[:PAGE]


def test_a_source_that_is_lost_fails_the_read(
    make_mount: Callable[..., Mount], tmp_path: Path, tmp_path_short: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "pc.ram@0x0").write_bytes(RAM)
    mount = make_mount()
    with nbdkit(tmp_path_short / "s", "file", f"dir={served}") as uri:
        run("pull", "--paused", "--deadline", "0.2", uri, mount.path / "vm").ok()
    mount.expect("nbd|source|lost")
    with fails(errno.EIO):
        read_at(mount.path / "vm/.guest/physmem", 0, PAGE)
    assert read_at(mount.path / "vm/.guest/vmcore", 0, 4) == b"\x7fELF"
