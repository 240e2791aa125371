"""ramfs capture: what a process stored into private mappings becomes a clone. Guests: tests/vm/test_capture.py."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import NOBODY, call, needs_root, run
from harness import Mount

from ramfs.cli._private import Process, batches, read_pagemap, scan
from ramfs.errors import FileError
from ramfs.image.scatter import pack

PAGE = 4096

#: A process that maps files and stores into them as it is told.
_HOLDER = """
import hashlib, mmap, os, sys
maps = []
for line in sys.stdin:
    word, *rest = line.split()
    if word in ("private", "shared"):
        fd = os.open(rest[0], os.O_RDONLY if word == "private" else os.O_RDWR)
        flags = mmap.MAP_PRIVATE if word == "private" else mmap.MAP_SHARED
        maps.append(mmap.mmap(fd, int(rest[2]), flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=int(rest[1])))
        os.close(fd)
    elif word == "fill":
        number, first, count, seed = map(int, rest)
        for page in range(first, first + count):
            maps[number][page * 4096 : page * 4096 + 4096] = bytes(4096) if seed < 0 else b"%16d" % (seed + page) * 256
    elif word == "zap":
        number, first, count = map(int, rest)
        maps[number].madvise(mmap.MADV_DONTNEED, first * 4096, count * 4096)
    print(hashlib.sha256(maps[0]).hexdigest() if word == "sum" else "ok", flush=True)
