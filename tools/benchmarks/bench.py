"""The ground a run stands on: its scratch directory, its probes, its child processes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 300.0  # seconds for any one command; a hung mount must not hang the run

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE = 4 * KIB


class Unavailable(Exception):
    """A contender cannot take part here; the run goes on without it."""


@dataclass
class Bench:
    scratch: Path  # on tmpfs
    ramfs: Sequence[str]  # the command
    size: int  # of the file that is mapped, in bytes
    rounds: int
    say: Callable[[str], None]
    quick: bool = False  # less of everything: the whole run is to end within minutes
    until: float = math.inf  # time.monotonic() at which the case that runs is to be over
    missing: dict[str, str] = field(default_factory=dict)  # contenders that took no part, and why
    serial: int = 0

    def miss(self, contender: str, error: Exception) -> None:
        """Go on without a contender, but never silently."""
        self.missing[contender] = str(error)
        self.say(f"  without {contender}: {error}")

    def each_round(self, more: int = 0) -> Iterator[int]:
        """The numbers of rounds: at least two, and none that would take more than what is left of the case's time.

        `more` such loops follow in the case, and each gets an equal part of what is left.
        """
        begun = time.monotonic()
        until = begun + (self.until - begun) / (more + 1)
        for number in range(self.rounds):
            now = time.monotonic()
            if number >= 2 and now + (now - begun) / number > until:
                return
            yield number

    def fresh(self, stem: str) -> Path:
        """A path that nothing has used in this run."""
        self.serial += 1
        return self.scratch / f"{self.serial:03}-{stem}"

    def warm_up(self, most: float) -> None:
        """Use the memory that the run will need, so many bytes, so that its pages are not the machine's first.

        A virtual machine's host gives it memory when it first touches it, which costs more
        than most of what is measured here.
        """
        free = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        amount = int(min(most, int(free[1]) * KIB / 2 if free else most))
        for _ in range(2):
            path = self.fresh("warm-up")
            self.fill(path, amount // MIB * MIB)
            path.unlink()

    def fill(self, path: Path, size: int, run: int = 0, stride: int = 0, seed: int = 1) -> None:
        """Make a file of size bytes with run bytes of data at every stride; all of it by default."""
        stride = stride or size
        self.probe("fill", path, size, "runs", run or stride, stride, seed)

    def scatter(self, path: Path, size: int, pages: int, seed: int) -> None:
        """Overwrite so many pages of a file, each in another random place."""
        self.probe("fill", path, size, "pages", pages, seed)

    def touch(
        self,
        path: Path,
        order: str = "random",
        access: str = "read",
        advice: str = "none",
        threads: int = 1,
        size: int = 0,
        step: int = 0,
        seed: int = 1,
        cpu: int | None = None,
    ) -> dict[str, float]:
        """Map the file with nothing of it cached and touch its pages."""
        step = step or (16 if order == "random" else 1)
        seen = self.probe("touch", path, size or self.size, order, step, access, advice, threads, seed, cpu=cpu)
        if seen["wrong"]:
            raise RuntimeError(f"{int(seen['wrong'])} pages of {path.name} had another page's contents")
        return seen

    def program(self, name: str) -> Path:
        """The program that is made of NAME.c, compiled when it is first asked for."""
        made = self.scratch / name
        if not made.exists():
            run(["gcc", "-O2", "-Wall", "-pthread", HERE / f"{name}.c", "-o", made])
        return made

    def probe(self, name: str, *arguments: object, cpu: int | None = None) -> dict[str, float]:
        command = [str(self.program(name)), *map(str, arguments)]
        if cpu is not None:
            command = ["taskset", "-c", str(cpu), *command]
        out = run(command)
        return {key: float(value) for key, value in json.loads(out).items()} if out else {}


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run to the end and return what it printed; its own session, so that Ctrl-C reaches only us."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            check=False,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{words[0]} is not installed") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{Path(words[0]).name} exited with {done.returncode}: {last}")
    return done.stdout


@contextmanager
def serving(command: Sequence[str | Path], ready: Callable[[], bool]) -> Iterator[int]:
    """A server for the length of the block: started, waited for, and stopped by its pid."""
    words = [str(word) for word in command]
    if not shutil.which(words[0]):
        raise Unavailable(f"{words[0]} is not installed")
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 20
            while not ready():
                if child.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    last = (log.read().strip() or "it said nothing").splitlines()[-1]
                    raise RuntimeError(f"{words[0]} does not serve: {last}")
                time.sleep(0.01)
            yield child.pid
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def mounts(under: Path) -> list[Path]:
    """The mount points at or below a path, innermost last mounted first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]))
        if point == under or under in point.parents:
            found.append(point)
    return found[::-1]


def mounted(point: Path) -> bool:
    return point in mounts(point)


def bdi(point: Path) -> Path:
    """The kernel's tuning directory of a mount, found without touching the mount."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        words = line.split()
        if words[4] == str(point):
            return Path("/sys/class/bdi") / words[2]
    raise RuntimeError(f"{point} is not mounted")


def unmount(point: Path) -> None:
    """Unmount by force of patience; the last resort detaches, so that nothing is left behind."""
    for command in (["umount", str(point)], ["umount", "--lazy", str(point)]):
        for _ in range(20):
            if not mounted(point):
                return
            if subprocess.run(command, check=False, capture_output=True, start_new_session=True).returncode == 0:
                break
            time.sleep(0.1)


def pin(pids: Sequence[int], cpu: int | None) -> None:
    """Keep every thread of these processes on one CPU, or let them go anywhere again."""
    allowed = os.sched_getaffinity(0) if cpu is None else {cpu}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), allowed)


def interrupt_once() -> None:
    """Turn the first INT, TERM or HUP into KeyboardInterrupt; later ones must not break the cleaning up."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handler(_number: int, _frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, handler)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory on tmpfs; goes with everything mounted below it."""
    place = Path(tempfile.mkdtemp(prefix="ramfs-bench.", dir=parent))
    try:
        yield place
    finally:
        for point in mounts(place):
            unmount(point)
        if mounts(place):  # never delete through a mount
            print(f"could not unmount below {place}; it is left there")
        else:
            shutil.rmtree(place, ignore_errors=True)
