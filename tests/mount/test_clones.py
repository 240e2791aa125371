"""Clones: no page is copied, and neither side ever sees what the other wrote."""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from harness import RAMFS, Mount
from hypothesis import given, settings
from hypothesis import strategies as st
from mount.posix import (
    NOBODY,
    PAGE,
    counters,
    eventually,
    fails,
    in_child,
    opened,
    page_counts,
    pattern,
    read,
    status,
)

MB = 1 << 20


def cp(*args: object) -> None:
    subprocess.run(["cp", *map(str, args)], check=True)


def ramfs(*args: object) -> subprocess.CompletedProcess[str]:
    command = [*RAMFS, *map(str, args)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def layer_bytes(mount: Path) -> int:
    return int(status(mount)["store_bytes"]["layers"])


@pytest.fixture
def parent(here: Path) -> Path:
    path = here / "parent"
    path.mkdir()
    (path / "pc.ram@0x0").write_bytes(pattern(8 * MB + 123))
    (path / "state").write_bytes(pattern(10_001, 2))
    (path / "sub").mkdir()
    (path / "sub" / "small").write_bytes(b"small")
    return path


# --- cp -r ---


def test_cp_r_is_copy_file_range_alone(shared: Mount, here: Path, parent: Path) -> None:
    before, space = counters(shared.path), layer_bytes(shared.path)
    cp("-r", parent, here / "clone")
    after = counters(shared.path)
    assert after["shared_bytes"] - before["shared_bytes"] == 8 * MB + 123 + 10_001 + 5
    assert after["shared_ranges"] - before["shared_ranges"] >= 3
    assert after["written_bytes"] == before["written_bytes"]
    assert after["read_bytes"] == before["read_bytes"]
    assert layer_bytes(shared.path) - space <= 4 * PAGE
    assert read(here / "clone" / "pc.ram@0x0") == pattern(8 * MB + 123)
    assert read(here / "clone" / "state") == pattern(10_001, 2)
    assert page_counts(here / "clone" / "pc.ram@0x0")["owned"] == 0
    assert page_counts(parent / "pc.ram@0x0")["owned"] == 0


def test_a_sparse_file_is_one_request_for_each_2_gib(shared: Mount, here: Path) -> None:
    """Older kernels cut requests at 2 GiB, newer ones at 4; cp adds none of its own."""
    directory = here / "sparse"
    directory.mkdir()
    with opened(directory / "ram", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 5 << 30)
        os.pwrite(fd, b"low", 100)
        os.pwrite(fd, b"middle", (3 << 30) + 5)
        os.pwrite(fd, b"high", (5 << 30) - 4)
    before = counters(shared.path)
    command = [
        "strace",
        "-f",
        "-e",
        "trace=copy_file_range",
        "-o",
        here / "trace",
        "cp",
        "-r",
        directory,
        here / "copy",
    ]
    subprocess.run(command, check=True)
    after = counters(shared.path)
    assert after["shared_bytes"] - before["shared_bytes"] == 5 << 30
    assert after["shared_ranges"] - before["shared_ranges"] in {2, 3}
    calls = re.findall(r"copy_file_range\(.* = (\d+)", (here / "trace").read_text())
    assert sum(map(int, calls)) == 5 << 30
    assert len([call for call in calls if int(call)]) <= 3
    assert after["written_bytes"] - before["written_bytes"] < MB  # the trace itself
    copy = here / "copy" / "ram"
    assert copy.stat().st_size == 5 << 30
    assert (read(copy, 100, 3), read(copy, (3 << 30) + 5, 6), read(copy, (5 << 30) - 4)) == (b"low", b"middle", b"high")
    assert page_counts(copy) == {"owned": 0, "shared": 3, "zero": (5 << 18) - 3, "absent": 0, "total": 5 << 18}


def test_the_cost_does_not_grow_with_what_is_resident(shared: Mount, here: Path) -> None:
    for name, size in (("small", 1), ("large", 32)):
        directory = here / name
        directory.mkdir()
        (directory / "ram").write_bytes(pattern(size * MB))
        space = layer_bytes(shared.path)
        cp("-r", directory, here / f"{name}-clone")
        assert layer_bytes(shared.path) == space


@pytest.mark.parametrize("how", ["cp", "clone"])
def test_both_sides_are_independent(here: Path, parent: Path, how: str) -> None:
    clone = here / "clone"
    if how == "cp":
        cp("-r", parent, clone)
    else:
        assert ramfs("clone", parent, clone).returncode == 0
    models = {parent: bytearray(pattern(8 * MB + 123)), clone: bytearray(pattern(8 * MB + 123))}
    for turn, (side, model) in enumerate([*models.items()] * 3):
        with opened(side / "pc.ram@0x0") as fd:
            for number in range(20):
                offset = (turn * 7919 + number * 104_729) * 31 % (8 * MB)
                data = pattern(1 + number * 977, turn * 50 + number)
                os.pwrite(fd, data, offset)
                model[offset : offset + len(data)] = data
                if len(model) > 8 * MB + 123 and len(model) < offset + len(data):
                    raise AssertionError
        for path, expected in models.items():
            assert read(path / "pc.ram@0x0") == expected
    (parent / "state").unlink()
    assert read(clone / "state") == pattern(10_001, 2)


def test_a_clone_of_a_clone_of_a_clone(here: Path, parent: Path) -> None:
    last = parent
    for generation in range(6):
        child = here / f"g{generation}"
        cp("-r", last, child)
        with opened(child / "pc.ram@0x0") as fd:
            os.pwrite(fd, bytes([generation + 1]) * PAGE, generation * PAGE)
        last = child
    model = bytearray(pattern(8 * MB + 123))
    for generation in range(6):
        model[generation * PAGE : (generation + 1) * PAGE] = bytes([generation + 1]) * PAGE
        assert read(here / f"g{generation}" / "pc.ram@0x0") == model
    assert read(parent / "pc.ram@0x0") == pattern(8 * MB + 123)


def test_dirty_mapped_pages_of_the_source_are_in_the_copy(here: Path, parent: Path) -> None:
    with opened(parent / "pc.ram@0x0") as fd, mmap.mmap(fd, 8 * MB) as memory:
        memory[0:5] = b"dirty"
        cp("-r", parent, here / "one")
        memory[PAGE : PAGE + 5] = b"dirty"
        assert ramfs("clone", parent, here / "two").returncode == 0
    assert read(here / "one" / "pc.ram@0x0", 0, 5) == b"dirty"
    assert read(here / "one" / "pc.ram@0x0", PAGE, 5) == pattern(8 * MB)[PAGE : PAGE + 5]
    assert read(here / "two" / "pc.ram@0x0", PAGE, 5) == b"dirty"


def test_a_mapped_target_shows_what_was_copied_over_it(here: Path) -> None:
    (here / "source").write_bytes(pattern(4 * PAGE))
    (here / "target").write_bytes(pattern(4 * PAGE, 7))
    with opened(here / "source") as one, opened(here / "target") as two, mmap.mmap(two, 4 * PAGE) as memory:
        memory[0] = 0  # dirty, and behind what will be copied
        assert memory[PAGE : 2 * PAGE] == pattern(4 * PAGE, 7)[PAGE : 2 * PAGE]
        assert os.copy_file_range(one, two, 2 * PAGE, PAGE, PAGE) == 2 * PAGE
        assert (
            memory[:]
            == b"\0"
            + pattern(4 * PAGE, 7)[1:PAGE]
            + pattern(4 * PAGE)[PAGE : 3 * PAGE]
            + pattern(4 * PAGE, 7)[3 * PAGE :]
        )


# --- copy_file_range ---


@pytest.mark.parametrize(
    ("source_offset", "target_offset", "length"),
    [
        (0, 0, 4 * PAGE),
        (PAGE, 0, 2 * PAGE),
        (0, 3 * PAGE, 4 * PAGE),
        (100, 100, 3 * PAGE),
        (100, 200, 3 * PAGE),
        (1, 0, 5),
        (0, 10 * PAGE + 5, PAGE),
        (5 * PAGE, 5 * PAGE, 2 * PAGE + 77),
        (7 * PAGE, 0, PAGE + 77),
        (7 * PAGE + 70, 20 * PAGE, 7),
    ],
)
def test_copy_file_range(here: Path, source_offset: int, target_offset: int, length: int) -> None:
    source, model = pattern(8 * PAGE + 77), bytearray(pattern(6 * PAGE + 5, 9))
    (here / "source").write_bytes(source)
    (here / "target").write_bytes(model)
    with opened(here / "source", os.O_RDONLY) as one, opened(here / "target") as two:
        done = os.copy_file_range(one, two, length, source_offset, target_offset)
    assert done == min(length, len(source) - source_offset)
    model.extend(bytes(max(0, target_offset + done - len(model))))
    model[target_offset : target_offset + done] = source[source_offset : source_offset + done]
    assert read(here / "target") == model
    assert read(here / "source") == source


def test_copy_file_range_beyond_the_source_is_nothing(here: Path) -> None:
    (here / "source").write_bytes(b"abc")
    (here / "target").write_bytes(b"xyz")
    with opened(here / "source") as one, opened(here / "target") as two:
        assert os.copy_file_range(one, two, 100, 3, 0) == 0
        assert os.copy_file_range(one, two, 100, 1 << 40, 0) == 0
        assert os.copy_file_range(one, two, 0, 0, 0) == 0
    assert read(here / "target") == b"xyz"


def test_copy_file_range_that_cannot_be(here: Path) -> None:
    from ramfs.units import MAX_FILE_SIZE

    (here / "f").write_bytes(pattern(4 * PAGE))
    (here / "g").touch()
    with opened(here / "f") as one, opened(here / "g") as two, opened(here / "g", os.O_RDONLY) as closed:
        with fails(errno.EBADF):
            os.copy_file_range(one, closed, PAGE, 0, 0)
        with fails(errno.EINVAL):  # overlapping ranges of one file
            os.copy_file_range(one, one, 2 * PAGE, 0, PAGE)
        with fails(errno.EFBIG):
            os.copy_file_range(one, two, PAGE, 0, MAX_FILE_SIZE)
    assert read(here / "f") == pattern(4 * PAGE)
    assert read(here / "g") == b""


def test_copy_within_one_file(here: Path) -> None:
    model = bytearray(pattern(8 * PAGE))
    (here / "f").write_bytes(model)
    with opened(here / "f") as fd:
        for source, target, length in ((0, 4 * PAGE, 3 * PAGE), (100, 6 * PAGE + 100, PAGE), (3, 20 * PAGE + 8, 5000)):
            assert os.copy_file_range(fd, fd, length, source, target) == length
            model.extend(bytes(max(0, target + length - len(model))))
            model[target : target + length] = model[source : source + length]
            assert os.pread(fd, len(model) + 1, 0) == model
            os.pwrite(fd, b"!", source)
            model[source] = ord("!")
    assert read(here / "f") == model


def test_copied_to_another_place_pages_are_shared(shared: Mount, here: Path) -> None:
    (here / "f").write_bytes(pattern(4 * MB))
    (here / "g").touch()
    space = layer_bytes(shared.path)
    with opened(here / "f") as one, opened(here / "g") as two:
        assert os.copy_file_range(one, two, 2 * MB, MB, 7 * MB) == 2 * MB
        os.pwrite(one, bytes([7]) * PAGE, MB)
        os.pwrite(two, bytes([8]) * PAGE, 8 * MB)
    assert layer_bytes(shared.path) - space <= 2 * MB // 100 + 4 * PAGE
    model = bytearray(7 * MB) + pattern(4 * MB)[MB : 3 * MB]
    model[8 * MB : 8 * MB + PAGE] = bytes([8]) * PAGE
    assert read(here / "g") == model


@st.composite
def copies(draw: st.DrawFn) -> list[tuple[int, int, int, int, int]]:
    place = st.one_of(
        st.integers(0, 9).map(lambda n: n * PAGE), st.integers(0, 9 * PAGE), st.sampled_from([1, PAGE - 1, PAGE + 1])
    )
    file = st.integers(0, 2)
    return draw(st.lists(st.tuples(file, place, file, place, place), min_size=1, max_size=12))


@given(copies(), st.lists(st.integers(0, 6 * PAGE), min_size=3, max_size=3), st.data())
@settings(max_examples=60)
def test_copies_of_every_alignment(
    copying: Path, steps: list[tuple[int, int, int, int, int]], sizes: list[int], data: st.DataObject
) -> None:
    """Three files, copied onto each other and within themselves, against bytearrays."""
    models = [bytearray(pattern(size, seed)) for seed, size in enumerate(sizes, 1)]
    files = [os.open(copying / f"f{number}", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for number in range(3)]
    try:
        for fd, model in zip(files, models, strict=True):
            os.pwrite(fd, model, 0)
        for number, (source, source_offset, target, target_offset, wanted) in enumerate(steps):
            old, new = models[source], models[target]
            length = max(0, min(wanted, len(old) - source_offset))
            if source == target and abs(source_offset - target_offset) < length:
                continue  # the kernel refuses overlapping ranges
            done = 0
            while done < length:
                done += os.copy_file_range(
                    files[source], files[target], length - done, source_offset + done, target_offset + done
                )
            if length:
                new.extend(bytes(max(0, target_offset + length - len(new))))
                new[target_offset : target_offset + length] = old[source_offset : source_offset + length]
            if data.draw(st.booleans()):
                patch = bytes([number + 1]) * data.draw(st.sampled_from([1, 100, PAGE, PAGE + 1]))
                where = data.draw(st.integers(0, 5 * PAGE))
                os.pwrite(files[source], patch, where)
                old.extend(bytes(max(0, where + len(patch) - len(old))))
                old[where : where + len(patch)] = patch
        for fd, model in zip(files, models, strict=True):
            assert os.pread(fd, len(model) + PAGE, 0) == model
    finally:
        for fd in files:
            os.close(fd)


@pytest.fixture(scope="module")
def copying(shared: Mount) -> Path:
    path = shared.path / "copying"
    path.mkdir()
    return path


def test_a_long_unaligned_copy_goes_on_in_pieces(here: Path) -> None:
    """A request may be answered with less than was asked; cp and read(2) callers go on."""
    data = pattern(20 * MB)
    (here / "f").write_bytes(data)
    with opened(here / "f") as one, opened(here / "g", os.O_RDWR | os.O_CREAT) as two:
        done = 0
        while done < len(data) - 1:
            count = os.copy_file_range(one, two, len(data) - 1 - done, 1 + done, done)
            assert count > 0
            done += count
    assert read(here / "g") == data[1:]


# --- ramfs clone ---


def test_ramfs_clone_copies_the_tree(shared: Mount, here: Path, parent: Path) -> None:
    os.setxattr(parent / "state", "user.note", b"note")
    os.link(parent / "state", parent / "sub" / "hard")
    (parent / "link").symlink_to("state")
    os.mkfifo(parent / "pipe")
    (parent / "state").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(parent / "state", 12, 34)
    (parent / ".snap" / "s").mkdir()
    before = counters(shared.path)
    assert ramfs("clone", parent, here / "clone").returncode == 0
    after = counters(shared.path)
    assert after["clones"] == before["clones"] + 1
    assert after["written_bytes"] == before["written_bytes"]
    clone = here / "clone"
    assert sorted(os.listdir(clone)) == ["link", "pc.ram@0x0", "pipe", "state", "sub"]
    assert os.listdir(clone / ".snap") == []
    old, new = (parent / "state").stat(), (clone / "state").stat()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"):
        assert getattr(old, field) == getattr(new, field), field
    assert os.getxattr(clone / "state", "user.note") == b"note"
    assert (clone / "sub" / "hard").stat().st_ino == new.st_ino
    assert os.readlink(clone / "link") == "state"
    assert stat.S_ISFIFO((clone / "pipe").stat().st_mode)
    assert clone.stat().st_nlink == 3
    assert read(clone / "pc.ram@0x0") == pattern(8 * MB + 123)


def test_ramfs_clone_into_a_directory_and_of_a_snapshot(here: Path, parent: Path) -> None:
    (parent / ".snap" / "s").mkdir()
    (parent / "state").write_bytes(b"later")
    (here / "into").mkdir()
    assert ramfs("clone", parent, here / "into").returncode == 0
    assert read(here / "into" / "parent" / "state") == b"later"
    assert ramfs("clone", parent / ".snap" / "s", here / "old").returncode == 0
    assert read(here / "old" / "state") == pattern(10_001, 2)
    (here / "old" / "state").write_bytes(b"writable")


def test_ramfs_clone_that_cannot_be(here: Path, parent: Path, tmp_path: Path) -> None:
    (here / "file").touch()
    for source, target in (
        (parent, here / "file"),
        (parent, here / "file" / "clone"),
        (parent, here / "none" / "clone"),
        (here / "file", here / "clone"),
        (here / "none", here / "clone"),
        (parent, tmp_path / "clone"),
        (tmp_path, here / "clone"),
        (parent, parent / ".snap" / "clone"),
        (parent / ".snap", here / "clone"),
    ):
        done = ramfs("clone", source, target)
        assert done.returncode != 0, (source, target)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("ramfs: ")
    assert sorted(os.listdir(here)) == ["file", "parent"]


def test_ramfs_clone_into_itself_ends(here: Path, parent: Path) -> None:
    done = ramfs("clone", parent, parent / "sub" / "copy")
    if done.returncode == 0:
        assert sorted(os.listdir(parent / "sub" / "copy")) == ["pc.ram@0x0", "state", "sub"]
        assert os.listdir(parent / "sub" / "copy" / "sub") == ["small"]
    else:
        assert "ramfs: " in done.stderr


def test_ramfs_clone_by_another_user(public: Mount) -> None:
    import ramfs.cli.clone

    assert ramfs.cli.clone.clone.name == "clone"  # imported here, for the child may not read the source tree
    root = public.path
    for name in ("readable", "secret"):
        (root / name).mkdir()
        (root / name).chmod(0o755)
        (root / name / "f").write_bytes(b"data")
        (root / name / "f").chmod(0o644)
    os.chown(root / "readable" / "f", 12, 34)
    (root / "readable" / "f").chmod(0o6755)
    (root / "secret" / "f").chmod(0o600)
    (root / "secret" / "g").write_bytes(b"public")
    (root / "home").mkdir()
    os.chown(root / "home", NOBODY, NOBODY)

    def clone(source: str, target: str) -> int:
        return ramfs.cli.main(["clone", str(root / source), str(root / target)])

    assert in_child(lambda: clone("readable", "home/copy"), user=NOBODY) == 0
    made = (root / "home" / "copy" / "f").stat()
    assert (made.st_uid, made.st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(made.st_mode) == 0o755
    assert in_child((root / "home" / "copy" / "f").read_bytes, user=NOBODY) == b"data"
    assert in_child(lambda: clone("secret", "home/stolen"), user=NOBODY) != 0
    assert in_child(lambda: clone("readable", "copy"), user=NOBODY) != 0
    assert os.listdir(root / "home") == ["copy"]
    assert sorted(os.listdir(root)) == ["home", "readable", "secret"]


def test_ramfs_clone_finds_no_way_around_a_closed_directory(public: Mount) -> None:
    """The control file takes paths: each directory on the way must let the caller through."""
    import json

    root = public.path
    (root / "closed").mkdir(0o700)
    (root / "closed" / "inner").mkdir()
    (root / "closed" / "inner").chmod(0o755)
    (root / "closed" / "inner" / "f").write_bytes(b"secret")
    (root / "closed" / "inner" / "f").chmod(0o644)
    (root / "closed" / "open").mkdir()
    (root / "closed" / "open").chmod(0o777)
    (root / "home").mkdir()
    os.chown(root / "home", NOBODY, NOBODY)

    def command(source: str, target: str) -> None:
        with opened(root / ".ramfs" / "control", os.O_WRONLY) as fd:
            os.write(fd, json.dumps({"clone": {"source": source, "parent": target, "name": "x"}}).encode())

    with fails(errno.EACCES):
        in_child(lambda: command("closed/inner", "home"), user=NOBODY)
    with fails(errno.EACCES):
        in_child(lambda: command("home", "closed/open"), user=NOBODY)
    assert os.listdir(root / "home") == []
    assert os.listdir(root / "closed" / "open") == []


# --- dense clones ---


def test_cp_al_of_a_snapshot_is_dense(shared: Mount, here: Path, parent: Path) -> None:
    (parent / ".snap" / "s").mkdir()
    before, space = counters(shared.path), layer_bytes(shared.path)
    cp("-al", parent / ".snap" / "s", here / "dense1")
    cp("-al", parent / ".snap" / "s", here / "dense2")
    after = counters(shared.path)
    assert (after["shared_bytes"], after["written_bytes"]) == (before["shared_bytes"], before["written_bytes"])
    assert layer_bytes(shared.path) < space + MB  # digests of other tests' layers are made meanwhile
    frozen = (parent / ".snap" / "s" / "pc.ram@0x0").stat()
    for clone in ("dense1", "dense2"):
        assert (here / clone / "pc.ram@0x0").stat().st_ino == frozen.st_ino
        with fails(errno.EROFS):
            os.open(here / clone / "pc.ram@0x0", os.O_RDWR)
        with opened(here / clone / "pc.ram@0x0", os.O_RDONLY) as fd:
            with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
                memory[0:7] = b"private"
                assert memory[PAGE : PAGE + 9] == pattern(2 * PAGE)[PAGE : PAGE + 9]
            assert os.pread(fd, 7, 0) == pattern(7)
    assert (here / "dense1" / "pc.ram@0x0").stat().st_nlink == 3
    (here / "dense1" / "new").write_bytes(b"the directory is writable")
    (here / "dense1" / "sub" / "small").unlink()
    assert read(parent / ".snap" / "s" / "sub" / "small") == b"small"


def test_a_dense_clone_outlives_parent_and_snapshot(here: Path, parent: Path) -> None:
    (parent / ".snap" / "s").mkdir()
    cp("-al", parent / ".snap" / "s", here / "dense")
    (parent / ".snap" / "s").rmdir()
    subprocess.run(["rm", "-r", parent], check=True)
    assert read(here / "dense" / "pc.ram@0x0") == pattern(8 * MB + 123)
    assert (here / "dense" / "pc.ram@0x0").stat().st_nlink == 1


# --- deletion ---


def test_deleting_either_side_harms_no_other_and_space_comes_back(shared: Mount, here: Path) -> None:
    base = layer_bytes(shared.path)
    (here / "a").mkdir()
    (here / "a" / "ram").write_bytes(pattern(16 * MB))
    cp("-r", here / "a", here / "b")
    with opened(here / "b" / "ram") as fd:
        os.pwrite(fd, pattern(4 * MB, 5), 4 * MB)
    model = bytearray(pattern(16 * MB))
    model[4 * MB : 8 * MB] = pattern(4 * MB, 5)
    assert layer_bytes(shared.path) - base >= 20 * MB
    subprocess.run(["rm", "-r", here / "a"], check=True)
    # The pages that b replaced were a's alone.
    eventually(lambda: layer_bytes(shared.path) - base < 18 * MB, "the parent's own pages are free")
    assert read(here / "b" / "ram") == model
    subprocess.run(["rm", "-r", here / "b"], check=True)
    eventually(lambda: layer_bytes(shared.path) - base < MB, "everything is free")
