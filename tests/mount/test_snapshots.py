"""Snapshots: `mkdir DIR/.snap/NAME` freezes all of DIR as it is at that moment."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mount
from mount.posix import (
    PAGE,
    Process,
    errno_of,
    eventually,
    fails,
    opened,
    page_counts,
    page_of,
    pattern,
    read,
    renameat2,
    status,
)

MB = 1 << 20


def snap(directory: Path, name: str = "s") -> Path:
    path = directory / ".snap" / name
    path.mkdir()
    return path


def layer_bytes(mount: Path) -> int:
    return int(status(mount)["store_bytes"]["layers"])


@pytest.fixture
def tree(here: Path) -> Path:
    """A directory with one of everything."""
    path = here / "tree"
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "ram").write_bytes(pattern(MB + 100))
    (path / "sub" / "f").write_bytes(b"sub")
    (path / "sub" / "deep" / "g").write_bytes(b"deep")
    (path / "link").symlink_to("ram")
    os.link(path / "ram", path / "sub" / "hard")
    os.mkfifo(path / "pipe")
    os.setxattr(path / "ram", "user.note", b"note")
    (path / "ram").chmod(0o640)
    return path


# --- what is frozen ---


def test_everything_is_frozen_as_it_is(tree: Path) -> None:
    before = {name: (tree / name).lstat() for name in ("ram", "sub", "sub/f", "sub/deep/g", "link", "pipe")}
    frozen = snap(tree)
    (tree / "ram").write_bytes(b"changed")
    (tree / "sub" / "f").unlink()
    (tree / "new").touch()
    os.rename(tree / "sub" / "deep", tree / "moved")
    os.setxattr(tree / "ram", "user.note", b"other")
    assert sorted(os.listdir(frozen)) == ["link", "pipe", "ram", "sub"]
    assert sorted(os.listdir(frozen / "sub")) == ["deep", "f", "hard"]
    assert read(frozen / "ram") == pattern(MB + 100)
    assert read(frozen / "sub" / "f") == b"sub"
    assert read(frozen / "sub" / "deep" / "g") == b"deep"
    assert os.readlink(frozen / "link") == "ram"
    assert os.getxattr(frozen / "ram", "user.note") == b"note"
    assert (frozen / "ram").stat().st_ino == (frozen / "sub" / "hard").stat().st_ino
    for name, old in before.items():
        new = (frozen / name).lstat()
        for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"):
            assert getattr(new, field) == getattr(old, field), (name, field)
    assert os.stat(f"{frozen}/sub/..").st_ino == frozen.stat().st_ino


def test_dirty_mapped_pages_are_in_it(tree: Path) -> None:
    """Stores of a process that never calls msync."""

    def work() -> mmap.mmap:
        with opened(tree / "ram") as fd:
            memory = mmap.mmap(fd, MB)
        memory[0:6] = b"stored"
        memory[17 * PAGE : 18 * PAGE] = page_of(17)
        return memory

    with Process(work):
        frozen = snap(tree)
        assert read(frozen / "ram", 0, 6) == b"stored"
        assert read(frozen / "ram", 17 * PAGE, PAGE) == page_of(17)
        assert read(frozen / "ram", MB) == pattern(MB + 100)[MB:]


def test_stores_after_it_are_not_in_it(tree: Path) -> None:
    with opened(tree / "ram") as fd, mmap.mmap(fd, MB) as memory:
        for turn in range(1, 6):
            memory[turn * PAGE] = turn
            snap(tree, f"s{turn}")
        memory.flush()
    for turn in range(1, 6):
        model = bytearray(pattern(MB + 100))
        for number in range(1, turn + 1):
            model[number * PAGE] = number
        assert read(tree / ".snap" / f"s{turn}" / "ram") == model


def test_an_unlinked_open_file_is_no_part_of_it(tree: Path) -> None:
    with opened(tree / "gone", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x")
        (tree / "gone").unlink()
        assert "gone" not in os.listdir(snap(tree))


def test_snapshots_of_nested_directories_are_their_own(tree: Path) -> None:
    snap(tree / "sub", "inner")
    frozen = snap(tree, "outer")
    assert os.listdir(tree / ".snap") == ["outer"]
    assert os.listdir(tree / "sub" / ".snap") == ["inner"]
    assert sorted(os.listdir(tree / "sub" / ".snap" / "inner")) == ["deep", "f", "hard"]
    with fails(errno.ENOENT):
        (frozen / ".snap").stat()
    with fails(errno.ENOENT):
        (frozen / "sub" / ".snap").stat()


def test_an_empty_directory_and_the_root(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    (mount.path / "empty").mkdir()
    assert os.listdir(snap(mount.path / "empty")) == []
    frozen = snap(mount.path, "all")
    assert os.listdir(frozen) == ["empty"]
    assert ".ramfs" not in os.listdir(frozen)


def test_wild_names(tree: Path) -> None:
    for name in (b"new\nline", b"\xff", b"n" * 255, b".hidden"):
        os.mkdir(os.path.join(os.fsencode(tree), b".snap", name))
    assert sorted(os.listdir(os.fsencode(tree / ".snap"))) == [b".hidden", b"new\nline", b"n" * 255, b"\xff"]


def test_names_are_taken_once(tree: Path) -> None:
    snap(tree)
    with fails(errno.EEXIST):
        snap(tree)
    with fails(errno.ENAMETOOLONG):
        snap(tree, "n" * 256)
    with fails(errno.EEXIST):
        os.mkdir(f"{tree}/.snap/.snap")
    assert os.listdir(tree / ".snap") == ["s"]


# --- where it is seen ---


def test_hidden_from_listings_and_copies(tree: Path, here: Path) -> None:
    snap(tree)
    assert ".snap" not in os.listdir(tree)
    assert ".snap" not in subprocess.run(["ls", "-a", tree], capture_output=True, text=True, check=True).stdout
    subprocess.run(["cp", "-r", tree, here / "copy"], check=True)
    assert os.listdir(here / "copy" / ".snap") == []
    assert sorted(os.listdir(here / "copy")) == ["link", "pipe", "ram", "sub"]
    found = subprocess.run(["find", tree, "-name", "*snap*"], capture_output=True, text=True, check=True).stdout
    assert found == ""


def test_a_copy_of_a_snapshot_is_writable(tree: Path, here: Path) -> None:
    snap(tree)
    (tree / "ram").write_bytes(b"changed")
    subprocess.run(["cp", "-r", tree / ".snap" / "s", here / "clone"], check=True)
    with opened(here / "clone" / "ram") as fd, mmap.mmap(fd, MB) as memory:
        memory[0:3] = b"abc"
    (here / "clone" / "new").touch()
    (here / "clone" / "sub" / "f").unlink()
    assert read(here / "clone" / "ram") == b"abc" + pattern(MB + 100)[3:]
    assert read(tree / ".snap" / "s" / "ram") == pattern(MB + 100)
    assert page_counts(here / "clone" / "sub" / "deep" / "g")["owned"] == 0


def test_a_clone_can_be_snapshot_too(tree: Path, here: Path) -> None:
    last = tree
    for generation in range(4):
        frozen = snap(last, "g")
        subprocess.run(["cp", "-r", frozen, here / f"c{generation}"], check=True)
        last = here / f"c{generation}"
        with opened(last / "ram") as fd:
            os.pwrite(fd, page_of(generation + 1), generation * PAGE)
    model = bytearray(pattern(MB + 100))
    for generation in range(4):
        model[generation * PAGE : (generation + 1) * PAGE] = page_of(generation + 1)
        assert read(here / f"c{generation}" / "ram") == model
    assert read(tree / "ram") == pattern(MB + 100)


# --- immutable ---


def changes(frozen: Path, elsewhere: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way to change something in a snapshot."""
    ram, sub = frozen / "ram", frozen / "sub"
    yield "open for writing", lambda: os.open(ram, os.O_WRONLY)
    yield "open for both", lambda: os.open(ram, os.O_RDWR)
    yield "open to append", lambda: os.open(ram, os.O_WRONLY | os.O_APPEND)
    yield "open to truncate", lambda: os.open(ram, os.O_RDONLY | os.O_TRUNC)
    yield "create", lambda: os.open(frozen / "new", os.O_RDWR | os.O_CREAT)
    yield "create below", lambda: os.open(sub / "new", os.O_RDWR | os.O_CREAT)
    yield "truncate", lambda: os.truncate(ram, 0)
    yield "chmod", lambda: os.chmod(ram, 0o777)
    yield "chmod of a directory", lambda: os.chmod(frozen, 0o700)
    yield "chown", lambda: os.chown(ram, 1, 1)
    yield "utime", lambda: os.utime(ram, ns=(1, 1))
    yield "setxattr", lambda: os.setxattr(ram, "user.x", b"1")
    yield "removexattr", lambda: os.removexattr(ram, "user.note")
    yield "unlink", lambda: os.unlink(ram)
    yield "rmdir", lambda: os.rmdir(sub / "deep")
    yield "mkdir", lambda: os.mkdir(frozen / "new")
    yield "symlink", lambda: os.symlink("x", frozen / "new")
    yield "mkfifo", lambda: os.mkfifo(frozen / "new")
    yield "link into it", lambda: os.link(elsewhere / "file", frozen / "new")
    yield "rename within", lambda: os.rename(ram, frozen / "other")
    yield "rename out", lambda: os.rename(ram, elsewhere / "stolen")
    yield "rename into", lambda: os.rename(elsewhere / "file", frozen / "new")
    yield "rename of a directory out", lambda: os.rename(sub, elsewhere / "stolen")
    yield "exchange", lambda: renameat2(ram, elsewhere / "file", 2)
    yield "rename of the snapshot", lambda: os.rename(frozen, frozen.parent / "other")
    yield "rename of the snapshot out", lambda: os.rename(frozen, elsewhere / "stolen")
    yield "QEMU's name", lambda: os.open(frozen / "qemu_back_mem.ram.aaaaaa", os.O_RDWR | os.O_CREAT | os.O_EXCL)


