"""Many at once: writers, readers, renames, copies, snapshots; then everything is looked at."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from harness import Mount
from mount.posix import PAGE, opened, page_of, pattern, read

SECONDS = float(os.environ.get("RAMFS_STRESS_SECONDS", "6"))


class Crowd:
    """Processes that each do one thing until the time is over; the first failure of one fails the test."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.children: list[int] = []

    def start(self, step: Callable[[int, random.Random], None], seed: int) -> None:
        child = os.fork()
        if child:
            self.children.append(child)
            return
        code, turn, chance = 1, 0, random.Random(seed)
        try:
            while time.monotonic() < self.deadline:
                step(turn, chance)
                turn += 1
            code = 0 if turn else 2
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        os._exit(code)

    def wait(self) -> None:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        assert codes == [0] * len(codes), "a process failed; its traceback is above"


def test_everything_at_once(mounted: Mount) -> None:
    root = mounted.path
    pages = 128
    for name in ("w0", "w1", "w2"):
        (root / name).mkdir()
        (root / name / "ram").write_bytes(page_of(0) * pages)
    (root / "copies").mkdir()
    (root / "names").mkdir()

    def writer(name: str) -> Callable[[int, random.Random], None]:
        def step(turn: int, chance: random.Random) -> None:
            with opened(root / name / "ram") as fd:
                for page in range(pages):
                    os.pwrite(fd, page_of(turn + 1), page * PAGE)

        return step

    def check(data: bytes, what: object) -> None:
        """One pass of a writer never overtakes another: the numbers of the pages never grow, nor skip."""
        assert len(data) == pages * PAGE, what
        numbers = [int.from_bytes(data[page * PAGE : page * PAGE + 8], "little") for page in range(pages)]
        for page, number in enumerate(numbers):
            assert data[page * PAGE : (page + 1) * PAGE] == page_of(number), (what, page)
        assert numbers == sorted(numbers, reverse=True), (what, numbers)
        assert numbers[0] - numbers[-1] <= 1, (what, numbers)

    def copier(turn: int, chance: random.Random) -> None:
        target = root / "copies" / f"c{os.getpid()}-{turn}"
        subprocess.run(["cp", "-r", root / chance.choice(["w0", "w1", "w2"]), target], check=True)
        check(read(target / "ram"), target)
        with opened(target / "ram") as fd:
            os.pwrite(fd, bytes(pages * PAGE), 0)
        if turn % 2:
            subprocess.run(["rm", "-r", target], check=True)

    def snapshotter(turn: int, chance: random.Random) -> None:
        place = root / chance.choice(["w0", "w1", "w2"])
        frozen = place / ".snap" / f"s{os.getpid()}-{turn}"
        frozen.mkdir()
        first = read(frozen / "ram")
        check(first, frozen)
        clone = root / "copies" / f"d{os.getpid()}-{turn}"
        subprocess.run(["cp", "-r", frozen, clone], check=True)
        assert read(clone / "ram") == first
        assert read(frozen / "ram") == first
        if turn % 3:
            frozen.rmdir()
            subprocess.run(["rm", "-r", clone], check=True)

    def renamer(turn: int, chance: random.Random) -> None:
        names = root / "names"
        mine = names / f"n{os.getpid()}-{turn}"
        mine.write_bytes(pattern(10_000, turn % 200))
        os.rename(mine, names / "target")
        data = read_or_gone(names / "target")
        assert data is None or len(data) == 10_000
        if turn % 5 == 0:
            with contextlib.suppress(FileNotFoundError):
                (names / "target").unlink()
        if turn % 7 == 0:
            for name in os.listdir(names):
                assert name == "target" or name.startswith("n")

    def reader(turn: int, chance: random.Random) -> None:
        name = chance.choice(["w0", "w1", "w2"])
        data = read(root / name / "ram")
        page = chance.randrange(pages)
        content = data[page * PAGE : (page + 1) * PAGE]
        assert content == page_of(int.from_bytes(content[:8], "little"))

    crowd = Crowd(SECONDS)
    works = [writer("w0"), writer("w1"), writer("w2"), copier, snapshotter, snapshotter, renamer, renamer, reader]
    for seed, step in enumerate(works):
        crowd.start(step, seed)
    crowd.wait()
    assert mounted.running
    kept: dict[Path, bytes] = {}
    for place in ("w0", "w1", "w2"):
        assert len(read(root / place / "ram")) == pages * PAGE
        for name in os.listdir(root / place / ".snap"):
            kept[root / place / ".snap" / name / "ram"] = read(root / place / ".snap" / name / "ram")
            check(kept[root / place / ".snap" / name / "ram"], name)
    for name in os.listdir(root / "copies"):
        kept[root / "copies" / name / "ram"] = read(root / "copies" / name / "ram")
        if name.startswith("c"):
            assert kept[root / "copies" / name / "ram"] == bytes(pages * PAGE)
    assert kept
    mounted.restart()
    for path, data in kept.items():
        assert read(path) == data


def read_or_gone(path: Path) -> bytes | None:
    """The contents of a file that others replace and remove; None when it is gone."""
    try:
        return read(path)
    except FileNotFoundError:
        return None


def test_threads_write_their_own_parts_of_one_file(mounted: Mount) -> None:
    path, count, each = mounted.path / "f", 8, 200
    path.touch()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with opened(path) as fd:
                for turn in range(each):
                    offset = (turn * count + number) * 1000  # parts that share pages
                    os.pwrite(fd, bytes([number + 1]) * 1000, offset)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert read(path) == b"".join(bytes([number + 1]) * 1000 for _ in range(each) for number in range(count))


def test_creates_and_removes_of_one_name(mounted: Mount) -> None:
    """Of all who create a name with O_EXCL one wins; the same for mkdir, rmdir and rename."""
    root = mounted.path

    def step(turn: int, chance: random.Random) -> None:
        for call, allowed in (
            (lambda: os.close(os.open(root / "x", os.O_RDWR | os.O_CREAT | os.O_EXCL)), {errno.EEXIST}),
            (lambda: os.unlink(root / "x"), {errno.ENOENT}),
            (lambda: os.mkdir(root / "d"), {errno.EEXIST}),
            (lambda: os.mkdir(root / "d" / "e"), {errno.EEXIST, errno.ENOENT}),
            (lambda: os.rmdir(root / "d" / "e"), {errno.ENOENT}),
            (lambda: os.rename(root / "d", root / "d2"), {errno.ENOENT, errno.ENOTEMPTY}),
            (lambda: os.rmdir(root / "d2"), {errno.ENOENT, errno.ENOTEMPTY}),
            (lambda: os.rmdir(root / "d2" / "e"), {errno.ENOENT}),
        ):
            try:
                call()
            except OSError as error:
                if error.errno not in allowed:
                    raise

    crowd = Crowd(2)
    for seed in range(4):
        crowd.start(step, seed)
    crowd.wait()
    for name in os.listdir(root):
        subprocess.run(["rm", "-r", root / name], check=True)
    assert root.stat().st_nlink == 2
