"""tools/bench: ramfs beside its peers on this machine, in one run, in turns."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import (  # noqa: F401  (their cases)
    arrival,
    capture,
    debugger,
    generations,
    host,
    native,
    postcopy,
    workingset,
)
from .bench import MIB, ROOT, Bench, interrupt_once, scratch
from .cases import ALWAYS, ASKED, CASES
from .machine import Watch, machine
from .stats import Curve, Measure, from_json, summary

#: Seconds that a run with --quick is to take, and that a case has at least.
QUICK, LEAST = 300, 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=f"{__doc__} Prints medians, their spread, the ratios and the goals. Needs root"
        " (it mounts, and tunes mounts) and about 10 GiB of free memory; everything lies on tmpfs.",
        epilog="RAMFS in the environment names another ramfs command to measure.",
    )
    parser.add_argument("--only", metavar="CASE", action="append", choices=list(CASES), help="this case; repeatable")
    parser.add_argument("--quick", action="store_true", help="smaller files, and two or three rounds: within 5 minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (7; at most 3 with --quick)")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the mapped file (1024; 256 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR", help="a tmpfs (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the cases")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.size is not None and (options.size < 64 or options.size & (options.size - 1)):
        parser.error("--size must be a power of two, at least 64")
    return options


def listing() -> str:
    lines = [f"{name:<12}{each.about}{f' ({each.when})' if each.when else ''}" for name, each in CASES.items()]
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> Sequence[str]:
    """The cases of this run."""
    if options.only:
        return list(dict.fromkeys(options.only))
    return [name for name, each in CASES.items() if each.when == ALWAYS or (each.when != ASKED and not options.quick)]


def measure(options: argparse.Namespace, ramfs: Sequence[str], document: dict[str, Any]) -> None:
    """Run the cases; what each has found is in the document as soon as it is over."""
    begun = time.monotonic()
    names = chosen(options)
    with scratch(options.scratch) as place:
        bench = Bench(
            scratch=place,
            ramfs=ramfs,
            size=(options.size or (256 if options.quick else 1024)) * MIB,
            rounds=options.rounds or (3 if options.quick else 7),
            say=lambda text: print(text, flush=True),
            quick=options.quick,
            missing=document["missing"],
        )
        bench.say("\nwarming up")
        bench.warm_up()
        for number, name in enumerate(names):
            bench.say(f"\n{number + 1} of {len(names)}: {name}, {CASES[name].about}")
            watch = Watch()
            if options.quick and not options.rounds:
                now = time.monotonic()
                bench.until = now + max(LEAST, (begun + QUICK - now) / (len(names) - number))
            found: Sequence[Measure | Curve] = []
            told: dict[str, Any] = {"about": CASES[name].about}
            try:
                found = CASES[name].measure(bench)
            except (RuntimeError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
                bench.say(f"  failed: {error}")
                told["failed"] = str(error)
            told |= {"mib": bench.size // MIB, **watch.told()}
            told["measures"] = [each.as_json() for each in found]
            document["cases"][name] = told
            for each in found:
                bench.say(each.show())
            busy = f"load {told['load']:g}, processors {told['busy']:.0%} busy and {told['steal']:.1%} stolen"
            bench.say(f"  {told['seconds']:.1f} s; {busy}")


def main() -> int:
    options = arguments()
    if options.list:
        print(listing())
        return 0
    if os.geteuid() != 0:
        print("tools/bench: needs root, to mount and to tune what is mounted", file=sys.stderr)
        return 1
    interrupt_once()
    ramfs = shlex.split(os.environ.get("RAMFS", str(ROOT / ".venv" / "bin" / "ramfs")))
    facts = machine(ramfs)
    print("\n".join(f"{key:<22}{value}" for key, value in facts.items()))

    document: dict[str, Any] = {
        "machine": facts,
        "command": shlex.join(["tools/bench", *sys.argv[1:]]),
        "cases": {},
        "missing": {},
    }
    begun = time.monotonic()
    interrupted = False
    try:
        measure(options, ramfs, document)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; everything started was stopped and unmounted", file=sys.stderr)
    finally:
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    took = time.monotonic() - begun
    found = [from_json(told) for each in document["cases"].values() for told in each["measures"]]
    print(f"\n{summary(found)}; {took:.0f} s")
    if options.quick and took > QUICK:
        print(f"--quick is to take at most {QUICK} s; this machine is slower, or busy")
    if interrupted:
        return 130
    return 1 if document["missing"] or any("failed" in each for each in document["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
