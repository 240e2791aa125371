"""Daemons are killed, or replaced, under loads that check every byte: what it costs them, and that nothing is lost."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

#: Seconds between two deaths at one mount: few enough at a time for the supervisor to start the next daemon at once.
GAP = 3.4
#: Seconds for whatever ends by itself; a hung mount must not hang the run.
PATIENCE = 120.0


class Broken(AssertionError):
    """A load found another byte than it wrote, got an error, or did not end."""


class Guest(Protocol):
    """What is asked of a running guest (tests/vm/guest.py)."""

    socket: Path

    def say(self, command: str, timeout: float = ...) -> str: ...


def run(*command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    if done.returncode:
        raise Broken(f"{' '.join(map(str, command))} exited with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


class Program:
    """A load that is a program, and tells its stalls when it is ended (steady.c)."""

    def __init__(self, *command: object) -> None:
        self.command = " ".join(map(str, command))
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.told: dict[str, Any] = {}

    def failed(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            out, errors = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise Broken(f"{self.command} does not end") from None
        if self.process.returncode:
            raise Broken(f"{self.command} ended with {self.process.returncode}: {errors}")
        self.told = json.loads(out)


class Loop:
    """A load that is done over and over, in a thread."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self.rounds = 0
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, args=(work,))
        self._thread.start()

    def _loop(self, work: Callable[[int], None]) -> None:
        try:
            while not self._ended.is_set():
                work(self.rounds)
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001  (raised by end)
            self._error = error

    def failed(self) -> bool:
        return self._error is not None

    def stop(self) -> None:
        """Begin no further round."""
        self._ended.set()

    def end(self) -> None:
        self.stop()
        self._thread.join(2 * PATIENCE)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive() or not self.rounds:
            raise Broken("a load did not end, or did nothing")


@dataclass
class Place:
    """A mount and what goes on there."""

    root: Path
    store: Path
    prober: Program
    loads: list[Program | Loop] = field(default_factory=list)
    checked: list[Path] = field(default_factory=list)
    """files of which `steady check` tells, also after the next mount, whether they have all"""
    struck: list[tuple[str, float]] = field(default_factory=list)
    """how its daemon was ended, and when in seconds of CLOCK_MONOTONIC"""

    def daemon(self) -> int:
        """The process that serves it, which has signed the lock of the store."""
        found = re.match(r"process (\d+) ", (self.store / "lock").read_text())
        if not found:
            raise Broken(f"nobody has signed the lock of {self.store}")
        return int(found[1])

    def stalls(self, how: str) -> list[float]:
        """For each time that its daemon was ended so: the longest that one access after it took, in seconds."""
        long = self.prober.told["stalls"]
        ends = [at for _, at in self.struck[1:]] + [float("inf")]
        return [
            max((to - max(since, at) for since, to in long if to > at and since < end), default=0.0)
            for (why, at), end in zip(self.struck, ends, strict=True)
            if why == how
        ]


