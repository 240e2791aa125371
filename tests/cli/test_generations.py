"""Generations of a directory: `ramfs diff` and `ramfs log`, beside a comparison of every byte."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import NOBODY, call, needs_root, run
from disk import reflink_disk
from harness import Mount

from ramfs.cli._generations import compare

PAGE = 4096
PAGES = 1500


def pages_of(path: Path) -> list[bytes]:
    data = path.read_bytes() if path.exists() else b""
    return [data[at : at + PAGE].ljust(PAGE, b"\0") for at in range(0, len(data), PAGE)]


def differing(old: Path, new: Path) -> set[int]:
    """The pages that differ, by their bytes; zeros behind the end of the shorter file."""
    sides = itertools.zip_longest(pages_of(old), pages_of(new), fillvalue=bytes(PAGE))
    return {number for number, (a, b) in enumerate(sides) if a != b}


def told(old: Path, new: Path, *, content: bool = False) -> dict[str, set[int]]:
    """The pages that have changed, by file, as ramfs tells; what is counted agrees with what is listed."""
    listed = {each.path: each for each in compare(str(old), str(new), content=content, with_runs=True)}
    for each in compare(str(old), str(new), content=content):
        assert each.pages == listed[each.path].pages
    found = {}
    for name, each in listed.items():
        runs = each.runs or []
        assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))
        found[name] = {page for first, stop in runs for page in range(first, stop)}
    return found


def unique(pages: int) -> bytes:
    return os.urandom(pages * PAGE)


def scribble(path: Path, source: random.Random, *, shifted: bool = True) -> None:
    """Change a file at random, no page to what it was before."""
    fd = os.open(path, os.O_RDWR)
    try:
        for _ in range(source.randrange(1, 8)):
            size = os.fstat(fd).st_size // PAGE
            first, count = source.randrange(PAGES), source.randrange(1, 40)
            match source.choice(("write", "part", "punch", "copy", "cut")):
                case "write":
                    os.pwrite(fd, unique(count), first * PAGE)
                case "part":
                    os.pwrite(fd, os.urandom(100), first * PAGE + 50)
                case "punch":
                    call("fallocate", "-p", "-o", first * PAGE, "-l", count * PAGE, path).ok()
                case "copy" if shifted and size > 200:
                    at = source.randrange(size - 100)
                    if at + count < size:
                        os.copy_file_range(fd, fd, count * PAGE, at * PAGE, (size + count) * PAGE)
                case "cut" if size > PAGES // 2:
                    os.truncate(fd, source.randrange(size // 2, size) * PAGE)
    finally:
        os.close(fd)


def grow_generations(vm: Path, source: random.Random, count: int, *, shifted: bool = True) -> list[Path]:
    """Snapshots of a directory of two files that change at random."""
    for name in ("pc.ram@0x100000", "sub/other"):
        (vm / name).parent.mkdir(parents=True, exist_ok=True)
        (vm / name).write_bytes(unique(source.randrange(PAGES // 2, PAGES)))
    found = []
    for number in range(count):
        for name in ("pc.ram@0x100000", "sub/other"):
            scribble(vm / name, source, shifted=shifted)
        found.append(vm / ".snap" / str(number))
        found[-1].mkdir()
    return found


def check_all(generations: list[Path], *, exact: bool = True) -> None:
    """Every pair of generations, in both directions."""
    for old, new in itertools.permutations(generations, 2):
        names = {str(each.relative_to(top)) for top in (old, new) for each in top.rglob("*") if each.is_file()}
        seen, by_content = told(old, new), told(old, new, content=True)
        assert seen.keys() == by_content.keys() == names
        for name in names:
            expected = differing(old / name, new / name)
            assert by_content[name] == expected, (old, new, name)
            assert seen[name] == expected if exact else seen[name] >= expected, (old, new, name)


@pytest.mark.parametrize("seed", [1, 2])
def test_diff_is_exact(mounted: Mount, seed: int) -> None:
    source = random.Random(seed)
    vm = mounted.path / "vm"
    vm.mkdir()
    generations = grow_generations(vm, source, 3)
    shutil.copytree(generations[1], mounted.path / "copy", copy_function=lambda a, b: call("cp", a, b).ok())
    run("clone", vm / ".snap/2", mounted.path / "clone").ok()
    scribble(mounted.path / "clone/sub/other", source)
    scribble(vm / "pc.ram@0x100000", source)
    check_all([*generations, vm, mounted.path / "copy", mounted.path / "clone"])
    # A flat copy shares no page with what it was made of, and is the same.
    run("flatten", generations[0]).ok()
    run("flatten", generations[2] / "pc.ram@0x100000").ok()
    check_all([*generations, mounted.path / "clone"])
    mounted.restart()
    check_all([*generations[:2], vm])


@needs_root
def test_diff_is_exact_of_what_the_kernel_serves(module_disk: Path, tmp_path: Path) -> None:
    """Native live files have no table: there the file system of the store tells which blocks are the same."""
    source = random.Random(3)
    with Mount(module_disk / "store", tmp_path / "mnt") as mount:
        vm = mount.path / "vm"
        vm.mkdir()
        generations = grow_generations(vm, source, 3, shifted=False)
        status = json.loads((mount.path / ".ramfs/status.json").read_text())
        assert status["native"]["live"] == 2, status["native"]
        scribble(vm / "pc.ram@0x100000", source, shifted=False)
        run("flatten", generations[0]).ok()
        check_all([*generations, vm])
        mount.restart()  # they get tables
        scribble(vm / "sub/other", source, shifted=False)
        check_all([generations[1], vm])


@pytest.fixture(scope="module")
def module_disk(module_shm: Path) -> Iterator[Path]:
    with reflink_disk(module_shm, "xfs") as point:
        yield point


def test_a_page_written_with_equal_bytes_has_changed(mounted: Mount) -> None:
    vm = mounted.path / "vm"
    vm.mkdir()
    data = unique(10) + b"end"
    (vm / "ram").write_bytes(data)
    (vm / ".snap/a").mkdir()
    with open(vm / "ram", "r+b") as file:
        file.seek(3 * PAGE)
        file.write(data[3 * PAGE : 5 * PAGE])
        file.seek(10 * PAGE)
        file.write(b"end")
        file.seek(7 * PAGE)
        file.write(b"other")
    assert told(vm / ".snap/a", vm) == {"ram": {3, 4, 7, 10}}
    assert told(vm / ".snap/a", vm, content=True) == {"ram": {7}}
    os.truncate(vm / "ram", 10 * PAGE + 2)
    assert told(vm / ".snap/a", vm, content=True) == {"ram": {7, 10}}


def test_diff_sees_what_a_guest_stored_a_moment_ago(mounted: Mount) -> None:
    vm = mounted.path / "vm"
    vm.mkdir()
    (vm / "ram").write_bytes(unique(100))
    (vm / ".snap/a").mkdir()
    with open(vm / "ram", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[42 * PAGE] ^= 1
        assert told(vm / ".snap/a", vm) == {"ram": {42}}


def test_many_runs_come_in_parts(mounted: Mount) -> None:
    (mounted.path / "a").mkdir()
    (mounted.path / "a/ram").write_bytes(unique(10_000))
    run("clone", mounted.path / "a", mounted.path / "b").ok()
    with open(mounted.path / "b/ram", "r+b") as file:
        for page in range(0, 10_000, 2):
            os.pwrite(file.fileno(), b"x", page * PAGE)
    assert told(mounted.path / "a", mounted.path / "b") == {"ram": set(range(0, 10_000, 2))}


def test_diff_text(mounted: Mount) -> None:
    vm = mounted.path / "vm"
    vm.mkdir()
    (vm / "pc.ram@0x100000").write_bytes(unique(256))
    (vm / "gone").write_bytes(unique(2))
    (vm / "same").touch()
    (vm / ".snap/a").mkdir()
    (vm / "gone").unlink()
    (vm / "new").write_bytes(unique(3))
    with open(vm / "pc.ram@0x100000", "r+b") as file:
        os.pwrite(file.fileno(), b"x" * 2 * PAGE, 5 * PAGE)
        os.pwrite(file.fileno(), b"x", 9 * PAGE)
    lines = [line.split() for line in run("diff", vm / ".snap/a", vm, "--pages").ok().splitlines()]
    assert lines == [
        ["8.0", "KiB", "removed", "gone"],
        ["12.0", "KiB", "added", "new"],
        ["12.0", "KiB", "of", "1.0", "MiB", "pc.ram@0x100000"],
        ["pages", "5-6,", "guest-physical", "0x105000-0x106fff"],
        ["page", "9,", "guest-physical", "0x109000-0x109fff"],
        ["32.0", "KiB", "8", "pages", "changed", "in", "all;", "1", "file", "as", "before"],
    ]
    one = json.loads(run("diff", "--json", vm / ".snap/a/pc.ram@0x100000", vm / "pc.ram@0x100000").ok())
    assert one["changed"] == 3
    assert one["files"][0]["guest_physical"] == [{"gpa": 0x100000, "size": 1 << 20, "offset": 0, "changed": 3}]


def test_diff_tells_where_in_the_guest_that_is(mounted: Mount) -> None:
    vm = mounted.path / "vm"
    vm.mkdir()
    (vm / "ram").write_bytes(unique(256))
    ranges = [
        {"gpa": "0x0", "size": "0x40000", "file": "ram"},
        {"gpa": "0x100000000", "size": "0xb0000", "file": "ram", "offset": "0x40000"},
    ]
    (vm / ".guest/layout.json").write_text(json.dumps({"ranges": ranges}))
    (vm / ".snap/a").mkdir()
    with open(vm / "ram", "r+b") as file:
        for first, stop in ((10, 12), (60, 68), (250, 251)):  # the last is in no range
            os.pwrite(file.fileno(), unique(stop - first), first * PAGE)
    for options in ((), ("--pages",)):
        file = json.loads(run("diff", "--json", *options, vm / ".snap/a", vm).ok())["files"][0]
        assert file["changed"] == 11
        assert [(each["gpa"], each["changed"]) for each in file["guest_physical"]] == [(0, 6), (1 << 32, 4)]
    lines = [line.strip() for line in run("diff", "--pages", vm / ".snap/a/ram", vm / "ram").ok().splitlines()]
    assert lines == [
        "44.0 KiB  of 1.0 MiB  ram",
        "24.0 KiB at guest-physical 0x0-0x3ffff",
        "16.0 KiB at guest-physical 0x100000000-0x1000affff",
        "pages 10-11, guest-physical 0xa000-0xbfff",
        "pages 60-67, guest-physical 0x3c000-0x3ffff, 0x100000000-0x100003fff",
        "page 250",
        "44.0 KiB  11 pages    changed in all; 0 files as before",
    ]


def test_what_cannot_be_compared(mounted: Mount, tmp_path: Path) -> None:
    vm = mounted.path / "vm"
    vm.mkdir()
    (vm / "ram").touch()
    run("diff", vm, vm / "ram").failed(1, "two directories")
    run("diff", vm, vm / ".snap/missing").failed(1, ".snap/missing")
    run("diff", vm, tmp_path).failed(8, "does not lie in a ramfs mount")
    run("log", vm / "ram").failed(1, "not a directory")
    (vm / ".snap/a").mkdir()
    run("log", vm / ".snap/a").failed(1, "frozen")
    run("diff", "", vm).failed(2, "A is empty")
    run("log", "").failed(2, "DIR is empty")


@needs_root
def test_nobody_learns_of_files_that_he_may_not_open(mounted: Mount) -> None:
    mounted.path.chmod(0o755)
    for name in ("vm", "other"):
        (mounted.path / name).mkdir()
        (mounted.path / name / "ram").write_bytes(b"x")
    ino = (mounted.path / "vm/ram").stat().st_ino
    assert os.getxattr(mounted.path / "other/ram", f"user.ramfs.changed.{ino}") == b'{"changed":1}'
    with pytest.raises(OSError, match="No such file"):
        os.getxattr(mounted.path / "other/ram", "user.ramfs.changed.4711")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(mounted.path / "other/ram", f"user.ramfs.changed.{(mounted.path / 'vm').stat().st_ino}")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(mounted.path / "other/ram", "user.ramfs.generation")


@needs_root
def test_a_directory_that_may_not_be_entered_is_not_compared_with(public: Path) -> None:
    with Mount(public / "store", public / "mnt", ["allow_other"]) as mount:
        mount.path.chmod(0o755)
        for name, mode in (("vm", 0o700), ("other", 0o755)):
            (mount.path / name).mkdir(mode)
            (mount.path / name / "ram").write_bytes(b"x")
            (mount.path / name / "ram").chmod(0o644)
        ino = (mount.path / "vm/ram").stat().st_ino
        ask = f"import os, sys; print(os.getxattr(sys.argv[1], 'user.ramfs.changed.{ino}'))"
        command = [*NOBODY, sys.executable, "-c", ask, mount.path / "other/ram"]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "PermissionError" in refused.stderr
        (mount.path / "vm").chmod(0o755)
        assert (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "b'{\"changed\":1}'"
        )


def test_a_snapshot_that_vanishes_is_one_line(mounted: Mount) -> None:
    """Whatever moment it goes at, the command tells all of it or says that it has gone."""
    vm = mounted.path / "vm"
    vm.mkdir()
    for number in range(40):
        (vm / f"file{number}").write_bytes(b"x")
    (vm / ".snap/stays").mkdir()
    codes = set()
    for number in range(8):
        (vm / ".snap/goes").mkdir()
        timer = threading.Timer(0.06 + number * 0.006, (vm / ".snap/goes").rmdir)
        timer.start()
        done = run("diff", "--json", vm / ".snap/goes", vm / ".snap/stays")
        timer.join()
        codes.add(done.code)
        if done.code:
            done.failed(1, "goes")
        else:
            assert len(json.loads(done.ok())["files"]) == 40
    assert codes <= {0, 1}


def test_log(mounted: Mount) -> None:
    vm, clone = mounted.path / "vm", mounted.path / "clone"
    vm.mkdir()
    (vm / "ram").write_bytes(unique(100))
    (vm / ".snap/zeta").mkdir()
    with open(vm / "ram", "r+b") as file:
        os.pwrite(file.fileno(), unique(7), 20 * PAGE)
    (vm / ".snap/alpha").mkdir()
    with open(vm / "ram", "r+b") as file:
        os.pwrite(file.fileno(), unique(2), 20 * PAGE)
    found = json.loads(run("log", "--json", vm).ok())["generations"]
    assert [(each["name"], each["changed"]) for each in found] == [(None, 2), ("alpha", 7), ("zeta", None)]
    parents = [each["parent"] for each in found]
    assert parents == [str(vm / ".snap/alpha"), str(vm / ".snap/zeta"), None]
    assert [each["owned_bytes"] // PAGE for each in found] == [2, 2, 7]
    assert found[2]["made"] < found[1]["made"]
    assert [each["pages"] for each in found] == [100] * 3
    run("clone", vm / ".snap/zeta", clone).ok()
    (clone / "ram").write_bytes(unique(1))
    (clone / ".snap/first").mkdir()
    found = json.loads(run("log", "--json", clone).ok())["generations"]
    assert [(each["name"], each["parent"], each["changed"]) for each in found] == [
        (None, str(clone / ".snap/first"), 0), ("first", str(vm / ".snap/zeta"), 100),
    ]  # fmt: skip
    text = run("log", vm).ok().splitlines()
    assert [line.split()[-1] for line in text] == ["after", "alpha", "zeta", "-"]
    assert text[2].split()[2:] == ["28.0", "KiB", "8.0", "KiB", "alpha", "zeta"]