def test_every_change_is_erofs(tree: Path, here: Path) -> None:
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    frozen = snap(tree)
    for what, change in changes(frozen, elsewhere):
        assert errno_of(change) == errno.EROFS, what
    assert read(frozen / "ram") == pattern(MB + 100)
    assert os.listdir(elsewhere) == ["file"]
    assert sorted(os.listdir(frozen)) == ["link", "pipe", "ram", "sub"]


def test_a_hard_link_out_of_it_is_as_frozen(tree: Path, here: Path) -> None:
    frozen = snap(tree)
    os.link(frozen / "ram", here / "dense")
    for call in (
        lambda: os.open(here / "dense", os.O_RDWR),
        lambda: os.truncate(here / "dense", 0),
        lambda: os.chmod(here / "dense", 0o777),
    ):
        with fails(errno.EROFS):
            call()
    os.rename(here / "dense", here / "renamed")
    (here / "renamed").unlink()
    assert read(frozen / "ram") == pattern(MB + 100)


def test_copy_file_range_into_it_is_refused(tree: Path) -> None:
    frozen = snap(tree)
    source, target = opened(tree / "sub" / "f", os.O_RDONLY), opened(frozen / "ram", os.O_RDONLY)
    with source as one, target as two, fails(errno.EBADF):
        os.copy_file_range(one, two, 1, 0, 0)