class Storm:
    """Three mounts under load. `mounts` are their roots and stores, `steady` the program, `ramfs` the command."""

    def __init__(self, mounts: Sequence[tuple[Path, Path]], steady: Path, ramfs: Sequence[str]) -> None:
        self.steady = steady
        self.ramfs = ramfs
        self.places: list[Place] = []
        self.seconds = 0.0
        mapping, files, trees = mounts
        self._place(*mapping)
        self._steady(self.places[0], "mapped", "ram", 32)
        self._place(*files)
        self._steady(self.places[1], "names", "names", 0)
        self._fio(self.places[1])
        self._place(*trees)
        self._trees(self.places[2])

    def _place(self, root: Path, store: Path) -> None:
        path = root / "calls"
        prober = Program(self.steady, "calls", path, 4, len(self.places) + 1)
        self.places.append(Place(root, store, prober, [prober], [path]))

    def _steady(self, place: Place, mode: str, name: str, mib: int) -> None:
        place.loads.append(Program(self.steady, mode, place.root / name, mib, 7))
        if mode != "names":
            place.checked.append(place.root / name)

    def _fio(self, place: Place) -> None:
        def work(number: int) -> None:
            engine = ("mmap", "psync")[number % 2]
            run(
                "fio", "--name=fio", f"--directory={place.root}", "--size=8M", "--rw=randrw", "--bsrange=4k-64k",
                "--verify=xxhash", "--verify_fatal=1", "--verify_backlog=64", f"--ioengine={engine}",
                f"--randseed={number}", "--verify_state_save=0", "--thinktime=500us",
            )  # fmt: skip

        place.loads.append(Loop(work))

    def _trees(self, place: Place) -> None:
        """cp -r, clone, snapshots and their deletion, each compared with what it was made of."""
        source = place.root / "vm"
        (source / "sub").mkdir(parents=True)
        for name in ("ram", "sub/disk"):
            (source / name).write_bytes(random.Random(name).randbytes((1 << 20) + 123))
        steps = itertools.cycle(("cp -r", "clone", "snapshot"))

        def work(number: int) -> None:
            step, copy = next(steps), place.root / f"copy{number}"
            if step == "cp -r":
                run("cp", "-r", source, copy)
            elif step == "clone":
                run(*self.ramfs, "clone", source, copy)
            else:
                copy = source / ".snap" / f"s{number}"
                os.mkdir(copy)
            run("diff", "-r", source, copy)
            if step == "snapshot":
                os.rmdir(copy)
            else:
                (copy / "ram").write_bytes(b"another")
                shutil.rmtree(copy)
            if sorted(os.listdir(source)) != ["ram", "sub"] or os.listdir(source / ".snap"):
                raise Broken(f"{source} is not as it was")

        place.loads.append(Loop(work))

    def add_guest(self, guest: Guest, directory: Path) -> None:
        """A guest on the last mount, with its RAM below `directory`: it checks its memory, and snapshots are made."""

        def work(number: int) -> None:
            answer = guest.say("verify", PATIENCE)
            if not answer.startswith("verified ok"):
                raise Broken(f"the guest: {answer}")
            if number % 4 == 1:
                run(*self.ramfs, "snapshot", directory, f"g{number}", "--qmp", guest.socket)
                os.rmdir(directory / ".snap" / f"g{number}")
            answer = guest.say(f"overwrite {number + 2} {number % 8}", PATIENCE)
            if not answer.startswith("overwritten"):
                raise Broken(f"the guest: {answer}")

        self.places[-1].loads.append(Loop(work))

    def kill(self, times: int, gap: float = GAP, seed: int = 1) -> None:
        """kill -9 of one daemon after the other, each at a random moment."""
        moments = random.Random(seed)
        for place in self._in_turn(times):
            self._wait(place, gap + moments.uniform(0, gap / len(self.places)))
            pid = place.daemon()
            place.struck.append(("kill", time.monotonic()))
            os.kill(pid, signal.SIGKILL)

    def upgrade(self, times: int) -> None:
        """`ramfs upgrade` of one mount after the other."""
        for place in self._in_turn(times):
            self._wait(place, GAP / 2)
            before = place.daemon()
            place.struck.append(("upgrade", time.monotonic()))
            run(*self.ramfs, "upgrade", place.root)
            if place.daemon() == before:
                raise Broken(f"{place.root} is served by the same daemon after an upgrade")

    def _in_turn(self, times: int) -> Iterator[Place]:
        turns = itertools.cycle(self.places)
        return itertools.islice(turns, times)

    def _wait(self, place: Place, gap: float) -> None:
        """Leave a mount alone for so long after what it has seen last. Raises what a load has found meanwhile."""
        last = place.struck[-1][1] if place.struck else time.monotonic() - random.uniform(0, gap)
        time.sleep(max(0.0, last + gap - time.monotonic()))
        if any(load.failed() for each in self.places for load in each.loads):
            self.end()
            raise Broken("a load has ended early")

    def end(self) -> None:
        """End the loads, each of which checks all it has once more. Raises what they have found."""
        errors: list[BaseException] = []
        for load in (load for place in self.places for load in place.loads):
            try:
                load.end()
            except BaseException as error:  # noqa: BLE001  (all must end)
                errors.append(error)
        if errors:
            raise errors[0]

    def abandon(self) -> None:
        """End what is still there, without a judgement."""
        for load in (load for place in self.places for load in place.loads):
            if isinstance(load, Loop):
                load.stop()
            elif load.process.poll() is None:
                load.process.kill()
                load.process.communicate()

    def check(self) -> None:
        """Have the files still all that was written? Also when the stores are mounted again."""
        for path in (path for place in self.places for path in place.checked):
            run(self.steady, "check", path)

    def stalls(self, how: str) -> list[float]:
        """Seconds, the shortest first, of all that `how` has ended."""
        return sorted(stall for place in self.places for stall in place.stalls(how))


def distribution(stalls: Sequence[float]) -> str:
    """A line for people."""
    parts = [f"{name} {percentile(stalls, part) * 1e3:.0f} ms" for name, part in PARTS.items()]
    return f"{len(stalls)} stalls: " + ", ".join(parts)


PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


def percentile(values: Sequence[float], part: float) -> float:
    """Of sorted values: the one that so large a part of them does not exceed."""
    return values[max(0, math.ceil(part * len(values)) - 1)]
