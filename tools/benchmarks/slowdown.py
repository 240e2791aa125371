"""Jobs in a guest, and in a process, whose memory is resident: on ramfs, and on tmpfs, one after the other."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from . import peers
from .bench import Bench, run
from .cases import RAMFS, TMPFS, case
from .stats import Goal, Measure
from .work import Process, Worker

FLUSHED, FROZEN = "ramfs, the first job after a flush", "ramfs, the first job after a snapshot"
#: MiB of a guest, and how much of that it uses; a process uses as much.
SIZE, USED = 256, 128
#: About a tenth of a second each, in a guest.
GUEST = {"compute": 15_000_000, "order": 2, "random": 250_000}
PROCESS = {"order": 4, "random": 4_000_000}
TITLES = {
    "compute": "a hash, in registers and 8 KiB",
    "order": f"loads and stores of {USED} MiB in order",
    "random": f"loads and stores of random words of {USED} MiB",
}
LIMIT = Goal(1.02, against=TMPFS)
#: Turns in a round, and how often in a run all is started anew: where pages lie in the machine's memory matters too.
TURNS, STARTS = 4, 3


@case("slowdown", f"jobs in a guest with {USED} MiB in use, and in a process, when all of it is resident")
def slowdown(bench: Bench) -> list[Measure]:
    clock = {job: Measure(f"in a guest, by its clock: {TITLES[job]}", "ms", goals=[LIMIT]) for job in GUEST}
    spent = {job: Measure(f"in a guest, processor time: {TITLES[job]}", "ms", goals=[LIMIT]) for job in GUEST}
    process = {job: Measure(f"in a process, processor time: {TITLES[job]}", "ms", goals=[LIMIT]) for job in PROCESS}

    def in_guest(name: str, guest: Worker, job: str) -> None:
        before = guest.cpu_seconds()
        clock[job].add(name, guest.work(job, GUEST[job]) * 1e3)
        spent[job].add(name, (guest.cpu_seconds() - before) * 1e3)

    starts = 1 if bench.quick else STARTS
    for start in range(starts):
        with ExitStack() as stack:
            at = stack.enter_context(peers.ramfs_mount(bench))
            rooms = {RAMFS: at.root / "vm", TMPFS: bench.fresh("tmpfs")}
            stack.callback(run, ["rm", "-r", rooms[TMPFS]])
            guests, processes = {}, {}
            for name, room in rooms.items():
                room.mkdir()
                guests[name] = stack.enter_context(Worker(bench, room / "ram", mib=SIZE, used=USED))
            for name, room in rooms.items():
                guests[name].wait_until_ready()
                processes[name] = stack.enter_context(Process(bench, room / "file", USED))
                for task in (guests[name].cpu, processes[name].pid):
                    alone(task)
            for turn in (turn for _ in bench.each_round(starts - 1 - start) for turn in range(TURNS)):
                for name in rooms if turn % 2 else reversed(rooms):
                    for job in GUEST:
                        in_guest(name, guests[name], job)
                    for job, count in PROCESS.items():
                        before = processes[name].cpu_seconds()
                        processes[name].work(job, count)
                        process[job].add(name, (processes[name].cpu_seconds() - before) * 1e3)
            for number in range(1 if bench.quick else bench.rounds):
                for job in PROCESS:
                    sync(rooms[RAMFS] / "ram")
                    in_guest(FLUSHED, guests[RAMFS], job)
                    snapshot = f"{job}{number}"
                    run([*bench.ramfs, "snapshot", rooms[RAMFS], snapshot, "--qmp", guests[RAMFS].socket])
                    in_guest(FROZEN, guests[RAMFS], job)
    return [*clock.values(), *spent.values(), *process.values()]


def alone(task: int) -> None:
    """Let a thread have a core before all else, so that other work on the machine is not taken for a slowdown."""
    os.sched_setaffinity(task, {max(os.sched_getaffinity(0))})
    os.sched_setscheduler(task, os.SCHED_FIFO, os.sched_param(1))


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