def test_shared_mappings_for_reading_only(tree: Path) -> None:
    frozen = snap(tree)
    with opened(frozen / "ram", os.O_RDONLY) as fd:
        with mmap.mmap(fd, MB, prot=mmap.PROT_READ) as memory:
            assert memory[:] == pattern(MB)
        with fails(errno.EACCES):
            mmap.mmap(fd, MB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with mmap.mmap(fd, MB, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
            memory[:] = bytes(MB)
    assert read(frozen / "ram") == pattern(MB + 100)


# --- template_rdwr ---


def test_template_rdwr_lets_open_and_accepts_no_write(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(options=("template_rdwr",))
    tree = mount.path / "tree"
    tree.mkdir()
    (tree / "ram").write_bytes(pattern(MB))
    frozen = snap(tree)
    os.link(frozen / "ram", mount.path / "dense")
    for path in (frozen / "ram", mount.path / "dense"):
        with opened(path, os.O_RDWR) as fd:
            with fails(errno.EROFS):
                os.pwrite(fd, b"x", 0)
            with fails(errno.EROFS):
                os.pwrite(fd, b"x" * MB, 0)
            with fails(errno.EROFS):
                os.ftruncate(fd, 0)
            with fails(errno.EROFS), opened(tree / "ram") as source:
                os.copy_file_range(source, fd, PAGE, 0, 0)
            with pytest.raises(OSError):  # noqa: PT011  (ENODEV, by the kernel)
                mmap.mmap(fd, MB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with mmap.mmap(fd, MB, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
                assert memory[:] == pattern(MB)
                memory[0 : 2 * PAGE] = bytes(2 * PAGE)
                assert memory[0 : 3 * PAGE] == bytes(2 * PAGE) + pattern(MB)[2 * PAGE : 3 * PAGE]
            assert os.pread(fd, MB, 0) == pattern(MB)
        with fails(errno.EROFS):
            os.open(path, os.O_RDWR | os.O_TRUNC)
    with fails(errno.EROFS):
        os.open(frozen / "new", os.O_RDWR | os.O_CREAT)
    with fails(errno.EROFS):
        os.chmod(frozen / "ram", 0o777)
    assert read(frozen / "ram") == pattern(MB)


def test_template_rdwr_beside_readers(make_mount: Callable[..., Mount]) -> None:
    """The same frozen file, opened for reading with its cache and for writing without."""
    mount = make_mount(options=("template_rdwr",))
    (mount.path / "ram").write_bytes(pattern(MB))
    frozen = snap(mount.path)
    with (
        opened(frozen / "ram", os.O_RDONLY) as one,
        opened(frozen / "ram", os.O_RDWR) as two,
        mmap.mmap(one, MB, prot=mmap.PROT_READ) as shared,
        mmap.mmap(two, MB, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private,
    ):
        private[5] = 0
        assert shared[:] == pattern(MB)
        assert os.pread(two, MB, 0) == pattern(MB)
        assert private[:] == pattern(MB)[:5] + b"\0" + pattern(MB)[6:]


# --- while others write ---


def test_under_writers_no_page_is_torn(here: Path) -> None:
    """Each writer fills its file's pages with one number after the other: one pass never overtakes another.

    Per-file consistent: in a frozen file the numbers of the pages, in the order they are written, never grow,
    and differ by at most one. The same for pages stored through a mapping, within each page.
    """
    tree = here / "tree"
    tree.mkdir()
    stop, count = threading.Event(), 64
    for name in ("w0", "w1", "m0"):
        (tree / name).write_bytes(page_of(0) * count)

    def writer(path: Path) -> int:
        with opened(path) as fd:
            number = 0
            while os.path.exists(here / "go"):
                number += 1
                for page in range(count):
                    os.pwrite(fd, page_of(number), page * PAGE)
        return 0

    def mapper(path: Path) -> int:
        with opened(path) as fd, mmap.mmap(fd, 0) as memory:
            number = 0
            while os.path.exists(here / "go"):
                number += 1
                for page in range(count):
                    memory[page * PAGE : (page + 1) * PAGE] = page_of(number)
        return 0

    (here / "go").touch()
    children = []
    for name in ("w0", "w1", "m0"):
        child = os.fork()
        if child == 0:
            os._exit(mapper(tree / name) if name == "m0" else writer(tree / name))
        children.append(child)
    copies: dict[Path, bytes] = {}
    try:
        for turn in range(12):
            frozen = snap(tree, f"s{turn}")
            for name in ("w0", "w1", "m0"):
                copies[frozen / name] = read(frozen / name)
            time.sleep(0.05)
    finally:
        (here / "go").unlink()
        codes = [os.waitpid(child, 0)[1] for child in children]
        stop.set()
    assert codes == [0, 0, 0]
    last: dict[str, int] = {}
    for path, data in copies.items():
        assert read(path) == data, f"{path} has changed after it was frozen"
        numbers = []
        for page in range(count):
            content = data[page * PAGE : (page + 1) * PAGE]
            numbers.append(int.from_bytes(content[:8], "little"))
            if path.name != "m0":  # write(2) of a page is atomic; stores are as the process had done them
                assert content == page_of(numbers[-1]), f"page {page} of {path} is torn"
        if path.name != "m0":
            assert numbers == sorted(numbers, reverse=True), f"{path}: a later page is in, an earlier one is not"
            assert numbers[0] - numbers[-1] <= 1
        assert numbers[0] >= last.get(path.name, 0), "a later snapshot is older"
        last[path.name] = numbers[0]
    assert last["w0"] > 0


def test_two_at_once(here: Path) -> None:
    tree = here / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "ram").write_bytes(pattern(4 * MB))
    (tree / "sub" / "ram").write_bytes(pattern(4 * MB, 2))
    results: list[int] = []

    def work(directory: Path, name: str) -> None:
        results.append(errno_of(lambda: snap(directory, name)))

    places = [(tree, "a"), (tree, "b"), (tree / "sub", "a"), (tree, "same"), (tree, "same")]
    threads = [threading.Thread(target=work, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 0, 0, 0, errno.EEXIST]
    assert sorted(os.listdir(tree / ".snap")) == ["a", "b", "same"]
    for name in ("a", "b", "same"):
        assert read(tree / ".snap" / name / "ram") == pattern(4 * MB)
        assert read(tree / ".snap" / name / "sub" / "ram") == pattern(4 * MB, 2)


def test_renamed_and_deleted_while_it_is_made(here: Path) -> None:
    """Whatever happens to the tree meanwhile: the snapshot is whole or refused."""
    tree = here / "tree"
    tree.mkdir()
    for number in range(30):
        (tree / f"f{number}").write_bytes(pattern(20_000, number))

    def churn() -> None:
        for turn in range(60):
            os.rename(tree / f"f{turn % 30}", tree / "moved")
            os.rename(tree / "moved", tree / f"f{turn % 30}")

    thread = threading.Thread(target=churn)
    thread.start()
    for turn in range(10):
        snap(tree, f"s{turn}")
    thread.join()
    for turn in range(10):
        names = os.listdir(tree / ".snap" / f"s{turn}")
        assert len(names) == 30
        for name in names:
            if name != "moved":
                assert read(tree / ".snap" / f"s{turn}" / name) == pattern(20_000, int(name[1:]))


# --- deletion ---


def test_deletion(tree: Path) -> None:
    frozen = snap(tree)
    with fails(errno.EROFS):
        (frozen / "ram").unlink()
    frozen.rmdir()
    assert os.listdir(tree / ".snap") == []
    with fails(errno.ENOENT):
        (tree / ".snap" / "s" / "ram").stat()
    with fails(errno.ENOENT):
        (tree / ".snap" / "s").rmdir()
    assert read(tree / "ram") == pattern(MB + 100)
    snap(tree)  # the name is free again


def test_an_open_file_of_a_deleted_snapshot_lives_on(tree: Path) -> None:
    frozen = snap(tree)
    (tree / "ram").write_bytes(b"changed")
    with opened(frozen / "ram", os.O_RDONLY) as fd, mmap.mmap(fd, MB, prot=mmap.PROT_READ) as memory:
        frozen.rmdir()
        assert os.pread(fd, MB + 100, 0) == pattern(MB + 100)
        assert memory[:] == pattern(MB)
        with fails(errno.ENOENT):
            (frozen / "ram").stat()


def test_a_directory_with_snapshots_is_not_empty(here: Path) -> None:
    tree = here / "tree"
    tree.mkdir()
    frozen = snap(tree)
    with fails(errno.ENOTEMPTY):
        tree.rmdir()
    frozen.rmdir()
    tree.rmdir()


def test_rm_r_says_what_it_cannot_remove(tree: Path) -> None:
    snap(tree)
    done = subprocess.run(["rm", "-r", tree], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert read(tree / ".snap" / "s" / "ram") == pattern(MB + 100)


def test_whoever_goes_harms_no_other_and_space_comes_back(shared: Mount, here: Path) -> None:
    """A parent, two snapshots and a clone, deleted in every order."""
    import itertools

    base = layer_bytes(shared.path)
    for number, order in enumerate(itertools.permutations(("parent", "s1", "s2", "clone"))):
        tree, clone = here / f"tree{number}", here / f"clone{number}"
        tree.mkdir()
        contents: dict[str, tuple[Path, bytes]] = {}
        data = bytearray(pattern(256 * 1024))
        (tree / "ram").write_bytes(data)
        contents["s1"] = (snap(tree, "s1") / "ram", bytes(data))
        with opened(tree / "ram") as fd:
            data[PAGE : 20 * PAGE] = pattern(19 * PAGE, 3)
            os.pwrite(fd, data[PAGE : 20 * PAGE], PAGE)
            contents["s2"] = (snap(tree, "s2") / "ram", bytes(data))
            shutil.copytree(tree, clone, copy_function=lambda a, b: subprocess.run(["cp", a, b], check=True))
            contents["clone"] = (clone / "ram", bytes(data))
            data[0:PAGE] = page_of(9)
            os.pwrite(fd, page_of(9), 0)
        contents["parent"] = (tree / "ram", bytes(data))
        for victim in order:
            path, _ = contents.pop(victim)
            if victim.startswith("s"):
                path.parent.rmdir()
            else:
                path.unlink()
            for left, expected in contents.values():
                assert read(left) == expected, (order, victim, left)
    eventually(lambda: layer_bytes(shared.path) - base < MB, "everything is free")


def test_many_generations_read_right(shared: Mount, here: Path) -> None:
    tree = here / "tree"
    tree.mkdir()
    model = bytearray(pattern(128 * PAGE))
    (tree / "ram").write_bytes(model)
    kept: dict[int, bytes] = {}
    with opened(tree / "ram") as fd:
        for generation in range(50):
            for number in range(3):
                page = (generation * 37 + number * 11) % 128
                model[page * PAGE : (page + 1) * PAGE] = page_of(generation * 10 + number)
                os.pwrite(fd, page_of(generation * 10 + number), page * PAGE)
            snap(tree, f"g{generation}")
            if generation % 10 == 0:
                kept[generation] = bytes(model)
            else:
                (tree / ".snap" / f"g{generation}").rmdir()
        for generation, expected in kept.items():
            assert read(tree / ".snap" / f"g{generation}" / "ram") == expected
        # With no snapshot left, its many layers are garbage or one: bytes stay what they are meanwhile.
        for generation in kept:
            (tree / ".snap" / f"g{generation}").rmdir()
        passes = status(shared.path)["requests"]["garbage_passes"]
        eventually(lambda: status(shared.path)["requests"]["garbage_passes"] > passes, "a garbage pass")
        with opened(tree / "ram", os.O_RDONLY | os.O_DIRECT) as direct, mmap.mmap(-1, len(model)) as memory:
            os.preadv(direct, [memory], 0)
            assert memory[:] == model
