"""`ramfs flatten` and `ramfs snapshot --flat`: one layer for each frozen file, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.conftest import needs_root, run
from fault.test_killed import calls_of, copy_sparse, traced
from harness import Mount, MountFailed
from mount.posix import PAGE, eventually, opened, page_counts, pattern, read, status
from power.disk import MAKE, mounted_image

from ramfs.store.repair import check_store

MB = 1 << 20
SIZE = 8 * MB


def freeze(directory: Path, name: str) -> Path:
    (directory / ".snap" / name).mkdir()
    return directory / ".snap" / name


def age(ram: Path, *, size: int = SIZE, generations: int = 3, step: int = 7) -> Path:
    """Write a file in several generations, each frozen, so that its pages lie scattered; returns the last snapshot."""
    with opened(ram, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, size)
        for start in range(0, size // 2, MB):
            os.pwrite(fd, pattern(min(MB, size // 2 - start), start // MB), start)
        for generation in range(generations):
            freeze(ram.parent, f"g{generation}")
            for page in range(generation, size * 3 // 4 // PAGE, step):
                os.pwrite(fd, page.to_bytes(4, "little") * (PAGE // 4), page * PAGE)
        os.pwrite(fd, bytes(5 * PAGE), MB)
    return freeze(ram.parent, "last")


def layers_of(mount: Mount) -> set[str]:
    return {path.name for path in (mount.store / "layers").iterdir()}


def is_native(path: Path, mount: Mount) -> bool:
    with opened(path, os.O_RDONLY):
        return [file["native"] for file in status(mount.path)["open_files"]] == [True]


@pytest.fixture
def mount(shm: Path) -> Iterator[Mount]:
    with Mount(shm / "store", shm / "mnt") as mount:
        (mount.path / "vm").mkdir()
        yield mount
    report = check_store(str(shm / "store"))
    assert not report.damaged, report


@pytest.fixture
def old(mount: Mount) -> Path:
    return age(mount.path / "vm" / "ram")


# --- what it does ---


@needs_root
def test_one_layer_for_each_frozen_file(mount: Mount, old: Path) -> None:
    shutil.copytree(old, mount.path / "clone")
    paths = [mount.path / "vm" / "ram", *(mount.path / "vm" / ".snap").glob("*/ram"), mount.path / "clone" / "ram"]
    expected = {path: read(path) for path in paths}
    before = old.joinpath("ram").stat()
    assert not is_native(old / "ram", mount)

    (line,) = run("flatten", old).ok().splitlines()
    assert line.startswith(f"flattened {old}/ram: ")
    assert is_native(old / "ram", mount)
    after = old.joinpath("ram").stat()
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (
        before.st_mtime_ns, before.st_ctime_ns, before.st_size,
    )  # fmt: skip
    assert {path: read(path) for path in paths} == expected
    assert page_counts(old / "ram")["shared"] == 0
    assert run("flatten", old / "ram").ok() == f"left {old}/ram: flat already\n"
    # Nor does anything change later: garbage, a new daemon.
    for snapshot in ("g0", "g1", "g2"):
        del expected[mount.path / "vm" / ".snap" / snapshot / "ram"]
        (mount.path / "vm" / ".snap" / snapshot).rmdir()
    mount.restart()
    assert {path: read(path) for path in expected} == expected
    assert is_native(old / "ram", mount)


@needs_root
def test_all_below_a_directory(mount: Mount) -> None:
    vm = mount.path / "vm"
    (vm / "sub").mkdir()
    (vm / "zeros").touch()
    os.truncate(vm / "zeros", SIZE)
    (vm / "sub" / "ragged").write_bytes(b"state")
    with opened(vm / "shifted", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, pattern(4 * PAGE), 0)
        assert os.copy_file_range(fd, fd, 2 * PAGE, 0, 6 * PAGE) == 2 * PAGE
    old = age(vm / "ram")
    expected = {path: read(path) for path in old.rglob("*") if path.is_file()}
    told = json.loads(run("flatten", "--json", old).ok())["files"]
    found = {os.path.relpath(file["path"], old): (file["flattened"], file["why"]) for file in told}
    assert found == {
        "ram": (True, ""),
        "shifted": (True, ""),
        "zeros": (False, "only zeros"),
        "sub/ragged": (False, "its size is no multiple of 4096"),
    }
    assert {path: read(path) for path in expected} == expected
    assert is_native(old / "shifted", mount)
    # Dense clones are names of the same inode.
    dense = mount.path / "dense"
    dense.mkdir()
    os.link(freeze(vm, "another") / "ram", dense / "ram")
    (dense / "own").write_bytes(b"x")
    assert "flattened" in run("flatten", dense).ok()
    assert is_native(dense / "ram", mount)


def test_readers_see_the_same_meanwhile(mount: Mount) -> None:
    frozen = age(mount.path / "vm" / "ram", size=32 * MB, generations=1, step=2) / "ram"
    expected = read(frozen)
    stop = threading.Event()
    wrong: list[int] = []

    def look() -> None:
        with opened(frozen, os.O_RDONLY | os.O_DIRECT) as fd:
            page = 0
            memory = mmap.mmap(-1, PAGE)
            while not stop.is_set():
                page = (page * 5 + 1) % (len(expected) // PAGE)
                os.preadv(fd, [memory], page * PAGE)
                if memory[:] != expected[page * PAGE : (page + 1) * PAGE]:
                    wrong.append(page)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        run("flatten", frozen).ok()
        # Once more for a file whose first open was through the cache: it stays so until it is closed.
        with opened(frozen, os.O_RDONLY) as fd:
            assert not any(file["native"] for file in status(mount.path)["open_files"])
            assert os.pread(fd, len(expected), 0) == expected
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert read(frozen) == expected


def test_a_snapshot_that_is_flat_at_once(mount: Mount, old: Path) -> None:
    vm = mount.path / "vm"
    expected = read(vm / "ram")
    told = json.loads(run("snapshot", "--flat", "--json", vm, "flat").ok())
    assert [(file["path"], file["flattened"]) for file in told["flat"]] == [(f"{vm}/.snap/flat/ram", True)]
    assert "flattened" in run("snapshot", "--flat", vm, "again").ok()
    assert "flat" not in json.loads(run("snapshot", "--json", vm, "plain").ok())
    assert read(vm / ".snap" / "flat" / "ram") == read(vm / ".snap" / "again" / "ram") == expected


# --- what it refuses ---


def test_what_is_not_frozen(mount: Mount, old: Path) -> None:
    for path in (mount.path / "vm" / "ram", mount.path / "vm", mount.path):
        run("flatten", path).failed(1, path, "frozen", "snapshot")
    run("flatten", mount.path / "nothing").failed(1, mount.path / "nothing", "No such file")
    run("flatten", "/proc").failed(8, "/proc", "ramfs mount")


def test_lost_pages(mount: Mount, old: Path) -> None:
    mount.expect("was lost|shorter than its pages")
    expected = read(old / "ram")
    mount.umount()
    layer = max((mount.store / "layers").glob("*.ram"))  # of the last generation
    os.truncate(layer, SIZE // 2)
    assert check_store(str(mount.store), repair=True).damaged is False
    mount.start()
    before = layers_of(mount)
    run("flatten", old).failed(1, old / "ram", "lost", "fsck")
    assert layers_of(mount) == before
    assert read(old / "ram", 0, MB) == expected[:MB]


@needs_root
def test_a_full_store(shm: Path) -> None:
    (shm / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", shm / "small"], check=True)
    try:
        with Mount(shm / "small" / "store", shm / "mnt") as mount:
            mount.expect("No space left on device")
            (mount.path / "vm").mkdir()
            old = age(mount.path / "vm" / "ram", size=32 * MB)
            expected, before = read(old / "ram"), layers_of(mount)
            run("flatten", old).failed(1, old / "ram", os.strerror(errno.ENOSPC))
            run("snapshot", "--flat", mount.path / "vm", "new").code == 1  # noqa: B015 - judged below
            assert layers_of(mount) <= before | {name.replace(".ram", ".xxh3") for name in before}
            assert read(old / "ram") == read(mount.path / "vm" / ".snap" / "new" / "ram") == expected
        assert not check_store(str(mount.store)).findings
    finally:
        subprocess.run(["umount", shm / "small"], check=True)


# --- interrupted ---


def interrupted(mount: Mount, how: Callable[[subprocess.Popen[str], Path], None]) -> tuple[int, str, str]:
    """How a flatten ends that is interrupted in the middle of its work, and leaves nothing.

    On a busy machine it may be done before: then it is tried again, with another snapshot.
    """
    expected = read(mount.path / "vm" / "ram")

    def layers() -> set[str]:
        return {name for name in layers_of(mount) if name.endswith(".ram")}

    def copies() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_blocks for path in (mount.store / "layers").glob("*.new"))
        return False

    for number in itertools.count():
        assert number < 20, "it was always done before it could be interrupted"
        old = freeze(mount.path / "vm", f"{how.__name__}{number}")
        before = layers()
        process = subprocess.Popen(
            [sys.executable, "-m", "ramfs", "flatten", old], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not copies():
            time.sleep(0.001)
        how(process, old)
        out, err = process.communicate()
        eventually(lambda: not list((mount.store / "layers").glob("*.ram.new")), "what was copied is removed")
        if old.exists():
            assert read(old / "ram") == expected
        if process.returncode and layers() <= before:  # those of deleted snapshots may just have gone
            return process.returncode, out, err
        eventually(lambda old=old: not old.exists() or page_counts(old / "ram")["shared"] == 0, "it was done before")
    raise AssertionError


def test_interrupted_it_leaves_nothing(shm: Path) -> None:
    """By signals to the command, by the end of the daemon, by the end of the snapshot."""
    mount = Mount(shm / "store", shm / "mnt").start()

    def stop(process: subprocess.Popen[str], old: Path) -> None:
        mount.terminate()
        process.wait()
        eventually(lambda: not list((mount.store / "layers").glob("*.ram.new")), "what was copied is removed")
        assert not check_store(str(mount.store)).findings
        mount.start()

    def remove(process: subprocess.Popen[str], old: Path) -> None:
        old.rmdir()

    try:
        (mount.path / "vm").mkdir()
        age(mount.path / "vm" / "ram", size=128 * MB, generations=1, step=2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):

            def kill(process: subprocess.Popen[str], old: Path, number: int = number) -> None:
                process.send_signal(number)

            ended = interrupted(mount, kill)
            if number == signal.SIGINT:
                assert (*ended[:2], ended[2].strip()) == (130, "", "ramfs: interrupted")
            for snapshot in (mount.path / "vm" / ".snap").glob("kill*"):
                snapshot.rmdir()
        interrupted(mount, stop)
        code, _, err = interrupted(mount, remove)
        assert code == 1
        assert "deleted" in err
        mount.umount()
        assert not check_store(str(mount.store)).findings
    finally:
        mount.abandon()


STEPS = int(os.environ.get("RAMFS_KILL_STEPS", "4"))
#: The socket of the supervisor.
NOT_FILES = shutil.ignore_patterns("supervisor")
CALLS = "pwrite64,fdatasync,fsync,openat,ftruncate,unlink,rename,copy_file_range"


@needs_root
def test_killed_at_a_step(shm: Path, tmp_path: Path) -> None:
    """kill -9 of the daemon: the frozen file reads the same, fsck is clean, and it can be flattened then."""
    template = shm / "template"
    mount = Mount(template, shm / "mnt").start()
    (mount.path / "vm").mkdir()
    old = age(mount.path / "vm" / "ram", size=MB, step=64)
    expected = read(old / "ram")
    mount.kill()
    shutil.copytree(template, shm / "dry", copy_function=copy_sparse, ignore=NOT_FILES)
    with Mount(shm / "dry", shm / "mnt") as dry, traced(dry, tmp_path / "calls", "-e", f"trace={CALLS}"):
        run("flatten", old).ok()
    steps = calls_of(tmp_path / "calls")
    assert {"copy_file_range", "rename", "fdatasync"} <= {call for call, _ in steps}
    # The first of each kind comes for sure; which thread does the later ones, and is their how-many-th, differs.
    telling = [("copy_file_range", 1), ("fdatasync", 1), ("rename", 1), ("pwrite64", 1)]
    sample = [*telling, *(step for step in steps if step not in telling)][:STEPS]
    killed = 0
    for call, number in sample:
        store = shm / "store"
        shutil.copytree(template, store, copy_function=copy_sparse, ignore=NOT_FILES)
        mount = Mount(store, shm / "mnt").start()
        mount.expect("was ended by signal 9")
        try:
            first = mount.pid
            injection = f"inject={call}:signal=KILL:when={number}"
            with traced(mount, tmp_path / "log", "-e", f"trace={call}", "-e", injection):
                run("flatten", old)
            assert read(old / "ram") == expected, (call, number)
            if status(mount.path)["pid"] != first:  # another has taken over
                killed += 1
                with contextlib.suppress(MountFailed):  # it may be unmounted by then
                    mount.kill()
            else:
                mount.umount()
            report = check_store(str(store))
            assert not report.damaged, (call, number, report)
            mount.start()
            assert read(old / "ram") == expected, (call, number)
            run("flatten", old).ok()
            assert read(old / "ram") == expected, (call, number)
            mount.umount()
            assert not check_store(str(store)).findings, (call, number)
        finally:
            mount.abandon()
        shutil.rmtree(store)
    assert killed >= min(len(sample) - 1, 4), "strace has hardly killed anything"


# --- blocks that are shared ---


@needs_root
@pytest.mark.parametrize("fstype", ["xfs", "btrfs"])
def test_nothing_is_copied_where_blocks_can_be_shared(fstype: str, tmp_path: Path) -> None:
    make = {**MAKE, "btrfs": ["mkfs.btrfs", "-q"]}[fstype]
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(400 * MB)
    subprocess.run([*make, image], check=True)
    with (
        mounted_image(image, tmp_path / "disk.mnt") as disk,
        Mount(disk / "store", tmp_path / "mnt") as mount,
    ):
        (mount.path / "vm").mkdir()
        old = age(mount.path / "vm" / "ram", size=64 * MB, step=512)
        expected = read(old / "ram")

        def free() -> int:
            os.sync()
            told = os.statvfs(disk)
            return told.f_bfree * told.f_bsize

        before = free()
        run("flatten", old).ok()
        assert before - free() < 4 * MB
        assert read(old / "ram") == expected
        assert is_native(old / "ram", mount)


def test_the_files_of_others(public: Path) -> None:
    """Who may not write .ramfs/control is told so."""
    from cli.conftest import NOBODY, call

    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with Mount(public / "store", public / "mnt", ["allow_other"]) as mount:
        mount.path.chmod(0o755)
        (mount.path / "vm").mkdir()
        old = age(mount.path / "vm" / "ram", size=MB)
        call(*NOBODY, sys.executable, "-m", "ramfs", "flatten", old).failed(1, ".ramfs/control", "owner")
