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
from typing import Any, NoReturn

from . import (  # noqa: F401  (most for their cases)
    arrival,
    capture,
    clones,
    debugger,
    faults,
    fleets,
    generations,
    growth,
    host,
    lazy,
    native,
    pauses,
    postcopy,
    report,
    slowdown,
    workingset,
)
from .bench import GIB, MIB, ROOT, Bench, interrupt_once, scratch
from .cases import ALWAYS, ASKED
from .cases import CASES as KNOWN
from .machine import Watch, machine
from .stats import Curve, Measure, summary

#: The order in which cases run and are told; others come behind.
ORDER = """
    fault restore sequential store write storm resume native live
    clone fleet chain growth images diff send
    pauses slowdown capture
    host dirtying expiry memory
    stream demand lazy postcopy workingset
    takeover debugger
    guests tuning
""".split()
CASES = dict(sorted(KNOWN.items(), key=lambda item: [*ORDER, item[0]].index(item[0])))
#: Seconds that a run with --quick is to take, and that a case has at least.
QUICK, LEAST = 300, 4


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help tells more\n")


def arguments() -> argparse.Namespace:
    parser = Parser(
        prog="tools/bench",
        description=f"{__doc__} Prints medians, their spread, the ratios and the goals. Needs root"
        " (it mounts, and tunes mounts) and about 10 GiB of free memory; what is measured lies on tmpfs.",
        epilog="RAMFS in the environment names another ramfs command to measure.",
    )
    parser.add_argument("--list", action="store_true", help="list the cases")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument("--only", metavar="CASE", action="append", choices=list(CASES), help="this case; repeatable")
    measured.add_argument("--quick", action="store_true", help="smaller files, two or three rounds: within 5 minutes")
    measured.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (7; at most 3 with --quick)")
    measured.add_argument(
        "--size", type=int, metavar="MIB", help="size of the mapped file (1024; at most 512 with --quick)"
    )
    measured.add_argument(
        "--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR", help="a tmpfs to work on (%(default)s)"
    )
    told = parser.add_argument_group("what is made of it")
    told.add_argument("--json", type=Path, metavar="FILE", help="write machine and all samples there, case by case")
    told.add_argument("--plots", type=Path, metavar="DIR", help="draw each case into a picture there")
    told.add_argument("--format", choices=("svg", "png"), default="svg", help="of the pictures (%(default)s)")
    told.add_argument("--table", action="store_true", help="print all figures and goals as a table in Markdown")
    told.add_argument("--write-docs", action="store_true", help="put table and pictures into docs/benchmarks.md")
    told.add_argument(
        "--from", dest="files", type=Path, metavar="FILE", action="append",
        help="measure nothing, take what --json wrote; repeatable: of each case the last counts",
    )  # fmt: skip
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.size is not None and (options.size < 64 or options.size & (options.size - 1)):
        parser.error("--size must be a power of two, at least 64")
    if options.files and (options.only or options.quick or options.rounds or options.size):
        parser.error("--from measures nothing")
    return options


def listing() -> str:
    lines = [f"{name:<12}{each.about}{f' ({each.when})' if each.when else ''}" for name, each in CASES.items()]
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> Sequence[str]:
    """The cases of this run."""
    if options.only:
        return list(dict.fromkeys(options.only))
    return [name for name, each in CASES.items() if each.when == ALWAYS or (each.when != ASKED and not options.quick)]


def command(options: argparse.Namespace) -> str:
    """What has to be given to measure the same again."""
    words = ["tools/bench"] + ["--quick"] * options.quick
    for name in ("rounds", "size"):
        if given := getattr(options, name):
            words += [f"--{name}", str(given)]
    return " ".join([*words, *(f"--only {name}" for name in options.only or ())])


def measure(options: argparse.Namespace, ramfs: Sequence[str], document: dict[str, Any]) -> None:
    """Run the cases; what each has found is in the document as soon as it is over."""
    begun = time.monotonic()
    names = chosen(options)
    with scratch(options.scratch) as place:
        bench = Bench(
            scratch=place,
            ramfs=ramfs,
            size=(options.size or 1024) * MIB,
            rounds=options.rounds or (3 if options.quick else 7),
            say=lambda text: print(text, flush=True),
            quick=options.quick,
            missing=document["missing"],
        )
        bench.say("\nwarming up")
        bench.warm_up(2.5 * GIB if options.quick else 10 * bench.size)
        for number, name in enumerate(names):
            bench.say(f"\n{number + 1} of {len(names)}: {name}, {CASES[name].about}")
            watch = Watch()
            if options.quick and not options.size:
                bench.size = CASES[name].quick * MIB
            if options.quick and not options.rounds:
                now = time.monotonic()
                bench.until = now + max(LEAST, (begun + QUICK - now) / (len(names) - number))
            found: Sequence[Measure | Curve] = []
            told: dict[str, Any] = {"about": CASES[name].about, "command": document["commands"][0]}
            try:
                found = CASES[name].measure(bench)
            except (RuntimeError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
                bench.say(f"  failed: {error}")
                told["failed"] = str(error)
            told |= {"mib": bench.size // MIB, **watch.told()}
            told["measures"] = [each.as_json() for each in found]
            document["cases"][name] = told
            save(options, document)
            for each in found:
                bench.say(each.show())
            busy = f"load {told['load']:g}, processors {told['busy']:.0%} busy and {told['steal']:.1%} stolen"
            bench.say(f"  {told['seconds']:.1f} s; {busy}")


def save(options: argparse.Namespace, document: dict[str, Any]) -> None:
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def tell(options: argparse.Namespace, document: report.Document) -> None:
    """All that is made of what was measured."""
    if options.table:
        print(f"\n{report.table(document)}")
    if options.plots:
        for path in report.plots(document, options.plots, options.format):
            print(path)
    if options.write_docs:
        report.write_page(document, report.PAGE, report.PLOTS)


def main() -> int:
    options = arguments()
    if options.list:
        print(listing())
        return 0
    try:
        if options.files:
            document = report.merged(options.files, list(CASES))
            save(options, document)
            tell(options, document)
            print(f"\n{summary(report.found(document))}")
            return 0
        return measured(options)
    except (report.Unreadable, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1


def measured(options: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        print("tools/bench: needs root, to mount and to tune what is mounted", file=sys.stderr)
        return 1
    ramfs = shlex.split(os.environ.get("RAMFS", str(ROOT / ".venv" / "bin" / "ramfs")))
    facts = machine(ramfs)
    document: report.Document = {
        "machine": facts,
        "commands": [command(options)],
        "cases": {},
        "missing": {},
    }
    save(options, document)  # what cannot be written is told now
    interrupt_once()
    print("\n".join(f"{key:<22}{value}" for key, value in facts.items()))
    begun = time.monotonic()
    interrupted = False
    try:
        measure(options, ramfs, document)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; everything started was stopped and unmounted", file=sys.stderr)
    save(options, document)
    took = time.monotonic() - begun
    tell(options, document)
    print(f"\n{summary(report.found(document))}; {took:.0f} s")
    if options.quick and took > QUICK:
        print(f"--quick is to take at most {QUICK} s; this machine is slower, or busy")
    if interrupted:
        return 130
    return 1 if document["missing"] or any("failed" in each for each in document["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