"""


class Holder:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def do(self, *words: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder()
    yield made
    made.close()


def pattern(pages: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def dense(here: Path, pages: int = 600) -> tuple[Path, Path]:
    """A snapshot with two files, and a dense clone of it."""
    vm = here / "vm"
    vm.mkdir()
    (vm / "ram0").write_bytes(pattern(pages, 1))
    (vm / "other").write_bytes(b"not mapped")
    (vm / "state").write_bytes(b"older")
    (vm / "ram0").chmod(0o640)
    (vm / ".snap" / "s").mkdir()
    clone = here / "dense"
    subprocess.run(["cp", "-al", vm / ".snap" / "s", clone], check=True)
    return vm / ".snap" / "s", clone


def entries(path: Path) -> dict[str, tuple[int, bytes]]:
    return {each.name: (each.stat().st_ino, each.read_bytes()) for each in path.iterdir()}


def test_a_dense_clone_becomes_an_ordinary_one(here: Path, holder: Holder) -> None:
    template, clone = dense(here)
    links = here / "links"
    subprocess.run(["cp", "-al", clone, links], check=True)
    before = entries(template)
    holder.do("private", clone / "ram0", 0, 600 * PAGE)
    for first, count, seed in ((0, 1, 5), (7, 1, 5), (9, 300, 6), (400, 2, -1), (599, 1, 7)):
        holder.do("fill", 0, first, count, seed)
    seen = holder.do("sum")
    done = run("capture", clone, "--pid", holder.pid, "--json")
    report = json.loads(done.ok())
    assert report["files"] == [{"path": str(clone / "ram0"), "pages": 305, "ranges": 5}]
    assert report["pause"] > 0
    assert len(report["notes"]) == 1  # of the state that fits no more
    assert sorted(path.name for path in clone.iterdir()) == ["other", "ram0"]
    assert hashlib.sha256((clone / "ram0").read_bytes()).hexdigest() == seen
    assert (clone / "ram0").stat().st_mode & 0o777 == 0o640
    counts = json.loads(os.getxattr(clone / "ram0", "user.ramfs.pages"))
    assert counts == {"owned": 303, "shared": 295, "zero": 2, "absent": 0, "total": 600}
    for name in ("ram0", "other"):
        with open(clone / name, "r+b") as file:
            file.write(b"mine")
    assert entries(template) == before
    # The process has what it had, and goes on; DIR is not what it maps any more, the links are.
    assert holder.do("sum") == seen
    run("capture", clone, "--pid", holder.pid).failed(1, "maps no file of")
    holder.do("fill", 0, 500, 1, 8)
    assert "306 pages (1.2 MiB) in 6 ranges" in run("capture", links, "--pid", holder.pid).out
    assert hashlib.sha256((links / "ram0").read_bytes()).hexdigest() == holder.do("sum")


def test_a_block_file_in_several_mappings(here: Path, holder: Holder) -> None:
    ram, data = here / "pc.ram@0x0", pattern(64, 2)
    ram.write_bytes(data)
    os.link(ram, here / "again")
    holder.do("private", ram, 0, 32 * PAGE)
    holder.do("private", ram, 40 * PAGE, 24 * PAGE)
    holder.do("fill", 0, 3, 4, 100)
    holder.do("fill", 1, 2, 2, 200)
    holder.do("zap", 0, 5, 1)  # what a balloon does: the file shows again
    os.kill(holder.pid, signal.SIGSTOP)  # it stays so
    report = json.loads(run("capture", here, "--pid", holder.pid, "--json").ok())
    assert (report["files"][0]["pages"], report["pause"]) == (5, None)
    os.kill(holder.pid, signal.SIGCONT)
    expected = bytearray(data)
    for page, seed in ((3, 103), (4, 104), (6, 106), (42, 202), (43, 203)):
        expected[page * PAGE : (page + 1) * PAGE] = b"%16d" % seed * 256
    assert ram.read_bytes() == expected
    assert os.path.samefile(ram, here / "again")

    # One page twice, each time another: nobody knows which is meant.
    other = here / "other"
    other.mkdir()
    (other / "ram0").write_bytes(data)
    for number in (2, 3):
        holder.do("private", other / "ram0", 0, 64 * PAGE)
        holder.do("fill", number, 10, number, number)
    before = entries(other)
    run("capture", other, "--pid", holder.pid).failed(1, "page 10 of", "twice")
    assert entries(other) == before
    assert holder.do("sum")


@needs_root
def test_what_cannot_be_captured(here: Path, public: Mount, holder: Holder) -> None:
    template, clone = dense(here)
    before = entries(clone)
    run("capture", clone, "--pid", holder.pid).failed(1, f"process {holder.pid} maps no file of")
    holder.do("shared", here / "vm" / "ram0", 0, PAGE)
    run("capture", here / "vm", "--pid", holder.pid).failed(1, "maps", "shared", "ramfs snapshot")
    holder.do("private", clone / "ram0", 0, PAGE)
    run("capture", template, "--pid", holder.pid).failed(8, "has no .snap")
    run("capture", clone, "--pid", 1 << 22).failed(1, "there is no process")
    run("capture", clone).failed(2, "--pid")
    run("capture", clone, "--pid", holder.pid, "--qmp", clone / "none").failed(9, "cannot reach QEMU")
    (public.path / "vm").mkdir()
    (public.path / "vm").chmod(0o777)
    command = [*NOBODY, sys.executable, "-P", "-m", "ramfs", "capture", public.path / "vm", "--pid", holder.pid]
    call(*command).failed(1, "you may not look into the memory of process", "which is root's")
    assert entries(clone) == before


def test_the_process_ends_meanwhile(here: Path, holder: Holder, shared: Mount) -> None:
    _, clone = dense(here, 40_000)
    before = {path.name: path.stat().st_ino for path in clone.iterdir()}
    holder.do("private", clone / "ram0", 0, 40_000 * PAGE)
    holder.do("fill", 0, 0, 40_000, 1)
    command = [sys.executable, "-m", "ramfs", "capture", str(clone), "--pid", str(holder.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert running.poll() is None
            time.sleep(0.001)
        # It copies now, and waits for the daemon when that stops.
        os.kill(shared.pid, signal.SIGSTOP)
        try:
            holder.close()
        finally:
            os.kill(shared.pid, signal.SIGCONT)
        out, said = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, ""), said
    assert said == f"ramfs: process {holder.pid} has ended meanwhile; nothing was changed\n"
    assert {path.name: path.stat().st_ino for path in clone.iterdir()} == before


def test_both_ways_to_find_copied_pages_agree(tmp_path: Path) -> None:
    path, pages = tmp_path / "file", 5000
    path.write_bytes(bytes(pages * PAGE))
    chosen = sorted(random.Random(3).sample(range(pages), 2000))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        for page in range(0, pages, 7):
            assert memory[page * PAGE] == 0  # there, and the file's
        for page in chosen:
            memory[page * PAGE] = 1
        with Process(os.getpid()) as process:
            mapping = next(each for each in process.mappings() if each.path == str(path))
            ranges = process.copied(mapping)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            slow = read_pagemap(pagemap, mapping.start, mapping.stop)
            fast = scan(pagemap, mapping.start, mapping.stop)
        finally:
            os.close(pagemap)
    assert ranges.tolist() == slow.tolist()
    for each in (slow, *([] if fast is None else [fast])):  # None is a kernel that cannot
        found = [page for start, stop in each.tolist() for page in range(start // PAGE, stop // PAGE)]
        assert [page - mapping.start // PAGE for page in found] == chosen


def test_many_runs_in_one_message(here: Path, shared: Mount) -> None:
    template, _ = dense(here, 100)
    way = os.fsencode(os.path.relpath(here / "vm" / "ram0", shared.path))
    before, page = (here / "vm" / "ram0").read_bytes(), b"p" * PAGE
    copy = here / "copy"
    subprocess.run(["cp", here / "vm" / "ram0", copy], check=True)
    fresh = os.fsencode(os.path.relpath(copy, shared.path))
    control = os.open(shared.path / ".ramfs" / "control", os.O_WRONLY)

    def refused(number: int, message: bytes) -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what is looked at
            os.pwrite(control, message, 0)
        assert caught.value.errno == number, message[:40]

    try:
        good = pack(fresh, [(0, PAGE), (5 * PAGE, 3 * PAGE), (99 * PAGE, PAGE)], [page, bytes(PAGE), page * 2, page])
        assert os.pwrite(control, good, 0) == len(good)
        none_is_zero = pack(fresh, [(20 * PAGE, PAGE), (30 * PAGE, 2 * PAGE), (25 * PAGE, PAGE)], [page * 4])
        assert os.pwrite(control, none_is_zero, 0) == len(none_is_zero)
        refused(errno.EINVAL, pack(way, [], []))
        refused(errno.EINVAL, pack(way, [(0, PAGE), (100 * PAGE, PAGE)], [page * 2]))
        refused(errno.EINVAL, pack(way, [(1, PAGE)], [page]))
        refused(errno.EINVAL, pack(way, [(0, PAGE)], [page * 2]))
        refused(errno.EINVAL, pack(way, [(0, PAGE)] * 65, [page * 65]))
        refused(errno.EINVAL, pack(way, [(0, PAGE)], [])[:30])
        refused(errno.EINVAL, b"RAMFSRUN")
        refused(errno.ENOENT, pack(way + b"x", [(0, PAGE)], [page]))
        frozen = os.fsencode(os.path.relpath(template / "ram0", shared.path))
        refused(errno.EROFS, pack(frozen, [(0, PAGE)], [page]))
        refused(errno.EISDIR, pack(os.path.dirname(way), [(0, PAGE)], [page]))
    finally:
        os.close(control)
    assert (here / "vm" / "ram0").read_bytes() == before
    expected = bytearray(before)
    for at, data in ((0, page), (5, bytes(PAGE) + page * 2), (20, page), (25, page), (30, page * 2), (99, page)):
        expected[at * PAGE : at * PAGE + len(data)] = data
    assert copy.read_bytes() == expected
    counts = json.loads(os.getxattr(copy, "user.ramfs.pages"))
    assert (counts["owned"], counts["shared"], counts["zero"]) == (8, 91, 1)


def test_memory_that_cannot_be_read_is_told() -> None:
    with mmap.mmap(-1, 4 * PAGE) as memory, Process(os.getpid()) as process:
        whole = np.array([[PAGE, 2 * PAGE]], np.uint64)  # nobody has the second page of all
        with pytest.raises(FileError, match="address"):
            process.read(whole, memory)


def test_batches_cover_everything_once() -> None:
    ranges = np.array([[0, PAGE], [PAGE * 2, 50 << 20], *([at, at + PAGE] for at in range(1 << 30, 2 << 30, 1 << 18))])
    pieces = [piece for batch in batches(ranges.astype(np.uint64)) for piece in batch.tolist()]
    assert all(len(batch) <= 1024 for batch in batches(ranges.astype(np.uint64)))
    merged = pieces[:1]
    for start, stop in pieces[1:]:
        if start == merged[-1][1]:
            merged[-1] = [merged[-1][0], stop]
        else:
            merged.append([start, stop])
    assert merged == ranges.tolist()
